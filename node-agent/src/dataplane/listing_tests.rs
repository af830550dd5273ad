//! What is shown of services, page by page.

use super::*;
use crate::{
    dataplane::{
        model::NodeLocalService,
        plan::{Plan, Rows},
        select::Place,
    },
    model::{EndpointPort, Protocol, ServicePort, TrafficPolicy},
    table::Table,
};

fn key(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey::new(namespace, name)
}

fn service(ip: &str) -> ServiceRow {
    ServiceRow {
        cluster_ips: vec![ip.parse().unwrap()],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 0,
        }],
        ..ServiceRow::default()
    }
}

fn slice(service: ObjectKey, endpoints: Vec<EndpointRow>) -> EndpointSliceRow {
    let ports = vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }];
    EndpointSliceRow { service, ports, endpoints, ..EndpointSliceRow::default() }
}

fn endpoint(ip: &str, node: &str) -> EndpointRow {
    EndpointRow { ip: ip.parse().unwrap(), node: node.into(), ..EndpointRow::default() }
}

struct World {
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    model: Model,
    observed: Observed,
    missing: BTreeSet<ServiceKey>,
}

impl World {
    fn new() -> Self {
        let dns = NodeLocalService {
            service: key("kube-system", "kube-dns"),
            address: "169.254.20.10".parse().unwrap(),
        };
        let mut model = Model::new(Some(dns));
        model.set_place(Place { node: "here".into(), zone: "".into() });
        Self {
            services: Table::new(),
            slices: Table::new(),
            model,
            observed: Observed::default(),
            missing: BTreeSet::new(),
        }
    }

    fn follow(&mut self) {
        let (services, slices) = (self.services.changes_since(0), self.slices.changes_since(0));
        self.model.update(services, slices);
    }

    fn program(&mut self) {
        self.follow();
        let all: Vec<ObjectKey> = self.model.services().cloned().collect();
        for key in all {
            let desired = self.model.desired(&key);
            self.observed.plan_service(&key, &desired.ports, &mut Plan::default());
        }
    }

    fn page(&self, wanted: &Wanted) -> Page {
        let (model, missing) = (&self.model, &self.missing);
        let sight =
            Sight { model, observed: Some(&self.observed), missing, unserved: &Problems::new() };
        page(sight, wanted)
    }

    /// `namespace/name kind frontend [backends]` of every row, and what is special.
    fn lines(&self, wanted: &Wanted) -> Vec<String> {
        let line = |row: &FrontendRow| {
            let backend = |one: &BackendRow| format!("{} {} {}", one.address, one.state, one.node);
            let backends: Vec<String> = row.backends.iter().map(backend).collect();
            let frontend = row.frontend.as_deref().unwrap_or("-");
            let mut line = format!("{} {} {frontend} {backends:?}", row.service, row.kind);
            if row.is_local {
                line += " local";
            }
            if row.affinity_s > 0 {
                line += &format!(" {} s", row.affinity_s);
            }
            if let Some(ranges) = &row.source_ranges {
                line += &format!(" {ranges:?}");
            }
            row.problems.iter().fold(line, |line, words| line + "; " + words)
        };
        self.page(wanted).rows.iter().map(line).collect()
    }
}

#[test]
fn every_frontend_is_shown_with_its_backends_as_they_are() {
    let mut world = World::new();
    let row = ServiceRow {
        kind: ServiceKind::LoadBalancer,
        ingress_ips: vec!["192.0.2.2".parse().unwrap()].into(),
        external_ips: vec!["192.0.2.1".parse().unwrap()].into(),
        external_policy: TrafficPolicy::Local,
        source_ranges: vec!["10.0.0.0/8".parse().unwrap()].into(),
        affinity_s: 60,
        ports: vec![ServicePort { node_port: 30_080, ..service("10.96.0.1").ports[0].clone() }],
        rejected: vec!["spec.externalIPs[1] \"x\" is no IP address".into()].into(),
        ..service("10.96.0.1")
    };
    world.services.upsert(key("d", "web"), row);
    let old = EndpointRow { ready: false, terminating: true, ..endpoint("10.244.0.3", "here") };
    let endpoints = vec![old, endpoint("10.244.1.2", "there"), endpoint("10.244.0.2", "here")];
    world.slices.upsert(key("d", "web-1"), slice(key("d", "web"), endpoints));
    world.program();
    let ready = "\"10.244.0.2:8080 ready here\"";
    let both = format!("[{ready}, \"10.244.1.2:8080 ready there\"]");
    assert_eq!(
        world.lines(&Wanted::default()),
        [
            format!(
                "d/web ClusterIP 10.96.0.1:80/TCP {both} 60 s; spec.externalIPs[1] \"x\" is no IP address"
            ),
            format!("d/web LoadBalancer 192.0.2.2:80/TCP {both} 60 s [10.0.0.0/8]"),
            format!(
                "d/web LoadBalancer 192.0.2.2:80/TCP from outside [{ready}] local 60 s [10.0.0.0/8]"
            ),
            format!("d/web ExternalIP 192.0.2.1:80/TCP {both} 60 s"),
            format!("d/web ExternalIP 192.0.2.1:80/TCP from outside [{ready}] local 60 s"),
            format!("d/web NodePort node:30080/TCP {both} 60 s"),
            format!("d/web NodePort node:30080/TCP from outside [{ready}] local 60 s"),
        ]
    );
}

