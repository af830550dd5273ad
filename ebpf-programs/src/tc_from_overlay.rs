//! What other nodes send through the tunnel: ingress of the VXLAN device.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{
    apart, arrival, count, helpers, log, maps, meeting,
    nat::{self, From, Step},
    packet::{NOT_IP, Packet},
};

#[classifier]
pub fn tc_from_overlay(ctx: TcContext) -> i32 {
    log::told(match try_from_overlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_from_overlay(ctx: &TcContext) -> Result<i32, DropReason> {
    // The far end does not know this device's MAC; what came through the tunnel is ours.
    helpers::mark_for_host(ctx)?;
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    if packet.kind == NOT_IP || packet.ttl <= 1 {
        return Ok(count::PASS);
    }
    let mut flow = nat::new_flow();
    if let Some(verdict) = arrival::receive(ctx, &mut packet, &mut flow, true) {
        return Ok(verdict);
    }
    // Pods reach other nodes' own addresses, and so their node ports, through the tunnel.
    if !maps::is_node_address(&packet.key.dst) {
        return Ok(count::PASS);
    }
    match apart::open_service(ctx, &packet, &mut flow, From::Inside) {
        Step::Translated => Ok(apart::forward(ctx, &mut packet, &mut flow)),
        Step::Unknown => Ok(meeting::to_own(ctx, &packet, &mut flow)),
        Step::Dropped => Ok(count::DROP),
        Step::Refused => Ok(apart::refuse(ctx, &packet)),
    }
}
