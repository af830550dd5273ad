//! Who owns what, and what a change touches.

use super::*;
use crate::{
    model::{
        EndpointPort, EndpointRow, HostPort, LocalEndpoint, Protocol, ServiceKind, ServicePort,
    },
    table::Table,
};

fn service(created_s: i64, node_port: u16) -> ServiceRow {
    ServiceRow {
        kind: if node_port == 0 { ServiceKind::ClusterIp } else { ServiceKind::NodePort },
        cluster_ips: vec!["10.96.1.1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port,
        }],
        created_s,
        ..ServiceRow::default()
    }
}

fn with_ip(row: ServiceRow, ip: &str) -> ServiceRow {
    ServiceRow { cluster_ips: vec![ip.parse().unwrap()], ..row }
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("d", name)
}

struct World {
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    seen: (u64, u64),
    model: Model,
}

impl World {
    fn new() -> Self {
        let (services, slices) = (Table::new(), Table::new());
        Self { services, slices, seen: (0, 0), model: Model::new(None) }
    }

    fn update(&mut self) -> Vec<String> {
        let services = self.services.changes_since(self.seen.0);
        let slices = self.slices.changes_since(self.seen.1);
        self.seen = (services.revision, slices.revision);
        let dirty = self.model.update(services, slices);
        dirty.iter().map(|key| key.name.to_string()).collect()
    }

    fn frontends(&mut self, name: &str) -> usize {
        let desired = self.model.desired(&key(name));
        desired.ports.iter().map(|port| port.frontends.len()).sum()
    }
}

#[test]
fn a_change_touches_its_service_and_nobody_else() {
    let mut world = World::new();
    world.services.upsert(key("a"), service(0, 0));
    world.services.upsert(key("b"), with_ip(service(0, 0), "10.96.9.9"));
    assert_eq!(world.update(), ["a", "b"]);
    let slice = |service: &str| EndpointSliceRow {
        service: key(service),
        endpoints: vec![EndpointRow::default()],
        ..EndpointSliceRow::default()
    };
    world.slices.upsert(key("s"), slice("b"));
    assert_eq!(world.update(), ["b"]);
    world.slices.upsert(key("s"), slice("a"));
    assert_eq!(world.update(), ["a", "b"], "the slice has moved");
    assert_eq!(world.update(), Vec::<String>::new());
    world.slices.delete(&key("s"));
    world.services.delete(&key("b"));
    assert_eq!(world.update(), ["a", "b"]);
    assert_eq!(world.frontends("b"), 0);
    assert_eq!(world.model.services().count(), 1);
}

#[test]
fn the_older_service_has_an_address_and_then_the_first_by_name() {
    let mut world = World::new();
    world.services.upsert(key("new"), service(20, 30_080));
    world.update();
    assert_eq!(world.frontends("new"), 2);
    world.services.upsert(key("old"), with_ip(service(10, 30_080), "10.96.1.2"));
    assert_eq!(world.update(), ["new", "old"]);
    assert_eq!((world.frontends("new"), world.frontends("old")), (1, 2));
    assert_eq!(
        world.model.problems()[&key("new")],
        ["node:30080/TCP belongs to service d/old, which is older or first by name"]
    );
    assert_eq!(world.model.problems().len(), 1);

    world.services.upsert(key("also-old"), with_ip(service(10, 30_080), "10.96.1.3"));
    world.update();
    assert_eq!((world.frontends("also-old"), world.frontends("old")), (2, 1), "first by name");

    world.services.delete(&key("also-old"));
    world.services.delete(&key("old"));
    assert!(world.update().contains(&"new".to_owned()), "its claim falls to who is left");
    assert_eq!((world.frontends("new"), world.frontends("old")), (2, 0));
    assert!(world.model.problems().is_empty());
}

#[test]
fn a_service_that_gives_a_port_up_hands_it_on() {
    let mut world = World::new();
    world.services.upsert(key("a"), service(1, 30_080));
    world.services.upsert(key("b"), with_ip(service(2, 30_080), "10.96.1.2"));
    world.update();
    assert_eq!(world.frontends("b"), 1);
    world.services.upsert(key("a"), service(1, 30_081));
    assert_eq!(world.update(), ["a", "b"]);
    assert_eq!((world.frontends("a"), world.frontends("b")), (2, 2));
}

#[test]
fn slices_may_come_before_their_service() {
    let mut world = World::new();
    let row = EndpointSliceRow { service: key("a"), ..EndpointSliceRow::default() };
    world.slices.upsert(key("s"), row);
    assert_eq!(world.update(), ["a"]);
    assert_eq!((world.frontends("a"), world.model.services().count()), (0, 0));
    world.services.upsert(key("a"), service(0, 0));
    world.update();
    assert_eq!(world.frontends("a"), 1);
}

#[test]
fn moving_the_node_touches_every_service() {
    let mut world = World::new();
    world.services.upsert(key("a"), service(0, 0));
    world.update();
    let place = Place { node: "n".into(), zone: "z".into() };
    assert_eq!(world.model.set_place(place.clone()).len(), 1);
    assert_eq!(world.model.set_place(place).len(), 0);
}

