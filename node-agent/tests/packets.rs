//! Packet tables of the tc programs: a packet in, a verdict and a packet out, rows and counters
//! after, by `BPF_PROG_TEST_RUN` on the running kernel.

#[cfg(test)]
#[path = "support/frame.rs"]
mod frame;
#[cfg(test)]
#[path = "support/place.rs"]
mod place;

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::IpAddr, thread};

    use ebpf_common::{
        addr::{Addr, Net},
        config::Config,
        endpoint::Endpoint,
        verdict::DropReason,
    };
    use node_agent::{
        dataplane::{
            load::{Programs, TcHook},
            maps::Maps,
            model,
        },
        model::{FarEnd, Protocol},
    };

    use super::{
        frame::{ACK, FIN, Frame, SYN},
        place::{is_possible, own_namespaces},
    };

    const PASS: i32 = -1;
    const DROP: i32 = 2;
    const REDIRECT: i32 = 7;

    const NODE: (&str, u16) = ("192.168.0.1", 30_080);
    const CLIENT: (&str, u16) = ("192.168.0.99", 20_000);
    const GATEWAY: &str = "10.244.1.1";
    const POD: (&str, u16) = ("10.244.1.7", 8080);
    const FAR_POD: (&str, u16) = ("10.244.2.7", 8080);
    const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
    const POD_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];

    struct Kernel {
        programs: Programs,
        maps: Maps,
    }

    impl Kernel {
        /// Runs a packet and checks what became of it; `None` for a packet that must not change.
        fn check(&mut self, hook: TcHook, packet: &[u8], verdict: i32, out: Option<&[u8]>) {
            let (got, bytes) = self.programs.test_run(hook, 0, packet).unwrap();
            assert_eq!(got, verdict, "{hook:?}");
            assert_eq!(hex(&bytes), hex(out.unwrap_or(packet)), "{hook:?}");
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            self.maps.drops().unwrap().iter().find(|(one, _)| *one == reason).unwrap().1
        }

        /// Runs a packet that must be dropped for a reason.
        fn drops(&mut self, hook: TcHook, packet: &[u8], reason: DropReason) {
            let before = self.dropped(reason);
            let (verdict, _) = self.programs.test_run(hook, 0, packet).unwrap();
            assert_eq!((verdict, self.dropped(reason)), (DROP, before + 1), "{reason:?}");
        }

        fn node_port(&mut self, protocol: Protocol, backends: &[(&str, u16)]) {
            let backends: BTreeSet<_> = backends
                .iter()
                .map(|(addr, port)| ebpf_common::service::Backend {
                    addr: Addr::from(address(addr)),
                    port: port.to_be_bytes(),
                    reserved: [0; 2],
                })
                .collect();
            let key = model::key(Addr::ANY_V4, NODE.1, protocol);
            for op in self.maps.observed().unwrap().plan(key, Some(&backends)) {
                self.maps.apply(&op).unwrap();
            }
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Runs a test in namespaces of its own with the programs loaded and this node's rows in place.
    fn with_kernel(test: impl FnOnce(&mut Kernel) + Send) {
        if !is_possible() {
            return;
        }
        let run = || {
            own_namespaces();
            let (programs, mut maps) = Programs::load(None).unwrap();
            let config = Config {
                services: [Net::new(address("10.96.0.0"), 16), Net::default()],
                gateway: [Addr::from(address(GATEWAY)), Addr::default()],
                vxlan_ifindex: 5,
                vni: 1,
                node_port_first: 30_000,
                node_port_last: 32_767,
                ..Config::default()
            };
            maps.set_config(&config).unwrap();
            maps.set_node_addresses(&BTreeSet::from([address(NODE.0)])).unwrap();
            maps.set_local_macs(&BTreeSet::from([[2, 0, 0, 0, 0, 1]])).unwrap();
            let endpoint = Endpoint { ifindex: 7, host_mac: HOST_MAC, pod_mac: POD_MAC, flags: 0 };
            maps.put_endpoint(address(POD.0), &endpoint).unwrap();
            let far = FarEnd { node: address("192.168.0.2"), routed: false };
            maps.put_tunnel("10.244.2.0/24".parse().unwrap(), far).unwrap();
            test(&mut Kernel { programs, maps });
        };
        thread::scope(|scope| scope.spawn(run).join()).unwrap();
    }

    fn hop(frame: &Frame) -> Frame {
        Frame { ttl: frame.ttl - 1, ..frame.clone() }
    }

    fn delivered(frame: &Frame) -> Frame {
        Frame { dst_mac: POD_MAC, src_mac: HOST_MAC, ..hop(frame) }
    }

    #[test]
    fn from_pod() {
        with_kernel(|kernel| {
            let hook = TcHook::FromPod;
            let other = ("10.244.1.8", 40_000);
            for near in [Frame::tcp(other, POD), Frame::udp(other, POD)] {
                kernel.check(hook, &near.bytes(), REDIRECT, Some(&delivered(&near).bytes()));
                let expired = Frame { ttl: 1, ..near }.bytes();
                kernel.check(hook, &expired, PASS, None);
            }
            let far = Frame::tcp(POD, FAR_POD);
            kernel.check(hook, &far.bytes(), REDIRECT, Some(&hop(&far).bytes()));
            kernel.check(hook, &Frame::tcp(POD, ("1.1.1.1", 53)).bytes(), PASS, None);
            kernel.check(hook, &Frame::tcp(POD, (GATEWAY, 53)).bytes(), PASS, None);
            let service = Frame::tcp(POD, ("10.96.3.4", 80)).bytes();
            kernel.drops(hook, &service, DropReason::UnknownService);
            let arp = [&[0xff; 6][..], &POD_MAC, &[8, 6], &[0; 28]].concat();
            kernel.check(hook, &arp, PASS, None);
        });
    }

    #[test]
    fn malformed() {
        with_kernel(|kernel| {
            let whole = Frame::tcp(CLIENT, NODE).bytes();
            let mut short_header = whole.clone();
            short_header[14] = 0x44;
            let mut other_version = whole.clone();
            other_version[14] = 0x65;
            for hook in [TcHook::FromPod, TcHook::FromUnderlay, TcHook::FromOverlay] {
                kernel.drops(hook, &short_header, DropReason::Malformed);
                kernel.drops(hook, &other_version, DropReason::Malformed);
            }
            kernel.drops(TcHook::FromUnderlay, &whole[..37], DropReason::Malformed);
            let mut fragment = whole;
            fragment[20] = 0x20;
            kernel.check(TcHook::FromUnderlay, &fragment, PASS, None);
        });
    }

    #[test]
    fn overlay() {
        with_kernel(|kernel| {
            let out = Frame::tcp(POD, FAR_POD).bytes();
            kernel.check(TcHook::ToOverlay, &out, PASS, None);
            let nowhere = Frame::tcp(POD, ("10.244.3.7", 1)).bytes();
            kernel.drops(TcHook::ToOverlay, &nowhere, DropReason::NoTunnel);

            // The far end's frame carries a MAC that is not ours.
            let foreign = [6, 6, 6, 6, 6, 6];
            let back = Frame { dst_mac: foreign, ..Frame::tcp(FAR_POD, POD) };
            kernel.check(
                TcHook::FromOverlay,
                &back.bytes(),
                REDIRECT,
                Some(&delivered(&back).bytes()),
            );
            kernel.node_port(Protocol::Tcp, &[POD]);
            let ported = Frame { dst_mac: foreign, ..Frame::tcp(FAR_POD, NODE) };
            let sent = delivered(&Frame::tcp((GATEWAY, FAR_POD.1), POD));
            kernel.check(TcHook::FromOverlay, &ported.bytes(), REDIRECT, Some(&sent.bytes()));
            let ssh = Frame { dst_mac: foreign, ..Frame::tcp(FAR_POD, (NODE.0, 22)) };
            kernel.check(TcHook::FromOverlay, &ssh.bytes(), PASS, None);
            let host = Frame { dst_mac: foreign, ..Frame::tcp(FAR_POD, (GATEWAY, 1)) };
            kernel.check(TcHook::FromOverlay, &host.bytes(), PASS, None);
        });
    }

    #[test]
    fn node_port_to_a_pod_here_and_back() {
        with_kernel(|kernel| {
            kernel.node_port(Protocol::Tcp, &[POD]);
            let asked = Frame::tcp(CLIENT, NODE);
            let masked = (GATEWAY, CLIENT.1);
            let sent = delivered(&Frame::tcp(masked, POD));
            kernel.check(TcHook::FromUnderlay, &asked.bytes(), REDIRECT, Some(&sent.bytes()));
            assert_eq!(kernel.maps.flows().unwrap().len(), 2);

            let reply = Frame { tcp_flags: SYN | ACK, ..Frame::tcp(POD, masked) };
            let seen = Frame { tcp_flags: SYN | ACK, ..hop(&Frame::tcp(NODE, CLIENT)) };
            kernel.check(TcHook::FromPod, &reply.bytes(), REDIRECT, Some(&seen.bytes()));

            let more = Frame { tcp_flags: ACK, ..asked };
            let more_sent = Frame { tcp_flags: ACK, ..sent };
            kernel.check(TcHook::FromUnderlay, &more.bytes(), REDIRECT, Some(&more_sent.bytes()));
            assert_eq!(kernel.maps.flows().unwrap().len(), 2);
        });
    }

    #[test]
    fn node_port_to_a_pod_elsewhere_and_back() {
        with_kernel(|kernel| {
            kernel.node_port(Protocol::Udp, &[FAR_POD]);
            for unchecked in [false, true] {
                let client = (CLIENT.0, CLIENT.1 + u16::from(unchecked));
                let masked = (GATEWAY, client.1);
                let asked = Frame { unchecked, ..Frame::udp(client, NODE) };
                let sent = Frame { unchecked, ..hop(&Frame::udp(masked, FAR_POD)) };
                kernel.check(TcHook::FromUnderlay, &asked.bytes(), REDIRECT, Some(&sent.bytes()));
                let reply = Frame { unchecked, ..Frame::udp(FAR_POD, masked) };
                let seen = Frame { unchecked, ..hop(&Frame::udp(NODE, client)) };
                kernel.check(TcHook::FromOverlay, &reply.bytes(), REDIRECT, Some(&seen.bytes()));
            }
        });
    }

    #[test]
    fn node_port_ports_are_never_shared_and_come_back() {
        with_kernel(|kernel| {
            kernel.node_port(Protocol::Tcp, &[POD]);
            let mut sources = BTreeSet::new();
            for last in 1..=50 {
                let client = (format!("192.168.0.{last}"), CLIENT.1);
                let frame = Frame::tcp((&client.0, client.1), NODE).bytes();
                let (verdict, out) =
                    kernel.programs.test_run(TcHook::FromUnderlay, 0, &frame).unwrap();
                assert_eq!(verdict, REDIRECT);
                assert!(sources.insert(out[34..36].to_vec()), "port given out twice");
            }
            assert_eq!(kernel.maps.flows().unwrap().len(), 100);

            // A closed flow's tuple is taken anew by a SYN, and both old halves go.
            let client = ("192.168.0.200", 21_000);
            for flags in [SYN, FIN | ACK, SYN] {
                let frame = Frame { tcp_flags: flags, ..Frame::tcp(client, NODE) }.bytes();
                let (verdict, _) =
                    kernel.programs.test_run(TcHook::FromUnderlay, 0, &frame).unwrap();
                assert_eq!(verdict, REDIRECT);
            }
            assert_eq!(kernel.maps.flows().unwrap().len(), 102);
        });
    }

    #[test]
    fn what_is_no_node_port_is_left_to_the_stack() {
        with_kernel(|kernel| {
            let hook = TcHook::FromUnderlay;
            kernel.check(hook, &Frame::tcp(CLIENT, NODE).bytes(), PASS, None);
            kernel.node_port(Protocol::Tcp, &[]);
            kernel.check(hook, &Frame::tcp(CLIENT, NODE).bytes(), PASS, None);
            assert_eq!(kernel.dropped(DropReason::NoBackend), 1);
            kernel.node_port(Protocol::Tcp, &[POD]);
            for frame in [
                Frame::udp(CLIENT, NODE),
                Frame::tcp(CLIENT, (NODE.0, 22)),
                Frame::tcp(CLIENT, ("192.168.0.77", NODE.1)),
                Frame { tcp_flags: ACK, ..Frame::tcp(CLIENT, NODE) },
                Frame { ttl: 1, ..Frame::tcp(CLIENT, NODE) },
            ] {
                kernel.check(hook, &frame.bytes(), PASS, None);
            }
            assert!(kernel.maps.flows().unwrap().is_empty());
            kernel.node_port(Protocol::Tcp, &[(NODE.0, 9000)]);
            let own = Frame::tcp(CLIENT, NODE).bytes();
            kernel.drops(hook, &own, DropReason::BackendOnThisNode);
        });
    }

    #[test]
    fn own_broadcasts_that_come_back_are_dropped() {
        with_kernel(|kernel| {
            let hook = TcHook::FromUnderlay;
            let echo = Frame {
                dst_mac: [0xff; 6],
                src_mac: [2, 0, 0, 0, 0, 1],
                ..Frame::udp(CLIENT, ("255.255.255.255", 67))
            };
            kernel.drops(hook, &echo.bytes(), DropReason::OwnFrame);
            let others = Frame { src_mac: [2, 0, 0, 0, 0, 2], ..echo };
            kernel.check(hook, &others.bytes(), PASS, None);
        });
    }
}
