//! What this node sends through the tunnel: egress of the VXLAN device.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{
    apart, count, helpers, log, maps,
    meeting::{OWN, give_way},
    nat::{self, Step},
    packet::{NOT_IP, Packet},
};

#[classifier]
pub fn tc_to_overlay(ctx: TcContext) -> i32 {
    log::told(match try_to_overlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    })
}

#[inline(always)]
fn try_to_overlay(ctx: &TcContext) -> Result<i32, DropReason> {
    let mut packet = Packet::new();
    apart::parse(ctx, &mut packet)?;
    if packet.kind == NOT_IP {
        return Err(DropReason::NoTunnel);
    }
    let mut flow = nat::new_flow();
    // Of what the node itself sends some answers a pod elsewhere that asked a service.
    let is_own = helpers::came_by(ctx) == 0;
    let step = if is_own { apart::follow(ctx, &mut packet, &mut flow) } else { Step::Translated };
    if step == Step::Dropped {
        return Ok(count::DROP);
    }
    let Some(tunnel) = maps::tunnel(&packet.key.dst) else {
        return Ok(count::drop_of(DropReason::NoTunnel, &packet.key));
    };
    if step == Step::Unknown
        && give_way(ctx, &packet, &mut flow, (tunnel.flags, OWN)) == Step::Dropped
    {
        return Ok(count::DROP);
    }
    let config = maps::config().ok_or(DropReason::NoTunnel)?;
    helpers::set_tunnel_key(ctx, config.vni, &tunnel.node)?;
    Ok(count::PASS)
}
