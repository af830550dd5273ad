//! Two nodes of a cluster with their pods, each in a network namespace, joined by a bridge: overlay and
//! dataplane run from tables, and servers and clients are real sockets.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use node_agent::{
    cni::{
        ipam::Attachment,
        veth::{self, VethSpec},
    },
    dataplane::{self, DataplaneConfig, Tables, TcPath, XdpMode, xdp::XdpPath},
    model::{
        EndpointPort, EndpointRow, EndpointSliceRow, Family, LocalEndpoint, NodeRow, ObjectKey,
        Protocol, ServiceKind, ServicePort, ServiceRow,
    },
    overlay::{self, Mode, OverlayConfig},
    sys::netns::NetNs,
    table::Table,
};
use tokio::sync::oneshot;

use crate::{place::ip, space::Space};

pub(crate) const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);
pub(crate) const NODE_PORT: u16 = 30_080;
/// An agent that does not come up at all fails. The verifier's work takes half a second on a machine
/// and ten times that where the processor is emulated, for two agents at once.
const START: Duration = Duration::from_secs(60);
pub(crate) const TIMEOUT: Duration = Duration::from_secs(3);

/// The tables that both nodes share, as if watched from one server.
#[derive(Clone, Default)]
pub(crate) struct Cluster {
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
    nodes: Table<ObjectKey, NodeRow>,
}

impl Cluster {
    fn new(node_ips: NodeIps) -> Self {
        let cluster = Self::default();
        for number in 1..=2 {
            let row = NodeRow {
                internal_ips: node_ips(number),
                pod_cidrs: vec![
                    format!("10.244.{number}.0/24").parse().unwrap(),
                    format!("fd00:244:0:{number}::/64").parse().unwrap(),
                ],
                ready: true,
                leaving: false,
                labels: BTreeMap::new(),
            };
            cluster.nodes.upsert(ObjectKey::new("", &name(number)), row);
        }
        cluster.set_node_port(NODE_PORT);
        cluster.nodes.mark_synced();
        cluster.services.mark_synced();
        cluster.set_backends(&[]);
        cluster.slices.mark_synced();
        cluster
    }

    /// Gives the service this node port; 0 takes it away.
    pub(crate) fn set_node_port(&self, node_port: u16) {
        let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| ServicePort {
            name: format!("{protocol:?}").into(),
            protocol,
            port: SERVICE.1,
            node_port,
        });
        let row = ServiceRow {
            kind: ServiceKind::NodePort,
            cluster_ips: vec![SERVICE.0.into(), "fd00:96::1".parse().unwrap()],
            ports: ports.to_vec(),
            ..ServiceRow::default()
        };
        self.services.upsert(ObjectKey::new("default", "web"), row);
    }

    pub(crate) fn with_backends(node_ips: NodeIps, pods: &[Ipv4Addr]) -> Self {
        let cluster = Self::new(node_ips);
        cluster.set_backends(pods);
        cluster
    }

    /// Gives the service these pods, in both families.
    pub(crate) fn set_backends(&self, pods: &[Ipv4Addr]) {
        let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| EndpointPort {
            name: format!("{protocol:?}").into(),
            protocol,
            port: 8080,
        });
        let six = |ip: &Ipv4Addr| pod_ip6(ip.octets()[2], ip.octets()[3]);
        for (family, ips) in [
            (Family::V4, pods.iter().map(|ip| (*ip).into()).collect::<Vec<IpAddr>>()),
            (Family::V6, pods.iter().map(six).collect()),
        ] {
            let row = EndpointSliceRow {
                service: ObjectKey::new("default", "web"),
                family,
                ports: ports.to_vec(),
                endpoints: ips
                    .into_iter()
                    .map(|ip| EndpointRow { ip, ..EndpointRow::default() })
                    .collect(),
                ..EndpointSliceRow::default()
            };
            self.slices.upsert(ObjectKey::new("default", &format!("web-{family:?}")), row);
        }
    }
}

