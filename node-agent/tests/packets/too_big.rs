//! Packets that are larger than their way out takes.

#[cfg(test)]
mod tests {
    use ebpf_common::{config::Config, verdict::DropReason};

    use crate::{
        frame::{ACK, Frame, RST, SCTP, TCP, UDP},
        kernel::{
            Family, Kernel, REDIRECT, any, config, delivered, hex, hop, masked, redirected,
            to_host, with_kernel,
        },
        place::ip,
        told::told,
    };

    const MTU: u16 = 1300;

    /// Runs a test where no more than [`MTU`] goes out, and the way out is known in full: the kernel says how
    /// much it takes only then.
    fn with_narrow_way(test: impl Fn(&mut Kernel, Family) + Send + Sync) {
        with_kernel(|kernel, at| {
            let _way = NarrowWay::new();
            test(kernel, at);
        });
    }

    /// The uplink is as it was when this is dropped.
    struct NarrowWay;

    impl NarrowWay {
        fn new() -> Self {
            ip(&format!(
                "link set up0 mtu {MTU}
                 neighbour replace 192.168.0.254 lladdr 02:00:00:00:00:fe dev up0
                 neighbour replace fd00:a::fe lladdr 02:00:00:00:00:fe dev up0"
            ));
            Self
        }
    }

    impl Drop for NarrowWay {
        fn drop(&mut self) {
            ip("link set up0 mtu 1500
                neighbour del 192.168.0.254 dev up0
                neighbour del fd00:a::fe dev up0");
        }
    }

    /// The frame with so much in it that its packet has a length.
    fn sized(frame: &Frame, length: u16) -> Frame {
        let empty = Frame { payload: Vec::new(), ..frame.clone() };
        let headers = empty.bytes().len() - 14;
        let payload = (0..=u8::MAX).cycle().take(usize::from(length) - headers).collect();
        let frame = Frame { payload, ..empty };
        assert_eq!(frame.bytes().len() - 14, usize::from(length));
        frame
    }

    /// One byte more than goes out.
    fn big(frame: &Frame) -> Frame {
        sized(frame, MTU + 1)
    }

    /// In IPv4 the sender lets it be cut; in IPv6 it has cut nothing off although it could.
    fn with_leave(frame: &Frame) -> Frame {
        big(&Frame { fragment: Some((0, 60_000, false)), ..frame.clone() })
    }

    /// Checks that a packet's sender is told by somebody how much goes out.
    #[track_caller]
    fn tells(kernel: &mut Kernel, hook: &str, asked: &Frame, from: &str) {
        let before = kernel.drops();
        let (verdict, out) = kernel.run(hook, &asked.bytes());
        let [high, low] = MTU.to_be_bytes();
        let kind = if asked.dst.0.is_ipv4() { (3, 4) } else { (2, 0) };
        let answer = told(asked, from.parse().unwrap(), (kind.0, kind.1, [0, 0, high, low]));
        let drops = kernel.drops_since(&before);
        assert_eq!((verdict, hex(&out)), (REDIRECT, hex(&answer)), "{hook} {asked:?} {drops:?}");
        assert_eq!(drops, [(DropReason::TooBig, 1)]);
    }

    fn asked_by_pod(at: Family) -> [Frame; 4] {
        [
            Frame::tcp((at.pod, 40_000), (at.client, 443)),
            Frame::udp((at.pod, 40_000), (at.client, 53)),
            Frame::new(SCTP, (at.pod, 40_000), (at.client, 99)),
            Frame::ping((at.pod, 777), at.client),
        ]
    }

    #[test]
    fn a_pod_is_told_how_much_goes_out_by_its_first_packet_and_by_later_ones() {
        with_narrow_way(|kernel, at| {
            for asked in asked_by_pod(at) {
                for _ in 0..2 {
                    tells(kernel, "tc_from_pod", &big(&asked), at.gateway);
                }
                let fits = sized(&asked, MTU);
                let sent = hop(&masked(&fits, (at.node, asked.src.1)));
                kernel.check("tc_from_pod", &fits, REDIRECT, Some(&sent));
                tells(kernel, "tc_from_pod", &big(&asked), at.gateway);
            }
            let later = Frame { flags: ACK, ..Frame::tcp((at.pod, 40_000), (at.client, 443)) };
            tells(kernel, "tc_from_pod", &big(&later), at.gateway);
            // The port that a pod has been given is not its own.
            let first = Frame::udp((at.pod, 40_000), (at.client, 53));
            let second = masked(&first, (at.pod2, 40_000));
            tells(kernel, "tc_from_pod", &big(&second), at.gateway);
            // The answers come in by a device that takes more.
            let answer = big(&masked(&first, (at.node, 40_000)).answer());
            let seen = delivered(&Frame { dst: first.src, ..answer.clone() });
            kernel.check("tc_from_underlay", &answer, REDIRECT, Some(&seen));
        });
    }

