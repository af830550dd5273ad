//! From API objects to rows. Pure.
//!
//! An object that contradicts itself (an address that is none, a port out of range) loses that part
//! only; a field that the dataplane does not implement yet is named in the row, so that the service
//! is not programmed as if the field were not there.

use std::net::IpAddr;

use k8s_openapi::api::{
    core::v1::{Node, Service, ServiceSpec},
    discovery::v1::{Endpoint, EndpointSlice},
};

use crate::model::{
    EndpointPort, EndpointRow, EndpointSliceRow, NodeRow, ObjectKey, Protocol, ServiceKind,
    ServicePort, ServiceRow,
};

/// Label that names a slice's service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The key and row of a service; `None` without a name.
#[must_use]
pub fn service(object: &Service) -> Option<(ObjectKey, ServiceRow)> {
    let key = key(&object.metadata)?;
    let spec = object.spec.as_ref()?;
    let cluster_ips: Vec<&str> = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(many), _) if !many.is_empty() => many.iter().map(String::as_str).collect(),
        (_, Some(one)) => vec![one],
        (_, None) => vec![],
    };
    let is_headless = cluster_ips.first() == Some(&"None");
    let kind = match spec.type_.as_deref() {
        Some("ExternalName") => ServiceKind::ExternalName,
        Some("NodePort") => ServiceKind::NodePort,
        Some("LoadBalancer") => ServiceKind::LoadBalancer,
        _ if is_headless => ServiceKind::Headless,
        _ => ServiceKind::ClusterIp,
    };
    let ingress = object.status.iter().filter_map(|status| status.load_balancer.as_ref());
    let ingress = ingress.flat_map(|balancer| balancer.ingress.iter().flatten());
    let ingress = ingress
        .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
        .filter_map(|ingress| ingress.ip.as_deref());
    let external = spec.external_ips.iter().flatten().map(String::as_str).chain(ingress);
    let row = ServiceRow {
        kind,
        cluster_ips: addresses(cluster_ips.into_iter()),
        external_ips: addresses(external),
        external_name: spec.external_name.as_deref().unwrap_or_default().into(),
        ports: ports(spec),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        unsupported: unsupported(kind, spec),
    };
    Some((key, row))
}

/// The key and row of a slice; `None` when it belongs to no service or holds host names.
#[must_use]
pub fn endpoint_slice(object: &EndpointSlice) -> Option<(ObjectKey, EndpointSliceRow)> {
    let key = key(&object.metadata)?;
    if object.address_type == "FQDN" {
        return None;
    }
    let name = object.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    let ports = object.ports.iter().flatten().filter_map(|port| {
        Some(EndpointPort {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: protocol(port.protocol.as_deref())?,
            port: u16::try_from(port.port?).ok()?,
        })
    });
    let row = EndpointSliceRow {
        service: ObjectKey::new(&key.namespace, name),
        ports: ports.collect(),
        endpoints: object.endpoints.iter().flatten().filter_map(endpoint).collect(),
    };
    Some((key, row))
}

/// The key and row of a node.
#[must_use]
pub fn node(object: &Node) -> Option<(ObjectKey, NodeRow)> {
    let key = key(&object.metadata)?;
    let status = object.status.as_ref();
    let internal = status
        .and_then(|status| status.addresses.as_ref())
        .into_iter()
        .flatten()
        .filter(|address| address.type_ == "InternalIP")
        .map(|address| address.address.as_str());
    let spec = object.spec.as_ref();
    let many = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let one = spec.and_then(|spec| spec.pod_cidr.clone());
    let cidrs = if many.is_empty() { one.into_iter().collect() } else { many };
    let ready = status
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let row = NodeRow {
        internal_ips: addresses(internal),
        pod_cidrs: cidrs.iter().filter_map(|cidr| cidr.parse().ok()).collect(),
        ready,
        labels: object.metadata.labels.clone().unwrap_or_default(),
    };
    Some((key, row))
}

/// Namespace and name of an object.
#[must_use]
pub fn key(
    metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
) -> Option<ObjectKey> {
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    Some(ObjectKey::new(namespace, metadata.name.as_deref()?))
}

fn ports(spec: &ServiceSpec) -> Vec<ServicePort> {
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        Some(ServicePort {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: protocol(port.protocol.as_deref())?,
            port: u16::try_from(port.port).ok()?,
            node_port: port.node_port.and_then(|port| u16::try_from(port).ok()).unwrap_or(0),
        })
    });
    ports.collect()
}

/// Field paths that change what the packets do and that the dataplane does not do.
fn unsupported(kind: ServiceKind, spec: &ServiceSpec) -> Vec<Box<str>> {
    let mut fields: Vec<Box<str>> = Vec::new();
    // These have no address of their own: DNS answers for them.
    if matches!(kind, ServiceKind::ExternalName | ServiceKind::Headless) {
        return fields;
    }
    if spec.session_affinity.as_deref() == Some("ClientIP") {
        fields.push("spec.sessionAffinity".into());
    }
    if spec.external_traffic_policy.as_deref() == Some("Local") {
        fields.push("spec.externalTrafficPolicy".into());
    }
    if spec.internal_traffic_policy.as_deref() == Some("Local") {
        fields.push("spec.internalTrafficPolicy".into());
    }
    if spec.load_balancer_source_ranges.as_ref().is_some_and(|ranges| !ranges.is_empty()) {
        fields.push("spec.loadBalancerSourceRanges".into());
    }
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        if port.protocol.as_deref() == Some("SCTP") {
            fields.push(format!("spec.ports[{index}].protocol").into());
        }
    }
    for (index, ip) in spec.cluster_ips.iter().flatten().enumerate() {
        if ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) {
            fields.push(format!("spec.clusterIPs[{index}]").into());
        }
    }
    for (index, ip) in spec.external_ips.iter().flatten().enumerate() {
        if ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()) {
            fields.push(format!("spec.externalIPs[{index}]").into());
        }
    }
    fields
}

fn endpoint(endpoint: &Endpoint) -> Option<EndpointRow> {
    let ip = endpoint.addresses.first()?.parse().ok()?;
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
    Some(EndpointRow {
        ip,
        ready,
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(ready),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        hostname: endpoint.hostname.as_deref().unwrap_or_default().into(),
        node: endpoint.node_name.as_deref().unwrap_or_default().into(),
    })
}

fn addresses(texts: impl Iterator<Item = impl AsRef<str>>) -> Vec<IpAddr> {
    texts.filter_map(|text| text.as_ref().parse().ok()).collect()
}

fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

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
    fn every_field_that_is_not_done_yet_is_named() {
        let row = parse_service(json!({
            "type": "LoadBalancer", "clusterIPs": ["10.96.3.4", "fd00::4"],
            "sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local",
            "internalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["10.0.0.0/8"],
            "externalIPs": ["fd00::9"],
            "ports": [{"port": 80}, {"name": "s", "port": 81, "protocol": "SCTP"}],
        }));
        let fields: Vec<&str> = row.unsupported.iter().map(AsRef::as_ref).collect();
        assert_eq!(
            fields,
            [
                "spec.sessionAffinity",
                "spec.externalTrafficPolicy",
                "spec.internalTrafficPolicy",
                "spec.loadBalancerSourceRanges",
                "spec.ports[1].protocol",
                "spec.clusterIPs[1]",
                "spec.externalIPs[0]",
            ]
        );
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
        assert_eq!(states, [(true, true, false), (false, false, false), (false, true, true)]);
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
    }
}
