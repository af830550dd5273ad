//! Which rows a service gets, by type, policy, family and protocol.

use std::sync::Arc;

use super::*;
use crate::model::{EndpointPort, EndpointRow, ObjectKey};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A dual-stack load balancer of one port with everything that leads to it.
fn service() -> ServiceRow {
    ServiceRow {
        kind: ServiceKind::LoadBalancer,
        cluster_ips: vec![ip("10.96.0.1"), ip("fd00:96::1")],
        external_ips: vec![ip("192.0.2.1")].into(),
        ingress_ips: vec![ip("192.0.2.2"), ip("2001:db8::2")].into(),
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 30_080,
        }],
        ..ServiceRow::default()
    }
}

/// One endpoint on this node and one elsewhere in each family.
fn slices(port: u16) -> [Arc<EndpointSliceRow>; 2] {
    let slice = |family, prefix: &str| {
        let endpoint = |last, node: &str| EndpointRow {
            ip: ip(&format!("{prefix}{last}")),
            node: node.into(),
            ..EndpointRow::default()
        };
        let ports = [Protocol::Tcp, Protocol::Sctp].map(|protocol| EndpointPort {
            name: "".into(),
            protocol,
            port,
        });
        Arc::new(EndpointSliceRow {
            service: ObjectKey::new("d", "web"),
            family,
            ports: ports.to_vec(),
            endpoints: vec![endpoint(1, "here"), endpoint(2, "there")],
            ..EndpointSliceRow::default()
        })
    };
    [slice(Family::V4, "10.244.0."), slice(Family::V6, "fd00:244::")]
}

fn desire(row: &ServiceRow, slices: &[Arc<EndpointSliceRow>]) -> Desired {
    let place = Place { node: "here".into(), zone: "".into() };
    desired(row, slices, here(&place), |_| true)
}

const fn here(place: &Place) -> Node<'_> {
    Node { place, answers: None, node_ports: (30_000, 32_767) }
}

/// `address:port/scope set flags consistent` of every row, the set by its last bytes.
fn rows(desired: &Desired) -> Vec<String> {
    let rows = desired.ports.iter().flat_map(|port| {
        port.frontends.iter().map(move |one| {
            let set = &port.backends[usize::from(one.which == Which::Local)];
            let lasts: Vec<u8> = set.iter().map(|backend| backend.addr.octets()[15]).collect();
            let scope = if one.key.scope == SCOPE_EXTERNAL { "out" } else { "in" };
            let number = u16::from_be_bytes(one.key.port);
            let consistent = if one.is_consistent { " c" } else { "" };
            format!("{} {number} {scope} {lasts:?} {}{consistent}", one.key.addr, one.flags)
        })
    });
    rows.collect()
}

#[test]
fn a_node_port_that_no_program_looks_for_has_no_row_and_is_named() {
    let mut row = service();
    assert!(rows(&desire(&row, &slices(8080))).iter().any(|row| row.starts_with("0.0.0.0 30080 ")));
    row.ports[0].node_port = 20_080;
    let desired = desire(&row, &slices(8080));
    assert_eq!(
        desired.problems,
        [
            "spec.ports[0].nodePort: 20080 is not in this node's --service-node-port-range 30000-32767 and does not \
             answer here"
        ]
    );
    let rows = rows(&desired);
    assert!(
        rows.iter().any(|row| row.starts_with("10.96.0.1 80 ")),
        "all else is served: {rows:?}"
    );
    assert!(!rows.iter().any(|row| row.contains(" 20080 ")), "{rows:?}");
}

#[test]
fn every_address_and_the_node_port_lead_to_one_set_in_each_family() {
    let desired = desire(&service(), &slices(8080));
    assert_eq!(
        rows(&desired),
        [
            "10.96.0.1 80 in [1, 2] 0",
            "192.0.2.2 80 in [1, 2] 0 c",
            "192.0.2.1 80 in [1, 2] 0 c",
            "0.0.0.0 30080 in [1, 2] 0 c",
            "fd00:96::1 80 in [1, 2] 0",
            "2001:db8::2 80 in [1, 2] 0 c",
            ":: 30080 in [1, 2] 0 c",
        ]
    );
    assert_eq!(desired.problems, Vec::<String>::new());
    assert_eq!(desired.ports.len(), 2);
}

#[test]
fn external_policy_local_binds_only_what_comes_from_outside_and_keeps_its_source() {
    let row = ServiceRow {
        cluster_ips: vec![ip("10.96.0.1")],
        ingress_ips: vec![ip("192.0.2.2")].into(),
        external_policy: TrafficPolicy::Local,
        ..service()
    };
    assert_eq!(
        rows(&desire(&row, &slices(8080))),
        [
            "10.96.0.1 80 in [1, 2] 0",
            "192.0.2.2 80 in [1, 2] 0",
            "192.0.2.2 80 out [1] 1 c",
            "192.0.2.1 80 in [1, 2] 0",
            "192.0.2.1 80 out [1] 1 c",
            "0.0.0.0 30080 in [1, 2] 0",
            "0.0.0.0 30080 out [1] 1 c",
        ]
    );
}

