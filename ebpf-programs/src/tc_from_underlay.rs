//! What comes in by the node's network devices: node ports, and pods of nodes reached by routes.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{count, helpers, maps, nat, packet, route};

#[classifier]
pub fn tc_from_underlay(ctx: TcContext) -> i32 {
    match try_from_underlay(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    }
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
    let Some(ip) = packet::ipv4(ctx)? else { return Ok(count::PASS) };
    if ip.ttl <= 1 {
        return Ok(count::PASS);
    }
    let Some(config) = maps::config() else { return Ok(count::PASS) };
    if maps::is_node_address(&ip.dst()) {
        return nat::to_node(ctx, config, &ip);
    }
    if config.is_gateway(&ip.dst()) {
        return nat::answer(ctx, config, &ip);
    }
    if let Some(endpoint) = maps::endpoint(&ip.dst()) {
        return route::deliver(ctx, &endpoint);
    }
    Ok(count::PASS)
}
