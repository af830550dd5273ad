//! A trace on the running kernel: it says what the programs would do, and nothing is written.

#[cfg(test)]
#[path = "support/place.rs"]
mod place;
#[cfg(test)]
#[path = "support/rows.rs"]
mod rows;

#[cfg(test)]
#[path = "trace/driver.rs"]
mod driver;
#[cfg(test)]
#[path = "trace/dump.rs"]
mod dump;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr, path::Path, thread};

    use ebpf_common::{
        SCTP, TCP,
        addr::Net,
        config::Config,
        maps as names,
        service::{Service, choose},
        socket::{Ask, CONNECT},
        trace::{ADD_FLOW, BACKEND, DROP, KEEP_CLIENT, SERVICE, Step},
        verdict::DropReason,
    };
    use node_agent::{
        dataplane::{
            load::{Programs, TcHook},
            trace::{Names, frame},
            tracer::{Answer, Tracer},
        },
        model::{LocalEndpoint, ObjectKey},
        sys::netlink::Netlink,
        table::Table,
        way::{self, Known},
    };

    use super::{
        dump::dump,
        place::{ip, is_possible, own_namespaces},
        rows::{Rows, addr, peer},
    };

    const SERVICE_V4: &str = "10.96.0.1:80";
    const SERVICE_V6: &str = "[fd00:10:96::1]:80";
    const EMPTY: &str = "10.96.0.2:80";
    const COOKIE: u64 = 4_711;

    fn backends(ips: [&str; 3]) -> Vec<SocketAddr> {
        ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 8_080)).collect()
    }

    fn set_up(pins: &Path) -> Programs {
        let (programs, _maps) = Programs::load(Some(pins)).unwrap();
        let rows = Rows::below(pins);
        let net = |ip: &str, length| Net::new(ip.parse::<std::net::IpAddr>().unwrap(), length);
        rows.set_config(Config {
            services: [net("10.96.0.0", 16), net("fd00:10:96::", 108)],
            gateway: [addr("10.244.1.1"), addr("fd00:244::1")],
            node_port_first: 30_000,
            node_port_last: 32_767,
            ..Config::default()
        });
        rows.put_node_address("192.0.2.1");
        rows.put_netns(COOKIE, ["10.244.1.7", "fd00:244::7"]);
        let sticky = Service { affinity_s: 60, ..Service::default() };
        let four = backends(["10.244.2.3", "10.244.2.4", "10.244.2.5"]);
        rows.put_service(SERVICE_V4, TCP, sticky, &four);
        rows.put_service("0.0.0.0:30080", TCP, Service::default(), &four);
        rows.put_service(EMPTY, TCP, Service::default(), &[]);
        let six = backends(["fd00:2::3", "fd00:2::4", "fd00:2::5"]);
        rows.put_service(SERVICE_V6, TCP, sticky, &six);
        programs
    }

    fn ask(tracer: &mut Tracer, to: &str, random: u32) -> (Answer, Vec<Step>) {
        let wanted = peer(to.parse().unwrap());
        let ask =
            Ask { netns: COOKIE, wanted, random, proto: TCP, call: CONNECT, reserved: [0; 6] };
        tracer.ask(&ask).unwrap()
    }

    fn has(steps: &[Step], kind: u32) -> bool {
        steps.iter().any(|step| step.kind == kind)
    }

    fn sockets_are_answered(tracer: &mut Tracer) {
        for (to, ips) in [
            (SERVICE_V4, ["10.244.2.3", "10.244.2.4", "10.244.2.5"]),
            (SERVICE_V6, ["fd00:2::3", "fd00:2::4", "fd00:2::5"]),
        ] {
            for random in [0, 1 << 31, u32::MAX] {
                let (answer, steps) = ask(tracer, to, random);
                let slot = usize::try_from(choose(random, 3).unwrap()).unwrap();
                assert_eq!(answer, Answer::Translated(peer(backends(ips)[slot])), "{to} {random}");
                assert!(has(&steps, SERVICE) && has(&steps, BACKEND) && has(&steps, KEEP_CLIENT));
                let words = Names::default().words(&steps[0]);
                assert!(words.contains("with 3 backends, a client keeps its backend for 60 s"));
            }
        }
        let (answer, steps) = ask(tracer, EMPTY, 0);
        assert_eq!(answer, Answer::Refused(DropReason::NoBackend));
        assert!(has(&steps, DROP));
        let (answer, _) = ask(tracer, "10.96.0.99:80", 0);
        assert_eq!(answer, Answer::Refused(DropReason::UnknownService));
        let (answer, _) = ask(tracer, "198.51.100.1:80", 0);
        assert_eq!(answer, Answer::Left);
    }

    /// A pod of this node, behind a link of its own.
    fn with_pod(ifindex: u32) -> Known {
        let known = Known { services: Table::new(), endpoints: Table::new() };
        let ip = "10.244.1.7".parse().unwrap();
        let pod = LocalEndpoint {
            pod: ObjectKey::new("default", "web"),
            ip,
            netns_cookie: COOKIE,
            host_ifindex: ifindex,
            host_mac: [2; 6],
            pod_mac: [3; 6],
            host_ports: [].into(),
        };
        known.endpoints.upsert(ip, pod);
        known
    }

    /// The programs that a packet meets, and all that is said of it.
    fn hops(pins: &Path, known: &Known, asked: [&str; 3]) -> (Vec<String>, String) {
        let arguments: BTreeMap<&str, &str> =
            ["from", "to", "protocol"].into_iter().zip(asked).collect();
        let hops = way::trace(pins, known, &arguments).unwrap();
        let programs = hops.as_array().unwrap().iter();
        let programs = programs.map(|hop| hop["program"].as_str().unwrap().to_owned());
        (programs.collect(), way::text(hops.as_array().unwrap()))
    }

    #[test]
    fn a_trace_meets_the_programs_that_the_packet_would() {
        if !is_possible() {
            return;
        }
        let test = || {
            let pins = own_namespaces().join("orlop");
            ip("link add orl0 type veth peer name pod0");
            let link = Netlink::open().unwrap().link("orl0").unwrap().unwrap();
            let _programs = set_up(&pins);
            let rows = Rows::below(&pins);
            let far = ["10.244.2.3:3868".parse().unwrap()];
            rows.put_service("10.96.0.7:3868", SCTP, Service::default(), &far);
            let known = with_pod(link.index);
            let before = dump(&pins);

            let (programs, text) = hops(&pins, &known, ["node", "pod/web:8080", "tcp"]);
            assert_eq!(programs, ["tc_trace_socket", "tc_to_pod"], "{text}");
            assert!(text.contains(&format!("a packet at orl0 ({})", link.index)), "{text}");
            assert!(!text.contains("tunnelled"), "{text}");

            // No program is asked about its socket.
            let (programs, text) = hops(&pins, &known, ["pod/web", "10.96.0.7:3868", "sctp"]);
            assert_eq!(programs, ["tc_from_pod"], "{text}");
            assert!(text.contains("frontend 10.96.0.7:3868 SCTP for clients"), "{text}");
            assert!(text.contains("backend 10.244.2.3:3868"), "{text}");
            assert_eq!(dump(&pins), before, "a trace writes nothing");
        };
        thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }

    #[test]
    fn a_trace_says_what_would_be_and_writes_nothing() {
        if !is_possible() {
            return;
        }
        let test = || {
            let pins = own_namespaces().join("orlop");
            ip("link add under0 type veth peer name far0
                addr add 192.0.2.1/24 dev under0
                link set under0 up
                route add 10.244.2.0/24 dev under0");
            let link = Netlink::open().unwrap().link("under0").unwrap().unwrap();
            let mut programs = set_up(&pins);
            let client = "192.0.2.9:40000".parse().unwrap();
            let to = "192.0.2.1:30080".parse().unwrap();
            let packet = frame(client, to, TCP, link.mac.unwrap());

            let before = dump(&pins);
            let mut tracer = Tracer::load(&pins).unwrap();
            sockets_are_answered(&mut tracer);
            let run = tracer.tc("tc_from_underlay", link.index, &packet).unwrap();
            assert!(has(&run.steps, SERVICE) && has(&run.steps, ADD_FLOW), "{:?}", run.steps);
            assert_eq!(run.steps.iter().filter(|step| step.kind == ADD_FLOW).count(), 2);
            assert_eq!(dump(&pins), before, "a trace writes nothing");

            // The same packet through the programs that packets meet is written down: the dump sees it.
            programs.test_run(TcHook::FromUnderlay, link.index, &packet).unwrap();
            let after = dump(&pins);
            assert_ne!(after, before);
            assert_eq!(after[names::CONNTRACK].len(), before[names::CONNTRACK].len() + 2);
            // And a trace of the next packet finds the flow and does not age it.
            let run = tracer.tc("tc_from_underlay", link.index, &packet).unwrap();
            assert!(!has(&run.steps, ADD_FLOW));
            assert_eq!(dump(&pins), after);
        };
        thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }
}
