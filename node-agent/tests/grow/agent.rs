//! A running agent whose maps are too small: real connections through a service go on while they grow.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aya::{Pod, maps::lpm_trie::LpmTrie};
use ebpf_common::{
    conntrack::{Flow, FlowKey},
    maps as names,
    service::{Backend, BackendKey, Service, ServiceKey, SourceRange},
};
use node_agent::{
    cni::{
        ipam::Attachment,
        veth::{self, VethSpec},
    },
    dataplane::{self, DataplaneConfig, Report, Tables, TcPath},
    model::{
        EndpointPort, EndpointRow, EndpointSliceRow, LocalEndpoint, ObjectKey, Protocol,
        ServicePort, ServiceRow,
    },
    sys::{bpf, map::RowMap, netns::NetNs},
    table::Table,
};
use tokio::sync::{oneshot, watch};

use crate::{
    pins,
    place::{ip, is_possible},
    space::{Space, pause},
};

const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 11);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 12);
const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);
const TIMEOUT: Duration = Duration::from_secs(10);
/// The verifier's work takes a second for each of four loads, and ten times that under emulation.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Default)]
struct Cluster {
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    endpoints: Table<IpAddr, LocalEndpoint>,
}

impl Cluster {
    fn add_service(&self, number: u8) {
        let key = ObjectKey::new("default", &format!("web-{number}"));
        let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 };
        let ports = vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }];
        let slice = EndpointSliceRow {
            service: key.clone(),
            ports,
            endpoints: vec![EndpointRow { ip: SERVER.into(), ..EndpointRow::default() }],
            ..EndpointSliceRow::default()
        };
        let cluster_ips = vec![Ipv4Addr::new(10, 96, 0, number).into()];
        self.slices.upsert(key.clone(), slice);
        self.services
            .upsert(key, ServiceRow { cluster_ips, ports: vec![port], ..Default::default() });
    }

    fn remove_service(&self, number: u8) {
        let key = ObjectKey::new("default", &format!("web-{number}"));
        self.services.delete(&key);
        self.slices.delete(&key);
    }

    fn add_pod(&self, node: &Space, address: Ipv4Addr) -> Space {
        let pod = Space::new();
        let name = address.to_string();
        let spec =
            VethSpec::new(&Attachment::new(&name, "eth0"), &[address.into()], 1450, &[NODE.into()]);
        let netns = |space: &Space| PathBuf::from(format!("/proc/self/task/{}/ns/net", space.tid));
        let host = NetNs::open(&netns(node)).unwrap();
        let link = veth::attach(&host, &netns(&pod), &spec).unwrap();
        let endpoint = LocalEndpoint {
            pod: ObjectKey::new("default", &name),
            ip: address.into(),
            netns_cookie: link.netns_cookie,
            host_ifindex: link.host_ifindex,
            host_mac: spec.host_mac,
            pod_mac: spec.pod_mac,
            host_ports: [].into(),
        };
        self.endpoints.upsert(address.into(), endpoint);
        pod
    }

    fn sync(&self) {
        self.services.mark_synced();
        self.slices.mark_synced();
        self.endpoints.mark_synced();
    }
}

/// A running agent; it ends as if killed when this is dropped.
struct Agent {
    _stop: oneshot::Sender<()>,
    asked: std::sync::mpsc::Receiver<(Report, bool)>,
}

impl Agent {
    fn start(node: &Space, cluster: &Cluster, pins: PathBuf, tc: Option<TcPath>) -> Self {
        let (_stop, mut stopped) = oneshot::channel::<()>();
        let (answer, asked) = std::sync::mpsc::sync_channel(0);
        let cluster = cluster.clone();
        node.spawn_agent(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (_no_overlay, overlay) = watch::channel(None);
                let tunnels = Table::new();
                tunnels.mark_synced();
                let Cluster { services, slices, endpoints } = cluster;
                let tables = Tables { services, slices, endpoints, tunnels, overlay };
                let config = DataplaneConfig {
                    cgroup: None,
                    pins: Some(pins),
                    tc,
                    node_local: None,
                    ..DataplaneConfig::new(NODE.into())
                };
                let handle = dataplane::start(config, tables).unwrap();
                while stopped.try_recv() == Err(oneshot::error::TryRecvError::Empty) {
                    let report = handle.report().await.unwrap();
                    let report = (report, handle.pulse.borrow().behind_since.is_some());
                    // Nobody may be asking just now.
                    let _not_asked = answer.try_send(report);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        });
        Self { _stop, asked }
    }

