//! Objects as the API gives them, and the rows that come of them.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::*;
use crate::model::{EndpointSliceRow, Family, Hints, ServiceKind, ServiceRow, TrafficPolicy};

fn parse_service(spec: Value) -> ServiceRow {
    let object = json!({"metadata": {"namespace": "d", "name": "web"}, "spec": spec});
    let (key, row) = service(&serde_json::from_value(object).unwrap()).unwrap();
    assert_eq!(key, ObjectKey::new("d", "web"));
    row
}

#[test]
fn a_node_port_service() {
    let row = parse_service(json!({
        "type": "NodePort", "clusterIP": "10.96.3.4", "clusterIPs": ["10.96.3.4"],
        "externalIPs": ["192.0.2.1"], "externalTrafficPolicy": "Cluster",
        "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"},
                  {"name": "q", "port": 443, "protocol": "UDP"}],
    }));
    assert_eq!(row.kind, ServiceKind::NodePort);
    assert_eq!(row.cluster_ips, ["10.96.3.4".parse::<IpAddr>().unwrap()]);
    assert_eq!(row.external_ips, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    let ports: Vec<_> = row.ports.iter().map(|p| (p.protocol, p.port, p.node_port)).collect();
    assert_eq!(ports, [(Protocol::Tcp, 80, 30_080), (Protocol::Udp, 443, 0)]);
    assert!(row.unsupported.is_empty());
}

#[test]
fn sctp_to_another_port_is_refused_by_name() {
    let row = parse_service(json!({
        "type": "LoadBalancer", "clusterIPs": ["10.96.3.4", "fd00::4"],
        "sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["10.0.0.0/8"],
        "externalIPs": ["fd00::9"],
        "ports": [{"port": 80, "targetPort": 8080},
                  {"name": "s", "port": 81, "protocol": "SCTP", "targetPort": 82},
                  {"name": "t", "port": 83, "protocol": "SCTP", "targetPort": 83},
                  {"name": "u", "port": 84, "protocol": "SCTP", "targetPort": "named"}],
    }));
    let fields: Vec<&str> = row.unsupported.iter().map(AsRef::as_ref).collect();
    assert_eq!(fields, ["spec.ports[1].targetPort"]);
    let ports: Vec<u16> = row.ports.iter().map(|port| port.port).collect();
    assert_eq!(ports, [80, 83, 84]);

    // DNS tells its ports; no program leads there.
    let row = parse_service(json!({
        "clusterIP": "None",
        "ports": [{"name": "s", "port": 81, "protocol": "SCTP", "targetPort": 82}],
    }));
    assert_eq!((row.ports.len(), row.unsupported.len()), (1, 0));
}

#[test]
fn headless_and_external_names_have_no_address() {
    let headless = parse_service(json!({"clusterIP": "None", "clusterIPs": ["None"]}));
    assert_eq!((headless.kind, headless.cluster_ips.len()), (ServiceKind::Headless, 0));
    let external = parse_service(json!({"type": "ExternalName", "externalName": "a.b"}));
    assert_eq!((external.kind, &*external.external_name), (ServiceKind::ExternalName, "a.b"));
}

#[test]
fn conditions_that_are_not_given_have_upstreams_meaning() {
    let object = json!({
        "metadata": {"namespace": "d", "name": "web-x",
                     "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "all"}],
        "endpoints": [
            {"addresses": ["10.244.1.2"], "nodeName": "n1"},
            {"addresses": ["10.244.1.3"], "conditions": {"ready": false}},
            {"addresses": ["10.244.1.4"],
             "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["nonsense"]},
        ],
    });
    let (_, row) = endpoint_slice(&serde_json::from_value(object).unwrap()).unwrap();
    assert_eq!(row.service, ObjectKey::new("d", "web"));
    assert_eq!(row.ports.len(), 1);
    let states: Vec<_> =
        row.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating)).collect();
    assert_eq!(states, [(true, true, false), (false, true, false), (false, true, true)]);
}

