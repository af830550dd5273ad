//! What packets from other machines have in common, however they came: most are for a pod here.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    conntrack::{Flow, LED_TO},
    endpoint::HAS_FLOWS,
};

use crate::{
    apart, count, fragment, maps,
    meeting::{give_way, note_asked},
    nat::Step,
    packet::{self, Packet},
};

/// Delivers a packet to a pod of this node, or sends on one whose flow is known. `inside`: it has come through
/// the tunnel. Gives tc's verdict; `None` for a packet that belongs to neither.
#[inline(always)]
pub fn receive(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow, inside: bool) -> Option<i32> {
    let endpoint = maps::endpoint(&packet.key.dst);
    let flags = endpoint.map_or(HAS_FLOWS, |endpoint| endpoint.flags);
    if let Some(endpoint) = endpoint
        && flags & (HAS_FLOWS | LED_TO) != 0
        // XDP in the driver has translated it for a pod here: it would meet its own flow. What the stack of another
        // node sends through the tunnel has one MAC twice as well.
        && !inside
        && packet::is_from_itself(ctx)
    {
        return Some(apart::deliver(ctx, packet, endpoint));
    }
    if endpoint.is_none() && fragment::is_lost(packet) && maps::is_node_address(&packet.key.dst) {
        // The node's stack waits for the first piece.
        return Some(count::PASS);
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
    let mut step = give_way(ctx, packet, flow, (flags, 0));
    if !inside && step == Step::Unknown {
        step = note_asked(ctx, packet, flow);
    }
    Some(match step {
        Step::Translated => apart::forward(ctx, packet, flow),
        Step::Unknown => apart::deliver(ctx, packet, endpoint),
        Step::Dropped | Step::Refused => count::DROP,
    })
}
