//! `sessionAffinity: ClientIP`, seen by a pod: its connections and datagrams of a family meet the same backend
//! whether a program at the socket or one in the packets' path chooses it.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/frame.rs"]
#[expect(dead_code, reason = "other packets are for other tests")]
mod frame;
#[cfg(test)]
#[path = "support/node.rs"]
mod node;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        io::{Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
        sync::{Arc, Mutex},
        thread,
        time::Duration,
    };

    use node_agent::{
        dataplane::load::{Programs, TcHook},
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, Family, ObjectKey, Protocol, ServicePort,
            ServiceRow,
        },
    };

    use super::{
        cgroup::TestCgroup,
        frame::{Frame, TCP},
        node::{Agent, FAMILIES, NAME, Node, place::is_possible, pod_ip, space::Space},
    };

    const BACKENDS: [u8; 5] = [21, 22, 23, 24, 25];
    const CLIENTS: [u8; 8] = [11, 12, 13, 14, 15, 16, 17, 18];
    const PATIENCE: Duration = Duration::from_secs(5);

    const fn service(family: Family) -> SocketAddr {
        let ip = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
            Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1)),
        };
        SocketAddr::new(ip, 80)
    }

    fn web(protocol: Protocol) -> (ObjectKey, ServiceRow) {
        let port = ServicePort { name: "p".into(), protocol, port: 80, node_port: 0 };
        let row = ServiceRow {
            cluster_ips: FAMILIES.map(|family| service(family).ip()).into(),
            ports: vec![port],
            affinity_s: 10_800,
            ..ServiceRow::default()
        };
        (ObjectKey::new("default", &format!("web-{protocol:?}")), row)
    }

    fn slice(family: Family, protocol: Protocol, backends: &[u8]) -> (ObjectKey, EndpointSliceRow) {
        let endpoint = |last: &u8| EndpointRow {
            ip: pod_ip(family, *last),
            node: NAME.into(),
            ..EndpointRow::default()
        };
        let (service, _) = web(protocol);
        let row = EndpointSliceRow {
            service,
            family,
            ports: vec![EndpointPort { name: "p".into(), protocol, port: 8_080 }],
            endpoints: backends.iter().map(endpoint).collect(),
            ..EndpointSliceRow::default()
        };
        (ObjectKey::new("default", &format!("web-{protocol:?}-{family:?}")), row)
    }

    /// Servers of both protocols that say a number.
    fn serve(number: u8) {
        let listener = TcpListener::bind("[::]:8080").unwrap();
        let _tcp = thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                // The far end may have gone.
                let _gone = stream.write_all(&[number]);
            }
        });
        let socket = UdpSocket::bind("[::]:8080").unwrap();
        let _udp = thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut bytes) {
                let _gone = socket.send_to(&[number], from);
            }
        });
    }

    /// Asks by a connection that a program at the socket translates.
    fn by_connection(service: SocketAddr) -> u8 {
        let mut stream = TcpStream::connect_timeout(&service, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        byte[0]
    }

    fn udp(service: SocketAddr) -> UdpSocket {
        let any = if service.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Asks by a datagram that a program at the socket translates.
    fn by_datagram(service: SocketAddr) -> u8 {
        let (socket, mut byte) = (udp(service), [0]);
        socket.send_to(b"?", service).unwrap();
        let (_, from) = socket.recv_from(&mut byte).unwrap();
        assert_eq!(from, service);
        byte[0]
    }

    /// Asks by a connected socket, whose datagrams a program in the packets' path translates.
    fn by_packet(service: SocketAddr) -> u8 {
        let (socket, mut byte) = (udp(service), [0]);
        socket.connect(service).unwrap();
        socket.send(b"?").unwrap();
        socket.recv(&mut byte).unwrap();
        byte[0]
    }

    /// The backend to which a connection's first packet goes in the packets' path, as of a process that no
    /// program at the socket sees.
    fn by_first_packet(programs: &mut Programs, family: Family, client: u8, port: u16) -> u8 {
        let service = service(family);
        let to = (service.ip(), service.port());
        let packet = Frame::between(TCP, (pod_ip(family, client), port), to).bytes();
        let (_, out) = programs.test_run(TcHook::FromPod, 0, &packet).unwrap();
        let to: IpAddr = match family {
            Family::V4 => <[u8; 4]>::try_from(&out[30..34]).unwrap().into(),
            Family::V6 => <[u8; 16]>::try_from(&out[38..54]).unwrap().into(),
        };
        let backend = BACKENDS.iter().find(|last| pod_ip(family, **last) == to);
        *backend.unwrap_or_else(|| panic!("went to {to}"))
    }

    /// A node whose agent has programmed a service of each protocol, with servers behind it.
    fn set_up(cgroup: &TestCgroup) -> (Node, Agent) {
        let outside = Space::new();
        let mut node = Node::new(&outside);
        for last in CLIENTS.iter().chain(&BACKENDS) {
            node.add_pod(*last);
        }
        for last in BACKENDS {
            node.pods[&last].run(move || serve(last));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let (key, service) = web(protocol);
            node.services.upsert(key, service);
            for family in FAMILIES {
                let (key, backends) = slice(family, protocol, &BACKENDS);
                node.slices.upsert(key, backends);
            }
        }
        let agent = node.start(Some(cgroup.path.clone()));
        (node, agent)
    }

    /// Programs to run by themselves, over the agent's maps.
    type Shared = Arc<Mutex<Programs>>;

    /// What one pod meets by each way, and what becomes of it when its backend goes. Gives the backends of its
    /// connections and of its datagrams.
    fn meets(
        (node, agent): (&Node, &Agent),
        programs: &Shared,
        family: Family,
        (index, client): (usize, u8),
    ) -> [u8; 2] {
        let (pod, to) = (&node.pods[&client], service(family));
        let first_packets = |port: u16| {
            let programs = Arc::clone(programs);
            node.space.run::<Vec<u8>>(move || {
                let mut programs = programs.lock().unwrap();
                let ports = port..port + 8;
                ports.map(|port| by_first_packet(&mut programs, family, client, port)).collect()
            })
        };
        // Who comes first differs, so that each path is seen to keep to what the other chose.
        let mut seen = BTreeSet::<u8>::new();
        let mut datagrams = BTreeSet::<u8>::new();
        for round in 0..2 {
            if (index + round) % 2 == 0 {
                seen.extend(pod.run(move || [(); 3].map(|()| by_connection(to))));
                datagrams.extend(pod.run(move || [(); 3].map(|()| by_datagram(to))));
            } else {
                seen.extend(first_packets(20_000 + 100 * u16::try_from(index).unwrap()));
                datagrams.extend(pod.run(move || [(); 3].map(|()| by_packet(to))));
            }
        }
        assert_eq!(seen.len(), 1, "connections of {client} to {to}: {seen:?}");
        assert_eq!(datagrams.len(), 1, "datagrams of {client} to {to}: {datagrams:?}");
        let met = [*seen.first().unwrap(), *datagrams.first().unwrap()];

        // Its backend goes: all paths move, to one and the same.
        let lost = met[1];
        let rest: Vec<u8> = BACKENDS.into_iter().filter(|last| *last != lost).collect();
        let (key, backends) = slice(family, Protocol::Udp, &rest);
        node.slices.upsert(key.clone(), backends);
        node.settle(agent);
        let ask = move || [by_packet(to), by_datagram(to), by_packet(to), by_datagram(to)];
        let moved: BTreeSet<u8> = pod.run(ask).into();
        assert!(moved.len() == 1 && !moved.contains(&lost), "{to}: {lost} to {moved:?}");
        node.slices.upsert(key, slice(family, Protocol::Udp, &BACKENDS).1);
        node.settle(agent);
        met
    }

    #[test]
    fn a_pod_has_one_backend_by_sockets_and_by_packets() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("affinity");
        let (node, agent) = set_up(&cgroup);
        let pins = node.pins();
        let load = move || Arc::new(Mutex::new(Programs::load(Some(&pins)).unwrap().0));
        let programs = node.space.run(load);
        for family in FAMILIES {
            let pods = CLIENTS.into_iter().enumerate();
            let met = pods.flat_map(|pod| meets((&node, &agent), &programs, family, pod));
            let chosen: BTreeSet<u8> = met.collect();
            assert!(chosen.len() > 1, "eight pods, two services, one backend: {chosen:?}");
        }
        drop(agent);
        node.space.settle();
    }
}