fn name(number: u8) -> String {
    format!("node-{number}")
}

pub(crate) const fn node_ip(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 0, number)
}

pub(crate) const fn pod_ip(node: u8, pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, pod)
}

/// The addresses by which nodes know each other.
pub(crate) type NodeIps = fn(u8) -> Vec<IpAddr>;

pub(crate) fn both_families(number: u8) -> Vec<IpAddr> {
    [vec![node_ip(number).into()], ipv6_alone(number)].concat()
}

pub(crate) fn ipv6_alone(number: u8) -> Vec<IpAddr> {
    vec![format!("2001:db8::{number}").parse().unwrap()]
}

pub(crate) fn pod_ip6(node: u8, pod: u8) -> IpAddr {
    format!("fd00:244:0:{node}::{pod}").parse().unwrap()
}

pub(crate) struct Node {
    number: u8,
    ips: Vec<IpAddr>,
    pub(crate) space: Space,
    endpoints: Table<IpAddr, LocalEndpoint>,
    pub(crate) pods: BTreeMap<u8, Space>,
}

impl Node {
    pub(crate) fn new(number: u8, node_ips: NodeIps, lan: &Space) -> Self {
        let space = Space::new();
        plug(lan, &space, number);
        let endpoints = Table::new();
        endpoints.mark_synced();
        Self { number, ips: node_ips(number), space, endpoints, pods: BTreeMap::new() }
    }

    /// A pod as the CNI server makes it, with a server that says the pod's last byte.
    pub(crate) fn add_pod(&mut self, last: u8) {
        let pod = Space::new();
        let ips = [pod_ip(self.number, last).into(), pod_ip6(self.number, last)];
        let attachment = Attachment::new(&format!("pod-{last}"), "eth0");
        let spec = VethSpec::new(&attachment, &ips, 1430, &self.ips);
        let netns = |space: &Space| PathBuf::from(format!("/proc/self/task/{}/ns/net", space.tid));
        let host = NetNs::open(&netns(&self.space)).unwrap();
        let link = veth::attach(&host, &netns(&pod), &spec).unwrap();
        pod.run(move || serve(last));
        for ip in ips {
            let endpoint = LocalEndpoint {
                pod: ObjectKey::new("default", &format!("pod-{last}")),
                ip,
                netns_cookie: link.netns_cookie,
                host_ifindex: link.host_ifindex,
                host_mac: spec.host_mac,
                pod_mac: spec.pod_mac,
                host_ports: [].into(),
            };
            self.endpoints.upsert(ip, endpoint);
        }
        self.pods.insert(last, pod);
    }

    /// Starts the agent's overlay and dataplane on this node; it runs until what is returned is
    /// dropped, and then stops as if killed.
    pub(crate) fn start(&self, cluster: &Cluster, set_up: SetUp) -> oneshot::Sender<()> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (number, ips, cluster) = (self.number, self.ips.clone(), cluster.clone());
        let endpoints = self.endpoints.clone();
        let revision = endpoints.changes_since(0).revision;
        let (ready, is_ready) = std::sync::mpsc::channel();
        self.space.spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let config = OverlayConfig {
                    mode: set_up.mode,
                    ..OverlayConfig::new(&name(number), ips.clone())
                };
                let overlay = overlay::start(config, cluster.nodes).unwrap();
                let tables = Tables {
                    services: cluster.services,
                    slices: cluster.slices,
                    endpoints,
                    tunnels: overlay.tunnels.clone(),
                    overlay: overlay.device.clone(),
                };
                let config = DataplaneConfig {
                    cgroup: set_up.cgroup,
                    pins: set_up.pins,
                    tc: set_up.tc,
                    xdp: set_up.xdp,
                    ..DataplaneConfig::new(ips[0])
                };
                let handle = dataplane::start(config, tables).unwrap();
                let start = Instant::now();
                loop {
                    let report = handle.report().await.unwrap();
                    let pods = *handle.programmed.borrow() >= revision;
                    if pods && report.frontends == 8 && overlay.device.borrow().is_some() {
                        assert!(report.trouble.is_empty(), "{}", report.status_text());
                        break;
                    }
                    assert!(start.elapsed() < START, "{}", report.status_text());
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let report = handle.report().await.unwrap();
                assert!(set_up.tc.is_none() || set_up.tc == report.tc, "{:?}", report.tc);
                let is_native = report.xdp["eth0"] == XdpPath::Native;
                assert_eq!(is_native, set_up.xdp == XdpMode::Native, "{:?}", report.xdp);
                ready.send(()).unwrap();
                // Dropped sender or message: both mean stop.
                let _stop: Result<(), _> = stopped.await;
            });
        });
        is_ready.recv_timeout(START).expect("the agent comes up");
        stop
    }
}

