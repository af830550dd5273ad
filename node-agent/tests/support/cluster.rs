//! Two nodes of a cluster with their pods, each in a network namespace, joined by a bridge: overlay and
//! dataplane run from tables, and servers and clients are real sockets.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
    thread,
    time::Duration,
};

use ipnet::IpNet;
use nix::sys::{
    socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};
use node_agent::{
    cni::CniConfig,
    dataplane::{DataplaneConfig, Handle, TcPath, XdpMode, xdp::XdpPath},
    model::{
        EndpointPort, EndpointRow, EndpointSliceRow, Family, LocalEndpoint, NodeRow, ObjectKey,
        Protocol, ServiceKind, ServicePort, ServiceRow,
    },
    overlay::{Mode, OverlayConfig},
    table::Table,
};

pub(crate) mod agent;
pub(crate) mod place;
pub(crate) mod space;

use self::{
    agent::{Agent, Followed},
    place::ip,
    space::Space,
};

pub(crate) const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);
/// The service's other address.
pub(crate) const SERVICE6: (Ipv6Addr, u16) =
    (Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1), SERVICE.1);
/// Where its pods answer. SCTP is asked at the same port, which it keeps.
pub(crate) const POD_PORT: u16 = 8080;
pub(crate) const NODE_PORT: u16 = 30_080;
/// How long an answer may take that must come. What is lost is sent again after 1, 3 and 7 s.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a refusal may take, or is listened for an answer that may not come: less than until the kernel itself says
/// that a neighbour is silent, after 3 s.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(2_900);

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
            agent::add_node(&cluster.nodes, number, node_ips(number));
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
        let port = |protocol, port, node_port| ServicePort {
            name: format!("{protocol:?}").into(),
            protocol,
            port,
            node_port,
        };
        let ports = [
            port(Protocol::Tcp, SERVICE.1, node_port),
            port(Protocol::Udp, SERVICE.1, node_port),
            port(Protocol::Sctp, POD_PORT, 0),
        ];
        let row = ServiceRow {
            kind: ServiceKind::NodePort,
            cluster_ips: vec![SERVICE.0.into(), SERVICE6.0.into()],
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

    /// Waits until these agents have programmed what the tables say now.
    pub(crate) fn settle(&self, agents: &[Agent]) {
        agents.iter().for_each(|agent| agent.settle(&self.services, &self.slices, 0));
    }

    /// Gives the service these pods, in both families.
    pub(crate) fn set_backends(&self, pods: &[Ipv4Addr]) {
        let six = |ip: &Ipv4Addr| pod_ip6(ip.octets()[2], ip.octets()[3]);
        self.set_endpoints(
            pods.iter().map(|ip| (*ip).into()).collect(),
            pods.iter().map(six).collect(),
        );
    }

    /// Gives the service these backends by family.
    pub(crate) fn set_endpoints(&self, four: Vec<IpAddr>, six: Vec<IpAddr>) {
        let port = |protocol| EndpointPort {
            name: format!("{protocol:?}").into(),
            protocol,
            port: POD_PORT,
        };
        let ports = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(port);
        for (family, ips) in [(Family::V4, four), (Family::V6, six)] {
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

/// The second node's port for the service, at each of the node's addresses.
pub(crate) fn node_ports() -> [SocketAddr; 2] {
    [0, 1].map(|family| SocketAddr::new(both_families(2)[family], NODE_PORT))
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
    pub(crate) endpoints: Table<IpAddr, LocalEndpoint>,
    pub(crate) pods: BTreeMap<u8, Space>,
    /// Where the agent's CNI server has its state, its socket and what it installs; `None`: no server.
    pub(crate) cni: Option<PathBuf>,
}

impl Node {
    pub(crate) fn new(number: u8, node_ips: NodeIps, lan: &Space) -> Self {
        let space = Space::new();
        plug(lan, &space, number);
        let endpoints = Table::new();
        endpoints.mark_synced();
        let (ips, pods) = (node_ips(number), BTreeMap::new());
        Self { number, ips, space, endpoints, pods, cni: None }
    }

    /// A pod with a server that says its last byte.
    pub(crate) fn add_pod(&mut self, last: u8) {
        let ips = [pod_ip(self.number, last).into(), pod_ip6(self.number, last)];
        let pod = agent::add_pod((&self.space, &self.ips), (last, &ips, 1430), &self.endpoints);
        pod.run(move || serve(last));
        self.pods.insert(last, pod);
    }

    /// Starts the agent's overlay and dataplane on this node; it runs until what is returned is
    /// dropped, and then stops as if killed.
    pub(crate) fn start(&self, cluster: &Cluster, set_up: SetUp) -> Agent {
        let service_cidrs: Vec<IpNet> =
            ["10.96.0.0/16", "fd00:96::/108"].map(|cidr| cidr.parse().unwrap()).into();
        let overlay = OverlayConfig {
            mode: set_up.mode,
            service_cidrs: service_cidrs.clone(),
            ..OverlayConfig::new(&name(self.number), self.ips.clone())
        };
        let dataplane = DataplaneConfig {
            cgroup: set_up.cgroup,
            pins: set_up.pins,
            tc: set_up.tc,
            xdp: set_up.xdp,
            service_cidrs,
            ..DataplaneConfig::new(self.ips[0])
        };
        let Cluster { services, slices, nodes } = cluster.clone();
        let cni = self.cni.as_ref().map(|folder| CniConfig {
            conf_dir: folder.join("net.d"),
            bin_dir: folder.join("bin"),
            node_ips: self.ips.clone(),
            ..CniConfig::new(folder, folder)
        });
        let endpoints = self.endpoints.clone();
        let followed = Followed { services, slices, nodes, endpoints, cni };
        let is_up = async move |handle: &Handle| {
            let report = handle.report().await?;
            if report.frontends != 10 {
                return None;
            }
            assert!(report.trouble.is_empty(), "{}", report.status_text());
            assert!(set_up.tc.is_none() || set_up.tc == report.tc, "{:?}", report.tc);
            let runs = match report.xdp["eth0"] {
                XdpPath::Native => XdpMode::Native,
                XdpPath::Generic => XdpMode::Generic,
                XdpPath::NativeAlone | XdpPath::Tc(_) => XdpMode::Off,
            };
            assert_eq!(runs, set_up.xdp, "{:?}", report.xdp);
            Some(agent::followed(handle))
        };
        let (stop, up) = agent::start(&self.space, (overlay, dataplane), followed, is_up);
        Agent::new(stop, up)
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
    ip("link add lan type bridge\nlink set lan up");
}

/// Connects a space to the LAN's bridge by a veth pair, with 192.168.0.`number`.
pub(crate) fn plug(lan: &Space, space: &Space, number: u8) {
    let tid = space.tid;
    lan.run(move || {
        ip(&format!(
            "link add port{number} type veth peer name eth0 netns {tid}
             link set port{number} master lan up"
        ));
    });
    space.run(move || {
        ip(&format!(
            "addr add {}/24 dev eth0
             addr add 2001:db8::{number}/64 dev eth0 nodad
             link set eth0 up",
            node_ip(number)
        ));
    });
}

/// TCP and UDP servers at port 8080 that say a number.
pub(crate) fn serve(number: u8) {
    let address = Ipv6Addr::UNSPECIFIED;
    let listener = TcpListener::bind((address, POD_PORT)).unwrap();
    let _tcp = thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let _connection = thread::spawn(move || answer(stream, number));
        }
    });
    let socket = UdpSocket::bind((address, POD_PORT)).unwrap();
    let _udp = thread::spawn(move || {
        let mut bytes = vec![0; 65_536];
        while let Ok((count, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&vec![number; count], from).unwrap();
        }
    });
}

/// Answers each byte with the number until the client closes.
pub(crate) fn answer(mut stream: TcpStream, number: u8) {
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

/// Asks a service and then its backend itself from the same port, over TCP and over UDP: who answers to each while
/// both go on. Sockets that are connected hear nobody else.
pub(crate) fn from_one_port(from: SocketAddr, [service, backend]: [SocketAddr; 2]) -> Vec<u8> {
    let mut answers = Vec::new();
    let mut streams =
        [service, backend].map(|to| TcpStream::from(connected(from, to, SockType::Stream)));
    let sockets =
        [service, backend].map(|to| UdpSocket::from(connected(from, to, SockType::Datagram)));
    for _ in 0..3 {
        answers.extend(streams.each_mut().map(ask));
        answers.extend(sockets.each_ref().map(|socket| {
            let mut byte = *b"?";
            socket.send(&byte).unwrap();
            assert_eq!(socket.recv(&mut byte).unwrap(), 1);
            byte[0]
        }));
    }
    answers
}

/// A socket at a port that others may have too, connected.
fn connected(from: SocketAddr, to: SocketAddr, kind: SockType) -> OwnedFd {
    let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::empty(), None).unwrap();
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    let timeout = TimeVal::seconds(i64::try_from(TIMEOUT.as_secs()).unwrap());
    setsockopt(&socket, sockopt::SendTimeout, &timeout).unwrap();
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).unwrap();
    bind(socket.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
    socket
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
