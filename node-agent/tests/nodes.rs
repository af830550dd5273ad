//! Two nodes, their pods and a client outside, each in a network namespace: the overlay, the
//! dataplane and its restart from tables to answered requests, on both ways of attaching programs.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/space.rs"]
mod space;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::{ErrorKind, Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
        path::PathBuf,
        thread,
        time::{Duration, Instant},
    };

    use node_agent::{
        cni::{
            ipam::Attachment,
            veth::{self, VethSpec},
        },
        dataplane::{self, DataplaneConfig, Tables, TcPath},
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, LocalEndpoint, NodeRow, ObjectKey,
            Protocol, ServiceKind, ServicePort, ServiceRow,
        },
        overlay::{self, Mode, OverlayConfig},
        sys::netns::NetNs,
        table::Table,
    };
    use tokio::sync::oneshot;

    use super::{
        cgroup::TestCgroup,
        place::{ip, is_possible},
        space::{Space, pause},
    };

    const SERVICE: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 0, 1), 80);
    const NODE_PORT: u16 = 30_080;
    /// An agent that does not come up at all fails. The verifier's work takes half a second on a machine
    /// and ten times that where the processor is emulated, for two agents at once.
    const START: Duration = Duration::from_secs(60);
    const TIMEOUT: Duration = Duration::from_secs(3);

    /// The tables that both nodes share, as if watched from one server.
    #[derive(Clone, Default)]
    struct Cluster {
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
            let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| ServicePort {
                name: format!("{protocol:?}").into(),
                protocol,
                port: SERVICE.1,
                node_port: NODE_PORT,
            });
            let row = ServiceRow {
                kind: ServiceKind::NodePort,
                cluster_ips: vec![SERVICE.0.into()],
                ports: ports.to_vec(),
                ..ServiceRow::default()
            };
            cluster.services.upsert(ObjectKey::new("default", "web"), row);
            cluster.nodes.mark_synced();
            cluster.services.mark_synced();
            cluster.set_backends(&[]);
            cluster.slices.mark_synced();
            cluster
        }

        fn with_backends(node_ips: NodeIps, pods: &[Ipv4Addr]) -> Self {
            let cluster = Self::new(node_ips);
            cluster.set_backends(pods);
            cluster
        }

        fn set_backends(&self, pods: &[Ipv4Addr]) {
            let ports = [Protocol::Tcp, Protocol::Udp].map(|protocol| EndpointPort {
                name: format!("{protocol:?}").into(),
                protocol,
                port: 8080,
            });
            let endpoints =
                pods.iter().map(|ip| EndpointRow { ip: (*ip).into(), ..EndpointRow::default() });
            let row = EndpointSliceRow {
                service: ObjectKey::new("default", "web"),
                ports: ports.to_vec(),
                endpoints: endpoints.collect(),
                ..EndpointSliceRow::default()
            };
            self.slices.upsert(ObjectKey::new("default", "web-1"), row);
        }
    }

    fn name(number: u8) -> String {
        format!("node-{number}")
    }

    const fn node_ip(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 0, number)
    }

    const fn pod_ip(node: u8, pod: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, node, pod)
    }

    /// The addresses by which nodes know each other.
    type NodeIps = fn(u8) -> Vec<IpAddr>;

    fn both_families(number: u8) -> Vec<IpAddr> {
        [vec![node_ip(number).into()], ipv6_alone(number)].concat()
    }

    fn ipv6_alone(number: u8) -> Vec<IpAddr> {
        vec![format!("2001:db8::{number}").parse().unwrap()]
    }

    fn pod_ip6(node: u8, pod: u8) -> IpAddr {
        format!("fd00:244:0:{node}::{pod}").parse().unwrap()
    }

    struct Node {
        number: u8,
        ips: Vec<IpAddr>,
        space: Space,
        endpoints: Table<IpAddr, LocalEndpoint>,
        pods: BTreeMap<u8, Space>,
    }

    impl Node {
        fn new(number: u8, node_ips: NodeIps, lan: &Space) -> Self {
            let space = Space::new();
            plug(lan, &space, number);
            let endpoints = Table::new();
            endpoints.mark_synced();
            Self { number, ips: node_ips(number), space, endpoints, pods: BTreeMap::new() }
        }

        /// A pod as the CNI server makes it, with a server that says the pod's last byte.
        fn add_pod(&mut self, last: u8) {
            let pod = Space::new();
            let ips = [pod_ip(self.number, last).into(), pod_ip6(self.number, last)];
            let attachment = Attachment::new(&format!("pod-{last}"), "eth0");
            let spec = VethSpec::new(&attachment, &ips, 1430, &self.ips);
            let netns =
                |space: &Space| PathBuf::from(format!("/proc/self/task/{}/ns/net", space.tid));
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
        fn start(&self, cluster: &Cluster, set_up: SetUp) -> oneshot::Sender<()> {
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
                        ..DataplaneConfig::new(ips[0])
                    };
                    let handle = dataplane::start(config, tables).unwrap();
                    let start = Instant::now();
                    loop {
                        let report = handle.report().await.unwrap();
                        let pods = *handle.programmed.borrow() >= revision;
                        if pods && report.frontends == 4 && overlay.device.borrow().is_some() {
                            assert!(report.trouble.is_empty(), "{}", report.status_text());
                            break;
                        }
                        assert!(start.elapsed() < START, "{}", report.status_text());
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    let path = handle.report().await.unwrap().tc;
                    assert!(set_up.tc.is_none() || set_up.tc == path, "{path:?}");
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
    struct SetUp {
        mode: Mode,
        tc: Option<TcPath>,
        cgroup: Option<PathBuf>,
        pins: Option<PathBuf>,
    }

    /// Connects a space to the LAN's bridge by a veth pair, with 192.168.0.`number`.
    fn plug(lan: &Space, space: &Space, number: u8) {
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
    fn serve(number: u8) {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        let _tcp = thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let _connection = thread::spawn(move || answer(stream, number));
            }
        });
        let socket = UdpSocket::bind("0.0.0.0:8080").unwrap();
        let _udp = thread::spawn(move || {
            let mut bytes = [0; 2048];
            while let Ok((_, from)) = socket.recv_from(&mut bytes) {
                socket.send_to(&[number], from).unwrap();
            }
        });
    }

    /// Answers each byte with the number until the client closes.
    fn answer(mut stream: TcpStream, number: u8) {
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && stream.write_all(&[number]).is_ok() {}
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect_timeout(&address, TIMEOUT).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    fn ask(stream: &mut TcpStream) -> u8 {
        let mut byte = *b"?";
        stream.write_all(&byte).unwrap();
        stream.read_exact(&mut byte).unwrap();
        byte[0]
    }

    /// Who answers how often, over TCP.
    fn tcp(address: (Ipv4Addr, u16), count: usize) -> BTreeMap<u8, usize> {
        let mut seen = BTreeMap::new();
        for _ in 0..count {
            *seen.entry(ask(&mut connect(address.into()))).or_default() += 1;
        }
        seen
    }

    /// Who answers how often, over UDP.
    fn udp(address: (Ipv4Addr, u16), count: usize) -> BTreeMap<u8, usize> {
        let mut seen = BTreeMap::new();
        for _ in 0..count {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
            socket.send_to(b"?", address).unwrap();
            let mut byte = [0];
            let (_, from) = socket.recv_from(&mut byte).unwrap();
            assert_eq!(from, address.into());
            *seen.entry(byte[0]).or_default() += 1;
        }
        seen
    }

    fn answered_by(seen: &BTreeMap<u8, usize>) -> Vec<u8> {
        seen.keys().copied().collect()
    }

    #[test]
    fn two_nodes() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("nodes");
        for (mode, tc) in [
            (Mode::Vxlan, None),
            (Mode::Vxlan, Some(TcPath::Clsact)),
            (Mode::L3, None),
            (Mode::Auto, Some(TcPath::Clsact)),
        ] {
            let set_up = SetUp { mode, tc, cgroup: None, pins: None };
            let with_sockets = SetUp { cgroup: Some(cgroup.path.clone()), ..set_up.clone() };
            scenario(set_up, with_sockets);
        }
        over_ipv6();
    }

    fn make_bridge() {
        ip("link add lan type bridge");
        ip("link set lan up");
    }

    fn add_pods(node: &mut Node, lasts: &[u8]) {
        for last in lasts {
            node.add_pod(*last);
        }
    }

    fn scenario(plain: SetUp, with_sockets: SetUp) {
        let lan = Space::new();
        lan.run(make_bridge);
        let new = |number| Node::new(number, both_families, &lan);
        let (mut one, mut two) = (new(1), new(2));
        let outside = Space::new();
        plug(&lan, &outside, 99);
        add_pods(&mut one, &[11, 12]);
        add_pods(&mut two, &[21]);
        let cluster = Cluster::with_backends(both_families, &[pod_ip(1, 12), pod_ip(2, 21)]);

        // The folder is another file system in each namespace.
        let pins = Some(one.space.bpf.join("orlop"));
        let with_sockets = SetUp { pins: pins.clone(), ..with_sockets };
        let plain = SetUp { pins, ..plain };
        let agents =
            [one.start(&cluster, with_sockets.clone()), two.start(&cluster, plain.clone())];
        let client = &one.pods[&11];

        // Pod to pod here and there, host to pod there, and through the service.
        for (ip, number) in [(pod_ip(1, 12), 12), (pod_ip(2, 21), 21)] {
            assert_eq!(client.run(move || answered_by(&tcp((ip, 8080), 3))), [number]);
        }
        two.space.run(|| serve(200));
        let host = (node_ip(2), 8080);
        assert_eq!(client.run(move || answered_by(&tcp(host, 3))), [200], "a pod reaches a node");
        assert_eq!(one.space.run(|| answered_by(&tcp((pod_ip(2, 21), 8080), 3))), [21]);
        for (ip, number) in [(pod_ip6(1, 12), 12), (pod_ip6(2, 21), 21)] {
            let asked = move || ask(&mut connect(SocketAddr::new(ip, 8080)));
            assert_eq!(client.run(asked), number, "pod to {ip}");
            assert_eq!(one.space.run(asked), number, "node to {ip}");
        }
        let seen = client.run(|| tcp(SERVICE, 200));
        assert!(seen.len() == 2 && seen.values().all(|count| *count > 60), "{seen:?}");
        assert_eq!(client.run(|| answered_by(&udp(SERVICE, 40))), [12, 21]);

        // Node ports from outside and from a pod, on the second node: the first one's programs at
        // the sockets take this whole process for their own.
        let node_port = (node_ip(2), NODE_PORT);
        let seen = outside.run(move || tcp(node_port, 100));
        assert!(seen.len() == 2 && seen.values().all(|count| *count > 25), "{seen:?}");
        assert_eq!(outside.run(move || answered_by(&udp(node_port, 40))), [12, 21]);
        assert_eq!(client.run(move || answered_by(&tcp(node_port, 40))), [12, 21]);

        // The agents die under established connections of every kind; they and new ones go on.
        let far = client.run(|| connect((pod_ip(2, 21), 8080).into()));
        let near = client.run(|| connect(SERVICE.into()));
        let from_outside = outside.run(move || connect(node_port.into()));
        let far6 = client.run(|| connect(SocketAddr::new(pod_ip6(2, 21), 8080)));
        let mut open = [far, near, from_outside, far6];
        let first: Vec<u8> = open.iter_mut().map(ask).collect();
        drop(agents);
        one.space.settle();
        assert_eq!(open.iter_mut().map(ask).collect::<Vec<u8>>(), first);
        assert_eq!(client.run(|| tcp(SERVICE, 50)).len(), 2);
        assert_eq!(outside.run(move || tcp(node_port, 50)).len(), 2);
        let agents = [one.start(&cluster, with_sockets), two.start(&cluster, plain)];
        assert_eq!(open.iter_mut().map(ask).collect::<Vec<u8>>(), first);

        // An endpoint goes: nobody meets it any more. The last one goes: refused at once.
        cluster.set_backends(&[pod_ip(2, 21)]);
        pause(Duration::from_millis(300));
        assert_eq!(client.run(|| answered_by(&tcp(SERVICE, 50))), [21]);
        assert_eq!(outside.run(move || answered_by(&tcp(node_port, 50))), [21]);
        cluster.set_backends(&[]);
        pause(Duration::from_millis(300));
        for (space, address) in [(client, SERVICE), (&outside, node_port)] {
            let error = space
                .run(move || TcpStream::connect_timeout(&address.into(), TIMEOUT).unwrap_err());
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
        drop(agents);
        one.space.settle();
    }

    /// Nodes that know each other by IPv6 alone: the tunnel's packets are IPv6, and pods' of both families
    /// go through it.
    fn over_ipv6() {
        let lan = Space::new();
        lan.run(make_bridge);
        let new = |number| Node::new(number, ipv6_alone, &lan);
        let (mut one, mut two) = (new(1), new(2));
        add_pods(&mut one, &[11, 12]);
        add_pods(&mut two, &[21]);
        let cluster = Cluster::with_backends(ipv6_alone, &[pod_ip(1, 12), pod_ip(2, 21)]);
        let set_up = |node: &Node| SetUp {
            mode: Mode::Vxlan,
            tc: None,
            cgroup: None,
            pins: Some(node.space.bpf.join("orlop")),
        };
        let agents = [one.start(&cluster, set_up(&one)), two.start(&cluster, set_up(&two))];
        let client = &one.pods[&11];
        for ip in [pod_ip(2, 21).into(), pod_ip6(2, 21)] {
            let asked = move || ask(&mut connect(SocketAddr::new(ip, 8080)));
            assert_eq!(client.run(asked), 21, "pod to {ip}");
            assert_eq!(one.space.run(asked), 21, "node to {ip}");
        }
        // Without programs at sockets every packet to the service is translated on its way.
        let seen = client.run(|| tcp(SERVICE, 40));
        assert_eq!(answered_by(&seen), [12, 21], "{seen:?}");
        drop(agents);
        one.space.settle();
    }
}
