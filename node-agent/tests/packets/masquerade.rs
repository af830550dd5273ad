//! Pods that speak to the outside under the node's address.

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr, UdpSocket};

    use ebpf_common::{
        addr::Addr,
        conntrack::{Flow, FlowKey, SNAT_FIRST, SNAT_LAST},
        device::Device,
        maps as names,
        verdict::DropReason,
    };

    use crate::{
        frame::{ACK, Frame, RST, SCTP, TCP, UDP},
        kernel::{
            Family, Kernel, PASS, REDIRECT, V4, addr, config, connecting, delivered, delivered2,
            hop, masked, port_of, to_host, with_kernel,
        },
        place::ip,
    };

    #[test]
    fn a_pod_asks_outside_under_the_nodes_address_and_its_own_port() {
        with_kernel(|kernel, at| {
            for asked in [
                Frame::tcp((at.pod, 40_000), (at.client, 443)),
                Frame::udp((at.pod, 40_000), (at.client, 53)),
                Frame::new(SCTP, (at.pod, 40_000), (at.client, 99)),
                Frame::ping((at.pod, 777), at.client),
            ] {
                let sent = masked(&asked, (at.node, asked.src.1));
                for _ in 0..2 {
                    kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
                }
                let seen = delivered(&asked.answer());
                kernel.check("tc_from_underlay", &sent.answer(), REDIRECT, Some(&seen));
                // The packets themselves leave by the device and are no newcomers.
                kernel.came_by = 1;
                kernel.check("tc_to_underlay", &sent, PASS, None);
                kernel.came_by = 0;
            }
            assert_eq!(kernel.flows().len(), 8);
        });
    }

    #[test]
    fn a_pod_that_is_asked_from_outside_answers_under_its_own_address() {
        with_kernel(|kernel, at| {
            let tcp = Frame::tcp((at.client, 40_000), (at.pod, 8080));
            for (asked, flags) in [
                (tcp, ACK),
                (Frame::udp((at.client, 40_000), (at.pod, 8080)), 0),
                (Frame::new(SCTP, (at.client, 40_000), (at.pod, 99)), 0),
                (Frame::ping((at.client, 777), at.pod), 0),
            ] {
                let rows = kernel.flows().len();
                kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&delivered(&asked)));
                assert_eq!(kernel.flows().len(), rows + 2, "{asked:?}");
                let answer = asked.answer();
                kernel.check("tc_from_pod", &answer, REDIRECT, Some(&hop(&answer)));
                if flags != 0 {
                    let later = Frame { flags, ..answer };
                    kernel.check("tc_from_pod", &later, REDIRECT, Some(&hop(&later)));
                }
            }
            // Who is told by a row of its own is not noted.
            let rows = kernel.flows().len();
            let inside = Frame::tcp((at.far_pod, 40_000), (at.pod, 8080));
            kernel.check("tc_from_underlay", &inside, REDIRECT, Some(&delivered(&inside)));
            assert_eq!(kernel.flows().len(), rows);
        });
    }

    /// The node's address at its uplink is another one, of which both the kernel's routes and the rows tell; as
    /// it was when this is dropped.
    struct Renumbered {
        at: Family,
        device: (u32, Device),
    }

    impl Renumbered {
        fn new(kernel: &mut Kernel, at: Family) -> Self {
            let has = |device: &Device| device.addr.contains(&addr(at.node));
            let device = kernel.devices().into_iter().find(|(_, device)| has(device)).unwrap();
            let moves = |one: Addr| if one == addr(at.node) { addr(new_of(at)) } else { one };
            let moved = Device { addr: device.1.addr.map(moves), ..device.1 };
            kernel.put(names::DEVICES, device.0, moved);
            ip(&format!(
                "address add {} dev up0 {}
                 route replace default via {} dev up0 src {}",
                new_of(at),
                if is_v6(at) { "nodad" } else { "" },
                gate_of(at),
                new_of(at),
            ));
            Self { at, device }
        }

        fn undo(self, kernel: &mut Kernel) {
            let at = self.at;
            ip(&format!(
                "route replace default via {} dev up0 src {}
                 address del {} dev up0",
                gate_of(at),
                at.node,
                new_of(at),
            ));
            kernel.put(names::DEVICES, self.device.0, self.device.1);
        }
    }

    fn is_v6(at: Family) -> bool {
        at.node.contains(':')
    }

    fn new_of(at: Family) -> &'static str {
        if is_v6(at) { "fd00:a::1:1" } else { "192.168.0.101" }
    }

    fn gate_of(at: Family) -> &'static str {
        if is_v6(at) { "fd00:a::fe" } else { "192.168.0.254" }
    }

    #[test]
    fn a_flow_leaves_an_address_that_the_node_has_no_more() {
        with_kernel(|kernel, at| {
            for asked in [
                Frame::udp((at.pod, 40_000), (at.client, 53)),
                Frame::tcp((at.pod, 40_000), (at.client, 443)),
            ] {
                let sent = masked(&asked, (at.node, 40_000));
                kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
                let renumbered = Renumbered::new(kernel, at);
                // A second later.
                let older = kernel.flows().into_iter().map(|(key, flow)| {
                    (key, Flow { last_seen: flow.last_seen.wrapping_sub(1), ..flow })
                });
                older.for_each(|(key, flow)| kernel.put(names::CONNTRACK, key, flow));
                let flags = if asked.proto == TCP { ACK } else { 0 };
                let later = Frame { flags, ..asked.clone() };
                let sent = masked(&later, (new_of(at), 40_000));
                for _ in 0..2 {
                    kernel.check("tc_from_pod", &later, REDIRECT, Some(&hop(&sent)));
                }
                let seen = delivered(&later.answer());
                kernel.check("tc_from_underlay", &sent.answer(), REDIRECT, Some(&seen));
                renumbered.undo(kernel);
            }
        });
    }

    /// As the node's own connections do: by what the route says, not by the order in which addresses came.
    #[test]
    fn of_several_addresses_the_one_is_taken_that_the_kernel_would_take() {
        if !says_its_source() {
            skip::because("a kernel that does not say which source it would take (before 6.7)");
            return;
        }
        with_kernel(|kernel, at| {
            let before = kernel.devices();
            let renumbered = Renumbered::new(kernel, at);
            for (index, device) in before {
                kernel.put(names::DEVICES, index, device);
            }
            let asked = Frame::tcp((at.pod, 40_000), (at.client, 443));
            let sent = masked(&asked, (new_of(at), 40_000));
            kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
            renumbered.undo(kernel);
        });
    }

    /// Before 6.7 the kernel does not say which address it would take (`BPF_FIB_LOOKUP_SRC`).
    fn says_its_source() -> bool {
        let release = nix::sys::utsname::uname().unwrap();
        let release = release.release().to_string_lossy().into_owned();
        let mut numbers = release.split('.').map_while(|part| part.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(6), Some(7))
    }

    #[test]
    fn two_pods_with_one_port_are_told_apart() {
        with_kernel(|kernel, at| {
            for asked in [
                Frame::tcp((at.pod, 40_000), (at.client, 443)),
                Frame::udp((at.pod, 40_000), (at.client, 53)),
                Frame::ping((at.pod, 777), at.client),
            ] {
                let _first = kernel.run("tc_from_pod", &asked.bytes());
                let second = masked(&asked, (at.pod2, asked.src.1));
                let (verdict, out) = kernel.run("tc_from_pod", &second.bytes());
                let port = port_of(&out, &second);
                assert_ne!(port, asked.src.1);
                let sent = masked(&second, (at.node, port));
                assert_eq!((verdict, out), (REDIRECT, hop(&sent).bytes()));
                let seen = delivered2(&second.answer());
                kernel.check("tc_from_underlay", &sent.answer(), REDIRECT, Some(&seen));
                let first = masked(&asked, (at.node, asked.src.1));
                let seen = delivered(&asked.answer());
                kernel.check("tc_from_underlay", &first.answer(), REDIRECT, Some(&seen));
            }
            // SCTP's port cannot be changed.
            let asked = Frame::new(SCTP, (at.pod, 40_000), (at.client, 99));
            let _first = kernel.run("tc_from_pod", &asked.bytes());
            let second = masked(&asked, (at.pod2, 40_000)).bytes();
            kernel.drops_for("tc_from_pod", &second, DropReason::PortsExhausted);
        });
    }

    #[test]
    fn a_port_is_found_where_nine_of_ten_are_taken() {
        with_kernel(|kernel, at| {
            // A pod that reaches itself does so under the gateway's address.
            kernel.serve(TCP, (at.service, 80), &[(at.pod, 8080)]);
            let answers = FlowKey {
                src: addr(at.pod),
                sport: 8080_u16.to_be_bytes(),
                dst: addr(at.gateway),
                proto: TCP,
                ..FlowKey::default()
            };
            // Without a pattern that the order of the tries could have too.
            let is_free = |port: u16| (u32::from(port).wrapping_mul(2_654_435_761) >> 16) % 10 == 0;
            for port in (SNAT_FIRST..=SNAT_LAST).filter(|port| !is_free(*port)) {
                let key = FlowKey { dport: port.to_be_bytes(), ..answers };
                kernel.put(names::CONNTRACK, key, Flow::default());
            }
            let (drops, mut found) = (kernel.drops(), 0);
            for port in 40_000..40_100 {
                let asked = Frame::tcp((at.pod, port), (at.service, 80));
                let (verdict, out) = kernel.run("tc_from_pod", &asked.bytes());
                assert!(verdict != REDIRECT || is_free(port_of(&out, &asked)), "{port}");
                found += u64::from(verdict == REDIRECT);
            }
            // Chance leaves more than three without one in one run of a hundred thousand.
            assert!(found >= 97, "{found} of 100");
            let exhausted = (DropReason::PortsExhausted, 100 - found);
            let expected: Vec<_> = (found < 100).then_some(exhausted).into_iter().collect();
            assert_eq!(kernel.drops_since(&drops), expected);
        });
    }

    #[test]
    fn a_port_that_a_socket_of_the_node_has_is_not_given_out() {
        with_kernel(|kernel, at| {
            let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
            let from = SocketAddr::new(ip(at.node), 40_000);
            let _tcp = connecting(from, SocketAddr::new(ip(at.client), 443));
            let _udp = UdpSocket::bind(from).unwrap();
            for asked in [
                Frame::tcp((at.pod, 40_000), (at.client, 443)),
                Frame::udp((at.pod, 40_000), (at.client, 53)),
            ] {
                let (verdict, out) = kernel.run("tc_from_pod", &asked.bytes());
                assert_eq!(verdict, REDIRECT);
                assert_ne!(port_of(&out, &asked), 40_000, "{asked:?}");
            }
            let elsewhere = Frame::tcp((at.pod, 40_000), (at.client, 444));
            let sent = masked(&elsewhere, (at.node, 40_000));
            kernel.check("tc_from_pod", &elsewhere, REDIRECT, Some(&hop(&sent)));
        });
    }

    #[test]
    fn a_connection_of_the_node_that_meets_a_pods_gets_another_port() {
        with_kernel(|kernel, at| {
            for (proto, flags) in [(TCP, ACK), (UDP, 0)] {
                let pods = Frame::new(proto, (at.pod, 40_000), (at.client, 443));
                let _taken = kernel.run("tc_from_pod", &pods.bytes());
                let own = masked(&pods, (at.node, 40_000));
                let (verdict, out) = kernel.run("tc_to_underlay", &own.bytes());
                let port = port_of(&out, &own);
                let sent = masked(&own, (at.node, port));
                assert_eq!((verdict, &out), (PASS, &sent.bytes()));
                assert_ne!(port, 40_000);
                let later = Frame { flags, ..own.clone() };
                let later_sent = Frame { flags, ..sent.clone() };
                kernel.check("tc_to_underlay", &later, PASS, Some(&later_sent));
                kernel.check("tc_from_underlay", &sent.answer(), PASS, Some(&own.answer()));
                // The pod's own is as before.
                let seen = delivered(&pods.answer());
                kernel.check("tc_from_underlay", &own.answer(), REDIRECT, Some(&seen));
            }
        });
    }

    #[test]
    fn a_connection_of_the_node_that_meets_its_own_question_to_a_service_gets_another_port() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 80), &[(at.client, 443)]);
            let asked = Frame::tcp((at.gateway, 40_000), (at.service, 80));
            let question = Frame::tcp((at.node, 40_000), (at.client, 443));
            kernel.check("tc_from_host", &asked, REDIRECT, Some(&hop(&question)));
            let own = question.clone();
            let (verdict, out) = kernel.run("tc_to_underlay", &own.bytes());
            let port = port_of(&out, &own);
            let sent = masked(&own, (at.node, port));
            assert_eq!((verdict, &out), (PASS, &sent.bytes()));
            assert_ne!(port, 40_000);
            kernel.check("tc_from_underlay", &sent.answer(), PASS, Some(&own.answer()));
            let seen = to_host(&asked.answer());
            kernel.check("tc_from_underlay", &question.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn without_masquerade_pods_keep_their_address() {
        with_kernel(|kernel, at| {
            kernel.set_config(ebpf_common::config::Config { flags: 0, ..config() });
            let asked = Frame::tcp((at.pod, 40_000), (at.client, 443));
            kernel.check("tc_from_pod", &asked, PASS, None);
            assert!(kernel.flows().is_empty());
        });
    }

    #[test]
    fn what_belongs_to_no_connection_does_not_leave() {
        with_kernel(|kernel, at| {
            let reset = Frame { flags: RST, ..Frame::tcp((at.pod, 40_000), (at.client, 443)) };
            kernel.drops_for("tc_from_pod", &reset.bytes(), DropReason::NoFlow);
            for id in [7, 0] {
                let unasked = Frame::ping((at.client, id), at.pod).answer();
                kernel.drops_for("tc_from_pod", &unasked.bytes(), DropReason::NoFlow);
            }
            let tunnelled = Frame::new(47, (at.pod, 0), (at.client, 0));
            kernel.drops_for("tc_from_pod", &tunnelled.bytes(), DropReason::NoFlow);
        });
    }

    #[test]
    fn a_full_table_is_a_counted_drop() {
        with_kernel(|kernel: &mut Kernel, at| {
            if at.node != V4.node {
                return;
            }
            let asked = Frame::tcp((at.pod, 40_000), (at.client, 443));
            let _open = kernel.run("tc_from_pod", &asked.bytes());
            kernel.fill_flows();
            let another = Frame::tcp((at.pod, 40_001), (at.client, 443)).bytes();
            kernel.drops_for("tc_from_pod", &another, DropReason::ConntrackFull);
            let sent = masked(&asked, (at.node, 40_000));
            kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
        });
    }
}
