//! What comes in by the node's network devices: services for clients outside, answers to what pods
//! asked outside, and pods of nodes reached by routes.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::{UDP, verdict::DropReason};

use crate::{
    apart, arrival, count, fragment, helpers, log, maps, meeting,
    nat::{self, From, Step},
    packet::{self, NOT_IP, Packet},
};

#[classifier]
pub fn tc_from_underlay(ctx: TcContext) -> i32 {
    log::told(match try_from_underlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_from_underlay(ctx: &TcContext) -> Result<i32, DropReason> {
    if !helpers::is_for_host(ctx) {
        // Some networks send a broadcast back to its sender, who must not take it for another's.
        if maps::is_local_mac(packet::source_mac(ctx)?) {
            return Err(DropReason::OwnFrame);
        }
        return Ok(count::PASS);
    }
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    if packet.kind == NOT_IP || packet.ttl <= 1 {
        return Ok(count::PASS);
    }
    let Some(config) = maps::config() else { return Ok(count::PASS) };
    // The tunnel's own packets are most of what comes here.
    if packet.key.proto == UDP && u16::from_be_bytes(packet.key.dport) == config.vxlan_port {
        fragment::note(&packet);
        return Ok(count::PASS);
    }
    let mut flow = nat::new_flow();
    if let Some(verdict) = arrival::receive(ctx, &mut packet, &mut flow, false) {
        return Ok(verdict);
    }
    match apart::open_service(ctx, &packet, &mut flow, origin(&packet)) {
        Step::Translated => Ok(apart::forward(ctx, &mut packet, &mut flow)),
        Step::Unknown => Ok(meeting::to_own(ctx, &packet, &mut flow)),
        Step::Dropped => Ok(count::DROP),
        Step::Refused => Ok(apart::refuse(ctx, &packet)),
    }
}

/// Pods of nodes that are reached by routes are inside; nodes themselves are clients like others.
#[inline(always)]
fn origin(packet: &Packet) -> From {
    match maps::tunnel(&packet.key.src) {
        Some(tunnel) if tunnel.node != packet.key.src => From::Inside,
        _ => From::Outside,
    }
}