    fn report(&self) -> Report {
        self.asked.recv_timeout(PATIENCE).expect("the agent answers").0
    }

    /// Whether load balancers are about to be told that this node does not follow the cluster.
    fn is_behind(&self) -> bool {
        self.asked.recv_timeout(PATIENCE).expect("the agent answers").1
    }

    #[track_caller]
    fn wait_for(&self, what: &str, is_so: impl Fn(&Report) -> bool) -> Report {
        let start = Instant::now();
        loop {
            let report = self.report();
            if is_so(&report) {
                return report;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {}", report.status_text());
        }
    }
}

fn serve() {
    let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
    let _server = thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _connection = thread::spawn(move || {
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            });
        }
    });
}

fn connect() -> TcpStream {
    let stream = TcpStream::connect_timeout(&SocketAddr::from(SERVICE), TIMEOUT).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

fn ask(stream: &mut TcpStream) {
    let mut byte = *b"?";
    stream.write_all(&byte).unwrap();
    stream.read_exact(&mut byte).unwrap();
}

#[test]
fn connections_and_services_go_on_while_their_maps_grow() {
    if !is_possible() {
        return;
    }
    for tc in [None, Some(TcPath::Clsact)] {
        scenario(tc);
    }
}

#[test]
fn a_map_that_may_not_grow_is_told_with_the_service_that_lacks_it() {
    if !is_possible() {
        return;
    }
    let node = Space::new();
    let cluster = Cluster::default();
    (1..=3).for_each(|number| cluster.add_service(number));
    for number in [4, 5] {
        let key = ObjectKey::new("default", &format!("limited-{number}"));
        let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 };
        let row = ServiceRow {
            cluster_ips: vec![Ipv4Addr::new(10, 96, 0, number).into()],
            ingress_ips: vec![Ipv4Addr::new(203, 0, 113, number).into()].into(),
            source_ranges: vec!["192.0.2.0/24".parse().unwrap()].into(),
            ports: vec![port],
            created_s: number.into(),
            ..ServiceRow::default()
        };
        cluster.services.upsert(key, row);
    }
    cluster.sync();
    let pins = node.bpf.join("orlop");
    let folder = pins.clone();
    node.run(move || {
        fs::create_dir_all(pins::folder(&folder)).unwrap();
        // Rows get their memory when they are written, as in the object.
        let ranges = LpmTrie::<_, SourceRange, u32>::create(1, 1).unwrap();
        ranges.pin(pins::folder(&folder).join(names::SOURCE_RANGES)).unwrap();
    });
    let agent = Agent::start(&node, &cluster, pins, None);
    let report = agent.wait_for("all but one", |report| !report.full.is_empty());
    let full: Vec<_> = report.full.iter().map(|one| (one.map, one.max, one.missing)).collect();
    assert_eq!(full, [(names::SOURCE_RANGES, 1, 1)]);
    let text = report.status_text();
    let words = "map SOURCE_RANGES has all its 1 rows taken, 1 rows are not programmed; it may not";
    assert!(text.contains(words), "{text}");
    assert!(text.contains("not programmed: default/limited-5"), "{text}");
    assert!(!text.contains("default/limited-4"), "{text}");
    assert_eq!(report.frontends, 5, "three services, and both addresses of the first limited");
    // All nodes have it to the full: none may tell load balancers to go elsewhere for that.
    assert!(!agent.is_behind());
    // What has room is written without a look at all that is there.
    cluster.add_service(6);
    let report = agent.wait_for("one more", |report| report.frontends == 6);
    let rounds = report.rounds.count;
    pause(Duration::from_secs(3));
    let report = agent.report();
    assert_eq!(report.rounds.count, rounds, "nothing has changed: {}", report.status_text());
    let text = report.status_text();
    assert!(text.contains(words) && text.contains("not programmed: default/limited-5"), "{text}");
    assert!(!agent.is_behind());
    // The other's room makes room for it.
    cluster.services.delete(&ObjectKey::new("default", "limited-4"));
    let report = agent.wait_for("the last", |report| report.full.is_empty());
    assert_eq!(report.frontends, 6, "{}", report.status_text());
    assert!(report.trouble.is_empty(), "{}", report.status_text());
}

