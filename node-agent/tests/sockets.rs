//! The socket programs on the running kernel: real sockets of a process in a cgroup of its own.
//!
//! One test, since a process can be in one cgroup only.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        io::{ErrorKind, Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
        thread,
        time::{Duration, Instant},
    };

    use ebpf_common::{
        addr::{Addr, Net},
        config::Config,
        service::Backend,
        verdict::DropReason,
    };
    use node_agent::{
        dataplane::{load::Programs, maps::Maps, model},
        model::Protocol,
    };

    use super::{
        cgroup::TestCgroup,
        place::{is_possible, own_namespaces},
    };

    const SERVICE: &str = "10.96.0.1:80";
    const EMPTY: &str = "10.96.0.2:80";
    const NODE_PORT: &str = "127.0.0.50:30080";

    /// Puts a frontend with backends on loopback addresses.
    fn put(maps: &mut Maps, frontend: &str, protocol: Protocol, backends: &[SocketAddr]) {
        let frontend: SocketAddr = frontend.parse().unwrap();
        let addr = Addr::from(frontend.ip());
        let addr = if frontend.port() == 30_080 { addr.any() } else { addr };
        let backends: BTreeSet<Backend> = backends
            .iter()
            .map(|backend| Backend {
                addr: Addr::from(backend.ip()),
                port: backend.port().to_be_bytes(),
                reserved: [0; 2],
            })
            .collect();
        let key = model::key(addr, frontend.port(), protocol);
        for op in maps.observed().unwrap().plan(key, Some(&backends)) {
            maps.apply(&op).unwrap();
        }
    }

    /// A server that says its number to everyone who connects.
    fn tcp_server(number: u8) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, number), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let _server = thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                stream.write_all(&[number]).unwrap();
            }
        });
        address
    }

    /// A server that answers each datagram with its number.
    fn udp_server(number: u8) -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, number), 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let _server = thread::spawn(move || {
            let mut bytes = [0; 16];
            while let Ok((_, from)) = socket.recv_from(&mut bytes) {
                socket.send_to(&[number], from).unwrap();
            }
        });
        address
    }

    fn ask(address: &str) -> u8 {
        let mut stream = TcpStream::connect(address).unwrap();
        assert_eq!(
            stream.peer_addr().unwrap().to_string(),
            address,
            "getpeername shows the service"
        );
        let mut number = [0];
        stream.read_exact(&mut number).unwrap();
        number[0]
    }

    fn udp_socket() -> UdpSocket {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket
    }

    fn dropped(maps: &Maps, reason: DropReason) -> u64 {
        maps.drops().unwrap().iter().find(|(one, _)| *one == reason).unwrap().1
    }

    #[test]
    fn services_for_processes_of_this_node() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("sockets");
        let test = || {
            let pins = own_namespaces().join("orlop");
            let (mut programs, mut maps) = Programs::load(Some(&pins)).unwrap();
            programs.attach_cgroup(&cgroup.path).unwrap();
            let config = Config {
                services: [Net::new([10, 96, 0, 0].into(), 16), Net::default()],
                node_port_first: 30_000,
                node_port_last: 32_767,
                ..Config::default()
            };
            maps.set_config(&config).unwrap();
            maps.set_node_addresses(&BTreeSet::from([IpAddr::from([127, 0, 0, 50])])).unwrap();
            let tcp = [tcp_server(2), tcp_server(3), tcp_server(4)];
            put(&mut maps, SERVICE, Protocol::Tcp, &tcp);
            put(&mut maps, NODE_PORT, Protocol::Tcp, &tcp[..1]);
            put(&mut maps, EMPTY, Protocol::Tcp, &[]);
            tcp_is_spread_evenly();
            assert_eq!(ask(NODE_PORT), 2);
            refusals_come_at_once(&maps);
            let udp = [udp_server(2), udp_server(3), udp_server(4)];
            put(&mut maps, SERVICE, Protocol::Udp, &udp);
            put(&mut maps, EMPTY, Protocol::Udp, &[]);
            udp_stays_with_its_backend_and_sees_the_service();

            // The agent dies: what is pinned goes on. The next one takes it over.
            drop((programs, maps));
            tcp_is_spread_evenly();
            let (mut programs, mut maps) = Programs::load(Some(&pins)).unwrap();
            programs.attach_cgroup(&cgroup.path).unwrap();
            assert_eq!(maps.observed().unwrap().frontends.len(), 5);
            assert_eq!(dropped(&maps, DropReason::NoBackend), 3, "counters live on");
            put(&mut maps, SERVICE, Protocol::Tcp, &tcp[2..]);
            assert_eq!(ask(SERVICE), 4, "the new agent's writes count");
        };
        thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }

    fn tcp_is_spread_evenly() {
        let mut seen = BTreeMap::<u8, f64>::new();
        for _ in 0..600 {
            *seen.entry(ask(SERVICE)).or_default() += 1.0;
        }
        // Chi-squared with two degrees of freedom: 18.4 is exceeded once in ten thousand runs.
        let chi: f64 = seen.values().map(|count| (count - 200.0).powi(2) / 200.0).sum();
        assert!(seen.len() == 3 && chi < 18.4, "{seen:?}");
    }

    fn refusals_come_at_once(maps: &Maps) {
        for (address, reason) in [
            (EMPTY, DropReason::NoBackend),
            ("10.96.0.99:80", DropReason::UnknownService),
            ("10.96.0.1:81", DropReason::UnknownService),
        ] {
            let (before, start) = (dropped(maps, reason), Instant::now());
            let error = TcpStream::connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
            assert!(start.elapsed() < Duration::from_millis(500));
            assert_eq!(dropped(maps, reason), before + 1);
        }
    }

    fn udp_stays_with_its_backend_and_sees_the_service() {
        let mut bytes = [0; 16];
        let mut chosen = BTreeSet::new();
        for _ in 0..40 {
            let socket = udp_socket();
            let mut own = BTreeSet::new();
            for _ in 0..5 {
                socket.send_to(b"?", SERVICE).unwrap();
                let (_, from) = socket.recv_from(&mut bytes).unwrap();
                assert_eq!(from.to_string(), SERVICE, "recvmsg shows the service");
                own.insert(bytes[0]);
            }
            assert_eq!(own.len(), 1, "one socket, one backend");
            chosen.extend(own);

            let connected = udp_socket();
            connected.connect(SERVICE).unwrap();
            assert_eq!(connected.peer_addr().unwrap().to_string(), SERVICE);
            connected.send(b"?").unwrap();
            assert_eq!(connected.recv(&mut bytes).unwrap(), 1);
        }
        assert_eq!(chosen, BTreeSet::from([2, 3, 4]), "all backends have sockets");
        let error = udp_socket().send_to(b"?", EMPTY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let error = udp_socket().connect(EMPTY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}
