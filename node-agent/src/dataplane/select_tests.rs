//! The cases of upstream's `TestCategorizeEndpoints` (`pkg/proxy/topology_test.go`), by its names,
//! then what the slices add.

use std::sync::Arc;

use super::*;
use crate::model::{EndpointPort, Hints, ObjectKey, Protocol};

/// Last byte of the address, then words: `ready`, `draining` (serving and terminating), `down`,
/// `local`, `z:a,b` (zone hints), `n:x` (node hints).
fn endpoint(text: &str) -> EndpointRow {
    let mut words = text.split(' ');
    let last: u8 = words.next().unwrap().parse().unwrap();
    let mut row = EndpointRow {
        ip: IpAddr::from([10, 1, 2, last]),
        ready: false,
        serving: false,
        node: "other".into(),
        ..EndpointRow::default()
    };
    let mut hints = Hints::default();
    let names = |list: &str| list.split(',').map(Into::into).collect();
    for word in words {
        match word.split_once(':') {
            Some(("z", list)) => hints.zones = names(list),
            Some(("n", list)) => hints.nodes = names(list),
            _ if word == "ready" => (row.ready, row.serving) = (true, true),
            _ if word == "draining" => (row.serving, row.terminating) = (true, true),
            _ if word == "local" => row.node = "node-1".into(),
            _ => assert_eq!(word, "down"),
        }
    }
    row.hints = (hints != Hints::default()).then(|| Box::new(hints));
    row
}

fn slice(endpoints: &[&str]) -> Arc<EndpointSliceRow> {
    Arc::new(EndpointSliceRow {
        service: ObjectKey::new("d", "web"),
        ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 80 }],
        endpoints: endpoints.iter().map(|text| endpoint(text)).collect(),
        ..EndpointSliceRow::default()
    })
}

/// `iTP` and `eTP` for the two policies `Local`, `np` for a node port, `z=a` for this node's zone.
fn choose_for(service: &str, endpoints: &[&str]) -> (Vec<u8>, Option<Vec<u8>>) {
    let has = |word: &str| service.split(' ').any(|one| one == word);
    let policy = |word| if has(word) { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
    let row = ServiceRow {
        internal_policy: policy("iTP"),
        external_policy: policy("eTP"),
        ..ServiceRow::default()
    };
    let node_port = if has("np") { 8080 } else { 0 };
    let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port };
    let zone = service.split(' ').find_map(|word| word.strip_prefix("z=")).unwrap_or_default();
    let place = Place { node: "node-1".into(), zone: zone.into() };
    let choice = choose(&row, &port, &[slice(endpoints)], (Family::V4, &place));
    (lasts(&choice.cluster), choice.local.as_deref().map(lasts))
}

fn lasts(targets: &[Target]) -> Vec<u8> {
    let last = |(ip, _): &Target| match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    targets.iter().map(last).collect()
}

type Case =
    (&'static str, &'static str, &'static [&'static str], &'static [u8], Option<&'static [u8]>);

const HINTED: &[&str] = &["3 ready z:a", "4 ready z:b", "5 ready z:c", "6 ready z:a"];
const BY_NODE: &[&str] = &[
    "3 ready z:a n:node-1",
    "4 ready z:b n:node-2",
    "5 ready z:c n:node-3",
    "6 ready z:a n:node-4",
];

