//! `sessionAffinity: ClientIP`, seen by a pod: its connections and datagrams meet the same backend whether a
//! program at the socket or one in the packets' path chooses it.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/node.rs"]
mod node;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        io::{Read as _, Write as _},
        net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
        sync::{Arc, Mutex},
        thread,
        time::Duration,
    };

    use node_agent::{
        dataplane::load::{Programs, TcHook},
        model::{
            EndpointPort, EndpointRow, EndpointSliceRow, ObjectKey, Protocol, ServicePort,
            ServiceRow,
        },
    };

    use super::{
        cgroup::TestCgroup,
        node::{Agent, NAME, Node, place::is_possible, pod_ip, space::Space},
    };

    const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 96, 0, 1), 80);
    const BACKENDS: [u8; 5] = [21, 22, 23, 24, 25];
    const CLIENTS: [u8; 4] = [11, 12, 13, 14];
    const PATIENCE: Duration = Duration::from_secs(5);

    fn web(protocol: Protocol) -> (ObjectKey, ServiceRow) {
        let port = ServicePort { name: "p".into(), protocol, port: SERVICE.port(), node_port: 0 };
        let row = ServiceRow {
            cluster_ips: vec![(*SERVICE.ip()).into()],
            ports: vec![port],
            affinity_s: 10_800,
            ..ServiceRow::default()
        };
        (ObjectKey::new("default", &format!("web-{protocol:?}")), row)
    }

    fn slice(protocol: Protocol, backends: &[u8]) -> (ObjectKey, EndpointSliceRow) {
        let endpoint = |last: &u8| EndpointRow {
            ip: pod_ip(*last).into(),
            node: NAME.into(),
            ..EndpointRow::default()
        };
        let (service, _) = web(protocol);
        let row = EndpointSliceRow {
            service: service.clone(),
            ports: vec![EndpointPort { name: "p".into(), protocol, port: 8_080 }],
            endpoints: backends.iter().map(endpoint).collect(),
            ..EndpointSliceRow::default()
        };
        (service, row)
    }

    /// Servers of both protocols that say a number.
    fn serve(number: u8) {
        let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
        let _tcp = thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                // The far end may have gone.
                let _gone = stream.write_all(&[number]);
            }
        });
        let socket = UdpSocket::bind("0.0.0.0:8080").unwrap();
        let _udp = thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok((_, from)) = socket.recv_from(&mut bytes) {
                let _gone = socket.send_to(&[number], from);
            }
        });
    }

    /// Asks by a connection that a program at the socket translates.
    fn by_connection() -> u8 {
        let mut stream = TcpStream::connect_timeout(&SERVICE.into(), PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        byte[0]
    }

    fn udp() -> UdpSocket {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Asks by a datagram that a program at the socket translates.
    fn by_datagram() -> u8 {
        let (socket, mut byte) = (udp(), [0]);
        socket.send_to(b"?", SERVICE).unwrap();
        let (_, from) = socket.recv_from(&mut byte).unwrap();
        assert_eq!(from, SERVICE.into());
        byte[0]
    }

    /// Asks by a connected socket, whose datagrams a program in the packets' path translates.
    fn by_packet() -> u8 {
        let (socket, mut byte) = (udp(), [0]);
        socket.connect(SERVICE).unwrap();
        socket.send(b"?").unwrap();
        socket.recv(&mut byte).unwrap();
        byte[0]
    }

    /// The backend to which a connection's first packet goes in the packets' path, as of a process that no
    /// program at the socket sees.
    fn by_first_packet(programs: &mut Programs, client: u8, port: u16) -> u8 {
        let mut packet = vec![0; 14];
        packet[12] = 8;
        packet.extend([0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0]);
        packet.extend(pod_ip(client).octets());
        packet.extend(SERVICE.ip().octets());
        packet.extend(port.to_be_bytes());
        packet.extend(SERVICE.port().to_be_bytes());
        packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
        let (_, out) = programs.test_run(TcHook::FromPod, 0, &packet).unwrap();
        let to = Ipv4Addr::new(out[30], out[31], out[32], out[33]);
        let backend = BACKENDS.iter().find(|last| pod_ip(**last) == to);
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
            let ((key, service), (_, backends)) = (web(protocol), slice(protocol, &BACKENDS));
            node.services.upsert(key.clone(), service);
            node.slices.upsert(key, backends);
        }
        let agent = node.start(Some(cgroup.path.clone()));
        (node, agent)
    }

    #[test]
    fn a_pod_has_one_backend_by_sockets_and_by_packets() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("affinity");
        let (node, agent) = set_up(&cgroup);
        // Programs to run by themselves, over the agent's maps.
        let pins = node.pins();
        let load = move || Arc::new(Mutex::new(Programs::load(Some(&pins)).unwrap().0));
        let programs = node.space.run(load);
        let first_packets = |client: u8, port: u16| {
            let programs = Arc::clone(&programs);
            node.space.run::<Vec<u8>>(move || {
                let mut programs = programs.lock().unwrap();
                (0..8).map(|more| by_first_packet(&mut programs, client, port + more)).collect()
            })
        };
        let mut chosen = BTreeSet::<u8>::new();
        for (index, client) in CLIENTS.into_iter().enumerate() {
            let pod = &node.pods[&client];
            // Who comes first differs, so that each path is seen to keep to what the other chose.
            let mut seen = BTreeSet::<u8>::new();
            let mut datagrams = BTreeSet::<u8>::new();
            for round in 0..2 {
                if (index + round) % 2 == 0 {
                    seen.extend(pod.run(|| [by_connection(), by_connection(), by_connection()]));
                    datagrams.extend(pod.run(|| [by_datagram(), by_datagram(), by_datagram()]));
                } else {
                    let port = 20_000 + 100 * u16::try_from(index).unwrap();
                    seen.extend(first_packets(client, port));
                    datagrams.extend(pod.run(|| [by_packet(), by_packet(), by_packet()]));
                }
            }
            assert_eq!(seen.len(), 1, "connections of {client}: {seen:?}");
            assert_eq!(datagrams.len(), 1, "datagrams of {client}: {datagrams:?}");
            chosen.extend(&seen);
            chosen.extend(&datagrams);

            // Its backend goes: all paths move, to one and the same.
            let lost = *datagrams.first().unwrap();
            let rest: Vec<u8> = BACKENDS.into_iter().filter(|last| *last != lost).collect();
            let (key, backends) = slice(Protocol::Udp, &rest);
            node.slices.upsert(key.clone(), backends);
            node.settle(&agent);
            let moved: BTreeSet<u8> =
                pod.run(|| [by_packet(), by_datagram(), by_packet(), by_datagram()]).into();
            assert!(moved.len() == 1 && !moved.contains(&lost), "{lost} to {moved:?}");
            node.slices.upsert(key, slice(Protocol::Udp, &BACKENDS).1);
            node.settle(&agent);
        }
        assert!(chosen.len() > 1, "four pods, two services, one backend: {chosen:?}");
        drop(agent);
        node.space.settle();
    }
}
