//! Ports of the node that lead to pods: rows at its addresses, one backend that is here.

#[cfg(test)]
mod tests {
    use ebpf_common::{
        SCTP, TCP, UDP,
        service::{SCOPE_INTERNAL, SCOPE_LOOPBACK},
    };

    use crate::{
        frame::Frame,
        kernel::{PASS, REDIRECT, delivered, hop, redirected, with_kernel},
    };

    #[test]
    fn clients_outside_and_pods_reach_it_under_their_own_address() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP, SCTP] {
                let container_port = if proto == SCTP { 8080 } else { 80 };
                kernel.serve(proto, (at.node, 8080), &[(at.pod, container_port)]);
                let frame = |from| match proto {
                    TCP => Frame::tcp(from, (at.node, 8080)),
                    UDP => Frame::udp(from, (at.node, 8080)),
                    _ => Frame::new(SCTP, from, (at.node, 8080)),
                };
                let outside = frame((at.client, 40_000));
                let inside = redirected(&outside, (at.pod, container_port));
                kernel.check("tc_from_underlay", &outside, REDIRECT, Some(&delivered(&inside)));
                let answer = inside.answer();
                kernel.check("tc_from_pod", &answer, REDIRECT, Some(&hop(&outside.answer())));
                let near = frame((at.pod2, 40_000));
                let to = redirected(&near, (at.pod, container_port));
                kernel.check("tc_from_pod", &near, REDIRECT, Some(&delivered(&to)));
            }
            // Another port is the node's own.
            let other = Frame::tcp((at.client, 40_000), (at.node, 8081));
            kernel.check("tc_from_underlay", &other, PASS, None);
        });
    }

    #[test]
    fn a_pod_reaches_itself_by_the_node() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.node, 8080), &[(at.pod, 80)]);
            let asked = Frame::tcp((at.pod, 40_000), (at.node, 8080));
            let (verdict, _) = kernel.run("tc_from_pod", &asked.bytes());
            assert_eq!(verdict, REDIRECT);
            assert_eq!(kernel.flows().len(), 2);
        });
    }

    #[test]
    fn a_port_at_loopback_is_no_packets() {
        with_kernel(|kernel, at| {
            let loopback = if at.node.contains(':') { "::1" } else { "127.0.0.1" };
            kernel.serve_in(SCOPE_LOOPBACK, TCP, (loopback, 8080), &[(at.pod, 80)]);
            for (hook, from) in [("tc_from_pod", at.pod2), ("tc_from_underlay", at.client)] {
                let forged = Frame::tcp((from, 40_000), (loopback, 8080));
                let _run = kernel.run(hook, &forged.bytes());
                assert!(kernel.flows().values().all(|flow| flow.dport != [0, 80]), "{hook}");
            }
            // The same row for packets would have led there.
            kernel.serve_in(SCOPE_INTERNAL, TCP, (loopback, 8080), &[(at.pod, 80)]);
            let forged = Frame::tcp((at.client, 40_000), (loopback, 8080));
            let _led = kernel.run("tc_from_underlay", &forged.bytes());
            assert!(kernel.flows().values().any(|flow| flow.dport == [0, 80]), "it would be seen");
        });
    }
}