const UPSTREAM: &[Case] = &[
    ("hints enabled", "z=a", HINTED, &[3, 6], None),
    (
        "externalTrafficPolicy: Local, topology ignored for Local endpoints",
        "z=a eTP np",
        &["3 ready local z:a", "4 ready local z:b", "5 ready z:c", "6 ready z:a"],
        &[3, 6],
        Some(&[3, 4]),
    ),
    (
        "internalTrafficPolicy: Local, topology ignored for Local endpoints",
        "z=a iTP np",
        &["3 ready local z:a", "4 ready local z:b", "5 ready z:c", "6 ready z:a"],
        &[3, 6],
        Some(&[3, 4]),
    ),
    ("empty zone label", "", &["3 ready z:a"], &[3], None),
    ("node in different zone, no endpoint filtering", "z=b", &["3 ready z:a"], &[3], None),
    (
        "unready endpoint",
        "z=a",
        &["3 ready z:a", "4 ready z:b", "5 ready z:c", "6 down z:a"],
        &[3],
        None,
    ),
    (
        "only unready endpoints in same zone (should not filter)",
        "z=a",
        &["3 down z:a", "4 ready z:b", "5 ready z:c", "6 down z:a"],
        &[4, 5],
        None,
    ),
    (
        "missing hints, no filtering applied",
        "z=a",
        &["3 ready z:a", "4 ready z:b", "5 ready", "6 ready z:a"],
        &[3, 4, 5, 6],
        None,
    ),
    (
        "multiple hints per endpoint, filtering includes any endpoint with zone included",
        "z=c",
        &["3 ready z:a,b,c", "4 ready z:b,c", "5 ready z:b,d", "6 ready z:c"],
        &[3, 4, 6],
        None,
    ),
    ("PreferSameNode available", "z=a", BY_NODE, &[3], None),
    (
        "PreferSameNode ignored if some endpoints unhinted",
        "z=a",
        &["3 ready z:a n:node-1", "4 ready", "5 ready z:c n:node-3", "6 ready z:a n:node-4"],
        &[3, 4, 5, 6],
        None,
    ),
    (
        "PreferSameNode falls back to PreferSameZone if no endpoint for node",
        "z=a",
        &["3 ready z:a n:node-0", "4 ready z:b n:node-2", "6 ready z:a n:node-4"],
        &[3, 6],
        None,
    ),
    (
        "conflicting topology and localness require merging allEndpoints",
        "z=a eTP np",
        &["0 ready local z:a", "1 ready local z:b", "2 ready z:a", "3 ready z:b"],
        &[0, 2],
        Some(&[0, 1]),
    ),
    ("internalTrafficPolicy: Local, with empty endpoints", "iTP", &[], &[], Some(&[])),
    (
        "internalTrafficPolicy: Local, but all endpoints are remote",
        "iTP",
        &["0 ready", "1 ready"],
        &[],
        Some(&[]),
    ),
    (
        "internalTrafficPolicy: Local, all endpoints are local",
        "iTP",
        &["0 ready local", "1 ready local"],
        &[],
        Some(&[0, 1]),
    ),
    (
        "internalTrafficPolicy: Local, some endpoints are local",
        "iTP",
        &["0 ready local", "1 ready"],
        &[],
        Some(&[0]),
    ),
    ("Cluster traffic policy, endpoints not Ready", "", &["0 down", "1 down"], &[], None),
    ("Cluster traffic policy, some endpoints are Ready", "", &["0 down", "1 ready"], &[1], None),
    (
        "Cluster traffic policy, all endpoints are terminating",
        "",
        &["0 draining local", "1 draining"],
        &[0, 1],
        None,
    ),
    (
        "iTP: Local, eTP: Cluster, some endpoints local",
        "iTP np",
        &["0 ready local", "1 ready"],
        &[0, 1],
        Some(&[0]),
    ),
    (
        "iTP: Cluster, eTP: Local, some endpoints local",
        "eTP np",
        &["0 ready local", "1 ready"],
        &[0, 1],
        Some(&[0]),
    ),
    (
        "iTP: Local, eTP: Local, some endpoints local",
        "iTP eTP np",
        &["0 ready local", "1 ready"],
        &[0, 1],
        Some(&[0]),
    ),
    (
        "iTP: Local, eTP: Local, all endpoints remote",
        "iTP eTP np",
        &["0 ready", "1 ready"],
        &[0, 1],
        Some(&[]),
    ),
    (
        "iTP: Local, eTP: Local, all endpoints remote and terminating",
        "iTP eTP np",
        &["0 draining", "1 draining"],
        &[0, 1],
        Some(&[]),
    ),
    (
        "iTP: Cluster, eTP: Local, with terminating endpoints",
        "eTP np",
        &["0 ready", "1 down local", "2 draining local", "3 draining"],
        &[0],
        Some(&[2]),
    ),
    (
        "eTP ignored if not externally accessible",
        "eTP",
        &["0 ready", "1 ready local"],
        &[0, 1],
        None,
    ),
    (
        "no cluster endpoints for iTP:Local internal-only service",
        "iTP",
        &["0 ready", "1 ready local"],
        &[],
        Some(&[1]),
    ),
    (
        "externalTrafficPolicy: Local, externally accessible, with empty endpoints",
        "eTP np",
        &[],
        &[],
        Some(&[]),
    ),
    (
        "externalTrafficPolicy: Local, externally accessible, but all endpoints are remote",
        "eTP np",
        &["0 ready", "1 ready"],
        &[0, 1],
        Some(&[]),
    ),
    (
        "externalTrafficPolicy: Local, externally accessible, all endpoints are local",
        "eTP np",
        &["0 ready local", "1 ready local"],
        &[0, 1],
        Some(&[0, 1]),
    ),
];

