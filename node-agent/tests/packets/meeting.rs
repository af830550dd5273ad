//! Connections that nothing translates and that have the ports of a flow towards the same backend.

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ebpf_common::tunnel::{ROUTED, Tunnel};

    use crate::{
        fragments::tests::pieces,
        frame::{ACK, FIN, Frame, RST, SCTP, TCP, UDP},
        kernel::{
            Family, Kernel, PASS, REDIRECT, addr, any, connecting, delivered, delivered2, hop,
            masked, port_of, redirected, to_host, with_kernel,
        },
    };

    /// Sends a packet that meets a flow; gives it as it must leave, under another port.
    #[track_caller]
    fn evades(kernel: &mut Kernel, hook: &str, direct: &Frame, out: fn(&Frame) -> Frame) -> Frame {
        let (got, bytes) = kernel.run(hook, &direct.bytes());
        let port = port_of(&bytes, direct);
        assert_ne!(port, direct.src.1, "{direct:?}");
        let sent = Frame { src: (direct.src.0, port), ..direct.clone() };
        let way = out(&sent).bytes();
        // What the stack is to have has no hop behind it.
        let verdict = if way == sent.bytes() { PASS } else { REDIRECT };
        assert_eq!((got, bytes), (verdict, way), "{hook} {direct:?}");
        sent
    }

    /// Where backends are: who they are, how packets leave for them, and where their answers come in.
    struct Place {
        backend: &'static str,
        out: fn(&Frame) -> Frame,
        answers_by: &'static str,
    }

    /// Here and elsewhere, each with a port for the client.
    fn places(at: Family) -> [(u16, Place); 2] {
        let here = Place { backend: at.pod2, out: delivered2, answers_by: "tc_from_pod" };
        let there = Place { backend: at.far_pod, out: hop, answers_by: "tc_from_overlay" };
        [(40_000, here), (40_001, there)]
    }

    #[test]
    fn what_is_sent_directly_with_the_ports_of_a_flow_gets_its_own_answers() {
        with_kernel(|kernel, at| {
            for (port, Place { backend, out, answers_by }) in places(at) {
                for proto in [UDP, TCP] {
                    kernel.serve(proto, (at.service, 53), &[(backend, 5353)]);
                    let asked = Frame::new(proto, (at.pod, port), (at.service, 53));
                    let direct = redirected(&asked, (backend, 5353));
                    kernel.check("tc_from_pod", &asked, REDIRECT, Some(&out(&direct)));
                    // Another socket has the port now, and sends to the backend itself, or to another
                    // service that a program at the socket has translated to it.
                    let sent = evades(kernel, "tc_from_pod", &direct, out);
                    let later = |frame: &Frame| match proto {
                        TCP => Frame { flags: ACK, ..frame.clone() },
                        _ => frame.clone(),
                    };
                    for _ in 0..2 {
                        // Each of the two goes on under the port that it has, and hears what is its own.
                        let (first, second) = (later(&asked), later(&direct));
                        kernel.check("tc_from_pod", &first, REDIRECT, Some(&out(&second)));
                        kernel.check("tc_from_pod", &second, REDIRECT, Some(&out(&later(&sent))));
                        let seen = delivered(&asked.answer());
                        kernel.check(answers_by, &direct.answer(), REDIRECT, Some(&seen));
                        let seen = delivered(&direct.answer());
                        kernel.check(answers_by, &sent.answer(), REDIRECT, Some(&seen));
                    }
                }
            }
            assert_eq!(kernel.flows().len(), 16);
        });
    }

    #[test]
    fn what_is_sent_directly_by_routes_gets_its_own_answers_too() {
        with_kernel(|kernel, at| {
            let routed = Tunnel { node: addr(at.other_node), flags: ROUTED };
            kernel.put_far_row(at.far_pod, routed);
            kernel.serve(UDP, (at.service, 53), &[(at.far_pod, 5353)]);
            let asked = Frame::udp((at.pod, 40_000), (at.service, 53));
            let direct = redirected(&asked, (at.far_pod, 5353));
            kernel.check("tc_from_pod", &direct, REDIRECT, Some(&hop(&direct)));
            kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&direct)));
            let sent = evades(kernel, "tc_from_pod", &direct, hop);
            let seen = delivered(&direct.answer());
            kernel.check("tc_from_underlay", &sent.answer(), REDIRECT, Some(&seen));
            let seen = delivered(&asked.answer());
            kernel.check("tc_from_underlay", &direct.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn other_ports_and_packets_of_connections_that_go_on_are_left_as_they_are() {
        with_kernel(|kernel, at| {
            for (port, Place { backend, out, answers_by }) in places(at) {
                kernel.serve(TCP, (at.service, 80), &[(backend, 8080)]);
                let asked = Frame::tcp((at.pod, port), (at.service, 80));
                kernel.check(
                    "tc_from_pod",
                    &asked,
                    REDIRECT,
                    Some(&out(&redirected(&asked, (backend, 8080)))),
                );
                let rows = kernel.flows().len();
                // The connection may be older than the flow.
                let older = redirected(&Frame { flags: ACK, ..asked.clone() }, (backend, 8080));
                for frame in [
                    older,
                    Frame::tcp((at.pod, port + 9), (backend, 8080)),
                    Frame::tcp((at.pod, port), (backend, 8081)),
                    Frame::udp((at.pod, port), (backend, 8080)),
                ] {
                    kernel.check("tc_from_pod", &frame, REDIRECT, Some(&out(&frame)));
                    if frame.flags != ACK {
                        let seen = delivered(&frame.answer());
                        kernel.check(answers_by, &frame.answer(), REDIRECT, Some(&seen));
                    }
                }
                assert_eq!(kernel.flows().len(), rows);
            }
        });
    }

    #[test]
    fn a_connection_that_is_over_makes_room_for_one_with_its_ports() {
        with_kernel(|kernel, at| {
            for (port, Place { backend, out, answers_by }) in places(at) {
                kernel.serve(TCP, (at.service, 80), &[(backend, 8080)]);
                let asked = Frame::tcp((at.pod, port), (at.service, 80));
                let direct = redirected(&asked, (backend, 8080));
                for (closer, flags) in [(&asked, FIN | ACK), (&asked, RST), (&direct, FIN | ACK)] {
                    kernel.check("tc_from_pod", &asked, REDIRECT, Some(&out(&direct)));
                    let (hook, end) = if std::ptr::eq(closer, &raw const direct) {
                        (answers_by, Frame { flags, ..direct.answer() })
                    } else {
                        ("tc_from_pod", Frame { flags, ..asked.clone() })
                    };
                    let _closed = kernel.run(hook, &end.bytes());
                    kernel.check("tc_from_pod", &direct, REDIRECT, Some(&out(&direct)));
                    assert!(kernel.flows().is_empty(), "both rows are gone");
                    let seen = delivered(&direct.answer());
                    kernel.check(answers_by, &direct.answer(), REDIRECT, Some(&seen));
                }
            }
        });
    }

    #[test]
    fn an_association_whose_port_cannot_be_changed_ends_the_one_that_had_it() {
        with_kernel(|kernel, at| {
            for (port, Place { backend, out, answers_by }) in places(at) {
                kernel.serve(SCTP, (at.service, 99), &[(backend, 99)]);
                let asked = Frame::new(SCTP, (at.pod, port), (at.service, 99));
                let direct = redirected(&asked, (backend, 99));
                kernel.check("tc_from_pod", &asked, REDIRECT, Some(&out(&direct)));
                kernel.check("tc_from_pod", &direct, REDIRECT, Some(&out(&direct)));
                assert!(kernel.flows().is_empty());
                let seen = delivered(&direct.answer());
                kernel.check(answers_by, &direct.answer(), REDIRECT, Some(&seen));
            }
        });
    }

    #[test]
    fn a_client_elsewhere_that_asked_a_node_port_may_ask_the_pod_too() {
        with_kernel(|kernel, at| {
            for (hook, client) in [("tc_from_overlay", at.far_pod), ("tc_from_underlay", at.client)]
            {
                for proto in [UDP, TCP] {
                    kernel.serve(proto, (any(at.node), 30_080), &[(at.pod, 8080)]);
                    let asked = Frame::new(proto, (client, 20_000), (at.node, 30_080));
                    let direct = redirected(&asked, (at.pod, 8080));
                    kernel.check(hook, &asked, REDIRECT, Some(&delivered(&direct)));
                    let sent = evades(kernel, hook, &direct, delivered);
                    let seen = hop(&direct.answer());
                    kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));
                    let seen = hop(&asked.answer());
                    kernel.check("tc_from_pod", &direct.answer(), REDIRECT, Some(&seen));
                }
            }
        });
    }

    /// Who asks a process of this node: by which hook, and where the answers leave.
    fn clients(at: Family) -> [(&'static str, &'static str, &'static str); 3] {
        [
            (at.client, "tc_from_underlay", "tc_to_underlay"),
            (at.pod, "tc_from_pod", "tc_to_pod"),
            (at.far_pod, "tc_from_overlay", "tc_to_overlay"),
        ]
    }

    #[test]
    fn what_gets_another_port_in_pieces_gets_it_for_all_of_them() {
        with_kernel(|kernel, at| {
            for (hook, client) in [("tc_from_overlay", at.far_pod), ("tc_from_underlay", at.client)]
            {
                kernel.serve(UDP, (any(at.node), 30_080), &[(at.pod, 8080)]);
                let asked = Frame::udp((client, 20_000), (at.node, 30_080));
                let asked = Frame { payload: vec![7; 60], ..asked };
                let direct = redirected(&asked, (at.pod, 8080));
                kernel.check(hook, &asked, REDIRECT, Some(&delivered(&direct)));
                let [first, later @ ..] = pieces(&direct);
                let sent = evades(kernel, hook, &first, delivered);
                let [_, went @ ..] = pieces(&sent);
                for (came, went) in later.iter().zip(&went) {
                    kernel.check(hook, came, REDIRECT, Some(&delivered(went)));
                }
            }
        });
    }

    #[test]
    fn who_asked_a_process_of_the_node_by_a_node_port_may_ask_it_directly_too() {
        with_kernel(|kernel, at| {
            for (client, hook, answers_by) in clients(at) {
                for (proto, later) in [(UDP, 0), (TCP, ACK)] {
                    kernel.serve(proto, (any(at.node), 30_443), &[(at.node, 6443)]);
                    let asked = Frame::new(proto, (client, 20_000), (at.node, 30_443));
                    let direct = redirected(&asked, (at.node, 6443));
                    kernel.check(hook, &asked, PASS, Some(&direct));
                    let sent = evades(kernel, hook, &direct, Frame::clone);
                    let later = |frame: &Frame| Frame { flags: later, ..frame.clone() };
                    for _ in 0..2 {
                        kernel.check(hook, &later(&asked), PASS, Some(&later(&direct)));
                        kernel.check(hook, &later(&direct), PASS, Some(&later(&sent)));
                        let (first, second) = (later(&asked).answer(), later(&direct).answer());
                        kernel.check(answers_by, &second, PASS, Some(&first));
                        kernel.check(answers_by, &later(&sent).answer(), PASS, Some(&second));
                    }
                }
            }
            assert_eq!(kernel.flows().len(), 24);
        });
    }

    #[test]
    fn a_process_of_the_node_hears_all_else_as_it_is() {
        with_kernel(|kernel, at| {
            for (client, hook, answers_by) in clients(at) {
                kernel.serve(TCP, (any(at.node), 30_443), &[(at.node, 6443)]);
                let asked = Frame::tcp((client, 20_000), (at.node, 30_443));
                let direct = redirected(&asked, (at.node, 6443));
                kernel.check(hook, &asked, PASS, Some(&direct));
                let rows = kernel.flows().len();
                for frame in [
                    Frame { flags: ACK, ..direct.clone() },
                    Frame::tcp((client, 20_009), (at.node, 6443)),
                    Frame::tcp((client, 20_000), (at.node, 6444)),
                    Frame::udp((client, 20_000), (at.node, 6443)),
                ] {
                    kernel.check(hook, &frame, PASS, None);
                    if frame.flags != ACK {
                        kernel.check(answers_by, &frame.answer(), PASS, None);
                    }
                }
                assert_eq!(kernel.flows().len(), rows);
            }
        });
    }

    #[test]
    fn what_is_over_or_cannot_change_its_port_makes_room_at_a_process_of_the_node_too() {
        with_kernel(|kernel, at| {
            // Pods elsewhere reach services of this node by its own addresses alone.
            for (client, hook, answers_by) in &clients(at)[..2] {
                for (proto, end) in [(TCP, FIN | ACK), (TCP, RST), (SCTP, 0)] {
                    kernel.serve(proto, (at.external, 6443), &[(at.node, 6443)]);
                    let asked = Frame::new(proto, (client, 20_000), (at.external, 6443));
                    let direct = redirected(&asked, (at.node, 6443));
                    kernel.check(hook, &asked, PASS, Some(&direct));
                    if proto == TCP {
                        let _closed = kernel.run(hook, &Frame { flags: end, ..asked }.bytes());
                    }
                    kernel.check(hook, &direct, PASS, None);
                    assert!(kernel.flows().is_empty(), "both rows are gone");
                    kernel.check(answers_by, &direct.answer(), PASS, None);
                }
            }
        });
    }

    #[test]
    fn a_client_that_speaks_to_a_process_of_the_node_already_asks_it_by_another_port() {
        with_kernel(|kernel, at| {
            let end = |text: &str, port| SocketAddr::new(text.parse().unwrap(), port);
            let _speaks = connecting(end(at.node, 6443), end(at.client, 20_000));
            kernel.serve(TCP, (any(at.node), 30_443), &[(at.node, 6443)]);
            let asked = Frame::tcp((at.client, 20_000), (at.node, 30_443));
            let (verdict, bytes) = kernel.run("tc_from_underlay", &asked.bytes());
            let sent = redirected(&asked, (at.node, 6443));
            let sent = masked(&sent, (at.client, port_of(&bytes, &asked)));
            assert_eq!((verdict, &bytes), (PASS, &sent.bytes()));
            assert_ne!(sent.src.1, 20_000);
            kernel.check("tc_to_underlay", &sent.answer(), PASS, Some(&asked.answer()));
            // What the two say to each other goes on as it is.
            let own = Frame { flags: ACK, ..redirected(&asked, (at.node, 6443)) };
            kernel.check("tc_from_underlay", &own, PASS, None);
            kernel.check("tc_to_underlay", &own.answer(), PASS, None);
        });
    }

    #[test]
    fn the_node_itself_gets_its_own_answers() {
        with_kernel(|kernel, at| {
            let same: fn(&Frame) -> Frame = Frame::clone;
            for (port, backend, out, hook, answers_by) in [
                (40_000, at.pod, delivered as fn(&Frame) -> Frame, "tc_to_pod", "tc_from_pod"),
                (40_001, at.far_pod, hop, "tc_to_overlay", "tc_from_overlay"),
            ] {
                kernel.serve(UDP, (at.service, 53), &[(backend, 5353)]);
                let asked = Frame::udp((at.gateway, port), (at.service, 53));
                let direct = redirected(&asked, (backend, 5353));
                kernel.check("tc_from_host", &asked, REDIRECT, Some(&out(&direct)));
                let sent = evades(kernel, hook, &direct, same);
                kernel.check(hook, &direct, PASS, Some(&sent));
                kernel.check(answers_by, &sent.answer(), PASS, Some(&direct.answer()));
                let seen = to_host(&asked.answer());
                kernel.check(answers_by, &direct.answer(), REDIRECT, Some(&seen));
                // What only passes through the node is another one's.
                kernel.came_by = 1;
                kernel.check(hook, &masked(&direct, (at.client, 40_000)), PASS, None);
                kernel.came_by = 0;
            }
        });
    }
}
