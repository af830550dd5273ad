//! Services that pods and the node itself ask per packet.

#[cfg(test)]
mod tests {
    use ebpf_common::{
        addr::Addr,
        conntrack::{FORWARD, Flow, REVERSE, idle_limit_s},
        service::{Backend, BackendKey, SOURCE_RANGES, Service},
        verdict::DropReason,
    };

    use crate::{
        frame::{ACK, FIN, Frame, RST, SCTP, SYN, TCP, UDP},
        kernel::{
            Kernel, PASS, REDIRECT, addr, any, delivered, delivered2, hop, masked, redirected,
            to_host, with_kernel,
        },
    };

    #[test]
    fn a_pod_asks_a_service_and_is_answered_by_it() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP, SCTP] {
                let port = if proto == SCTP { 80 } else { 8080 };
                kernel.serve(proto, (at.service, 80), &[(at.pod2, port)]);
                let asked = Frame::new(proto, (at.pod, 40_000), (at.service, 80));
                let sent = redirected(&asked, (at.pod2, port));
                for _ in 0..2 {
                    kernel.check("tc_from_pod", &asked, REDIRECT, Some(&delivered2(&sent)));
                }
                let seen = delivered(&asked.answer());
                for hook in ["tc_from_pod", "tc_from_overlay"] {
                    kernel.check(hook, &sent.answer(), REDIRECT, Some(&seen));
                }
            }
            let flows = kernel.flows();
            assert_eq!(flows.len(), 6);
            assert_eq!(flows.values().filter(|flow| flow.direction == FORWARD).count(), 3);
            for (key, flow) in flows.iter().filter(|(_, flow)| flow.direction == REVERSE) {
                assert_eq!(flows[&flow.opposite(key.proto)].opposite(key.proto), *key);
            }
        });
    }

    #[test]
    fn a_connection_has_begun_when_its_client_goes_on_from_the_answer() {
        with_kernel(|kernel, at| {
            for (proto, port, begun) in [(TCP, 8080, 7_440), (SCTP, 80, 210)] {
                kernel.serve(proto, (at.service, 80), &[(at.pod2, port)]);
                let asked = Frame::new(proto, (at.pod, 40_000), (at.service, 80));
                let flags = if proto == TCP { SYN | ACK } else { ACK };
                let answer = Frame { flags, ..redirected(&asked, (at.pod2, port)).answer() };
                let more = Frame { flags: ACK, ..asked.clone() };
                let steps = [(&asked, 60), (&answer, 60), (&asked, 60), (&more, begun)];
                for (step, (frame, limit)) in steps.into_iter().enumerate() {
                    assert_eq!(kernel.run("tc_from_pod", &frame.bytes()).0, REDIRECT);
                    let flows = kernel.flows();
                    let is_forward = |flow: &Flow| flow.direction == FORWARD;
                    let mut flows_of = flows.iter().filter(|(key, _)| key.proto == proto);
                    let (_, forward) = flows_of.find(|(_, flow)| is_forward(flow)).unwrap();
                    let reverse = flows[&forward.opposite(proto)];
                    let found = idle_limit_s(proto, forward.seen, reverse.seen);
                    assert_eq!(found, limit, "{proto} {step}");
                }
            }
        });
    }

    #[test]
    fn a_pod_asks_a_service_on_another_node() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.service, 53), &[(at.far_pod, 5353)]);
            for unchecked in [false, at.pod.contains('.')] {
                let asked = Frame { unchecked, ..Frame::udp((at.pod, 40_000), (at.service, 53)) };
                let sent = redirected(&asked, (at.far_pod, 5353));
                kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
                let seen = delivered(&asked.answer());
                kernel.check("tc_from_overlay", &sent.answer(), REDIRECT, Some(&seen));
            }
        });
    }

    #[test]
    fn a_pod_that_reaches_itself_sees_the_gateway() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 80), &[(at.pod, 8080)]);
            let asked = Frame::tcp((at.pod, 4_000), (at.service, 80));
            let sent = masked(&redirected(&asked, (at.pod, 8080)), (at.gateway, 4_000));
            kernel.check("tc_from_pod", &asked, REDIRECT, Some(&delivered(&sent)));
            let seen = delivered(&asked.answer());
            kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn the_node_asks_a_service_and_is_answered_by_the_host_device() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.service, 53), &[(at.pod, 5353)]);
            let asked = Frame::udp((at.gateway, 40_000), (at.service, 53));
            let sent = redirected(&asked, (at.pod, 5353));
            kernel.check("tc_from_host", &asked, REDIRECT, Some(&delivered(&sent)));
            let seen = to_host(&asked.answer());
            kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));

            kernel.serve(UDP, (at.service, 54), &[(at.far_pod, 5353)]);
            let asked = Frame::udp((at.gateway, 40_000), (at.service, 54));
            let sent = redirected(&asked, (at.far_pod, 5353));
            kernel.check("tc_from_host", &asked, REDIRECT, Some(&hop(&sent)));
            let seen = to_host(&asked.answer());
            kernel.check("tc_from_overlay", &sent.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn a_process_of_the_node_is_asked_by_the_node_under_an_address_of_nobody() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.service, 55), &[(at.node, 5353)]);
            let v6 = at.service.contains(':');
            let asker = if v6 { "fd6f:726c:6f70::2" } else { "169.254.21.2" };
            let asked = Frame::udp((at.gateway, 4_000), (at.service, 55));
            let sent = masked(&redirected(&asked, (at.node, 5353)), (asker, 4_000));
            kernel.check("tc_from_host", &asked, REDIRECT, Some(&to_host(&sent)));
            let seen = to_host(&asked.answer());
            kernel.check("tc_from_host", &sent.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn a_process_of_another_node_behind_a_service_answers_the_pod() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP] {
                kernel.serve(proto, (at.service, 444), &[(at.other_node, 6443)]);
                let asked = Frame::new(proto, (at.pod, 40_000), (at.service, 444));
                let sent = redirected(&asked, (at.other_node, 6443));
                kernel.check("tc_from_pod", &asked, REDIRECT, Some(&hop(&sent)));
                // The tunnel of the other node has no neighbours, so that its frames are for their own sender.
                let answer = sent.answer();
                let answer = Frame { src_mac: answer.dst_mac, ..answer };
                let seen = delivered(&asked.answer());
                kernel.check("tc_from_overlay", &answer, REDIRECT, Some(&seen));
            }
        });
    }

    #[test]
    fn a_process_of_the_node_behind_a_service_answers_the_pod() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 443), &[(at.node, 6443)]);
            let asked = Frame::tcp((at.pod, 40_000), (at.service, 443));
            let sent = redirected(&asked, (at.node, 6443));
            kernel.check("tc_from_pod", &asked, PASS, Some(&sent));
            kernel.check("tc_to_pod", &sent.answer(), PASS, Some(&asked.answer()));
            // And a pod elsewhere that asks by a node port.
            kernel.serve(TCP, (any(at.node), 30_443), &[(at.node, 6443)]);
            let asked = Frame::tcp((at.far_pod, 40_000), (at.node, 30_443));
            let sent = redirected(&asked, (at.node, 6443));
            kernel.check("tc_from_overlay", &asked, PASS, Some(&sent));
            kernel.check("tc_to_overlay", &sent.answer(), PASS, Some(&asked.answer()));
        });
    }

    #[test]
    fn two_frontends_of_one_backend_share_no_port_there() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (any(at.node), 30_080), &[(at.pod2, 8080)]);
            kernel.serve(TCP, (at.external, 80), &[(at.pod2, 8080)]);
            let mut ports = Vec::new();
            for to in [(at.node, 30_080), (at.external, 80)] {
                let asked = Frame::tcp((at.pod, 40_001), to);
                let (verdict, out) = kernel.run("tc_from_pod", &asked.bytes());
                // TCP's header and twelve bytes are the end of the packet.
                let port = u16::from_be_bytes([out[out.len() - 32], out[out.len() - 31]]);
                let sent = masked(&redirected(&asked, (at.pod2, 8080)), (at.pod, port));
                assert_eq!((verdict, out), (REDIRECT, delivered2(&sent).bytes()));
                let seen = delivered(&asked.answer());
                kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));
                ports.push(port);
            }
            assert_eq!(ports[0], 40_001, "the first keeps its port");
            assert_ne!(ports[0], ports[1]);
        });
    }

    #[test]
    fn datagrams_move_when_their_backend_leaves_and_connections_drain() {
        with_kernel(|kernel, at| {
            for proto in [UDP, TCP] {
                let both = [(at.pod2, 5353), (at.far_pod, 5353)];
                let service = kernel.serve(proto, (at.service, 53), &both);
                let asked = Frame::new(proto, (at.pod, 40_000), (at.service, 53));
                let later = Frame { flags: if proto == TCP { ACK } else { 0 }, ..asked.clone() };
                let _first = kernel.run("tc_from_pod", &asked.bytes());
                let backend = chosen(kernel, proto);
                let [mut stays, mut other] = both;
                if backend != addr(stays.0) {
                    (stays, other) = (other, stays);
                }
                // In whatever slot, it is still the one.
                for backends in [[other, stays], [stays, other]] {
                    kernel.set_backends(service.set, &backends);
                    let _same = kernel.run("tc_from_pod", &later.bytes());
                    assert_eq!(chosen(kernel, proto), backend);
                }
                kernel.set_backends(service.set, &[other]);
                kernel.delete::<_, Backend>("BACKENDS", &BackendKey { set: service.set, slot: 1 });
                let alone = Service { count: 1, ..service };
                kernel.put_frontend(0, proto, (at.service, 53), alone);
                let _moved = kernel.run("tc_from_pod", &later.bytes());
                let now = if proto == UDP { addr(other.0) } else { backend };
                assert_eq!(chosen(kernel, proto), now, "protocol {proto}");
                assert_eq!(kernel.flows().keys().filter(|key| key.proto == proto).count(), 2);
            }
        });
    }

    fn chosen(kernel: &Kernel, proto: u8) -> Addr {
        let flows = kernel.flows();
        let mut rows =
            flows.iter().filter(|(key, flow)| key.proto == proto && flow.direction == FORWARD);
        rows.next().unwrap().1.dst
    }

    #[test]
    fn a_port_that_is_used_again_begins_anew() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 80), &[(at.pod2, 8080)]);
            let asked = Frame::tcp((at.pod, 40_000), (at.service, 80));
            let answer = redirected(&asked, (at.pod2, 8080)).answer();
            for closer in [&asked, &answer] {
                let _open = kernel.run("tc_from_pod", &asked.bytes());
                assert!(kernel.flows().values().all(|flow| !flow.is_closing()));
                let fin = Frame { flags: FIN | ACK, ..closer.clone() };
                let _closed = kernel.run("tc_from_pod", &fin.bytes());
                assert_eq!(kernel.flows().values().filter(|flow| flow.is_closing()).count(), 1);
            }
            let _open = kernel.run("tc_from_pod", &asked.bytes());
            assert!(kernel.flows().values().all(|flow| !flow.is_closing()));
            assert_eq!(kernel.flows().len(), 2);
        });
    }

    #[test]
    fn what_a_service_does_not_take_is_dropped_and_counted() {
        with_kernel(|kernel, at| {
            let service = kernel.serve(TCP, (at.service, 80), &[(at.pod2, 8080)]);
            let asked = Frame::tcp((at.pod, 40_000), (at.service, 80));
            let reset = Frame { flags: RST, ..asked.clone() };
            kernel.drops_for("tc_from_pod", &reset.bytes(), DropReason::NoFlow);
            let ping = Frame::ping((at.pod, 7), at.service);
            kernel.drops_for("tc_from_pod", &ping.bytes(), DropReason::ServiceAddress);
            kernel.serve(SCTP, (at.service, 80), &[(at.pod2, 8080)]);
            let sctp = Frame::new(SCTP, (at.pod, 40_000), (at.service, 80));
            kernel.drops_for("tc_from_pod", &sctp.bytes(), DropReason::SctpPort);

            let limited = Service { flags: SOURCE_RANGES, ..service };
            kernel.put_frontend(0, TCP, (at.service, 80), limited);
            kernel.drops_for("tc_from_pod", &asked.bytes(), DropReason::SourceRange);
            assert!(kernel.flows().is_empty());
            kernel.allow(service.service, at.pod, if at.pod.contains(':') { 128 } else { 32 });
            let sent = redirected(&asked, (at.pod2, 8080));
            kernel.check("tc_from_pod", &asked, REDIRECT, Some(&delivered2(&sent)));
        });
    }
}
