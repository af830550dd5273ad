//! Node ports, load balancers' and external addresses asked from outside.

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ebpf_common::{
        service::{SCOPE_EXTERNAL, SOURCE_RANGES, Service},
        verdict::DropReason,
    };

    use crate::{
        frame::{ACK, Frame, SCTP, TCP, UDP},
        kernel::{PASS, REDIRECT, any, delivered, hop, masked, redirected, with_kernel},
    };

    #[test]
    fn a_pod_here_sees_the_client_and_its_answer_leaves_as_the_services() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP, SCTP] {
                let port = if proto == SCTP { 30_080 } else { 8080 };
                kernel.serve(proto, (any(at.node), 30_080), &[(at.pod, port)]);
                let asked = Frame::new(proto, (at.client, 20_000), (at.node, 30_080));
                let sent = redirected(&asked, (at.pod, port));
                for _ in 0..2 {
                    kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&delivered(&sent)));
                }
                let seen = hop(&asked.answer());
                kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));
            }
            assert_eq!(kernel.flows().len(), 6);
        });
    }

    #[test]
    fn a_pod_elsewhere_sees_the_gateway_and_answers_by_it() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.external, 53), &[(at.far_pod, 5353)]);
            let asked = Frame::udp((at.client, 20_000), (at.external, 53));
            let sent = masked(&redirected(&asked, (at.far_pod, 5353)), (at.gateway, 20_000));
            kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&hop(&sent)));
            let seen = hop(&asked.answer());
            kernel.check("tc_from_overlay", &sent.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn a_process_of_this_node_sees_the_client() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (any(at.node), 30_443), &[(at.node, 6443)]);
            let asked = Frame::tcp((at.client, 20_000), (at.node, 30_443));
            let sent = redirected(&asked, (at.node, 6443));
            kernel.check("tc_from_underlay", &asked, PASS, Some(&sent));
            kernel.check("tc_to_underlay", &sent.answer(), PASS, Some(&asked.answer()));
        });
    }

    #[test]
    fn a_process_of_another_node_sees_this_nodes_address() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (any(at.node), 30_443), &[(at.other_node, 6443)]);
            let asked = Frame::tcp((at.client, 20_000), (at.node, 30_443));
            let sent = masked(&redirected(&asked, (at.other_node, 6443)), (at.node, 20_000));
            kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&hop(&sent)));
            let seen = hop(&asked.answer());
            kernel.check("tc_from_underlay", &sent.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn who_asks_outside_and_is_the_backend_sees_this_nodes_address() {
        with_kernel(|kernel, at| {
            for itself in [at.client, at.other_node] {
                kernel.serve(TCP, (any(at.node), 30_443), &[(itself, 6443)]);
                let asked = Frame::tcp((itself, 20_000), (at.node, 30_443));
                let sent = masked(&redirected(&asked, (itself, 6443)), (at.node, 20_000));
                kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&hop(&sent)));
                let seen = hop(&asked.answer());
                kernel.check("tc_from_underlay", &sent.answer(), REDIRECT, Some(&seen));
            }
        });
    }

    #[test]
    fn a_pod_of_another_node_asks_by_the_tunnel_and_keeps_its_address() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (any(at.node), 30_080), &[(at.pod, 8080)]);
            let asked = Frame::tcp((at.far_pod, 20_000), (at.node, 30_080));
            let sent = redirected(&asked, (at.pod, 8080));
            let foreign = Frame { dst_mac: [6; 6], ..asked.clone() };
            kernel.check("tc_from_overlay", &foreign, REDIRECT, Some(&delivered(&sent)));
            let seen = hop(&asked.answer());
            kernel.check("tc_from_pod", &sent.answer(), REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn outside_has_rows_of_its_own_where_they_differ() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.external, 80), &[(at.far_pod, 8080)]);
            kernel.serve_in(SCOPE_EXTERNAL, TCP, (at.external, 80), &[(at.pod, 8080)]);
            let asked = Frame::tcp((at.client, 20_000), (at.external, 80));
            let sent = redirected(&asked, (at.pod, 8080));
            kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&delivered(&sent)));
            let inside = Frame::tcp((at.pod2, 20_000), (at.external, 80));
            let sent = redirected(&inside, (at.far_pod, 8080));
            kernel.check("tc_from_pod", &inside, REDIRECT, Some(&hop(&sent)));
        });
    }

    #[test]
    fn only_clients_in_the_source_ranges_are_let_in() {
        with_kernel(|kernel, at| {
            let service = kernel.serve(TCP, (at.external, 80), &[(at.pod, 8080)]);
            let limited = Service { flags: SOURCE_RANGES, ..service };
            kernel.put_frontend(0, TCP, (at.external, 80), limited);
            let asked = Frame::tcp((at.client, 20_000), (at.external, 80));
            kernel.drops_for("tc_from_underlay", &asked.bytes(), DropReason::SourceRange);
            kernel.allow(service.service, at.client, if at.node.contains(':') { 64 } else { 24 });
            let sent = redirected(&asked, (at.pod, 8080));
            kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&delivered(&sent)));
        });
    }

    #[test]
    fn ports_towards_a_backend_are_never_shared() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (any(at.node), 30_080), &[(at.far_pod, 8080)]);
            let mut sources = BTreeSet::new();
            let net = at.client.strip_suffix('9').unwrap();
            for last in 1..=50_u8 {
                let client = format!("{net}{last}");
                let frame = Frame::tcp((&client, 20_000), (at.node, 30_080)).bytes();
                let (verdict, out) = kernel.run("tc_from_underlay", &frame);
                assert_eq!(verdict, REDIRECT);
                let port = out.len() - 32;
                assert!(sources.insert(out[port..port + 2].to_vec()), "port given out twice");
            }
            assert_eq!(kernel.flows().len(), 100);
        });
    }

    #[test]
    fn what_is_no_service_is_left_to_the_stack() {
        with_kernel(|kernel, at| {
            let node_port = Frame::tcp((at.client, 20_000), (at.node, 30_080));
            kernel.check("tc_from_underlay", &node_port, PASS, None);
            kernel.serve(TCP, (any(at.node), 30_080), &[(at.pod, 8080)]);
            for frame in [
                Frame::udp((at.client, 20_000), (at.node, 30_080)),
                Frame::tcp((at.client, 20_000), (at.node, 22)),
                Frame::tcp((at.client, 20_000), (at.external, 30_080)),
                Frame { flags: ACK, ..node_port.clone() },
                Frame { ttl: 1, ..node_port },
            ] {
                kernel.check("tc_from_underlay", &frame, PASS, None);
            }
            assert!(kernel.flows().is_empty());
        });
    }
}
