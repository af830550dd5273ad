//! XDP on real devices: two nodes whose uplinks are veth pairs with the program in native mode, or in the stack, and a
//! client outside with real sockets.
//!
//! The other ends of the pairs have a program too, as a veth takes in frames from XDP only then, and finish
//! checksums, as network cards do.

#[cfg(test)]
#[path = "support/cluster.rs"]
#[expect(dead_code, reason = "shared with tests that need more of it")]
mod cluster;

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Read as _, Write as _},
        net::{SocketAddr, TcpStream, UdpSocket},
        panic::catch_unwind,
        process::Command,
        thread,
    };

    use aya::{Ebpf, EbpfLoader, programs::Xdp as XdpProgram};
    use ebpf_common::ABI_VERSION;
    use node_agent::{
        dataplane::{XdpMode, object},
        overlay::Mode,
        sys::{
            ethtool::{self, Offload},
            netlink::Netlink,
        },
    };

    use super::cluster::{
        Cluster, Node, SetUp, TIMEOUT, answered_by, any_of, ask, both_families, connect,
        from_one_port, make_bridge, node_ports, place::is_possible, plug, pod_ip, pod_ip6, serve,
        space::Space, tcp, udp,
    };

    /// Two nodes on one bridge, and a client beside them.
    struct World {
        nodes: [Node; 2],
        outside: Space,
        lan: Space,
        _ports: [Ebpf; 2],
    }

    /// Makes the other end of a node's uplink what a network card is; it stays so as long as the program.
    fn far_end(port: &str) -> Ebpf {
        ethtool::set_offload(port, Offload::TxChecksums, false).unwrap();
        // With empty maps our own program lets everything pass.
        let mut other = EbpfLoader::new().load(object()).unwrap();
        let program: &mut XdpProgram = other.program_mut("xdp_entry").unwrap().try_into().unwrap();
        program.load().unwrap();
        program.attach(port, aya::programs::xdp::XdpMode::Driver).unwrap();
        other
    }

    impl World {
        fn new() -> Self {
            let lan = Space::new();
            lan.run(make_bridge);
            let mut nodes = [1, 2].map(|number| Node::new(number, both_families, &lan));
            let outside = Space::new();
            plug(&lan, &outside, 99);
            let ports = lan.run(|| ["port1", "port2"].map(far_end));
            nodes[0].add_pod(11);
            nodes[1].add_pod(21);
            Self { nodes, outside, lan, _ports: ports }
        }

        fn set_up(&self, mode: Mode) -> SetUp {
            let pins = Some(self.nodes[1].space.bpf.join("orlop"));
            SetUp { mode, tc: None, cgroup: None, pins, xdp: XdpMode::Native }
        }

        /// Whether the second node gets packets with finished checksums, as from a network card.
        fn finish(&self, is_finished: bool) {
            let set = move || ethtool::set_offload("port2", Offload::TxChecksums, !is_finished);
            self.lan.run(set).unwrap();
        }

        /// Takes tc's programs off the second node's uplink, whose agent has gone.
        fn detach_tc(&self) {
            let links = self.nodes[1].space.bpf.join(format!("orlop/v{ABI_VERSION}/links"));
            self.nodes[1].space.run(move || {
                let index = nix::net::if_::if_nametoindex("eth0").unwrap();
                let pins = ["tc_from_underlay", "tc_to_underlay"]
                    .map(|name| links.join(format!("{name}_{index}")));
                if pins.iter().all(|pin| pin.exists()) {
                    pins.iter().for_each(|pin| std::fs::remove_file(pin).unwrap());
                } else {
                    // Before tcx they are filters.
                    let mut tc = Command::new("tc");
                    let tc = tc.args(["qdisc", "del", "dev", "eth0", "clsact"]).status();
                    assert!(tc.unwrap().success());
                }
            });
        }

        /// Number of the XDP program on the second node's uplink.
        fn program(&self) -> Option<u32> {
            self.nodes[1].space.run(|| {
                let index = nix::net::if_::if_nametoindex("eth0").unwrap();
                let mut netlink = Netlink::open().unwrap();
                node_agent::sys::xdp::device(&mut netlink, index).unwrap().program
            })
        }
    }

    /// Sends and receives as much over one connection as takes many full frames each way.
    fn exchange(address: SocketAddr, bytes: usize) -> u8 {
        let mut stream = connect(address);
        let mut writer = stream.try_clone().unwrap();
        let writing = thread::spawn(move || writer.write_all(&vec![b'?'; bytes]).unwrap());
        let mut answer = vec![0; bytes];
        stream.read_exact(&mut answer).unwrap();
        writing.join().unwrap();
        assert!(answer.iter().all(|byte| *byte == answer[0]));
        answer[0]
    }

    /// Asks by a datagram of so many bytes; gives the length of the answer.
    fn datagram(address: SocketAddr, bytes: usize) -> usize {
        let socket = UdpSocket::bind((any_of(address), 0)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.send_to(&vec![b'?'; bytes], address).unwrap();
        socket.recv_from(&mut [0; 8_000]).unwrap().0
    }

    /// How many questions are answered, by TCP and by UDP.
    fn answers(address: SocketAddr, questions: usize) -> [usize; 2] {
        let by_tcp = || -> io::Result<()> {
            let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.write_all(b"?")?;
            stream.read_exact(&mut [0])
        };
        let by_udp = || -> io::Result<()> {
            let socket = UdpSocket::bind((any_of(address), 0))?;
            socket.set_read_timeout(Some(TIMEOUT))?;
            let _sent = socket.send_to(b"?", address)?;
            socket.recv(&mut [0]).map(drop)
        };
        [&by_tcp as &dyn Fn() -> io::Result<()>, &by_udp]
            .map(|ask| (0..questions).filter(|_| ask().is_ok()).count())
    }

    #[test]
    fn clients_outside_are_served_in_the_driver_also_over_a_restart() {
        if !is_possible() {
            return;
        }
        for mode in [Mode::Vxlan, Mode::L3] {
            let world = World::new();
            let [one, two] = &world.nodes;
            let backends = [pod_ip(1, 11), pod_ip(2, 21)];
            let cluster = Cluster::with_backends(both_families, &backends);
            let start = || {
                [one.start(&cluster, world.set_up(mode)), two.start(&cluster, world.set_up(mode))]
            };
            let agents = start();
            let first = world.program();
            assert!(first.is_some());
            for address in node_ports() {
                assert_eq!(world.outside.run(move || answered_by(&tcp(address, 40))), [11, 21]);
                assert_eq!(world.outside.run(move || answered_by(&udp(address, 40))), [11, 21]);
                for _ in 0..4 {
                    world.outside.run(move || exchange(address, 300_000));
                }
            }
            let mut open = node_ports().map(|address| world.outside.run(move || connect(address)));
            let before = open.each_mut().map(ask);
            drop(agents);
            [one, two].iter().for_each(|node| node.space.settle());
            assert_eq!(world.program(), first, "it outlives the agent");
            assert_eq!(open.each_mut().map(ask), before);
            let agents = start();
            assert_ne!(world.program(), first, "swapped in place");
            assert_eq!(open.each_mut().map(ask), before);
            for address in node_ports() {
                assert_eq!(world.outside.run(move || answered_by(&tcp(address, 40))), [11, 21]);
            }
            drop(agents);
            [one, two].iter().for_each(|node| node.space.settle());
        }
    }

    #[test]
    fn who_asks_by_a_node_port_may_ask_the_pod_or_the_process_itself_from_the_same_port() {
        if !is_possible() {
            return;
        }
        let world = World::new();
        let [one, two] = &world.nodes;
        let cluster = Cluster::with_backends(both_families, &[pod_ip(2, 21)]);
        let set_up = world.set_up(Mode::L3);
        let agents = [one.start(&cluster, set_up.clone()), two.start(&cluster, set_up)];
        let pods = [pod_ip(2, 21).into(), pod_ip6(2, 21)];
        let own = both_families(2);
        two.space.run(|| serve(200));
        for (backends, port, number) in [(&pods[..], 20_000, 21), (&own, 20_001, 200)] {
            cluster.set_endpoints(vec![backends[0]], vec![backends[1]]);
            cluster.settle(&agents);
            for (family, service) in node_ports().into_iter().enumerate() {
                // The first node, which knows the way to the second one's pods.
                let from = SocketAddr::new(both_families(1)[family], port);
                let ends = [service, SocketAddr::new(backends[family], 8080)];
                let seen = one.space.run(move || from_one_port(from, ends));
                assert_eq!(seen, [number; 12], "{ends:?}");
            }
        }
        drop(agents);
        [one, two].iter().for_each(|node| node.space.settle());
    }

    #[test]
    fn xdp_alone_serves_clients_with_backends_on_another_node() {
        if !is_possible() {
            return;
        }
        // What is left to tc, which is not there, is few: a SYN that is sent again, a packet for which the next hop is to
        // be asked for anew; in the stack, a finished checksum that looks unfinished.
        for xdp in [XdpMode::Native, XdpMode::Generic] {
            let world = World::new();
            let [one, two] = &world.nodes;
            let cluster = Cluster::with_backends(both_families, &[pod_ip(1, 11)]);
            let set_up = SetUp { xdp, ..world.set_up(Mode::L3) };
            let _first = one.start(&cluster, set_up.clone());
            let second = two.start(&cluster, set_up);
            for address in node_ports() {
                // The kernel looks neighbours up for what its own stack sends.
                assert_eq!(world.outside.run(move || answered_by(&tcp(address, 5))), [11]);
            }
            drop(second);
            two.space.settle();
            world.detach_tc();
            for address in node_ports() {
                let answers = world.outside.run(move || answers(address, 30));
                assert!(answers.iter().all(|count| *count >= 27), "{xdp:?}: {answers:?}");
                if xdp == XdpMode::Native {
                    let exchanges = move || catch_unwind(|| exchange(address, 300_000)).ok();
                    let mut tries = (0..3).map(|_| world.outside.run(exchanges));
                    assert!(tries.any(|answer| answer == Some(11)));
                }
            }
        }
    }

    #[test]
    fn in_the_stack_clients_outside_are_served_whatever_is_left_of_checksums_to_finish() {
        if !is_possible() {
            return;
        }
        for (mode, is_finished) in
            [(Mode::L3, false), (Mode::L3, true), (Mode::Vxlan, false), (Mode::Vxlan, true)]
        {
            let world = World::new();
            // Who takes packets to the first node finishes them: one made wrong on the second does not arrive.
            world.finish(is_finished);
            let [one, two] = &world.nodes;
            let set_up = SetUp { xdp: XdpMode::Generic, ..world.set_up(mode) };
            let cluster = Cluster::with_backends(both_families, &[pod_ip(1, 11), pod_ip(2, 21)]);
            let agents = [one.start(&cluster, set_up.clone()), two.start(&cluster, set_up)];
            for address in node_ports() {
                assert_eq!(world.outside.run(move || answered_by(&tcp(address, 40))), [11, 21]);
                assert_eq!(world.outside.run(move || answered_by(&udp(address, 40))), [11, 21]);
                for _ in 0..4 {
                    world.outside.run(move || exchange(address, 300_000));
                }
            }
            drop(agents);
            two.space.settle();
        }
    }

    #[test]
    fn what_is_in_pieces_or_too_large_is_left_to_tc_and_arrives() {
        if !is_possible() {
            return;
        }
        let world = World::new();
        let [one, two] = &world.nodes;
        let set_up = world.set_up(Mode::Vxlan);
        let cluster = Cluster::with_backends(both_families, &[pod_ip(2, 21)]);
        let agents = [one.start(&cluster, set_up.clone()), two.start(&cluster, set_up)];
        for address in node_ports() {
            assert_eq!(world.outside.run(move || datagram(address, 4_000)), 4_000);
        }
        cluster.set_backends(&[pod_ip(1, 11)]);
        cluster.settle(&agents);
        for address in node_ports() {
            // Small ones go first, so that XDP knows the way; the full one fits into no tunnel.
            assert_eq!(world.outside.run(move || answered_by(&udp(address, 5))), [11]);
            let full = 1_500 - if address.is_ipv4() { 28 } else { 48 };
            assert_eq!(world.outside.run(move || datagram(address, full)), full);
        }
        drop(agents);
        [one, two].iter().for_each(|node| node.space.settle());
    }
}