#[test]
fn what_differs_from_the_slices_is_told() {
    let mut world = World::new();
    for (name, ip) in [("web", "10.96.0.1"), ("full", "10.96.0.2")] {
        world.services.upsert(key("d", name), service(ip));
        let pods = vec![endpoint("10.244.0.2", "here"), endpoint("10.244.0.3", "here")];
        world.slices.upsert(key("d", name), slice(key("d", name), pods));
    }
    world.services.upsert(key("kube-system", "kube-dns"), service("10.96.0.10"));
    let headless = ServiceRow { kind: ServiceKind::Headless, ..ServiceRow::default() };
    world.services.upsert(key("d", "less"), headless);
    world.program();
    // After the round: one pod goes, one drains.
    let drains = EndpointRow { ready: false, terminating: true, ..endpoint("10.244.0.2", "here") };
    world.slices.upsert(key("d", "web"), slice(key("d", "web"), vec![drains]));
    world.follow();
    world.missing.insert(frontends::key(
        ebpf_common::addr::Addr::v4([10, 96, 0, 2]),
        80,
        Protocol::Tcp,
    ));
    assert_eq!(
        world.lines(&Wanted::default()),
        [
            "d/full ClusterIP 10.96.0.2:80/TCP [\"10.244.0.2:8080 ready here\", \"10.244.0.3:8080 ready here\"]; \
             not programmed: a map is full or could not be written",
            "d/less Headless - []; its name leads to pods",
            "d/web ClusterIP 10.96.0.1:80/TCP [\"10.244.0.2:8080 terminating here\", \"10.244.0.3:8080 gone \"]",
            "kube-system/kube-dns ClusterIP 10.96.0.10:80/TCP [\"169.254.20.10:80 this node \"]",
        ]
    );
}

#[test]
fn what_an_earlier_agent_left_is_shown_as_that() {
    let mut world = World::new();
    world.services.upsert(key("d", "web"), service("10.96.0.1"));
    world.follow();
    let at = frontends::key(ebpf_common::addr::Addr::v4([10, 96, 0, 1]), 80, Protocol::Tcp);
    let services = vec![(at, Service { set: 3, count: 0, service: 9, ..Service::default() })];
    world.observed = Observed::from_rows(Rows { services, ..Rows::default() }).0;
    assert_eq!(
        world.lines(&Wanted::default()),
        [
            "d/web ClusterIP 10.96.0.1:80/TCP []; as an earlier agent left it, until the server has spoken"
        ]
    );
}

#[test]
fn a_hundred_thousand_services_are_told_in_bounded_pages_and_filters_hold() {
    let mut world = World::new();
    let rows = (0..2_500_u32).map(|n| {
        let ip = IpAddr::from((0x0a60_0001 + n).to_be_bytes());
        (key(&format!("n{}", n % 2), &format!("s{n:04}")), service(&ip.to_string()))
    });
    world.services.replace(rows.collect());
    world.program();
    let mut wanted = Wanted::default();
    let (mut seen, mut pages) = (Vec::new(), 0);
    loop {
        let page = world.page(&wanted);
        assert!(page.rows.len() <= SERVICES);
        seen.extend(page.rows.into_iter().map(|row| row.service));
        pages += 1;
        wanted.after = page.next;
        if wanted.after.is_none() {
            break;
        }
    }
    assert_eq!((pages, seen.len()), (3, 2_500));
    assert!(seen.is_sorted(), "each once");

    let of = |namespace: Option<&str>, name: Option<&str>| {
        let owned = |text: &str| text.to_owned();
        let wanted = Wanted { namespace: namespace.map(owned), name: name.map(owned), after: None };
        world.page(&wanted)
    };
    let page = of(Some("n0"), None);
    assert!(page.rows.iter().all(|row| &*row.service.namespace == "n0") && page.next.is_some());
    assert_eq!(of(None, Some("s2499")).rows.len(), 1);
    assert_eq!(of(Some("n0"), Some("s2499")).rows.len(), 0);
    assert_eq!(of(Some("n1"), Some("s2499")).rows[0].service, key("n1", "s2499"));
}

#[test]
fn a_page_ends_where_it_has_many_rows_and_a_long_set_is_counted() {
    let mut world = World::new();
    let pod = |n: u32| {
        let ip = IpAddr::from((0x0af4_0000 + n).to_be_bytes());
        EndpointRow { ip, ..EndpointRow::default() }
    };
    for n in 0..30_u8 {
        let key = key("d", &format!("s{n:02}"));
        world.services.upsert(key.clone(), service(&format!("10.96.0.{n}")));
        world.slices.upsert(key.clone(), slice(key, (0..1_500).map(pod).collect()));
    }
    world.program();
    let page = world.page(&Wanted::default());
    let row = &page.rows[0];
    assert_eq!((row.backends.len(), row.left_out), (BACKENDS, 500));
    assert_eq!(page.rows.len(), ROWS.div_ceil(1 + BACKENDS));
    assert!(page.next.is_some());
}