#[test]
fn a_service_is_checked_when_it_is_programmed_and_names_a_port() {
    let mut world = World::new();
    let balanced = ServiceRow { health_check_port: 31_000, ..service(1, 30_080) };
    world.services.upsert(key("a"), balanced.clone());
    world.services.upsert(key("b"), service(1, 30_081));
    let headless = ServiceRow { kind: ServiceKind::Headless, ..balanced };
    world.services.upsert(key("c"), headless);
    world.model.set_place(Place { node: "n1".into(), zone: "".into() });
    let here = EndpointRow { node: "n1".into(), ..EndpointRow::default() };
    world.slices.upsert(
        key("a-1"),
        EndpointSliceRow {
            service: key("a"),
            ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: vec![here],
            ..EndpointSliceRow::default()
        },
    );
    world.update();
    assert_eq!(world.model.check(&key("a")), Some(Check { port: 31_000, endpoints: 1 }));
    for name in ["b", "c", "d"] {
        assert_eq!(world.model.check(&key(name)), None, "{name}");
    }
}

#[test]
fn ports_of_pods_are_kept_apart_from_services_and_go_with_their_pod() {
    let mut world = World::new();
    world.services.upsert(key("a"), service(1, 30_080));
    world.update();
    let pod = |ip: &str| LocalEndpoint {
        pod: key("web"),
        ip: ip.parse().unwrap(),
        netns_cookie: 0,
        host_ifindex: 1,
        host_mac: [0; 6],
        pod_mac: [0; 6],
        host_ports: [HostPort {
            host_ip: "192.168.0.1".parse().ok(),
            host_port: 80,
            protocol: Protocol::Tcp,
            container_port: 8080,
        }]
        .into(),
    };
    let rows = |ips: &[&str]| {
        let pods: Vec<Arc<LocalEndpoint>> = ips.iter().map(|ip| Arc::new(pod(ip))).collect();
        host_ports::rows(&pods, &BTreeSet::new())
    };
    let name = "pod:web@192.168.0.1";
    let touched = |dirty: BTreeSet<ObjectKey>| {
        dirty.iter().map(|key| key.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(touched(world.model.set_host_ports(rows(&["10.244.1.7"]))), [name]);
    assert_eq!(world.frontends(name), 1);
    assert_eq!(touched(world.model.set_host_ports(rows(&["10.244.1.7"]))), [""; 0], "idempotent");
    // A list of all services says nothing of pods.
    world.seen = (0, 0);
    world.update();
    assert_eq!((world.frontends(name), world.frontends("a")), (1, 2));
    // The pod comes back with another address.
    assert_eq!(touched(world.model.set_host_ports(rows(&["10.244.1.9"]))), [name]);
    let backends = world.model.desired(&key(name)).ports[0].backends[0].clone();
    assert_eq!(backends.len(), 1);
    assert_eq!(backends[0].addr.to_string(), "10.244.1.9");
    assert_eq!(touched(world.model.set_host_ports(rows(&[]))), [name]);
    assert_eq!((world.frontends(name), world.frontends("a")), (0, 2));
    assert!(world.model.slices.is_empty(), "nothing is left behind");
}

#[test]
fn a_service_goes_before_a_pods_port_of_the_node_and_the_pod_is_told() {
    let node = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
    let pod = LocalEndpoint {
        pod: key("web"),
        ip: "10.244.1.7".parse().unwrap(),
        netns_cookie: 0,
        host_ifindex: 1,
        host_mac: [0; 6],
        pod_mac: [0; 6],
        host_ports: [HostPort {
            host_ip: None,
            host_port: 30_080,
            protocol: Protocol::Tcp,
            container_port: 80,
        }]
        .into(),
    };
    let name = "pod:web@*";
    let mut world = World::new();
    let rows = host_ports::rows([Arc::new(pod)], &node);
    world.model.set_host_ports(rows);
    // At the node's address and at the loopback one.
    assert_eq!(world.frontends(name), 2);
    // By a node port, or by an address that is the node's; another one's is nothing to it.
    world.services.upsert(key("other"), with_ip(service(9, 30_081), "10.96.9.9"));
    assert_eq!(world.update(), ["other"]);
    world.services.upsert(key("a"), service(9, 30_080));
    assert_eq!(world.update(), ["a", name]);
    assert_eq!((world.frontends(name), world.frontends("a")), (0, 2));
    assert_eq!(
        world.model.problems()[&key(name)],
        [
            "127.0.0.1:30080/TCP is the node port of service d/a, which has it",
            "192.0.2.1:30080/TCP is the node port of service d/a, which has it",
        ]
    );
    assert!(!world.model.problems().contains_key(&key("a")));
    let with_external = ServiceRow {
        external_ips: vec!["192.0.2.1".parse().unwrap()].into(),
        ports: vec![ServicePort { port: 30_080, ..service(9, 0).ports[0].clone() }],
        ..service(9, 0)
    };
    world.services.upsert(key("a"), with_external);
    assert_eq!(world.update(), ["a", name]);
    assert_eq!((world.frontends(name), world.frontends("a")), (1, 2));
    let words = &world.model.problems()[&key(name)];
    assert!(words.len() == 1 && words[0].contains("belongs to service d/a"), "{words:?}");
    // It gets back what nobody has.
    world.services.delete(&key("a"));
    assert_eq!(world.update(), ["a", name]);
    assert_eq!(world.frontends(name), 2);
    assert!(!world.model.problems().contains_key(&key(name)));
}
