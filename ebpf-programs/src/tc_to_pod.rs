//! What this node's own stack sends to a pod: egress of the host's end of its veth pair. What other
//! programs deliver goes past this one.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::{endpoint::HAS_FLOWS, verdict::DropReason};

use crate::{
    apart, count, helpers, log, maps,
    nat::{self, Step},
    packet::Packet,
};

#[classifier]
pub fn tc_to_pod(ctx: TcContext) -> i32 {
    log::told(match try_to_pod(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_to_pod(ctx: &TcContext) -> Result<i32, DropReason> {
    if helpers::came_by(ctx) != 0 {
        return Ok(count::PASS);
    }
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    // A process of the node may be the backend of a service that the pod asked.
    let has_flows = maps::endpoint(&packet.key.dst).is_some_and(|row| row.flags & HAS_FLOWS != 0);
    let mut flow = nat::new_flow();
    if has_flows && apart::follow(ctx, &mut packet, &mut flow) == Step::Dropped {
        return Ok(count::DROP);
    }
    Ok(count::PASS)
}
