//! Two nodes, their pods and a client outside, each in a network namespace: the overlay, the
//! dataplane and its restart from tables to answered requests, on both ways of attaching programs.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/cluster.rs"]
mod cluster;

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
        time::{Duration, Instant},
    };

    use node_agent::{
        dataplane::{TcPath, XdpMode},
        overlay::Mode,
    };

    use super::{
        cgroup::TestCgroup,
        cluster::{
            Cluster, NODE_PORT, Node, SERVICE, SetUp, TIMEOUT, answered_by, any_of, ask,
            both_families, connect, from_one_port, ipv6_alone, make_bridge, node_ip,
            place::is_possible,
            plug, pod_ip, pod_ip6, serve_at,
            space::{Space, pause},
            tcp, udp,
        },
    };

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
            let set_up = SetUp { mode, tc, cgroup: None, pins: None, xdp: XdpMode::Off };
            let with_sockets = SetUp { cgroup: Some(cgroup.path.clone()), ..set_up.clone() };
            scenario(set_up, with_sockets);
        }
        over_ipv6();
    }

    fn add_pods(node: &mut Node, lasts: &[u8]) {
        for last in lasts {
            node.add_pod(*last);
        }
    }

    fn scenario(plain: SetUp, with_sockets: SetUp) {
        let lan = Space::new();
        lan.run(make_bridge);
        let [mut one, mut two] = [1, 2].map(|number| Node::new(number, both_families, &lan));
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
        both_families(2).into_iter().for_each(|ip| two.space.run(move || serve_at(ip, 200)));
        assert_eq!(client.run(|| answered_by(&tcp((node_ip(2), 8080), 3))), [200], "a node");
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

        a_node_port_goes(&cluster, (client, &outside), node_port);
        a_process_of_the_node_answers(&cluster, (client, &outside));

        // An endpoint goes: nobody meets it any more. The last one goes: refused at once.
        cluster.set_backends(&[pod_ip(2, 21)]);
        pause(Duration::from_millis(300));
        assert_eq!(client.run(|| answered_by(&tcp(SERVICE, 50))), [21]);
        assert_eq!(outside.run(move || answered_by(&tcp(node_port, 50))), [21]);
        cluster.set_backends(&[]);
        pause(Duration::from_millis(300));
        for (space, address) in [(client, SERVICE), (&outside, node_port)] {
            let refused = move || TcpStream::connect_timeout(&address.into(), TIMEOUT).unwrap_err();
            assert_eq!(space.run(refused).kind(), ErrorKind::ConnectionRefused);
        }
        drop(agents);
        one.space.settle();
    }

    /// The node port goes while its backends stay: who asked by it hears nothing any more.
    fn a_node_port_goes(
        cluster: &Cluster,
        (client, outside): (&Space, &Space),
        node_port: (Ipv4Addr, u16),
    ) {
        let asking = outside.run(move || {
            let socket = UdpSocket::bind((any_of(node_port.into()), 0)).unwrap();
            socket.set_read_timeout(Some(TIMEOUT)).unwrap();
            socket.connect(node_port).unwrap();
            socket
        });
        assert!(hears(&asking));
        cluster.set_node_port(0);
        let last = Instant::now() + Duration::from_secs(10);
        while hears(&asking) {
            assert!(Instant::now() < last, "a flow outlives its frontend");
            pause(Duration::from_millis(50));
        }
        assert!(!hears(&asking), "nor later");
        assert_eq!(client.run(|| answered_by(&udp(SERVICE, 40))), [12, 21]);
        cluster.set_node_port(NODE_PORT);
        pause(Duration::from_millis(300));
        assert!(hears(&asking));
    }

    /// A process of the second node as backend hears clients both by the node port and at its own.
    fn a_process_of_the_node_answers(cluster: &Cluster, (client, outside): (&Space, &Space)) {
        let two = both_families(2);
        cluster.set_endpoints(vec![two[0]], vec![two[1]]);
        pause(Duration::from_millis(300));
        for space in [client, outside] {
            for ip in &two {
                let ends = [NODE_PORT, 8080].map(|port| SocketAddr::new(*ip, port));
                let from = SocketAddr::new(any_of(ends[0]), 20_000);
                assert_eq!(space.run(move || from_one_port(from, ends)), [200; 12], "by {ip}");
            }
        }
    }

    /// Whether a datagram is answered.
    fn hears(socket: &UdpSocket) -> bool {
        // What was refused is told by the next call.
        socket.send(b"?").is_ok() && socket.recv(&mut [0]).is_ok()
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
            xdp: XdpMode::Off,
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