#[test]
fn upstreams_cases() {
    for (name, service, endpoints, cluster, local) in UPSTREAM {
        let (found, found_local) = choose_for(service, endpoints);
        assert_eq!(found, *cluster, "{name}: cluster");
        assert_eq!(found_local.as_deref(), *local, "{name}: local");
    }
}

#[test]
fn ready_endpoints_elsewhere_do_not_keep_draining_ones_from_traffic_that_must_stay_here() {
    let (cluster, local) = choose_for("eTP np", &["0 ready", "2 draining local"]);
    assert_eq!((cluster, local), (vec![0], Some(vec![2])));
}

#[test]
fn a_slices_port_is_found_by_name_and_protocol_and_counts_only_in_its_family() {
    let row = ServiceRow::default();
    let port = ServicePort { name: "http".into(), protocol: Protocol::Udp, port: 53, node_port: 0 };
    let with = |name: &str, protocol, number| {
        let mut slice = (*slice(&["1 ready"])).clone();
        slice.ports = vec![EndpointPort { name: name.into(), protocol, port: number }];
        Arc::new(slice)
    };
    let mut six = (*with("http", Protocol::Udp, 6)).clone();
    six.family = Family::V6;
    six.endpoints[0].ip = "fd00::9".parse().unwrap();
    let slices = [
        with("http", Protocol::Tcp, 1),
        with("dns", Protocol::Udp, 2),
        with("http", Protocol::Udp, 3),
        with("http", Protocol::Udp, 3),
        with("http", Protocol::Udp, 4),
        Arc::new(six),
    ];
    let ports = |family| -> Vec<u16> {
        let choice = choose(&row, &port, &slices, (family, &Place::default()));
        choice.cluster.iter().map(|(_, port)| *port).collect()
    };
    assert_eq!(ports(Family::V4), [3, 4], "the same target once, pods with another number beside");
    assert_eq!(ports(Family::V6), [6]);
}

#[test]
fn a_service_that_publishes_all_addresses_has_them_all() {
    let row = ServiceRow { publish_not_ready: true, ..ServiceRow::default() };
    let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 };
    let slices = [slice(&["1 down", "2 ready", "3 draining"])];
    let choice = choose(&row, &port, &slices, (Family::V4, &Place::default()));
    assert_eq!(lasts(&choice.cluster), [1, 2, 3]);
}

#[test]
fn an_endpoint_without_a_node_is_local_to_nobody() {
    let row = ServiceRow { internal_policy: TrafficPolicy::Local, ..ServiceRow::default() };
    let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 };
    let mut lost = (*slice(&["1 ready"])).clone();
    lost.endpoints[0].node = "".into();
    let choice = choose(&row, &port, &[Arc::new(lost)], (Family::V4, &Place::default()));
    assert_eq!((choice.local, choice.has_any), (Some(vec![]), true));
}

#[test]
fn a_health_check_counts_the_ready_pods_of_this_node_each_once() {
    let port = |name: &str| ServicePort {
        name: name.into(),
        protocol: Protocol::Tcp,
        port: 80,
        node_port: 0,
    };
    // Of the two ports of the service the slices have one.
    let row = ServiceRow { ports: vec![port(""), port("other")], ..ServiceRow::default() };
    let four = slice(&["1 ready local", "2 ready", "3 draining local", "4 down local"]);
    let mut six = (*slice(&["1 ready local", "2 ready local"])).clone();
    six.family = Family::V6;
    for (endpoint, last) in six.endpoints.iter_mut().zip(1_u16..) {
        endpoint.ip = IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last]);
    }
    let here = |slices: &[Arc<EndpointSliceRow>], node: &str| {
        ready_here(&row, slices, &Place { node: node.into(), zone: "".into() })
    };
    assert_eq!(here(&[Arc::clone(&four), Arc::clone(&four)], "node-1"), 1, "in two slices at once");
    assert_eq!(
        here(&[Arc::clone(&four), Arc::new(six)], "node-1"),
        2,
        "two families, the same pods"
    );
    assert_eq!(here(&[slice(&["3 draining local"])], "node-1"), 0, "it only drains");
    assert_eq!(here(&[four], ""), 0, "a node without a name has none");
    let nobody = ServiceRow { ports: vec![port("other")], ..ServiceRow::default() };
    let place = Place { node: "node-1".into(), zone: "".into() };
    assert_eq!(ready_here(&nobody, &[slice(&["1 ready local"])], &place), 0, "no such port");
}
