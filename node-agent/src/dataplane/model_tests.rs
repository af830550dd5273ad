//! Cases of the service semantics.

use super::*;
use crate::{
    model::{EndpointPort, EndpointRow},
    table::Table,
};

fn service(node_port: u16) -> ServiceRow {
    ServiceRow {
        kind: if node_port == 0 { ServiceKind::ClusterIp } else { ServiceKind::NodePort },
        cluster_ips: vec!["10.96.1.1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port,
        }],
        ..ServiceRow::default()
    }
}

fn endpoint(last: u8, state: &str) -> EndpointRow {
    EndpointRow {
        ip: IpAddr::from([10, 244, 1, last]),
        ready: state == "ready",
        serving: state == "ready" || state == "draining",
        terminating: state == "draining" || state == "gone",
        ..EndpointRow::default()
    }
}

fn slice(endpoints: Vec<EndpointRow>) -> EndpointSliceRow {
    EndpointSliceRow {
        service: ObjectKey::new("default", "web"),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints,
        ..EndpointSliceRow::default()
    }
}

fn last_bytes(frontends: &Frontends) -> Vec<Vec<u8>> {
    frontends
        .values()
        .map(|backends| backends.iter().map(|b| b.addr.v4_octets()[3]).collect())
        .collect()
}

#[test]
fn which_endpoints_are_backends() {
    let cases: &[(&[&str], bool, &[u8])] = &[
        (&["ready", "ready"], false, &[1, 2]),
        (&["ready", "starting"], false, &[1]),
        (&["ready", "draining"], false, &[1]),
        (&["draining", "starting", "gone"], false, &[1]),
        (&["starting", "gone"], false, &[]),
        (&["starting", "gone", "ready"], true, &[1, 2, 3]),
        (&[], false, &[]),
    ];
    for (states, publish_not_ready, expected) in cases {
        let endpoints = states.iter().zip(1..).map(|(state, last)| endpoint(last, state)).collect();
        let row = ServiceRow { publish_not_ready: *publish_not_ready, ..service(0) };
        let frontends = frontends(&row, &[&slice(endpoints)], None);
        assert_eq!(last_bytes(&frontends), vec![expected.to_vec()], "{states:?}");
    }
}

#[test]
fn a_node_port_is_a_second_frontend_with_the_same_backends() {
    let frontends = frontends(&service(30_080), &[&slice(vec![endpoint(7, "ready")])], None);
    let keys: Vec<_> = frontends.keys().map(|k| (k.addr, k.port, k.scope)).collect();
    assert_eq!(
        keys,
        [
            (Addr::ANY_V4, 30_080_u16.to_be_bytes(), SCOPE_INTERNAL),
            (Addr::v4([10, 96, 1, 1]), 80_u16.to_be_bytes(), SCOPE_INTERNAL)
        ]
    );
    assert_eq!(last_bytes(&frontends), vec![vec![7], vec![7]]);
}

#[test]
fn a_service_with_an_unsupported_field_is_not_programmed() {
    let row = ServiceRow { unsupported: vec!["spec.sessionAffinity".into()], ..service(0) };
    assert!(frontends(&row, &[&slice(vec![endpoint(1, "ready")])], None).is_empty());
}

#[test]
fn another_port_name_or_protocol_is_no_backend() {
    let mut other = slice(vec![endpoint(1, "ready")]);
    other.ports[0].name = "metrics".into();
    assert_eq!(last_bytes(&frontends(&service(0), &[&other], None)), vec![Vec::<u8>::new()]);
    other.ports[0] = EndpointPort { name: "http".into(), protocol: Protocol::Udp, port: 1 };
    assert_eq!(last_bytes(&frontends(&service(0), &[&other], None)), vec![Vec::<u8>::new()]);
}

#[test]
fn cluster_dns_is_answered_on_this_node_at_the_services_port() {
    let local = IpAddr::from([169, 254, 20, 10]);
    let frontends = frontends(&service(0), &[&slice(vec![endpoint(1, "ready")])], Some(local));
    let backends: Vec<_> = frontends.values().flatten().map(|b| (b.addr, b.port)).collect();
    assert_eq!(backends, [(Addr::from(local), 80_u16.to_be_bytes())]);
}

#[test]
fn changes_touch_only_their_service_and_a_lost_claim_falls_to_the_next() {
    let (services, slices) = (Table::new(), Table::new());
    let (first, second) = (ObjectKey::new("a", "x"), ObjectKey::new("b", "x"));
    services.upsert(first.clone(), service(0));
    services.upsert(second.clone(), service(0));
    services.upsert(
        ObjectKey::new("c", "other"),
        ServiceRow { cluster_ips: vec!["10.96.9.9".parse().unwrap()], ..service(0) },
    );
    let mut model = Model::default();
    let (all, none) = (services.changes_since(0), slices.changes_since(0));
    let seen = all.revision;
    assert_eq!(model.update(all, none).len(), 2);
    let frontend = key(Addr::v4([10, 96, 1, 1]), 80, Protocol::Tcp);
    assert_eq!(model.owner(&frontend), Some(&first));
    assert_eq!(model.conflicts().map(|(loser, ..)| loser).collect::<Vec<_>>(), [&second]);

    slices.upsert(
        ObjectKey::new("b", "s"),
        EndpointSliceRow { service: second.clone(), ..slice(vec![endpoint(9, "ready")]) },
    );
    services.delete(&first);
    let touched = model.update(services.changes_since(seen), slices.changes_since(0));
    assert_eq!(touched, BTreeSet::from([frontend]));
    assert_eq!(model.owner(&frontend), Some(&second));
    assert_eq!(model.backends(&frontend).unwrap().len(), 1);
}
