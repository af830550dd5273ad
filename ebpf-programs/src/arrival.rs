//! What packets from other machines have in common, however they came: most are for a pod here.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    conntrack::{Flow, LED_TO},
    endpoint::HAS_FLOWS,
};

use crate::{
    apart, count, maps,
    meeting::give_way,
    nat::Step,
    packet::{self, Packet},
};

/// Delivers a packet to a pod of this node, or sends on one whose flow is known. Gives tc's verdict;
/// `None` for a packet that belongs to neither.
#[inline(always)]
pub fn receive(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Option<i32> {
    let endpoint = maps::endpoint(&packet.key.dst);
    let flags = endpoint.map_or(HAS_FLOWS, |endpoint| endpoint.flags);
    if let Some(endpoint) = endpoint
        && flags & (HAS_FLOWS | LED_TO) != 0
        // XDP in the driver has translated it for a pod here: it would meet its own flow.
        && packet::is_from_itself(ctx)
    {
        return Some(apart::deliver(ctx, packet, endpoint));
    }
    if flags & HAS_FLOWS != 0 {
        match apart::follow(ctx, packet, flow) {
            Step::Translated => return Some(apart::forward(ctx, packet, flow)),
            // It answers nothing that the pod asked of a service.
            Step::Unknown => {}
            Step::Dropped | Step::Refused => return Some(count::DROP),
        }
    }
    let endpoint = endpoint?;
    Some(match give_way(ctx, packet, flow, (flags, 0)) {
        Step::Translated => apart::forward(ctx, packet, flow),
        Step::Unknown => apart::deliver(ctx, packet, endpoint),
        Step::Dropped | Step::Refused => count::DROP,
    })
}
