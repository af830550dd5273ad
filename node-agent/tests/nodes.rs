//! Two nodes, their pods and a client outside, each in a network namespace: the overlay, the
//! dataplane and its restart from tables to answered requests of both families, on both ways of attaching
//! programs, beside programs of somebody else's.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/cluster.rs"]
mod cluster;
#[cfg(test)]
#[path = "nodes/datagrams.rs"]
mod datagrams;
#[cfg(test)]
#[path = "nodes/foreign.rs"]
mod foreign;
#[cfg(test)]
#[path = "support/requests.rs"]
mod requests;
#[cfg(test)]
#[path = "nodes/sctp.rs"]
mod sctp;

#[cfg(test)]
use cluster::space;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::ErrorKind,
        net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
        time::{Duration, Instant},
    };

    use node_agent::{
        dataplane::{TcPath, XdpMode},
        overlay::Mode,
        sys::ethtool::{self, Offload},
    };

    use super::{
        cgroup::TestCgroup,
        cluster::{
            AT_ONCE, Cluster, NODE_PORT, Node, NodeIps, POD_PORT, SERVICE, SERVICE6, SetUp,
            TIMEOUT,
            agent::Agent,
            answered_by, any_of, ask, both_families, connect, from_one_port, ipv6_alone,
            make_bridge, node_ports,
            place::{self, is_possible},
            plug, pod_ip, pod_ip6, serve,
            space::{Space, pause},
            tcp, udp,
        },
        datagrams::{self, connect_udp, connected, echoed, hears},
        foreign::Foreign,
        requests::{BREATH, Kind, Outcome, Requests},
        sctp,
    };

    const BACKENDS: [(u8, u8); 2] = [(1, 12), (2, 21)];
    /// So many requests miss one of two backends once in ten million times.
    const ASKS: usize = 24;
    /// Bytes of datagrams: what one packet of a pod takes at the most in IPv4 through the tunnel, and several.
    const LARGE: [usize; 2] = [1_422, 4_000];
    /// So often a process of the node is asked by the node in one way.
    const OWN: usize = 3;
    /// How many answers a client has at the least while agents die and come.
    const ANSWERS: usize = 20;

    /// The service's address of each family.
    fn services() -> [SocketAddr; 2] {
        [SERVICE.into(), SERVICE6.into()]
    }

    /// A pod's addresses, in the same order.
    fn pod_ips(node: u8, pod: u8) -> [IpAddr; 2] {
        [pod_ip(node, pod).into(), pod_ip6(node, pod)]
    }

    #[test]
    fn two_nodes() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("nodes");
        let foreign = Foreign::load();
        let has_sctp = sctp::is_there();
        for (mode, tc) in [
            (Mode::Vxlan, None),
            (Mode::Vxlan, Some(TcPath::Clsact)),
            (Mode::L3, None),
            (Mode::Auto, Some(TcPath::Clsact)),
        ] {
            let set_up = SetUp { mode, tc, cgroup: None, pins: None, xdp: XdpMode::Off };
            let with_sockets = SetUp { cgroup: Some(cgroup.path.clone()), ..set_up.clone() };
            let world = World::new(both_families);
            if tc.is_some() {
                world.finish_checksums();
            }
            if has_sctp {
                world.serve_sctp();
            }
            foreign.attach(&world.nodes[1].space, tc);
            world.scenario([with_sockets, set_up], &foreign, has_sctp);
        }
        over_ipv6();
    }

    /// The nodes with their pods, a client outside, and what the nodes follow.
    struct World {
        nodes: [Node; 2],
        outside: Space,
        cluster: Cluster,
        lan: Space,
    }

    /// Running agents, one a node.
    type Agents = [Agent; 2];

    impl World {
        fn new(node_ips: NodeIps) -> Self {
            let lan = Space::new();
            lan.run(make_bridge);
            let mut nodes = [1, 2].map(|number| Node::new(number, node_ips, &lan));
            let outside = Space::new();
            plug(&lan, &outside, 99);
            for (node, last) in [(0, 11), (0, 12), (1, 21)] {
                nodes[node].add_pod(last);
            }
            let backends = BACKENDS.map(|(node, pod)| pod_ip(node, pod));
            let cluster = Cluster::with_backends(node_ips, &backends);
            Self { nodes, outside, cluster, lan }
        }

        /// Starts the agents, the first node's by the first set-up.
        fn start(&self, set_ups: &[SetUp; 2]) -> Agents {
            [0, 1].map(|at| {
                // The folder is another file system in each namespace.
                let pins = Some(self.nodes[at].space.bpf.join("orlop"));
                self.nodes[at].start(&self.cluster, SetUp { pins, ..set_ups[at].clone() })
            })
        }

        fn stop(&self, agents: Agents) {
            drop(agents);
            self.nodes.iter().for_each(|node| node.space.settle());
        }

        /// The pod that asks.
        fn client(&self) -> &Space {
            &self.nodes[0].pods[&11]
        }

        fn backend(&self, (node, pod): (u8, u8)) -> &Space {
            &self.nodes[usize::from(node) - 1].pods[&pod]
        }

        /// Checksums are written where packets begin and read where they end, and a tunnel's on its way, as network
        /// cards leave it; else nobody looks at them between one namespace and another.
        fn finish_checksums(&self) {
            let pods = self.nodes.iter().flat_map(|node| node.pods.values());
            for space in pods.chain([&self.outside]) {
                space.run(|| ethtool::set_offload("eth0", Offload::TxChecksums, false).unwrap());
            }
            self.lan.run(|| {
                for port in ["port1", "port2", "port99"] {
                    ethtool::set_offload(port, Offload::TxChecksums, false).unwrap();
                }
            });
        }

        fn serve_sctp(&self) {
            for (node, pod) in BACKENDS {
                for ip in pod_ips(node, pod) {
                    let at = SocketAddr::new(ip, POD_PORT);
                    self.backend((node, pod)).run(move || sctp::serve(at, pod));
                }
            }
        }

        fn scenario(&self, set_ups: [SetUp; 2], foreign: &Foreign, has_sctp: bool) {
            let agents = self.start(&set_ups);
            self.pods_and_nodes_reach_each_other();
            self.who_knows_the_way_reaches_pods();
            self.services_answer();
            self.beside(foreign);
            let mut open = self.connections();
            if has_sctp {
                self.associations_meet_both();
                open.extend(self.associations());
            }

            // The agents die under established connections of every kind and under requests; all go on.
            let first: Vec<u8> = open.iter_mut().map(ask).collect();
            let running = self.requests();
            self.stop(agents);
            assert_eq!(open.iter_mut().map(ask).collect::<Vec<u8>>(), first);
            assert_eq!(self.client().run(|| tcp(SERVICE, ASKS)).len(), 2);
            assert_eq!(self.outside.run(|| tcp(node_ports()[0], ASKS)).len(), 2);
            let agents = self.start(&set_ups);
            assert_eq!(open.iter_mut().map(ask).collect::<Vec<u8>>(), first);
            let (start, patience) = (Instant::now(), Duration::from_secs(60));
            while running.iter().any(|client| client.answered() <= ANSWERS)
                && start.elapsed() < patience
            {
                pause(Duration::from_millis(50));
            }
            for outcome in running.into_iter().map(Requests::stop).collect::<Vec<Outcome>>() {
                assert!(outcome.failures.is_empty(), "{outcome:?}");
                assert!(outcome.answered > ANSWERS, "{outcome:?}");
            }
            self.beside(foreign);

            self.pods_that_are_gone_are_unreachable(&agents);
            self.a_node_port_goes(&agents);
            self.a_process_of_the_node_answers(&agents);
            self.endpoints_go(&agents);
            self.stop(agents);
        }

        /// Pod to pod here and there, host to pod there, and pods to what is no pod.
        fn pods_and_nodes_reach_each_other(&self) {
            let (client, node) = (self.client(), &self.nodes[0].space);
            self.nodes[1].space.run(|| serve(200));
            self.outside.run(|| serve(99));
            for family in [0, 1] {
                for (at, pod) in BACKENDS {
                    let ip = pod_ips(at, pod)[family];
                    let asked = move || ask(&mut connect(SocketAddr::new(ip, POD_PORT)));
                    assert_eq!(client.run(asked), pod, "pod to {ip}");
                    assert_eq!(node.run(asked), pod, "node to {ip}");
                }
                let to = SocketAddr::new(both_families(2)[family], POD_PORT);
                let seen = client.run(move || [tcp(to, 3), udp(to, 3), connected(to, 3)]);
                assert_eq!(seen.each_ref().map(answered_by), [[200]; 3], "pod to {to}");
                // It knows no way to pods: without the node's address as source nothing is answered.
                let to = SocketAddr::new(both_families(99)[family], POD_PORT);
                let seen = client.run(move || [tcp(to, 3), udp(to, 3), connected(to, 3)]);
                assert_eq!(seen.each_ref().map(answered_by), [[99]; 3], "pod to {to}");
            }
        }

        /// A client outside that has a route to a node's pods hears the pod that it asks, and not its node.
        fn who_knows_the_way_reaches_pods(&self) {
            let ways = "10.244.2.0/24 via 192.168.0.2\nfd00:244:0:2::/64 via 2001:db8::2";
            let change = |verb: &str| {
                let lines = ways.lines().map(|way| format!("route {verb} {way}\n"));
                let lines: String = lines.collect();
                self.outside.run(move || place::ip(&lines));
            };
            change("add");
            for ip in pod_ips(2, 21) {
                let to = SocketAddr::new(ip, POD_PORT);
                let seen = self.outside.run(move || [tcp(to, 3), udp(to, 3), connected(to, 3)]);
                assert_eq!(seen.each_ref().map(answered_by), [[21]; 3], "outside to {to}");
            }
            change("del");
        }

        fn services_answer(&self) {
            let (client, outside) = (self.client(), &self.outside);
            let seen = client.run(|| tcp(SERVICE, 200));
            assert!(seen.len() == 2 && seen.values().all(|count| *count > 60), "{seen:?}");
            for service in services() {
                for seen in client.run(move || [tcp(service, ASKS), udp(service, ASKS)]) {
                    assert_eq!(answered_by(&seen), [12, 21], "pod to {service}");
                }
                // Translated on their way: a pod's, and the node's own by the host device.
                for space in [client, &self.nodes[0].space] {
                    let seen = space.run(move || connected(service, ASKS));
                    assert_eq!(answered_by(&seen), [12, 21], "to {service}");
                }
                for bytes in LARGE {
                    for _ in 0..4 {
                        let heard = self.nodes[0].space.run(move || echoed(service, bytes));
                        assert_eq!(heard, bytes, "to {service}");
                    }
                }
            }

            // Node ports from outside and from a pod, on the second node: the first one's programs at
            // the sockets take this whole process for their own.
            let seen = outside.run(|| tcp(node_ports()[0], 100));
            assert!(seen.len() == 2 && seen.values().all(|count| *count > 25), "{seen:?}");
            for to in node_ports() {
                for space in [outside, client] {
                    for seen in space.run(move || [tcp(to, ASKS), udp(to, ASKS)]) {
                        assert_eq!(answered_by(&seen), [12, 21], "to {to}");
                    }
                }
            }
        }

        /// Somebody else's program before ours on the second node's device sees all packets, and the one
        /// behind those that ours leaves to the node.
        fn beside(&self, foreign: &Foreign) {
            let begin = foreign.runs();
            for ip in both_families(2) {
                let to = SocketAddr::new(ip, POD_PORT);
                assert_eq!(answered_by(&self.outside.run(move || udp(to, 20))), [200]);
            }
            // As many datagrams as answers.
            let seen = foreign.since(begin);
            assert!(seen.iter().all(|runs| *runs >= 80), "the node's own: {seen:?}");
            let begin = foreign.runs();
            for to in node_ports() {
                assert_eq!(answered_by(&self.outside.run(move || udp(to, ASKS))), [12, 21]);
            }
            let datagrams = u64::try_from(ASKS).unwrap();
            let [before, behind] = foreign.since(begin);
            // Those to the two addresses, less what another sends between two looks.
            assert!(
                before + 9 > behind + 2 * datagrams,
                "a node port's: {before} before, {behind} behind"
            );
        }

        /// Connections that stay open: of pods to pods and services, of the client outside to node ports.
        fn connections(&self) -> Vec<TcpStream> {
            let far = pod_ips(2, 21).map(|ip| SocketAddr::new(ip, POD_PORT));
            let inside = [far, services()].concat();
            let mut open: Vec<TcpStream> =
                inside.into_iter().map(|to| self.client().run(move || connect(to))).collect();
            open.extend(node_ports().map(|to| self.outside.run(move || connect(to))));
            open
        }

        /// Associations of a pod's with the service, which no program at a socket translates.
        fn associations(&self) -> [TcpStream; 2] {
            [0, 1].map(|family| {
                let to = SocketAddr::new(services()[family].ip(), POD_PORT);
                let from = pod_ips(1, 11)[family];
                self.client().run(move || sctp::associate(from, to))
            })
        }

        fn associations_meet_both(&self) {
            let mut seen = [(); 2].map(|()| BTreeMap::<u8, usize>::new());
            for _ in 0..ASKS {
                for (seen, mut association) in seen.iter_mut().zip(self.associations()) {
                    *seen.entry(ask(&mut association)).or_default() += 1;
                }
            }
            assert_eq!(seen.each_ref().map(answered_by), [[12, 21]; 2], "{seen:?}");
        }

        /// Clients of every kind that ask until they are stopped.
        fn requests(&self) -> Vec<Requests> {
            // All that an emulated processor can do would be theirs.
            let is_emulated = std::env::var_os("ORLOP_EMULATED").is_some();
            let breath = BREATH * if is_emulated { 20 } else { 2 };
            let of = |space, kind, to: [SocketAddr; 2]| {
                Requests::start(space, kind, to.to_vec(), breath)
            };
            vec![
                of(self.client(), Kind::Connection, services()),
                of(self.client(), Kind::Connected, services()),
                of(self.client(), Kind::Datagram, services()),
                of(&self.outside, Kind::Connection, node_ports()),
                of(&self.outside, Kind::Connected, node_ports()),
            ]
        }

        /// Who speaks to a pod that is gone is told at once, here and there, directly and by its service; it would
        /// wait for its time-out if the packet went out by the default route.
        fn pods_that_are_gone_are_unreachable(&self, agents: &Agents) {
            const GONE: u8 = 99;
            let unreachable = |space: &Space, to: SocketAddr| {
                let failed = move || TcpStream::connect_timeout(&to, AT_ONCE).unwrap_err().kind();
                // The kernel tells of its own IPv6 routes in the words for a missing one.
                let words = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable];
                let kind = space.run(failed);
                assert!(words.contains(&kind), "{to}: {kind}");
            };
            let node = &self.nodes[0].space;
            // In IPv6 a client of the same machine hears of it by its second packet, a second later: the kernel
            // drops errors while the caller of connect() holds the socket. So not every way is tried there.
            for (number, port) in [1, 2].into_iter().zip(node_ports()) {
                let [four, six] = pod_ips(number, GONE).map(|ip| SocketAddr::new(ip, POD_PORT));
                unreachable(self.client(), four);
                unreachable(self.client(), six);
                unreachable(node, four);
                self.cluster.set_backends(&[pod_ip(number, GONE)]);
                self.cluster.settle(agents);
                unreachable(self.client(), services()[0]);
                unreachable(&self.outside, port);
            }
            let backends = BACKENDS.map(|(node, pod)| pod_ip(node, pod));
            self.cluster.set_backends(&backends);
            self.cluster.settle(agents);
        }

        /// The node port goes while its backends stay: who asked by it hears nothing any more.
        fn a_node_port_goes(&self, agents: &Agents) {
            let asking = node_ports().map(|to| self.outside.run(move || connect_udp(to)));
            let hears = |socket: &UdpSocket| hears(socket, TIMEOUT);
            let still_hears = |socket: &UdpSocket| self::hears(socket, AT_ONCE);
            assert!(asking.iter().all(hears));
            self.cluster.set_node_port(0);
            let last = Instant::now() + Duration::from_secs(10);
            while asking.iter().any(still_hears) {
                assert!(Instant::now() < last, "a flow outlives its frontend");
                pause(Duration::from_millis(50));
            }
            assert!(!asking.iter().any(still_hears), "nor later");
            assert_eq!(self.client().run(|| answered_by(&udp(SERVICE, ASKS))), [12, 21]);
            self.cluster.set_node_port(NODE_PORT);
            self.cluster.settle(agents);
            assert!(asking.iter().all(hears));
        }

        /// A process of the second node as backend hears clients both by the node port and at its own.
        fn a_process_of_the_node_answers(&self, agents: &Agents) {
            let two = both_families(2);
            self.cluster.set_endpoints(vec![two[0]], vec![two[1]]);
            self.cluster.settle(agents);
            for space in [self.client(), &self.outside] {
                for ip in &two {
                    let ends = [NODE_PORT, POD_PORT].map(|port| SocketAddr::new(*ip, port));
                    let from = SocketAddr::new(any_of(ends[0]), 20_000);
                    let answers = space.run(move || from_one_port(from, ends));
                    assert_eq!(answers, [200; 12], "by {ip}");
                }
            }
            // By the service too, where no socket translates it; and the node itself one of its own.
            for service in services() {
                let seen = self.client().run(move || connected(service, OWN));
                assert_eq!(answered_by(&seen), [200], "pod to {service}");
            }
            let one = both_families(1);
            self.cluster.set_endpoints(vec![one[0]], vec![one[1]]);
            self.cluster.settle(agents);
            let node = &self.nodes[0].space;
            node.run(|| datagrams::serve(4 * OWN));
            for service in services() {
                let seen = node.run(move || [udp(service, OWN), connected(service, OWN)]);
                assert_eq!(
                    seen.map(|seen| answered_by(&seen)),
                    [[datagrams::NUMBER]; 2],
                    "{service}"
                );
            }
        }

        /// An endpoint goes: nobody meets it any more. The last one goes: refused at once.
        fn endpoints_go(&self, agents: &Agents) {
            let asked = [(self.client(), services()), (&self.outside, node_ports())];
            let all = || asked.into_iter().flat_map(|(space, to)| to.map(|to| (space, to)));
            self.cluster.set_backends(&[pod_ip(2, 21)]);
            self.cluster.settle(agents);
            for (space, to) in all() {
                assert_eq!(space.run(move || answered_by(&tcp(to, ASKS))), [21], "{to}");
            }
            self.cluster.set_backends(&[]);
            self.cluster.settle(agents);
            for (space, to) in all() {
                let refused = move || TcpStream::connect_timeout(&to, AT_ONCE).unwrap_err().kind();
                assert_eq!(space.run(refused), ErrorKind::ConnectionRefused, "{to}");
            }
        }
    }

    /// Nodes that know each other by IPv6 alone: the tunnel's packets are IPv6, and pods' of both families
    /// go through it. Without programs at sockets every packet to the service is translated on its way.
    fn over_ipv6() {
        let world = World::new(ipv6_alone);
        world.finish_checksums();
        let set_up =
            SetUp { mode: Mode::Vxlan, tc: None, cgroup: None, pins: None, xdp: XdpMode::Off };
        let agents = world.start(&[set_up.clone(), set_up]);
        for ip in pod_ips(2, 21) {
            let asked = move || ask(&mut connect(SocketAddr::new(ip, POD_PORT)));
            assert_eq!(world.client().run(asked), 21, "pod to {ip}");
            assert_eq!(world.nodes[0].space.run(asked), 21, "node to {ip}");
        }
        for service in services() {
            // The node's own go by the host device.
            for space in [world.client(), &world.nodes[0].space] {
                let asked =
                    move || [tcp(service, ASKS), udp(service, ASKS), connected(service, ASKS)];
                for seen in space.run(asked) {
                    assert_eq!(answered_by(&seen), [12, 21], "to {service}: {seen:?}");
                }
            }
        }
        let port = node_ports()[1];
        let seen = world.outside.run(move || [tcp(port, ASKS), udp(port, ASKS)]);
        assert_eq!(seen.each_ref().map(answered_by), [[12, 21]; 2], "to {port}");
        world.endpoints_go(&agents);
        world.stop(agents);
    }
}
