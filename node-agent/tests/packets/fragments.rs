//! Packets in pieces and behind extension headers.

#[cfg(test)]
pub(crate) mod tests {
    use ebpf_common::verdict::DropReason;

    use crate::{
        frame::{Frame, RST, TCP, UDP},
        kernel::{
            PASS, REDIRECT, addr, config, delivered, delivered2, hop, masked, redirected,
            with_kernel,
        },
    };

    pub(crate) fn pieces(whole: &Frame) -> [Frame; 3] {
        let piece = |fragment| Frame { fragment: Some(fragment), ..whole.clone() };
        [piece((0, 24, true)), piece((24, 16, true)), piece((40, 100, false))]
    }

    #[test]
    fn later_fragments_follow_the_first() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.service, 53), &[(at.pod2, 5353)]);
            let asked =
                Frame { payload: vec![7; 60], ..Frame::udp((at.pod, 40_000), (at.service, 53)) };
            let sent = redirected(&asked, (at.pod2, 5353));
            for (asked, sent) in pieces(&asked).iter().zip(pieces(&sent)) {
                kernel.check("tc_from_pod", asked, REDIRECT, Some(&delivered2(&sent)));
            }
            for (answer, seen) in pieces(&sent.answer()).iter().zip(pieces(&asked.answer())) {
                kernel.check("tc_from_pod", answer, REDIRECT, Some(&delivered(&seen)));
            }
        });
    }

    #[test]
    fn masqueraded_fragments_follow_the_first() {
        with_kernel(|kernel, at| {
            for whole in [
                Frame::udp((at.pod, 40_000), (at.client, 53)),
                Frame::ping((at.pod, 777), at.client),
            ] {
                let asked = Frame { payload: vec![7; 60], ..whole };
                let sent = masked(&asked, (at.node, asked.src.1));
                for (asked, sent) in pieces(&asked).iter().zip(pieces(&sent)) {
                    kernel.check("tc_from_pod", asked, REDIRECT, Some(&hop(&sent)));
                }
                for (answer, seen) in pieces(&sent.answer()).iter().zip(pieces(&asked.answer())) {
                    kernel.check("tc_from_underlay", answer, REDIRECT, Some(&delivered(&seen)));
                }
            }
        });
    }

    #[test]
    fn a_later_fragment_to_the_node_itself_waits_in_its_stack_for_the_first() {
        with_kernel(|kernel, at| {
            let whole =
                Frame { payload: vec![7; 60], ..Frame::udp((at.client, 40_000), (at.node, 9)) };
            let [first, second, third] = pieces(&whole);
            for piece in [third, second, first] {
                kernel.check("tc_from_underlay", &piece, PASS, None);
            }
            // A load balancer's address is not this node's, whose stack would send it on.
            let whole = Frame { dst: (at.external.parse().unwrap(), 53), ..whole };
            kernel.serve(UDP, (at.external, 53), &[(at.pod, 5353)]);
            let [_, second, _] = pieces(&whole);
            kernel.drops_for("tc_from_underlay", &second.bytes(), DropReason::FragmentLost);
        });
    }

    #[test]
    fn a_later_fragment_before_the_first_is_dropped_and_counted() {
        with_kernel(|kernel, at| {
            kernel.serve(UDP, (at.service, 53), &[(at.pod2, 5353)]);
            for to in [at.service, at.client] {
                let asked =
                    Frame { payload: vec![7; 60], ..Frame::udp((at.pod, 40_000), (to, 53)) };
                let [_, later, _] = pieces(&asked);
                kernel.drops_for("tc_from_pod", &later.bytes(), DropReason::FragmentLost);
            }
            // Between pods nothing needs the first one.
            let plain =
                Frame { payload: vec![7; 60], ..Frame::udp((at.pod2, 40_000), (at.pod, 53)) };
            let [_, later, _] = pieces(&plain);
            kernel.check("tc_from_pod", &later, REDIRECT, Some(&delivered(&later)));
        });
    }

    #[test]
    fn later_fragments_open_nothing_that_their_first_may_not() {
        with_kernel(|kernel, at| {
            kernel.serve(TCP, (at.service, 53), &[(at.pod2, 5353)]);
            for to in [at.service, at.client] {
                let reset = Frame { flags: RST, ..Frame::tcp((at.pod, 40_000), (to, 53)) };
                let reset = Frame { payload: vec![7; 60], ..reset };
                for piece in pieces(&reset) {
                    kernel.drops_for("tc_from_pod", &piece.bytes(), DropReason::NoFlow);
                }
            }
            assert!(kernel.flows().is_empty());
        });
    }

    #[test]
    fn the_tunnels_own_packets_are_the_stacks_in_pieces_too() {
        with_kernel(|kernel, at| {
            let outer = Frame::udp((at.other_node, 50_000), (at.node, config().vxlan_port));
            let outer = Frame { payload: vec![7; 60], ..outer };
            let ours = Frame { src: outer.dst, dst: (outer.src.0, outer.dst.1), ..outer.clone() };
            for (came, went) in pieces(&outer).iter().zip(pieces(&ours)) {
                kernel.check("tc_from_underlay", came, PASS, None);
                kernel.check("tc_to_underlay", &went, PASS, None);
            }
        });
    }

    #[test]
    fn extension_headers_are_stepped_over_up_to_a_bound() {
        with_kernel(|kernel, at| {
            if addr(at.pod).is_v4() {
                return;
            }
            for proto in [TCP, UDP] {
                kernel.serve(proto, (at.service, 53), &[(at.pod2, 5353)]);
                let plain = Frame::new(proto, (at.pod, 40_000), (at.service, 53));
                for extensions in [vec![0], vec![0, 60], vec![0, 60, 43, 60, 60]] {
                    let asked = Frame { extensions, ..plain.clone() };
                    let sent = redirected(&asked, (at.pod2, 5353));
                    kernel.check("tc_from_pod", &asked, REDIRECT, Some(&delivered2(&sent)));
                }
                let many = Frame { extensions: vec![60; 7], ..plain.clone() }.bytes();
                kernel.drops_for("tc_from_pod", &many, DropReason::Extensions);
                let whole = Frame { payload: vec![7; 60], extensions: vec![0, 60], ..plain };
                let [first, ..] = pieces(&whole);
                let sent = redirected(&first, (at.pod2, 5353));
                kernel.check("tc_from_pod", &first, REDIRECT, Some(&delivered2(&sent)));
            }
        });
    }
}