#[test]
fn a_node_with_its_range() {
    let object = json!({
        "metadata": {"name": "n1", "labels": {"a": "b"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
        "status": {
            "addresses": [{"type": "Hostname", "address": "n1"},
                          {"type": "InternalIP", "address": "192.168.0.2"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    });
    let (key, row) = node(&serde_json::from_value(object).unwrap()).unwrap();
    assert_eq!(key, ObjectKey::new("", "n1"));
    assert_eq!((row.internal_ips.len(), row.pod_cidrs.len(), row.ready), (1, 2, true));
    assert!(!row.leaving);
}

#[test]
fn a_node_is_leaving_when_it_is_deleted_or_the_autoscaler_says_so() {
    let leaving = |metadata: Value, taints: Value| {
        let object = json!({"metadata": metadata, "spec": {"taints": taints}});
        node(&serde_json::from_value(object).unwrap()).unwrap().1.leaving
    };
    let taint = |key: &str| json!([{"key": key, "effect": "NoSchedule"}]);
    assert!(!leaving(json!({"name": "n1"}), taint("other")));
    assert!(leaving(json!({"name": "n1"}), taint("ToBeDeletedByClusterAutoscaler")));
    let deleted = json!({"name": "n1", "deletionTimestamp": "2026-01-01T00:00:00Z"});
    assert!(leaving(deleted, json!([])));
}

#[test]
fn policies_affinity_and_ranges_have_upstreams_meaning() {
    let row = parse_service(json!({
        "type": "LoadBalancer", "clusterIPs": ["10.96.3.4", "fd00::4"],
        "sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Local", "healthCheckNodePort": 31_234,
        "loadBalancerSourceRanges": [" 10.1.2.3/8 ", "fd00::/64"], "ports": [{"port": 80}],
    }));
    assert_eq!((row.affinity_s, row.health_check_port), (10_800, 31_234));
    assert_eq!(row.internal_policy, TrafficPolicy::Local);
    assert_eq!(row.external_policy, TrafficPolicy::Local);
    let ranges: Vec<String> = row.source_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(
        (ranges, row.is_closed),
        (["10.0.0.0/8", "fd00::/64"].map(str::to_owned).to_vec(), false)
    );
    assert!(row.rejected.is_empty(), "{:?}", row.rejected);

    // Neither means anything for a service that cannot be reached from outside.
    let row = parse_service(json!({
        "clusterIP": "10.96.3.4", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31_234,
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}}, "ports": [{"port": 80}],
    }));
    assert_eq!((row.external_policy, row.health_check_port), (TrafficPolicy::Cluster, 0));
    assert_eq!(row.affinity_s, 7);
}

#[test]
fn a_load_balancer_that_proxies_keeps_its_address() {
    let object = json!({
        "metadata": {"namespace": "d", "name": "web", "creationTimestamp": "1970-01-01T00:01:00Z"},
        "spec": {"type": "LoadBalancer", "clusterIP": "10.96.3.4", "ports": [{"port": 80}]},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.1", "ipMode": "Proxy"}, {"ip": "192.0.2.2", "ipMode": "VIP"},
            {"ip": "192.0.2.3"}, {"hostname": "lb.example.com"},
        ]}},
    });
    let (_, row) = service(&serde_json::from_value(object).unwrap()).unwrap();
    let ips: Vec<String> = row.ingress_ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["192.0.2.2", "192.0.2.3"]);
    assert_eq!(row.created_s, 60);
}

#[test]
fn what_contradicts_itself_is_left_out_and_named() {
    let row = parse_service(json!({
        "type": "NodePort", "clusterIPs": ["10.96.3.4", "10.96.3.400"], "externalIPs": ["x"],
        "loadBalancerSourceRanges": ["10.0.0.0/33"],
        "ports": [{"port": 80, "nodePort": 70_000}, {"port": 81}, {"name": "a", "port": 0},
                  {"name": "b", "port": 82, "protocol": "QUIC"}],
    }));
    let words: Vec<&str> = row.rejected.iter().map(AsRef::as_ref).collect();
    assert_eq!(
        words,
        [
            r#"spec.clusterIPs[1] "10.96.3.400" is no IP address"#,
            r#"spec.externalIPs[0] "x" is no IP address"#,
            "spec.ports[0].nodePort is not in 1 to 65535",
            r#"spec.ports[1].name "" stands twice"#,
            "spec.ports[2].port 0 is not in 1 to 65535",
            r#"spec.ports[3].protocol "QUIC" is not TCP, UDP or SCTP"#,
            r#"spec.loadBalancerSourceRanges[0] "10.0.0.0/33" is no CIDR"#,
        ]
    );
    assert_eq!((row.cluster_ips.len(), row.ports.len(), row.is_closed), (1, 1, true));
}

fn parse_slice(family: &str, endpoints: &Value, ports: &Value) -> EndpointSliceRow {
    let object = json!({
        "metadata": {"namespace": "d", "name": "web-x",
                     "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": family, "ports": ports, "endpoints": endpoints,
    });
    endpoint_slice(&serde_json::from_value(object).unwrap()).unwrap().1
}

#[test]
fn a_slice_of_one_family_keeps_only_addresses_of_it() {
    let endpoints = json!([
        {"addresses": ["fd00::1"]}, {"addresses": ["10.0.0.1"]}, {"addresses": []},
    ]);
    let ports = json!([{"port": 80}, {"name": "none"}, {"name": "zero", "port": 0}]);
    let row = parse_slice("IPv6", &endpoints, &ports);
    assert_eq!((row.family, row.endpoints.len(), row.ports.len()), (Family::V6, 1, 1));
    let words: Vec<&str> = row.rejected.iter().map(AsRef::as_ref).collect();
    assert_eq!(
        words,
        [
            "ports[1].port is missing or not in 1 to 65535",
            "ports[2].port is missing or not in 1 to 65535",
            "endpoints[1].addresses: 10.0.0.1 is not of the slice's addressType IPv6",
            "endpoints[2].addresses: there is none",
        ]
    );
}

#[test]
fn hints_name_zones_and_nodes() {
    let endpoints = json!([
        {"addresses": ["10.0.0.1"],
         "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "n1"}]}},
        {"addresses": ["10.0.0.2"], "hints": {}},
    ]);
    let row = parse_slice("IPv4", &endpoints, &json!([{"port": 80}]));
    let expected = Hints { zones: ["a".into(), "b".into()].into(), nodes: ["n1".into()].into() };
    assert_eq!(row.endpoints[0].hints.as_deref(), Some(&expected));
    assert_eq!(row.endpoints[1].hints, None);
}
