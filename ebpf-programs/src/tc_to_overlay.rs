//! What this node sends through the tunnel: egress of the VXLAN device.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{count, helpers, maps, packet};

#[classifier]
pub fn tc_to_overlay(ctx: TcContext) -> i32 {
    match try_to_overlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    }
}

#[inline(always)]
fn try_to_overlay(ctx: &TcContext) -> Result<i32, DropReason> {
    let ip = packet::ipv4(ctx)?.ok_or(DropReason::NoTunnel)?;
    let tunnel = maps::tunnel(&ip.dst()).ok_or(DropReason::NoTunnel)?;
    let config = maps::config().ok_or(DropReason::NoTunnel)?;
    helpers::set_tunnel_key(ctx, config.vni, tunnel.node.v4_octets())?;
    Ok(count::PASS)
}
