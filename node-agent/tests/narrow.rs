//! A node whose way out takes less than its pods send, with real sockets at both ends: who sends too much is
//! told so and goes on with less, and what may be cut arrives whole, all under the node's address.

#[cfg(test)]
#[path = "support/cluster.rs"]
#[expect(dead_code, reason = "shared with tests that need more of it")]
mod cluster;

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{self, Read as _, Write as _},
        net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, UdpSocket},
        os::fd::AsFd,
        slice::from_ref,
        thread,
        time::{Duration, Instant},
    };

    use nix::{
        errno::Errno,
        sys::socket::{setsockopt, sockopt},
    };
    use node_agent::{
        dataplane::{TcPath, XdpMode},
        overlay::Mode,
    };

    use super::cluster::{
        Cluster, NODE_PORT, Node, SERVICE, SetUp, TIMEOUT, any_of, both_families, connect,
        make_bridge,
        place::{ip, is_possible},
        pod_ip,
        space::{Space, pause},
    };

    /// What the way out takes; pods send 1430.
    const MTU: u16 = 1300;
    /// Bytes of a datagram that fits a pod's device and not the way out.
    const TOO_MUCH: usize = 1_380;
    /// Bytes of a datagram that a pod has to cut itself.
    const MUCH: usize = 4_000;
    /// Bytes of a transfer.
    const TRANSFER: usize = 4 << 20;

    /// For a transfer and what is sent again of it: who counts speaks at its end only.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// The server outside, and the node as it sees it, by family.
    const SERVERS: [&str; 2] = ["198.51.100.2", "2001:db8:51::2"];
    const NODES: [&str; 2] = ["203.0.113.1", "2001:db8:f::1"];

    #[test]
    fn a_way_out_takes_less_than_pods_send() {
        if !is_possible() {
            return;
        }
        for tc in [None, Some(TcPath::Clsact)] {
            scenario(tc);
        }
    }

    fn scenario(tc: Option<TcPath>) {
        let lan = Space::new();
        lan.run(make_bridge);
        let mut node = Node::new(1, both_families, &lan);
        let (router, server) = (Space::new(), Space::new());
        make_way_out(&node.space, &router, &server);
        for last in 11..=17 {
            node.add_pod(last);
        }
        let server_ip: Ipv4Addr = SERVERS[0].parse().unwrap();
        let cluster = Cluster::with_backends(both_families, &[server_ip]);
        let pins = Some(node.space.bpf.join("orlop"));
        let set_up = SetUp { mode: Mode::Vxlan, tc, cgroup: None, pins, xdp: XdpMode::Off };
        let agent = node.start(&cluster, set_up);

        // What the kernel said of itself before the router's end was up.
        let before = node.space.run(lost);
        what_may_be_cut_arrives(&node);
        for family in [0, 1] {
            let (at, node_ip) = (server_at(family), NODES[family]);
            node.pods[&11].run(move || is_told(&socket_to(at), node_ip));
            node.pods[&12].run(move || {
                let socket = socket_to(at);
                assert_eq!(sent(&socket, 5), Some(heard(5, node_ip)));
                is_told(&socket, node_ip);
            });
        }
        // A service whose backend is outside.
        let at = SERVICE.into();
        node.pods[&14].run(move || is_told(&socket_to(at), NODES[0]));
        // A client outside, whose answers are too big.
        cluster.set_backends(&[pod_ip(1, 16)]);
        cluster.settle(from_ref(&agent));
        server.run(|| echoes(SocketAddr::new(NODES[0].parse().unwrap(), NODE_PORT)));
        assert_eq!(node.space.run(lost), before, "something too big was sent");
        // Many full packets at once, of which a slow receiver's queue may lose some; what is too big would never arrive.
        for family in [0, 1] {
            let (at, node_ip) = (server_at(family), NODES[family]);
            node.pods[&13].run(move || transfers(at, node_ip));
        }
        cluster.set_backends(&[server_ip]);
        cluster.settle(from_ref(&agent));
        node.pods[&15].run(move || transfers(at, NODES[0]));
        drop(agent);
        node.space.settle();
    }

    /// The router's other link takes more, so that no end hears of the narrow one when a connection begins.
    fn make_way_out(node: &Space, router: &Space, server: &Space) {
        let tid = router.tid;
        node.run(move || {
            ip(&format!("link add wan0 mtu {MTU} type veth peer name node0 mtu {MTU} netns {tid}"));
            // A device that cuts nothing itself gets each packet of a large one.
            ip("link set wan0 gso_max_segs 1
                addr add 203.0.113.1/24 dev wan0
                addr add 2001:db8:f::1/64 dev wan0 nodad
                link set wan0 up
                route add default via 203.0.113.2");
        });
        let tid = server.tid;
        router.run(move || {
            for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{setting}"), "1").unwrap();
            }
            ip(&format!("link add far0 type veth peer name eth0 netns {tid}"));
            ip("addr add 203.0.113.2/24 dev node0
                addr add 2001:db8:f::2/64 dev node0 nodad
                addr add 198.51.100.1/24 dev far0
                addr add 2001:db8:51::1/64 dev far0 nodad
                link set node0 up
                link set far0 up");
        });
        node.run(|| ip("route add default via 2001:db8:f::2"));
        server.run(|| {
            ip("addr add 198.51.100.2/24 dev eth0
                addr add 2001:db8:51::2/64 dev eth0 nodad
                link set eth0 up
                route add default via 198.51.100.1
                route add default via 2001:db8:51::1");
            count_bytes();
        });
    }

    fn server_at(family: usize) -> SocketAddr {
        SocketAddr::new(SERVERS[family].parse().unwrap(), 8080)
    }

    /// TCP and UDP servers at port 8080 that say how much they got, and from whom: of a datagram, and of a
    /// connection when it ends.
    fn count_bytes() {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        takes_little(&listener);
        let _tcp = thread::spawn(move || {
            while let Ok((mut stream, from)) = listener.accept() {
                let _connection = thread::spawn(move || {
                    let count = io::copy(&mut stream, &mut io::sink()).unwrap();
                    stream.write_all(heard_from(count, from).as_bytes()).unwrap();
                });
            }
        });
        let socket = UdpSocket::bind("[::]:8080").unwrap();
        let _udp = thread::spawn(move || {
            let mut bytes = vec![0; 65_536];
            while let Ok((count, from)) = socket.recv_from(&mut bytes) {
                let words = heard_from(count.try_into().unwrap(), from);
                socket.send_to(words.as_bytes(), from).unwrap();
            }
        });
    }

    /// So much may be under way to a socket that less than two hundred packets wait in front of it: a device whose
    /// far end's queue is full (netdev_max_backlog, 1000) counts what it loses there as not sent.
    fn takes_little(socket: &impl AsFd) {
        setsockopt(socket, sockopt::RcvBuf, &(128 << 10)).unwrap();
    }

    fn heard_from(count: u64, from: SocketAddr) -> String {
        format!("{count} from {}", from.ip().to_canonical())
    }

    fn heard(count: usize, node: &str) -> String {
        format!("{count} from {node}")
    }

    fn socket_to(at: SocketAddr) -> UdpSocket {
        let socket = UdpSocket::bind((any_of(at), 0)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.connect(at).unwrap();
        socket
    }

    /// Sends a datagram; gives the answer.
    fn sent(socket: &UdpSocket, length: usize) -> Option<String> {
        socket.send(&vec![7; length]).unwrap();
        let mut bytes = [0; 100];
        let count = socket.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..count].to_vec()).unwrap())
    }

    /// Checks that a socket whose datagrams must not be cut learns how much goes out.
    fn is_told(socket: &UdpSocket, node: &str) {
        socket.send(&vec![7; TOO_MUCH]).unwrap();
        let last = Instant::now() + TIMEOUT;
        let told = loop {
            match socket.take_error().unwrap() {
                Some(error) => break error,
                None => assert!(Instant::now() < last, "nothing was told"),
            }
            pause(Duration::from_millis(5));
        };
        assert_eq!(told.raw_os_error(), Some(Errno::EMSGSIZE as i32));
        // The pod's own stack cuts now.
        assert_eq!(sent(socket, TOO_MUCH), Some(heard(TOO_MUCH, node)));
        assert_eq!(sent(socket, MUCH), Some(heard(MUCH, node)));
    }

    /// Checks that a connection gets much more through than one packet, having begun with less.
    fn transfers(at: SocketAddr, node: &str) {
        let mut stream = connect(at);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"hello").unwrap();
        pause(Duration::from_millis(50));
        stream.write_all(&vec![7; TRANSFER]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut words = String::new();
        let _length = stream.read_to_string(&mut words).unwrap();
        assert_eq!(words, heard(TRANSFER + 5, node));
    }

    /// Checks that as much comes back from a pod as is sent to it.
    fn echoes(at: SocketAddr) {
        let mut stream = connect(at);
        takes_little(&stream);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut other = stream.try_clone().unwrap();
        let asking = thread::spawn(move || {
            other.write_all(&vec![7; TRANSFER]).unwrap();
            other.shutdown(Shutdown::Write).unwrap();
        });
        let count = io::copy(&mut stream, &mut io::sink()).unwrap();
        asking.join().unwrap();
        assert_eq!(count, u64::try_from(TRANSFER).unwrap());
    }

    /// Pods that let their packets be cut on the way hear of nothing and need not.
    fn what_may_be_cut_arrives(node: &Node) {
        let before = node.space.run(cut);
        node.pods[&17].run(|| {
            // Sockets that are made from now on ask for no path's MTU (ip-sysctl).
            fs::write("/proc/sys/net/ipv4/ip_no_pmtu_disc", "1").unwrap();
            let at = server_at(0);
            let socket = socket_to(at);
            for length in [TOO_MUCH, 5, TOO_MUCH, MUCH] {
                assert_eq!(sent(&socket, length), Some(heard(length, NODES[0])));
            }
            assert!(socket.take_error().unwrap().is_none());
            transfers(at, NODES[0]);
        });
        assert!(node.space.run(cut) > before, "the node has cut nothing");
    }

    /// How many packets were sent by the way out and not taken.
    fn lost() -> u64 {
        let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix("wan0:")).unwrap();
        // Eight columns of what came in are before those of what went out: bytes, packets, errors, drops.
        line.split_whitespace().nth(8 + 3).unwrap().parse().unwrap()
    }

    /// How many packets this namespace has cut into fragments.
    fn cut() -> u64 {
        let text = fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip: "));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let at = names.split(' ').position(|name| name == "FragOKs").unwrap();
        values.split(' ').nth(at).unwrap().parse().unwrap()
    }
}