#[test]
fn with_endpoints_on_other_nodes_alone_clients_outside_are_to_try_again() {
    let row = ServiceRow {
        cluster_ips: vec![ip("10.96.0.1")],
        ingress_ips: vec![ip("192.0.2.2")].into(),
        external_ips: vec![].into(),
        internal_policy: TrafficPolicy::Local,
        external_policy: TrafficPolicy::Local,
        ..service()
    };
    let away = slices(8080).map(|slice| {
        let mut slice = (*slice).clone();
        slice.endpoints.iter_mut().for_each(|one| one.node = "other".into());
        Arc::new(slice)
    });
    assert_eq!(
        rows(&desire(&row, &away)),
        [
            "10.96.0.1 80 in [] 0",
            "192.0.2.2 80 in [1, 2] 0",
            "192.0.2.2 80 out [] 9 c",
            "0.0.0.0 30080 in [1, 2] 0",
            "0.0.0.0 30080 out [] 9 c",
        ]
    );
    // Where nobody has any, they are told so.
    let none: [Arc<EndpointSliceRow>; 0] = [];
    assert!(rows(&desire(&row, &none)).contains(&"0.0.0.0 30080 out [] 1 c".to_owned()));
}

#[test]
fn internal_policy_local_binds_the_cluster_ip_alone() {
    let row = ServiceRow {
        cluster_ips: vec![ip("10.96.0.1")],
        ingress_ips: vec![].into(),
        external_ips: vec![].into(),
        internal_policy: TrafficPolicy::Local,
        ..service()
    };
    assert_eq!(
        rows(&desire(&row, &slices(8080))),
        ["10.96.0.1 80 in [1] 0", "0.0.0.0 30080 in [1, 2] 0 c"]
    );
}

#[test]
fn source_ranges_guard_the_load_balancers_addresses_of_their_family() {
    let ranges = ["10.0.0.0/8", "192.168.1.0/24"].map(|range| range.parse().unwrap());
    let row = ServiceRow { source_ranges: ranges.to_vec().into(), ..service() };
    let desired = desire(&row, &slices(8080));
    let guarded: Vec<String> =
        rows(&desired).into_iter().filter(|row| row.contains("] 2")).collect();
    assert_eq!(guarded, ["192.0.2.2 80 in [1, 2] 2 c"]);
    let bits: Vec<u32> = desired.ports[0].ranges.iter().map(|(bits, _)| *bits).collect();
    assert_eq!((bits, desired.ports[1].ranges.len()), (vec![104, 120], 0));
}

#[test]
fn ranges_that_cannot_be_read_let_nobody_in() {
    let guarded = |row: &ServiceRow| {
        let desired = desire(row, &slices(8080));
        let rows = rows(&desired).into_iter().filter(|row| row.contains("] 2")).collect();
        let ranges: Vec<usize> = desired.ports.iter().map(|port| port.ranges.len()).collect();
        (rows, ranges, desired.problems)
    };
    let none = ServiceRow { is_closed: true, ..service() };
    let (rows, ranges, problems): (Vec<String>, _, _) = guarded(&none);
    assert_eq!(rows, ["192.0.2.2 80 in [1, 2] 2 c", "2001:db8::2 80 in [1, 2] 2 c"]);
    assert_eq!(ranges, [0, 0]);
    let words =
        "spec.loadBalancerSourceRanges: no range of IPv4 can be read, so no client is let in at";
    assert!(problems[0].starts_with(words), "{problems:?}");
    // The one that cannot be read may have been meant for the other family.
    let some = ServiceRow { source_ranges: vec!["10.0.0.0/8".parse().unwrap()].into(), ..none };
    let (rows, ranges, problems) = guarded(&some);
    assert_eq!((rows.len(), ranges), (2, vec![1, 0]));
    assert!(problems[0].contains("no range of IPv6"), "{problems:?}");
    // As with kube-proxy, ranges of one family say nothing of the other.
    let (rows, ranges, problems) = guarded(&ServiceRow { is_closed: false, ..some });
    assert_eq!((rows.len(), ranges, problems.len()), (1, vec![1, 0], 0));
}

#[test]
fn an_address_that_stands_twice_has_one_row() {
    let row = ServiceRow {
        cluster_ips: vec![ip("10.96.0.1")],
        external_ips: vec![ip("192.0.2.2"), ip("10.96.0.1")].into(),
        ingress_ips: vec![ip("192.0.2.2")].into(),
        ..service()
    };
    assert_eq!(rows(&desire(&row, &slices(1))).len(), 3);
}

