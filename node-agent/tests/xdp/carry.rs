//! Packets of flows that are known.

#[cfg(test)]
mod tests {
    use ebpf_common::{
        conntrack::{FLOW_MASQUERADE, Flow},
        service::{Backend, BackendKey},
    };

    use crate::{
        driver::{
            CLIENT_MAC, MAC, NEXT_MAC, PASS, REDIRECT, V4, V6, asked, decapsulated, hex, question,
            with_kernel,
        },
        wire::{SYN, TCP, UDP, Wire},
    };

    #[test]
    fn flows_to_far_pods_leave_in_the_tunnel() {
        with_kernel(|kernel, family| {
            for (port, proto, over) in
                [(20_000, TCP, V4), (20_001, UDP, V4), (20_002, TCP, V6), (20_003, UDP, V6)]
            {
                let pod = if over.node == V4.node { family.tunnel_pod } else { family.tunnel6_pod };
                kernel.open(family, proto, port, pod);
                let mut sources = Vec::new();
                // Not ECN capable, ECT(1), congested: marks survive, congestion is told outside as ECT(0).
                for (class, outer) in [(0, 0), (0xb9, 1), (3, 2)] {
                    let question = Wire { class, ..question(family, proto, port) };
                    let (action, bytes) = kernel.run(&question.bytes());
                    assert_eq!(action, REDIRECT);
                    let (inner, source) = decapsulated(&bytes, over, outer);
                    assert_eq!(hex(&inner), hex(&asked(family, &question, pod).bytes()));
                    sources.push(source);
                }
                assert!(sources.iter().all(|source| *source == sources[0]), "one path for a flow");
            }
            // Without a checksum it stays without, where that is allowed.
            if family.node == V4.node {
                let question = Wire { unchecked: true, ..question(family, UDP, 20_001) };
                let (_, bytes) = kernel.run(&question.bytes());
                let (inner, _) = decapsulated(&bytes, V4, 0);
                assert_eq!(hex(&inner), hex(&asked(family, &question, V4.tunnel_pod).bytes()));
            }
        });
    }

    #[test]
    fn flows_to_routed_pods_go_to_the_next_hop_and_answers_turn_around() {
        with_kernel(|kernel, family| {
            for (port, proto) in [(20_000, TCP), (20_001, UDP)] {
                kernel.open(family, proto, port, family.routed_pod);
                let question = question(family, proto, port);
                let asked =
                    Wire { macs: [NEXT_MAC, MAC], ..asked(family, &question, family.routed_pod) };
                kernel.check(&question.bytes(), REDIRECT, &asked.bytes());
                let answer = Wire { src: asked.dst, dst: asked.src, ttl: 9, ..question.clone() };
                let turned = Wire {
                    macs: [CLIENT_MAC, MAC],
                    src: question.dst,
                    dst: question.src,
                    ttl: 8,
                    ..answer.clone()
                };
                kernel.check(&answer.bytes(), REDIRECT, &turned.bytes());
            }
        });
    }

    #[test]
    fn what_is_for_a_pod_here_is_translated_and_delivered_by_tc() {
        with_kernel(|kernel, family| {
            kernel.open(family, TCP, 20_000, family.local_pod);
            let question = question(family, TCP, 20_000);
            let dst = (family.local_pod.parse().unwrap(), 8080);
            let translated = Wire { macs: [MAC; 2], dst, ..question.clone() };
            kernel.check(&question.bytes(), PASS, &translated.bytes());
        });
    }

    #[test]
    fn all_else_passes_untouched() {
        with_kernel(|kernel, family| {
            kernel.open(family, TCP, 20_000, family.routed_pod);
            let carried = question(family, TCP, 20_000);
            assert_eq!(kernel.run(&carried.bytes()).0, REDIRECT, "the packet that is varied");
            let vary = |change: &dyn Fn(&mut Wire)| {
                let mut wire = carried.clone();
                change(&mut wire);
                wire.bytes()
            };
            kernel.passes(&vary(&|wire| wire.src.1 = 20_009));
            kernel.passes(&vary(&|wire| wire.flags = SYN));
            kernel.passes(&vary(&|wire| wire.ttl = 1));
            kernel.passes(&vary(&|wire| wire.macs[0] = CLIENT_MAC));
            kernel.passes(&vary(&|wire| wire.payload = vec![7; 1_461]));
            let mut short = carried.bytes();
            short.truncate(short.len() - 1);
            kernel.passes(&short);
            let mut vlan = carried.bytes();
            vlan[12..14].copy_from_slice(&[0x81, 0]);
            kernel.passes(&vlan);
            for (at, value) in if family.node == V4.node {
                // Options, more fragments, a later fragment.
                [(14, 0x46), (20, 0x20), (21, 1)]
            } else {
                // Hop-by-hop options, a fragment, a destination option.
                [(20, 0), (20, 44), (20, 60)]
            } {
                let mut odd = carried.bytes();
                odd[at] = value;
                kernel.passes(&odd);
            }
            // No neighbour, a backend that has left, pods' own connections to the outside.
            kernel.open(family, TCP, 20_001, family.lost_pod);
            kernel.passes(&question(family, TCP, 20_001).bytes());
            kernel.open(family, UDP, 20_002, family.routed_pod);
            kernel.put(
                "BACKENDS",
                BackendKey { set: 1, slot: kernel.slots - 1 },
                Backend::default(),
            );
            kernel.passes(&question(family, UDP, 20_002).bytes());
            let key = kernel.open(family, TCP, 20_003, family.routed_pod);
            let masked = Flow { flags: FLOW_MASQUERADE, ..kernel.flows()[&key] };
            kernel.put("CONNTRACK", key, masked);
            kernel.passes(&question(family, TCP, 20_003).bytes());
        });
    }
}