#[derive(Clone)]
pub(crate) struct SetUp {
    pub(crate) mode: Mode,
    pub(crate) tc: Option<TcPath>,
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) pins: Option<PathBuf>,
    pub(crate) xdp: XdpMode,
}

/// The bridge of the LAN, in a space of its own.
pub(crate) fn make_bridge() {
    ip("link add lan type bridge");
    ip("link set lan up");
}

/// Connects a space to the LAN's bridge by a veth pair, with 192.168.0.`number`.
pub(crate) fn plug(lan: &Space, space: &Space, number: u8) {
    let tid = space.tid;
    lan.run(move || {
        ip(&format!("link add port{number} type veth peer name eth0 netns {tid}"));
        ip(&format!("link set port{number} master lan up"));
    });
    space.run(move || {
        ip(&format!("addr add {}/24 dev eth0", node_ip(number)));
        ip(&format!("addr add 2001:db8::{number}/64 dev eth0 nodad"));
        ip("link set eth0 up");
    });
}

/// TCP and UDP servers at port 8080 that say a number.
pub(crate) fn serve(number: u8) {
    let listener = TcpListener::bind("[::]:8080").unwrap();
    let _tcp = thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let _connection = thread::spawn(move || answer(stream, number));
        }
    });
    let socket = UdpSocket::bind("[::]:8080").unwrap();
    let _udp = thread::spawn(move || {
        let mut bytes = vec![0; 65_536];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&vec![number; count], from).unwrap();
        }
    });
}

/// Answers each byte with the number until the client closes.
fn answer(mut stream: TcpStream, number: u8) {
    let mut bytes = vec![0; 65_536];
    while let Ok(count @ 1..) = stream.read(&mut bytes)
        && stream.write_all(&vec![number; count]).is_ok()
    {}
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

pub(crate) fn ask(stream: &mut TcpStream) -> u8 {
    let mut byte = *b"?";
    stream.write_all(&byte).unwrap();
    stream.read_exact(&mut byte).unwrap();
    byte[0]
}

/// Who answers how often, over TCP.
pub(crate) fn tcp(address: impl Into<SocketAddr>, count: usize) -> BTreeMap<u8, usize> {
    let address = address.into();
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        *seen.entry(ask(&mut connect(address))).or_default() += 1;
    }
    seen
}

/// Who answers how often, over UDP.
pub(crate) fn udp(address: impl Into<SocketAddr>, count: usize) -> BTreeMap<u8, usize> {
    let address = address.into();
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        let socket = UdpSocket::bind((any_of(address), 0)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.send_to(b"?", address).unwrap();
        let mut byte = [0];
        let (_, from) = socket.recv_from(&mut byte).unwrap();
        assert_eq!(from, address);
        *seen.entry(byte[0]).or_default() += 1;
    }
    seen
}

/// "Any address" of an address's family.
pub(crate) const fn any_of(address: SocketAddr) -> IpAddr {
    match address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

pub(crate) fn answered_by(seen: &BTreeMap<u8, usize>) -> Vec<u8> {
    seen.keys().copied().collect()
}
