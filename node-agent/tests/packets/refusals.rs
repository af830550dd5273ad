//! Clients that are told at once that nobody answers.

#[cfg(test)]
mod tests {
    use ebpf_common::{
        service::{ELSEWHERE, KEEP_SOURCE, SCOPE_EXTERNAL, Service},
        verdict::{DropReason, REFUSALS_PER_SECOND},
    };

    use crate::{
        frame::{Frame, RST, TCP, UDP},
        kernel::{DROP, Kernel, REDIRECT, any, hex, with_kernel},
        told::told,
    };

    /// The answer as it is sent back: what the address itself would say.
    fn answer(asked: &Frame) -> Vec<u8> {
        let kind = if asked.dst.0.is_ipv4() { (3, 3, [0; 4]) } else { (1, 4, [0; 4]) };
        told(asked, asked.dst.0, kind)
    }

    #[track_caller]
    fn refuses(kernel: &mut Kernel, hook: &str, asked: &Frame, reason: DropReason) {
        let before = kernel.drops();
        let (verdict, out) = kernel.run(hook, &asked.bytes());
        assert_eq!((verdict, hex(&out)), (REDIRECT, hex(&answer(asked))), "{hook} {asked:?}");
        assert_eq!(kernel.drops_since(&before), [(reason, 1)]);
    }

    #[test]
    fn a_service_without_endpoints_and_an_unknown_one_refuse() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP] {
                let nobody = Frame::new(proto, (at.pod, 40_000), (at.service, 9));
                let of_node = Frame::new(proto, (at.gateway, 40_000), (at.service, 9));
                let outside = Frame::new(proto, (at.client, 40_000), (at.service, 9));
                for (hook, asked) in [
                    ("tc_from_pod", &nobody),
                    ("tc_from_host", &of_node),
                    ("tc_from_underlay", &outside),
                ] {
                    refuses(kernel, hook, asked, DropReason::UnknownService);
                }
                kernel.serve(proto, (at.service, 80), &[]);
                kernel.serve(proto, (any(at.node), 30_080), &[]);
                let empty = Frame::new(proto, (at.pod, 40_000), (at.service, 80));
                let far = Frame::new(proto, (at.far_pod, 40_000), (at.node, 30_080));
                let outside = Frame::new(proto, (at.client, 40_000), (at.node, 30_080));
                for (hook, asked) in [
                    ("tc_from_pod", &empty),
                    ("tc_from_underlay", &outside),
                    ("tc_from_overlay", &far),
                ] {
                    refuses(kernel, hook, asked, DropReason::NoBackend);
                }
            }
            let short = Frame { payload: Vec::new(), ..Frame::udp((at.pod, 1), (at.service, 9)) };
            refuses(kernel, "tc_from_pod", &short, DropReason::UnknownService);
            assert!(kernel.flows().is_empty());
        });
    }

    /// Whoever balances the load by nodes is about to hear that this one has none.
    #[test]
    fn a_service_with_endpoints_on_other_nodes_alone_lets_clients_outside_try_again() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP] {
                let to = (any(at.node), 30_080);
                let service = kernel.serve_in(SCOPE_EXTERNAL, proto, to, &[]);
                let row = Service { flags: KEEP_SOURCE | ELSEWHERE, ..service };
                kernel.put_frontend(SCOPE_EXTERNAL, proto, to, row);
                kernel.serve(proto, to, &[(at.far_pod, 8080)]);
                let outside = Frame::new(proto, (at.client, 40_000), (at.node, 30_080)).bytes();
                kernel.drops_for("tc_from_underlay", &outside, DropReason::NoLocalBackend);
                let pod = Frame::new(proto, (at.pod, 40_000), (at.node, 30_080));
                assert_ne!(kernel.run("tc_from_pod", &pod.bytes()).0, DROP);
            }
        });
    }

    /// Pods that have gone while their service still names them.
    #[test]
    fn a_backend_to_which_no_way_leads_is_told_to_be_unreachable() {
        with_kernel(|kernel, at| {
            for proto in [TCP, UDP] {
                let gone = (at.nobody, 8080);
                kernel.serve(proto, (at.service, 80), &[gone]);
                kernel.serve(proto, (any(at.node), 30_080), &[gone]);
                for (hook, from, to, teller) in [
                    ("tc_from_pod", at.pod, (at.service, 80), at.gateway),
                    ("tc_from_host", at.gateway, (at.service, 80), at.service),
                    ("tc_from_underlay", at.client, (at.node, 30_080), at.node),
                    ("tc_from_overlay", at.far_pod, (at.node, 30_080), at.node),
                ] {
                    let asked = Frame::new(proto, (from, 40_000), to);
                    let kind = if asked.dst.0.is_ipv4() { (3, 1, [0; 4]) } else { (1, 3, [0; 4]) };
                    let answer = told(&asked, teller.parse().unwrap(), kind);
                    // The first packet, and another one of the flow that it has opened.
                    for _ in 0..2 {
                        let before = kernel.drops();
                        let (verdict, out) = kernel.run(hook, &asked.bytes());
                        let seen = (verdict, hex(&out));
                        assert_eq!(seen, (REDIRECT, hex(&answer)), "{hook} {asked:?}");
                        assert_eq!(kernel.drops_since(&before), [(DropReason::NoRoute, 1)]);
                    }
                }
                let reset = Frame { flags: RST, ..Frame::tcp((at.pod, 40_000), (at.service, 80)) };
                if proto == TCP {
                    kernel.drops_for("tc_from_pod", &reset.bytes(), DropReason::NoRoute);
                }
            }
        });
    }

    #[test]
    fn resets_and_later_fragments_are_not_answered() {
        with_kernel(|kernel, at| {
            let asked = Frame::tcp((at.pod, 40_000), (at.service, 9));
            let reset = Frame { flags: RST, ..asked.clone() };
            kernel.drops_for("tc_from_pod", &reset.bytes(), DropReason::UnknownService);
            let later = Frame { fragment: Some((24, 8, false)), ..asked };
            kernel.drops_for("tc_from_pod", &later.bytes(), DropReason::FragmentLost);
        });
    }

    #[test]
    fn answers_are_bounded() {
        with_kernel(|kernel, at| {
            let asked = Frame::udp((at.pod, 40_000), (at.service, 9)).bytes();
            let before = kernel.drops();
            // More than all CPUs may send in a second, and in the next that may begin meanwhile.
            let cpus = u32::try_from(aya::util::nr_cpus().unwrap()).unwrap();
            let mut dropped = 0;
            for _ in 0..(2 * cpus + 1) * REFUSALS_PER_SECOND {
                let (verdict, _) = kernel.run("tc_from_pod", &asked);
                dropped += u64::from(verdict == DROP);
            }
            let counted = kernel.drops_since(&before);
            assert!(dropped > 0);
            assert!(counted.contains(&(DropReason::RefusalLimit, dropped)), "{counted:?}");
        });
    }
}