/// What keeps maps from growing after the first has its larger copy in its place.
#[derive(Clone, Copy, Debug)]
enum Obstacle {
    /// The next one cannot be put into its place.
    SecondCopy,
    /// The programs cannot be loaded over them.
    Load,
}

impl Obstacle {
    fn put(self, folder: &Path) {
        let pin = |map: &RowMap<u32, u32>, name: &str| {
            bpf::pin(map.as_fd(), &folder.join(name)).unwrap();
        };
        let map = RowMap::create(1).unwrap();
        match self {
            Self::SecondCopy => pin(&map, "BACKENDS_new"),
            Self::Load => {
                fs::rename(folder.join(names::MEMBERS), folder.join("kept")).unwrap();
                pin(&map, names::MEMBERS);
            }
        }
    }

    fn take_away(self, folder: &Path) {
        match self {
            Self::SecondCopy => fs::remove_file(folder.join("BACKENDS_new")).unwrap(),
            Self::Load => fs::rename(folder.join("kept"), folder.join(names::MEMBERS)).unwrap(),
        }
    }
}

/// The last bytes of the addresses in the map of services that is pinned now.
fn pinned_services(node: &Space, pins: &Path) -> Vec<u8> {
    let pin = pins::folder(pins).join(names::SERVICES);
    let rows = node.run(move || RowMap::<ServiceKey, Service>::open(&pin).unwrap().dump().unwrap());
    let mut last: Vec<u8> = rows.iter().map(|(key, _)| key.addr.octets()[15]).collect();
    last.sort_unstable();
    last
}

#[test]
fn growth_that_is_cut_short_loses_no_change_of_the_meantime() {
    if !is_possible() {
        return;
    }
    for obstacle in [Obstacle::SecondCopy, Obstacle::Load] {
        cut_short(obstacle);
    }
}

fn cut_short(obstacle: Obstacle) {
    let node = Space::new();
    let cluster = Cluster::default();
    (1..=2).for_each(|number| cluster.add_service(number));
    cluster.sync();
    let pins = node.bpf.join("orlop");
    let agent = start_on_small_maps(&node, &cluster, &pins, None);
    agent.wait_for("two services", |report| report.frontends == 2 && report.trouble.is_empty());
    let folder = pins::folder(&pins);
    let blocked = folder.clone();
    node.run(move || obstacle.put(&blocked));
    (3..=5).for_each(|number| cluster.add_service(number));
    let is_told = |report: &Report| report.trouble.iter().any(|(part, _)| part.contains("room"));
    agent.wait_for("no growth", |report| {
        let [_, _, services, _] = pinned(&node, &pins);
        services > 4 && is_told(report)
    });
    // Now all that is left has room.
    (3..=5).for_each(|number| cluster.remove_service(number));
    agent.wait_for("two services again", |report| report.frontends == 2 && report.full.is_empty());
    node.run(move || obstacle.take_away(&folder));
    let report = agent.wait_for("growth", |report| report.trouble.is_empty());
    let start = Instant::now();
    while pinned_services(&node, &pins) != [1, 2] {
        assert!(start.elapsed() < PATIENCE, "{obstacle:?}: {}", report.status_text());
        pause(Duration::from_millis(50));
    }
    // Whoever looks at what is pinned sees what is written from now on.
    cluster.add_service(6);
    agent.wait_for("one more", |report| report.frontends == 3);
    assert_eq!(pinned_services(&node, &pins), [1, 2, 6], "{obstacle:?}");
}

