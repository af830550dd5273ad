//! What is translated by nothing: pods, nodes, neighbours.

#[cfg(test)]
mod tests {
    use ebpf_common::{
        tunnel::{ROUTED, Tunnel},
        verdict::DropReason,
    };

    use crate::{
        frame::Frame,
        kernel::{PASS, POD_MAC, REDIRECT, V4, addr, config, delivered, hop, with_kernel},
    };

    #[test]
    fn pods_reach_pods_past_the_stack() {
        with_kernel(|kernel, at| {
            for frame in [
                Frame::tcp((at.pod2, 40_000), (at.pod, 8080)),
                Frame::udp((at.pod2, 40_000), (at.pod, 8080)),
                Frame::ping((at.pod2, 7), at.pod),
            ] {
                kernel.check("tc_from_pod", &frame, REDIRECT, Some(&delivered(&frame)));
                let expired = Frame { ttl: 1, ..frame };
                kernel.check("tc_from_pod", &expired, PASS, None);
            }
            // To another node itself, and so to its node ports, through the tunnel.
            for to in [(at.far_pod, 8080), (at.other_node, 30_080)] {
                let far = Frame::tcp((at.pod, 40_000), to);
                kernel.check("tc_from_pod", &far, REDIRECT, Some(&hop(&far)));
            }
            // To this node itself by its stack.
            for to in [at.gateway, at.node] {
                let near = Frame::tcp((at.pod, 40_000), (to, 22));
                kernel.check("tc_from_pod", &near, PASS, None);
            }
            assert!(kernel.flows().is_empty());
        });
    }

    #[test]
    fn routed_nodes_are_reached_past_the_stack() {
        with_kernel(|kernel, at| {
            let far = Frame::tcp((at.pod, 40_000), (at.far_pod, 8080));
            let mut untunnelled = config();
            untunnelled.vxlan_ifindex = 0;
            kernel.set_config(untunnelled);
            kernel.check("tc_from_pod", &far, PASS, None);
            kernel.set_config(config());
            let routed = Tunnel { node: addr(at.other_node), flags: ROUTED };
            kernel.put_far_row(at.far_pod, routed);
            for frame in [&far, &Frame::ping((at.pod, 7), at.far_pod)] {
                kernel.check("tc_from_pod", frame, REDIRECT, Some(&hop(frame)));
            }
            assert!(kernel.flows().is_empty());
            let back = far.answer();
            kernel.check("tc_from_underlay", &back, REDIRECT, Some(&delivered(&back)));
        });
    }

    #[test]
    fn an_address_of_the_nodes_range_that_no_pod_has_is_the_stacks() {
        with_kernel(|kernel, at| {
            for hook in ["tc_from_pod", "tc_from_overlay", "tc_from_underlay"] {
                for asked in [
                    Frame::tcp((at.pod2, 40_000), (at.nobody, 8080)),
                    Frame::udp((at.pod2, 40_000), (at.nobody, 8080)),
                    Frame::ping((at.pod2, 7), at.nobody),
                ] {
                    kernel.check(hook, &asked, PASS, None);
                }
            }
            assert!(kernel.flows().is_empty());
        });
    }

    #[test]
    fn neighbours_groups_and_other_protocols_are_the_stacks() {
        with_kernel(|kernel, at| {
            let group = if at.node == V4.node { "224.0.0.1" } else { "ff02::1" };
            let frame = Frame::udp((at.pod, 5353), (group, 5353));
            kernel.check("tc_from_pod", &frame, PASS, None);
            let arp = [&[0xff; 6][..], &POD_MAC, &[8, 6], &[0; 28]].concat();
            for hook in ["tc_from_pod", "tc_from_overlay", "tc_from_underlay", "tc_to_pod"] {
                assert_eq!(kernel.run(hook, &arp), (PASS, arp.clone()), "{hook}");
            }
        });
    }

    #[test]
    fn overlay() {
        with_kernel(|kernel, at| {
            let out = Frame::tcp((at.pod, 40_000), (at.far_pod, 8080));
            kernel.check("tc_to_overlay", &out, PASS, None);
            let elsewhere = if at.node == V4.node { "10.244.3.7" } else { "fd00:244:3::7" };
            let nowhere = Frame::tcp((at.pod, 40_000), (elsewhere, 1)).bytes();
            kernel.drops_for("tc_to_overlay", &nowhere, DropReason::NoTunnel);
            // The far end's frame carries a MAC that is not ours.
            let back = Frame { dst_mac: [6; 6], ..out.answer() };
            kernel.check("tc_from_overlay", &back, REDIRECT, Some(&delivered(&back)));
            for to in [at.gateway, at.node] {
                let host = Frame { dst_mac: [6; 6], ..Frame::tcp((at.far_pod, 8080), (to, 22)) };
                kernel.check("tc_from_overlay", &host, PASS, None);
            }
        });
    }

    #[test]
    fn own_broadcasts_that_come_back_are_dropped() {
        with_kernel(|kernel, at| {
            let echo = Frame {
                dst_mac: [0xff; 6],
                src_mac: [2, 0, 0, 0, 0, 1],
                ..Frame::udp((at.client, 68), (at.node, 67))
            };
            kernel.drops_for("tc_from_underlay", &echo.bytes(), DropReason::OwnFrame);
            let others = Frame { src_mac: [2, 0, 0, 0, 0, 2], ..echo };
            kernel.check("tc_from_underlay", &others, PASS, None);
        });
    }

    #[test]
    fn the_nodes_own_traffic_is_left_alone() {
        with_kernel(|kernel, at| {
            for frame in [
                Frame::tcp((at.client, 40_000), (at.node, 22)),
                Frame::udp((at.client, 40_000), (at.node, 53)),
                Frame::udp((at.other_node, 40_000), (at.node, 8472)),
                Frame::ping((at.client, 9), at.node),
            ] {
                kernel.check("tc_from_underlay", &frame, PASS, None);
                kernel.check("tc_to_underlay", &frame.answer(), PASS, None);
            }
            let to_pod = Frame::tcp((at.node, 40_000), (at.pod, 80));
            kernel.check("tc_to_pod", &to_pod, PASS, None);
            assert!(kernel.flows().is_empty());
        });
    }
}
