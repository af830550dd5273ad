//! Random services asked by real sockets in a cgroup of the test's own, and what the reference says of it.
//!
//! One test, since a process can be in one cgroup only. `ORLOP_CASES` and `ORLOP_SEED` as in `model.rs`, a
//! hundredth of the cases: each is a connection to a server.

#[cfg(test)]
#[path = "support/cgroup.rs"]
mod cgroup;
#[cfg(test)]
#[expect(dead_code, reason = "packets are compared by another test")]
#[path = "model/mod.rs"]
mod model;
#[cfg(test)]
#[path = "support/runs.rs"]
mod runs;

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        io::{self, ErrorKind, Read as _, Write as _},
        net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
        thread,
        time::Duration,
    };

    use ebpf_common::verdict::DropReason;
    use node_agent::sys::socket::netns_cookie;

    use super::{
        cgroup::TestCgroup,
        model::{
            asking::{Asker, Question, Reply},
            chance::Random,
            frame::{TCP, UDP},
            place::{ip as ip_lines, is_possible},
            random,
            reference::Reference,
            rig::Rig,
            world::{DNS, End, Place},
        },
        runs,
    };

    /// All ports that endpoints of random services have.
    const PORTS: [u16; 5] = [80, 53, 443, 5_353, 8_080];
    /// How long an answer may take that must come, and how long one is waited for that need not.
    const PATIENCE: [Duration; 2] = [Duration::from_secs(5), Duration::from_millis(20)];

    #[expect(clippy::print_stdout, reason = "how much was compared is what the run is for")]
    #[test]
    fn sockets_get_what_the_reference_allows() {
        if !is_possible() {
            return;
        }
        let cgroup = TestCgroup::enter("model");
        let test = || {
            let mut rig = Rig::load();
            serve_everywhere();
            rig.programs.attach_cgroup(&cgroup.path).unwrap();
            let mut tally = BTreeMap::<&str, usize>::new();
            let mut seed = runs::seed();
            while tally.values().sum::<usize>() < runs::cases(100_000) / 50 {
                let compared = case(seed, &mut rig);
                compared.iter().for_each(|(what, n)| *tally.entry(what).or_default() += n);
                seed += 1;
            }
            println!("seeds {} to {seed}: {tally:?}", runs::seed());
            assert_eq!(tally.len(), 6, "every kind of answer was given to both protocols");
        };
        thread::scope(|scope| scope.spawn(test).join()).expect("the case above");
    }

    /// Servers at every place that an endpoint may have, each of which tells its address. Every other
    /// address is this machine's too, so that what is not translated is refused and not lost.
    fn serve_everywhere() {
        let places = Place::ALL.iter().flat_map(|place| [place.ip(false), place.ip(true)]);
        let places: Vec<_> = places.chain(DNS).collect();
        let mut lines = "route replace local default dev lo
                         route replace local ::/0 dev lo"
            .to_owned();
        for ip in &places {
            let (bits, nodad) = if ip.is_ipv4() { (32, "") } else { (128, "nodad") };
            lines.push_str(&format!("\naddr replace {ip}/{bits} dev lo {nodad}"));
        }
        ip_lines(&lines);
        for ip in places {
            for port in PORTS {
                serve(SocketAddr::new(ip, port));
            }
        }
    }

    fn serve(address: SocketAddr) {
        let listener = TcpListener::bind(address).unwrap();
        let _tcp = thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                // The far end may have gone.
                let _gone = stream.write_all(address.to_string().as_bytes());
            }
        });
        let socket = UdpSocket::bind(address).unwrap();
        let _udp = thread::spawn(move || {
            let mut bytes = [0; 16];
            while let Ok((_, from)) = socket.recv_from(&mut bytes) {
                let _gone = socket.send_to(address.to_string().as_bytes(), from);
            }
        });
    }

    fn case(seed: u64, rig: &mut Rig) -> BTreeMap<&'static str, usize> {
        let mut random = Random(seed);
        let world = random::world(&mut random);
        rig.set_up(&world);
        let mut reference = Reference::new(world);
        let mut tally = BTreeMap::new();
        for _ in 0..20 {
            let question = random::question(&mut random, &reference.world);
            if question.to.0.is_loopback() && question.asker != Asker::Node {
                // The test's own servers listen at no loopback address.
                continue;
            }
            rig.be(question.asker, netns_cookie().unwrap());
            let allowed = reference.reply(&question);
            let got = ask(&question, PATIENCE[usize::from(allowed == Reply::Left)]);
            let is_allowed = match (&allowed, got) {
                (Reply::Refused(DropReason::SourceRange), Got::Denied) => true,
                (Reply::Refused(reason), Got::Refused) => *reason != DropReason::SourceRange,
                (Reply::OneOf(backends, port), Got::Backend(backend)) => {
                    reference.take_reply(&question, *port, backend);
                    backends.contains(&backend)
                }
                // Nobody else is asked; whether somebody listens there is another matter.
                (Reply::Left, Got::Backend(backend)) => backend == question.to,
                (Reply::Left, Got::Refused | Got::Nothing) => true,
                _ => false,
            };
            let world = &reference.world;
            assert!(
                is_allowed,
                "seed {seed}: {question:?}\n{got:?}, allowed {allowed:?}\n{world:?}"
            );
            let name = match (question.proto, &allowed) {
                (UDP, Reply::Left) => "datagrams left alone",
                (UDP, Reply::Refused(_)) => "datagrams refused",
                (UDP, Reply::OneOf(..)) => "datagrams translated",
                (_, allowed) => allowed.name(),
            };
            *tally.entry(name).or_default() += 1;
        }
        tally
    }

    #[derive(Clone, Copy, Debug)]
    enum Got {
        Backend(End),
        Refused,
        Denied,
        Nothing,
    }

    fn ask(question: &Question, patience: Duration) -> Got {
        let to = SocketAddr::from(question.to);
        let answer = match (question.proto, question.datagram) {
            (TCP, _) => ask_tcp(to, patience),
            (_, true) => ask_datagram(to, patience),
            (_, false) => ask_connected(to, patience),
        };
        match answer {
            Ok(who) => {
                let who: SocketAddr = who.parse().unwrap();
                Got::Backend((who.ip(), who.port()))
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Got::Refused,
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Got::Denied,
            Err(_) => Got::Nothing,
        }
    }

    fn ask_tcp(to: SocketAddr, patience: Duration) -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        assert_eq!(stream.peer_addr()?, to, "getpeername shows what was asked for");
        let mut who = String::new();
        stream.read_to_string(&mut who)?;
        Ok(who)
    }

    fn udp_socket(to: SocketAddr, patience: Duration) -> io::Result<UdpSocket> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(patience))?;
        Ok(socket)
    }

    fn ask_datagram(to: SocketAddr, patience: Duration) -> io::Result<String> {
        let socket = udp_socket(to, patience)?;
        socket.send_to(b"?", to)?;
        let mut bytes = [0; 64];
        let (length, from) = socket.recv_from(&mut bytes)?;
        assert_eq!(from, to, "recvmsg shows what was asked for");
        Ok(std::str::from_utf8(&bytes[..length]).unwrap().to_owned())
    }

    fn ask_connected(to: SocketAddr, patience: Duration) -> io::Result<String> {
        let socket = udp_socket(to, patience)?;
        socket.connect(to)?;
        assert_eq!(socket.peer_addr()?, to, "getpeername shows what was asked for");
        socket.send(b"?")?;
        let mut bytes = [0; 64];
        let length = socket.recv(&mut bytes)?;
        Ok(std::str::from_utf8(&bytes[..length]).unwrap().to_owned())
    }
}
