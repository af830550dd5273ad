//! Where a packet goes next, without the host's stack.

use aya_ebpf::programs::TcContext;
use ebpf_common::{addr::Addr, config::Config, endpoint::Endpoint, verdict::DropReason};

use crate::{helpers, maps, packet};

/// Into a pod of this node.
#[inline(always)]
pub fn deliver(ctx: &TcContext, endpoint: &Endpoint) -> Result<i32, DropReason> {
    helpers::mark_for_host(ctx)?;
    packet::set_macs(ctx, endpoint.pod_mac, endpoint.host_mac)?;
    packet::decrement_ttl(ctx)?;
    Ok(helpers::redirect_peer(endpoint.ifindex))
}

/// To the VXLAN device; its own program finds the far end.
#[inline(always)]
pub fn to_overlay(ctx: &TcContext, config: &Config) -> Result<i32, DropReason> {
    packet::decrement_ttl(ctx)?;
    Ok(helpers::redirect(config.vxlan_ifindex))
}

/// To wherever a translated packet's new destination is: a pod here, a pod of another node, or out
/// of the device `out` (0: the one that the routing table names).
#[inline(always)]
pub fn forward(
    ctx: &TcContext,
    config: &Config,
    src: &Addr,
    dst: &Addr,
    out: u32,
) -> Result<i32, DropReason> {
    if let Some(endpoint) = maps::endpoint(dst) {
        return deliver(ctx, &endpoint);
    }
    // A row for a node's own address is for pods only: between nodes the underlay is shorter.
    let tunnel = maps::tunnel(dst).filter(|tunnel| tunnel.node != *dst);
    if config.vxlan_ifindex != 0 && tunnel.is_some() {
        return to_overlay(ctx, config);
    }
    let out = if out == 0 { helpers::route(ctx, src.v4_octets(), dst.v4_octets())? } else { out };
    packet::decrement_ttl(ctx)?;
    Ok(helpers::redirect_neigh(out))
}
