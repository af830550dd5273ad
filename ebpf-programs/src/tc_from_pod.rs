//! What a pod sends: ingress of the host's end of its veth pair.

use aya_ebpf::{macros::classifier, programs::TcContext};
use ebpf_common::verdict::DropReason;

use crate::{count, maps, nat, packet, route};

#[classifier]
pub fn tc_from_pod(ctx: TcContext) -> i32 {
    match try_from_pod(&ctx) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop(reason),
    }
}

#[inline(always)]
fn try_from_pod(ctx: &TcContext) -> Result<i32, DropReason> {
    let Some(ip) = packet::ipv4(ctx)? else { return Ok(count::PASS) };
    // The stack answers an expired TTL.
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
    if config.vxlan_ifindex != 0 && maps::tunnel(&ip.dst()).is_some() {
        return route::to_overlay(ctx, config);
    }
    if config.is_service_address(&ip.dst()) {
        return Err(DropReason::UnknownService);
    }
    Ok(count::PASS)
}
