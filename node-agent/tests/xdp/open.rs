//! The first packets of clients outside to services: flows that XDP opens, and those that it leaves to tc.

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ebpf_common::{
        conntrack::{FORWARD, Flow, FlowKey, SEEN_FIN, SEEN_REPLY},
        service::{SOURCE_RANGES, Service},
    };

    use crate::{
        driver::{
            CLIENT_MAC, Kernel, MAC, NEXT_MAC, PASS, REDIRECT, V4, addr, asked, decapsulated, hex,
            question, with_kernel,
        },
        wire::{ACK, FIN, SYN, TCP, UDP, Wire},
    };

    const NODE_PORT: u16 = 30_080;
    /// A load balancer's address in both families.
    const BALANCER: [&str; 2] = ["203.0.113.10", "2001:db8:ee::10"];

    fn any(of: &str) -> &'static str {
        if of.contains(':') { "::" } else { "0.0.0.0" }
    }

    fn balancer(of: &str) -> &'static str {
        BALANCER[usize::from(of.contains(':'))]
    }

    fn set(set: u32) -> Service {
        Service { set, ..Service::default() }
    }

    /// The first packet of a flow.
    fn first(wire: Wire) -> Wire {
        Wire { flags: if wire.proto == TCP { SYN } else { 0 }, ..wire }
    }

    /// What does not differ between two openings of the same flow.
    fn lasting(flows: BTreeMap<FlowKey, Flow>) -> BTreeMap<FlowKey, Flow> {
        let lasting = |(key, flow)| (key, Flow { last_seen: 0, seen: 0, ..flow });
        flows.into_iter().map(lasting).collect()
    }

    #[test]
    fn first_packets_leave_in_the_tunnel_by_rows_as_tc_makes_them() {
        with_kernel(|kernel, family| {
            for (proto, at) in
                [(TCP, family.node), (UDP, family.node), (TCP, balancer(family.node))]
            {
                let key = if at == family.node { any(at) } else { at };
                kernel.serve((key, NODE_PORT), proto, set(9), &[family.tunnel_pod]);
                let first = first(Wire::new(proto, (family.client, 20_000), (at, NODE_PORT)));
                let (action, bytes) = kernel.run(&first.bytes());
                assert_eq!(action, REDIRECT);
                let (inner, _) = decapsulated(&bytes, V4, 0);
                assert_eq!(hex(&inner), hex(&asked(family, &first, family.tunnel_pod).bytes()));
                let next = Wire { flags: first.flags & ACK, ..first.clone() };
                assert_eq!(kernel.run(&next.bytes()).0, REDIRECT);
                let by_xdp = kernel.take_flows();
                kernel.run_tc(&first);
                let by_tc = kernel.take_flows();
                assert_eq!((by_xdp.len(), lasting(by_xdp)), (2, lasting(by_tc)));
            }
        });
    }

    #[test]
    fn first_packets_go_to_routed_pods_and_to_pods_here() {
        with_kernel(|kernel, family| {
            for (proto, pod) in [
                (TCP, family.routed_pod),
                (UDP, family.routed_pod),
                (TCP, family.local_pod),
                (UDP, family.local_pod),
            ] {
                kernel.serve((any(family.node), NODE_PORT), proto, set(9), &[pod]);
                let first = first(question(family, proto, 20_000));
                let out = if pod == family.local_pod {
                    let macs = [MAC; 2];
                    Wire { macs, dst: (pod.parse().unwrap(), 8080), ..first.clone() }
                } else {
                    Wire { macs: [NEXT_MAC, MAC], ..asked(family, &first, pod) }
                };
                let action = if pod == family.local_pod { PASS } else { REDIRECT };
                kernel.check(&first.bytes(), action, &out.bytes());
                let by_xdp = kernel.take_flows();
                if proto == TCP {
                    // The client has not gone on from an answer.
                    assert!(by_xdp.values().all(|flow| flow.seen == 0), "{by_xdp:?}");
                }
                kernel.run_tc(&first);
                assert_eq!(lasting(by_xdp), lasting(kernel.take_flows()));
            }
        });
    }

    #[test]
    fn two_clients_with_one_port_get_two_towards_the_backend() {
        with_kernel(|kernel, family| {
            kernel.serve((any(family.node), NODE_PORT), TCP, set(9), &[family.tunnel_pod]);
            for client in [family.client, family.next] {
                let wire = Wire::new(TCP, (client, 20_000), (family.node, NODE_PORT));
                assert_eq!(kernel.run(&first(wire).bytes()).0, REDIRECT);
            }
            let flows = kernel.flows();
            let mut ports: Vec<[u8; 2]> = flows
                .values()
                .filter(|flow| flow.direction == FORWARD)
                .map(|flow| flow.sport)
                .collect();
            ports.dedup();
            assert_eq!((flows.len(), ports.len()), (4, 2));
        });
    }

    #[test]
    fn source_ranges_hold() {
        with_kernel(|kernel, family| {
            let limited = Service { flags: SOURCE_RANGES, ..set(9) };
            let at = (balancer(family.node), 80);
            kernel.serve(at, TCP, limited, &[family.tunnel_pod]);
            let asked = first(Wire::new(TCP, (family.client, 20_000), at));
            kernel.passes(&asked.bytes());
            assert_eq!(kernel.flows().len(), 0);
            kernel.allow(9, family.client);
            assert_eq!(kernel.run(&asked.bytes()).0, REDIRECT);
        });
    }

    #[test]
    fn what_tc_opened_xdp_carries_and_both_note_its_end() {
        with_kernel(|kernel, family| {
            kernel.serve((any(family.node), NODE_PORT), TCP, set(9), &[family.tunnel_pod]);
            kernel.run_tc(&first(question(family, TCP, 20_000)));
            assert_eq!(kernel.flows().len(), 2, "tc has opened it");
            let question = question(family, TCP, 20_000);
            let (action, bytes) = kernel.run(&question.bytes());
            assert_eq!(action, REDIRECT);
            let (inner, _) = decapsulated(&bytes, V4, 0);
            assert_eq!(hex(&inner), hex(&asked(family, &question, family.tunnel_pod).bytes()));
            let last = Wire { flags: FIN, ..question };
            kernel.run(&last.bytes());
            let flows = kernel.flows();
            let forward = flows.values().find(|flow| flow.direction == FORWARD).unwrap();
            assert_eq!(forward.seen, SEEN_REPLY | SEEN_FIN);
            assert!(forward.last_seen > 0);
            // The client begins anew from the same port: tc ends the old flow.
            kernel.passes(&first(last).bytes());
        });
    }

    /// A packet that must come out as it went in, open no flow and be counted nowhere.
    #[track_caller]
    fn is_left(kernel: &mut Kernel, wire: &Wire) {
        let drops = kernel.drops();
        kernel.passes(&wire.bytes());
        assert_eq!((kernel.flows().len(), kernel.drops()), (0, drops), "{wire:?}");
    }

    #[test]
    fn what_is_not_plain_is_left_to_tc() {
        with_kernel(|kernel, family| {
            kernel.serve((any(family.node), NODE_PORT), TCP, set(9), &[family.tunnel_pod]);
            kernel.serve((any(family.node), NODE_PORT), UDP, set(9), &[family.tunnel_pod]);
            let plain = first(question(family, TCP, 20_000));
            for flags in [ACK, FIN, SYN | ACK, 4] {
                is_left(kernel, &Wire { flags, ..plain.clone() });
            }
            is_left(kernel, &Wire { ttl: 1, ..plain.clone() });
            is_left(kernel, &Wire { macs: [CLIENT_MAC, MAC], ..plain.clone() });
            // Pods of nodes that are reached by routes are inside.
            let inside = (family.routed_pod.parse().unwrap(), 20_000);
            is_left(kernel, &Wire { src: inside, ..plain.clone() });
            let to =
                |at: &str, port, proto| first(Wire::new(proto, (family.client, 1), (at, port)));
            // Another port, another protocol's service, a pod's own address.
            is_left(kernel, &to(family.node, 22, TCP));
            is_left(kernel, &to(family.local_pod, NODE_PORT, UDP));
            // Tunnels' own packets.
            kernel.serve((family.node, 8472), UDP, set(9), &[family.tunnel_pod]);
            is_left(kernel, &to(family.node, 8472, UDP));
            // Nobody answers: tc says so.
            kernel.serve((balancer(family.node), 81), TCP, set(10), &[]);
            is_left(kernel, &to(balancer(family.node), 81, TCP));
            if family.node == V4.node {
                is_left(kernel, &to("10.96.0.9", 80, TCP));
            }
            // A process of this node, and of another.
            kernel.serve((balancer(family.node), 82), TCP, set(11), &[family.node]);
            is_left(kernel, &to(balancer(family.node), 82, TCP));
            kernel.serve((balancer(family.node), 83), TCP, set(12), &[family.next]);
            is_left(kernel, &to(balancer(family.node), 83, TCP));
            assert!(!addr(family.next).is_zero());
        });
    }

    #[test]
    fn without_a_known_way_the_flow_is_opened_and_tc_carries_its_packets() {
        with_kernel(|kernel, family| {
            kernel.serve((any(family.node), NODE_PORT), UDP, set(9), &[family.lost_pod]);
            kernel.passes(&question(family, UDP, 20_000).bytes());
            assert_eq!(kernel.flows().len(), 2);
        });
    }
}
