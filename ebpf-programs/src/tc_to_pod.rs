//! What this node's own stack sends to a pod: egress of the host's end of its veth pair. What other
//! programs deliver goes past this one.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::{endpoint::HAS_FLOWS, verdict::DropReason};

use crate::{
    apart, count, helpers, log, maps,
    meeting::{OWN, give_way},
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
    let flags = maps::endpoint(&packet.key.dst).map_or(0, |row| row.flags);
    let mut flow = nat::new_flow();
    let mut step = Step::Unknown;
    if flags & HAS_FLOWS != 0 {
        step = apart::follow(ctx, &mut packet, &mut flow);
    }
    if step == Step::Unknown {
        step = give_way(ctx, &packet, &mut flow, (flags, OWN));
    }
    Ok(if step == Step::Dropped { count::DROP } else { count::PASS })
}
