//! What packets from other machines have in common, however they came: most are for a pod here.

use aya_ebpf::programs::TcContext;
use ebpf_common::{conntrack::Flow, endpoint::HAS_FLOWS};

use crate::{apart, count, maps, nat::Step, packet::Packet};

/// Delivers a packet to a pod of this node, or sends on one whose flow is known. Gives tc's verdict;
/// `None` for a packet that belongs to neither.
#[inline(always)]
pub fn receive(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Option<i32> {
    let endpoint = maps::endpoint(&packet.key.dst);
    if let Some(endpoint) = endpoint
        && endpoint.flags & HAS_FLOWS == 0
    {
        return Some(apart::deliver(ctx, packet, endpoint));
    }
    match apart::follow(ctx, packet, flow) {
        Step::Translated => Some(apart::forward(ctx, packet, flow)),
        // It answers nothing that the pod asked of a service.
        Step::Unknown => endpoint.map(|endpoint| apart::deliver(ctx, packet, endpoint)),
        Step::Dropped | Step::Refused => Some(count::DROP),
    }
}
