//! What this node itself sends to services: ingress of the host device's far end, into which the
//! service addresses are routed.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{
    apart, count, log,
    nat::{self, From, Step},
    packet::{NOT_IP, Packet},
};

#[classifier]
pub fn tc_from_host(ctx: TcContext) -> i32 {
    log::told(match try_from_host(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_from_host(ctx: &TcContext) -> Result<i32, DropReason> {
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    if packet.kind == NOT_IP || packet.ttl <= 1 {
        return Ok(count::PASS);
    }
    let mut flow = nat::new_flow();
    match apart::follow(ctx, &mut packet, &mut flow) {
        Step::Translated => return Ok(apart::forward(ctx, &mut packet, &mut flow)),
        Step::Unknown => {}
        Step::Dropped | Step::Refused => return Ok(count::DROP),
    }
    match apart::open_service(ctx, &packet, &mut flow, From::Host) {
        Step::Translated => Ok(apart::forward(ctx, &mut packet, &mut flow)),
        // Nothing but service addresses is routed here; what else comes must not go round.
        Step::Unknown => Ok(count::drop_of(DropReason::UnknownService, &packet.key)),
        Step::Dropped => Ok(count::DROP),
        Step::Refused => Ok(apart::refuse(ctx, &packet)),
    }
}