#[test]
fn sctp_keeps_its_port_or_is_refused_by_name() {
    let port =
        ServicePort { name: "".into(), protocol: Protocol::Sctp, port: 80, node_port: 30_080 };
    let row = ServiceRow {
        kind: ServiceKind::NodePort,
        cluster_ips: vec![ip("10.96.0.1")],
        external_ips: vec![].into(),
        ingress_ips: vec![].into(),
        ports: vec![port],
        ..service()
    };
    let same = desire(&row, &slices(80));
    assert_eq!(rows(&same), ["10.96.0.1 80 in [1, 2] 0"], "the node port is another");
    assert!(same.problems[0].starts_with("spec.ports[0]: SCTP keeps its port"));
    let other = desire(&row, &slices(8080));
    assert_eq!((rows(&other).len(), other.problems.len()), (0, 1));
}

#[test]
fn sctp_that_keeps_its_port_for_some_clients_alone_is_served_to_nobody() {
    let port = ServicePort { name: "".into(), protocol: Protocol::Sctp, port: 80, node_port: 0 };
    let row = ServiceRow {
        cluster_ips: vec![ip("10.96.0.1")],
        external_ips: vec![].into(),
        ports: vec![port],
        external_policy: TrafficPolicy::Local,
        ..service()
    };
    // The one endpoint here drains, and has another target port than the ready one elsewhere.
    let [mut there, _] = slices(80);
    Arc::make_mut(&mut there).endpoints.remove(0);
    let [mut here, _] = slices(8080);
    let endpoints = &mut Arc::make_mut(&mut here).endpoints;
    endpoints.pop();
    endpoints[0] = EndpointRow { ready: false, terminating: true, ..endpoints[0].clone() };
    let desired = desire(&row, &[there, here]);
    assert_eq!(rows(&desired), ["10.96.0.1 80 in [2] 0"], "no client outside gets the one there");
}

#[test]
fn what_contradicts_itself_is_told_and_the_rest_is_there() {
    let named = |name: &str, port, node_port| ServicePort {
        name: name.into(),
        protocol: Protocol::Tcp,
        port,
        node_port,
    };
    let row = ServiceRow {
        cluster_ips: vec![ip("10.96.0.1")],
        ingress_ips: vec![ip("2001:db8::2")].into(),
        external_ips: vec![].into(),
        ports: vec![named("", 80, 30_080), named("b", 81, 30_080), named("c", 80, 0)],
        ..service()
    };
    let desired = desire(&row, &slices(8080));
    assert_eq!(
        desired.problems,
        [
            "2001:db8::2 is of a family that spec.clusterIPs lacks",
            "spec.ports[1]: its port or nodePort stands twice",
            "spec.ports[1]: no EndpointSlice has port \"b\" of its protocol",
            "spec.ports[2]: its port or nodePort stands twice",
            "spec.ports[2]: no EndpointSlice has port \"c\" of its protocol",
        ]
    );
    assert_eq!(
        rows(&desired),
        ["10.96.0.1 80 in [1, 2] 0", "0.0.0.0 30080 in [1, 2] 0 c", "10.96.0.1 81 in [] 0"]
    );
}

#[test]
fn ten_thousand_endpoints_are_programmed_and_more_are_told() {
    let mut slice = (*slices(80)[0]).clone();
    let endpoint = |n: u32| EndpointRow {
        ip: IpAddr::from((0x0af4_0000 + n).to_be_bytes()),
        ..EndpointRow::default()
    };
    slice.endpoints = (0..10_001).map(endpoint).collect();
    let row = ServiceRow { cluster_ips: vec![ip("10.96.0.1")], ..service() };
    let desired = desire(&row, &[Arc::new(slice)]);
    assert_eq!(desired.ports[0].backends[0].len(), BACKENDS);
    assert!(desired.problems.iter().any(|words| words.contains("more than 10000 endpoints")));
}

#[test]
fn cluster_dns_is_answered_on_this_node_at_the_services_port() {
    let place = Place::default();
    let node = Node { answers: Some(ip("169.254.20.10")), ..here(&place) };
    let row = ServiceRow {
        kind: ServiceKind::ClusterIp,
        external_ips: vec![].into(),
        ingress_ips: vec![].into(),
        ports: vec![ServicePort { node_port: 0, port: 53, ..service().ports[0].clone() }],
        ..service()
    };
    let desired = desired(&row, &slices(8080), node, |_| true);
    assert_eq!(rows(&desired), ["10.96.0.1 53 in [10] 4", "fd00:96::1 53 in [1, 2] 0"]);
    assert_eq!(desired.ports[0].backends[0][0].port, 53_u16.to_be_bytes());
}

#[test]
fn what_has_no_address_or_asks_for_what_is_not_done_claims_nothing() {
    let headless = ServiceRow { kind: ServiceKind::Headless, ..service() };
    let unsupported = ServiceRow { unsupported: vec!["spec.new".into()].into(), ..service() };
    for row in [headless, unsupported] {
        assert_eq!((claims(&row), desire(&row, &slices(80))), (vec![], Desired::default()));
    }
    assert_eq!(claims(&service()).len(), 7);
}
