//! What packets from other machines have in common, however they came: most are for a pod here.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    conntrack::{Flow, LED_TO},
    device::XDP,
    endpoint::HAS_FLOWS,
};

use crate::{apart, count, helpers, maps, meeting::give_way, nat::Step, packet::Packet};

/// Delivers a packet to a pod of this node, or sends on one whose flow is known. Gives tc's verdict;
/// `None` for a packet that belongs to neither.
#[inline(always)]
pub fn receive(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Option<i32> {
    let endpoint = maps::endpoint(&packet.key.dst);
    let flags = endpoint.map_or(HAS_FLOWS, |endpoint| endpoint.flags);
    if flags & HAS_FLOWS != 0 {
        match apart::follow(ctx, packet, flow) {
            Step::Translated => return Some(apart::forward(ctx, packet, flow)),
            // It answers nothing that the pod asked of a service.
            Step::Unknown => {}
            Step::Dropped | Step::Refused => return Some(count::DROP),
        }
    }
    let endpoint = endpoint?;
    if flags & LED_TO != 0 && !is_carried(ctx) {
        match give_way(ctx, packet, flow, (flags, 0)) {
            Step::Translated => return Some(apart::forward(ctx, packet, flow)),
            Step::Unknown => {}
            Step::Dropped | Step::Refused => return Some(count::DROP),
        }
    }
    Some(apart::deliver(ctx, packet, endpoint))
}

/// Whether XDP may have translated the packet: it would meet its own flow.
#[inline(always)]
fn is_carried(ctx: &TcContext) -> bool {
    maps::device(helpers::ifindex(ctx)).is_some_and(|device| device.flags & XDP != 0)
}