    #[test]
    fn what_may_be_cut_is_cut_by_the_stack_under_the_nodes_address() {
        with_narrow_way(|kernel, at| {
            for asked in asked_by_pod(at) {
                let asked = with_leave(&asked);
                if asked.dst.0.is_ipv6() {
                    tells(kernel, "tc_from_pod", &asked, at.gateway);
                    continue;
                }
                let cut = to_host(&masked(&asked, (at.node, asked.src.1)));
                for _ in 0..2 {
                    kernel.check("tc_from_pod", &asked, REDIRECT, Some(&cut));
                }
            }
            // What its sender has cut may still be too big.
            let whole = Frame::udp((at.pod, 40_001), (at.client, 53));
            let whole = Frame { payload: vec![7; 2_600], ..whole };
            let first = Frame { fragment: Some((0, 1_384, true)), ..whole.clone() };
            let later = Frame { fragment: Some((1_384, 1_224, false)), ..whole };
            if at.pod.contains('.') {
                let cut = to_host(&masked(&first, (at.node, 40_001)));
                kernel.check("tc_from_pod", &first, REDIRECT, Some(&cut));
            } else {
                tells(kernel, "tc_from_pod", &first, at.gateway);
            }
            let sent = hop(&masked(&later, (at.node, 40_001)));
            kernel.check("tc_from_pod", &later, REDIRECT, Some(&sent));
        });
    }

    #[test]
    fn without_a_host_device_what_may_be_cut_is_refused_too() {
        with_narrow_way(|kernel, at| {
            kernel.set_config(Config { host_ifindex: 0, ..config() });
            for asked in asked_by_pod(at) {
                tells(kernel, "tc_from_pod", &with_leave(&asked), at.gateway);
            }
        });
    }

    #[test]
    fn who_asks_a_service_outside_is_told_in_its_own_words() {
        with_narrow_way(|kernel, at| {
            for proto in [TCP, UDP] {
                kernel.serve(proto, (at.service, 80), &[(at.client, 8080)]);
                kernel.serve(proto, (any(at.node), 30_080), &[(at.client, 8080)]);
                let by_pod = Frame::new(proto, (at.pod, 40_000), (at.service, 80));
                let by_node = Frame::new(proto, (at.gateway, 40_001), (at.service, 80));
                let by_far_pod = Frame::new(proto, (at.far_pod, 40_002), (at.node, 30_080));
                let outside = Frame::new(proto, (at.router, 40_003), (at.node, 30_080));
                for (hook, asked, from) in [
                    ("tc_from_pod", &by_pod, at.gateway),
                    ("tc_from_host", &by_node, at.service),
                    ("tc_from_overlay", &by_far_pod, at.node),
                    ("tc_from_underlay", &outside, at.node),
                ] {
                    for _ in 0..2 {
                        tells(kernel, hook, &big(asked), from);
                    }
                    let fits = sized(asked, MTU);
                    let sent =
                        masked(&redirected(&fits, (at.client, 8080)), (at.node, asked.src.1));
                    kernel.check(hook, &fits, REDIRECT, Some(&hop(&sent)));
                }
            }
        });
    }

    #[test]
    fn a_pod_that_answers_outside_is_told_too() {
        with_narrow_way(|kernel, at| {
            // Test runs come in by loopback, and what answers them leaves by it.
            ip(&format!("link set lo mtu {MTU}"));
            for proto in [TCP, UDP] {
                kernel.serve(proto, (any(at.node), 30_080), &[(at.pod, 8080)]);
                let asked = Frame::new(proto, (at.client, 40_000), (at.node, 30_080));
                let seen = redirected(&asked, (at.pod, 8080));
                kernel.check("tc_from_underlay", &asked, REDIRECT, Some(&delivered(&seen)));
                tells(kernel, "tc_from_pod", &big(&seen.answer()), at.gateway);
                kernel.check("tc_from_pod", &seen.answer(), REDIRECT, Some(&hop(&asked.answer())));
            }
        });
    }

    #[test]
    fn what_must_not_be_answered_is_dropped_in_silence() {
        with_narrow_way(|kernel, at| {
            let asked = Frame::tcp((at.pod, 40_000), (at.client, 443));
            kernel.check(
                "tc_from_pod",
                &asked,
                REDIRECT,
                Some(&hop(&masked(&asked, (at.node, 40_000)))),
            );
            let reset = big(&Frame { flags: RST, ..asked.clone() });
            kernel.drops_for("tc_from_pod", &reset.bytes(), DropReason::TooBig);
            let complaint = Frame::error(at.pod, &big(&asked.answer()), 1_290);
            kernel.drops_for("tc_from_pod", &complaint.bytes(), DropReason::TooBig);
            if at.pod.contains(':') {
                let whole = Frame { payload: vec![7; 2_600], ..asked };
                let first = Frame { fragment: Some((0, 1_224, true)), ..whole.clone() };
                let _known = kernel.run("tc_from_pod", &first.bytes());
                let later = Frame { fragment: Some((1_224, 1_396, false)), ..whole };
                kernel.drops_for("tc_from_pod", &later.bytes(), DropReason::TooBig);
            }
        });
    }
}