fn scenario(tc: Option<TcPath>) {
    let node = Space::new();
    node.run(|| {
        ip(&format!(
            "link add eth0 type veth peer name lan
             addr add {NODE}/24 dev eth0
             link set lan up
             link set eth0 up"
        ));
    });
    let cluster = Cluster::default();
    let client = cluster.add_pod(&node, CLIENT);
    let server = cluster.add_pod(&node, SERVER);
    server.run(serve);
    cluster.add_service(1);
    cluster.sync();
    let pins = node.bpf.join("orlop");
    let mut agent = start_on_small_maps(&node, &cluster, &pins, tc);
    let before =
        agent.wait_for("one service", |report| report.frontends == 1 && report.trouble.is_empty());

    // Services for which there is no room make some.
    let mut open: Vec<TcpStream> = (0..20).map(|_| client.run(connect)).collect();
    (2..=20).for_each(|number| cluster.add_service(number));
    let report = agent.wait_for("all services", |report| report.frontends == 20);
    assert!(report.full.is_empty() && report.trouble.is_empty(), "{}", report.status_text());
    let (rounds, before) = (report.rounds, before.rounds);
    assert!(rounds.count > before.count && rounds.total_us > before.total_us, "{rounds:?}");
    open.iter_mut().for_each(ask);
    let [_, _, services, backends] = pinned(&node, &pins);
    assert!(services >= 32 && backends >= 32, "{services} {backends}");

    // Three quarters of 64 rows are taken by 25 connections: both halves of each.
    open.extend((20..25).map(|_| client.run(connect)));
    let start = Instant::now();
    let mut has_died = false;
    loop {
        open.iter_mut().for_each(ask);
        let [table, old, ..] = pinned(&node, &pins);
        if old > 1 && !has_died {
            // Dies in the middle of it.
            drop(agent);
            node.settle();
            open.iter_mut().for_each(ask);
            open.push(client.run(connect));
            agent = Agent::start(&node, &cluster, pins.clone(), tc);
            has_died = true;
        }
        if table >= 128 && old == 1 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{}", agent.report().status_text());
        pause(Duration::from_millis(50));
    }
    assert!(has_died);
    // Beyond what was there before.
    open.extend((0..20).map(|_| client.run(connect)));
    open.iter_mut().for_each(ask);
    let report = agent.wait_for("a walk through the table", |report| report.flows >= open.len());
    assert!(report.trouble.is_empty() && report.full.is_empty(), "{}", report.status_text());
    let dropped: Vec<_> = report.drops.iter().filter(|(_, count)| *count > 0).collect();
    assert!(dropped.is_empty(), "{dropped:?}");
}

fn start_on_small_maps(node: &Space, cluster: &Cluster, pins: &Path, tc: Option<TcPath>) -> Agent {
    let folder = pins.to_owned();
    node.run(move || {
        pins::pin::<FlowKey, Flow>(&folder, names::CONNTRACK, 64);
        pins::pin::<ServiceKey, Service>(&folder, names::SERVICES, 4);
        pins::pin::<BackendKey, Backend>(&folder, names::BACKENDS, 4);
    });
    Agent::start(node, cluster, pins.to_owned(), tc)
}

/// Rows for which the map that is pinned now has room.
fn room<K: Pod, V: Pod>(pins: &Path, name: &str) -> u32 {
    RowMap::<K, V>::open(&pins::folder(pins).join(name)).unwrap().max()
}

/// Rooms of the connection tables, the services and the backends.
fn pinned(node: &Space, pins: &Path) -> [u32; 4] {
    let pins = pins.to_owned();
    node.run(move || {
        [
            room::<FlowKey, Flow>(&pins, names::CONNTRACK),
            room::<FlowKey, Flow>(&pins, names::CONNTRACK_OLD),
            room::<ServiceKey, Service>(&pins, names::SERVICES),
            room::<BackendKey, Backend>(&pins, names::BACKENDS),
        ]
    })
}
