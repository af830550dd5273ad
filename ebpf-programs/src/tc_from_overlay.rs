//! What other nodes send through the tunnel: ingress of the VXLAN device.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{count, helpers, maps, nat, packet, route};

#[classifier]
pub fn tc_from_overlay(ctx: TcContext) -> i32 {
    match try_from_overlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    }
}

#[inline(always)]
fn try_from_overlay(ctx: &TcContext) -> Result<i32, DropReason> {
    // The far end does not know this device's MAC; what came through the tunnel is ours.
    helpers::mark_for_host(ctx)?;
    let Some(ip) = packet::ipv4(ctx)? else { return Ok(count::PASS) };
    if ip.ttl <= 1 {
        return Ok(count::PASS);
    }
    if let Some(endpoint) = maps::endpoint(&ip.dst()) {
        return route::deliver(ctx, &endpoint);
    }
    let Some(config) = maps::config() else { return Ok(count::PASS) };
    if config.is_gateway(&ip.dst()) {
        return nat::answer(ctx, config, &ip);
    }
    // Pods reach other nodes' own addresses, and so their node ports, through the tunnel.
    if maps::is_node_address(&ip.dst()) {
        return nat::to_node(ctx, config, &ip);
    }
    Ok(count::PASS)
}
