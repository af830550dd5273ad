//! Where a packet goes next in tc, without the host's stack.

use aya_ebpf::programs::TcContext;
use ebpf_common::{
    config::Config,
    conntrack::{FLOW_FROM_POD, FLOW_LOCAL, FLOW_TO_HOST, Flow, FlowKey},
    device::Device,
    endpoint::Endpoint,
    tunnel::ROUTED,
    verdict::DropReason,
};

use crate::{
    apart, count,
    frame::Arrival as _,
    helpers, maps, packet,
    packet::{NO_WAY, Packet},
};

/// Into a pod of this node.
#[inline(always)]
pub fn deliver(ctx: &TcContext, packet: &Packet, endpoint: &Endpoint) -> i32 {
    match try_deliver(ctx, packet, endpoint) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop_of(reason, &packet.key),
    }
}

#[inline(always)]
fn try_deliver(ctx: &TcContext, packet: &Packet, endpoint: &Endpoint) -> Result<i32, DropReason> {
    helpers::mark_for_host(ctx)?;
    packet::set_macs(ctx, endpoint.pod_mac, endpoint.host_mac)?;
    packet::decrement_ttl(ctx, packet)?;
    Ok(helpers::redirect_peer(endpoint.ifindex))
}

/// To the VXLAN device; its own program finds the far end.
#[inline(always)]
pub fn to_overlay(ctx: &TcContext, config: &Config, packet: &Packet) -> Result<i32, DropReason> {
    packet::decrement_ttl(ctx, packet)?;
    Ok(helpers::redirect(config.vxlan_ifindex))
}

/// To this node's own stack, as if it came by the host device.
#[inline(always)]
fn to_host(ctx: &TcContext, config: &Config, device: &Device) -> Result<i32, DropReason> {
    packet::set_macs(ctx, device.mac, [0; 6])?;
    Ok(helpers::redirect_in(config.host_ifindex))
}

/// To wherever a translated packet's new destination is: this node itself, a pod here, a pod of
/// another node, or out of the flow's device. Of a packet that is too big for that it notes the MTU, of one
/// that nothing leads on that there is no way.
#[inline(always)]
pub fn forward(ctx: &TcContext, packet: &mut Packet, flow: &Flow) -> i32 {
    match try_forward(ctx, packet, flow) {
        Ok(verdict) => verdict,
        Err(reason) => count::drop_of(reason, &packet.key),
    }
}

#[inline(always)]
fn try_forward(ctx: &TcContext, packet: &mut Packet, flow: &Flow) -> Result<i32, DropReason> {
    let config = maps::config().ok_or(DropReason::NoRoute)?;
    if flow.flags & FLOW_LOCAL != 0 {
        return Ok(count::PASS);
    }
    if flow.flags & FLOW_TO_HOST != 0 {
        let Some(device) = maps::device(config.host_ifindex) else { return Ok(count::PASS) };
        return to_host(ctx, config, device);
    }
    if let Some(endpoint) = maps::endpoint(&flow.dst) {
        return try_deliver(ctx, packet, endpoint);
    }
    if config.vxlan_ifindex != 0
        && let Some(tunnel) = maps::tunnel(&flow.dst)
        && tunnel.flags & ROUTED == 0
        // A row for a node's own address is for pods only: between nodes the underlay is shorter.
        && (tunnel.node != flow.dst || flow.flags & FLOW_FROM_POD != 0)
    {
        return to_overlay(ctx, config, packet);
    }
    let mut out = flow.ifindex;
    if out == 0 {
        out = match ctx.route(&flow.src, &flow.dst) {
            Ok(device) => device,
            Err(reason) => {
                packet.mtu = NO_WAY;
                return Err(reason);
            }
        };
    }
    if let Some(mtu) = helpers::exceeded_mtu(ctx, out) {
        if packet::may_be_cut(ctx, packet)?
            && let Some(device) = maps::device(config.host_ifindex)
        {
            // The stack cuts it; the addresses are those of the flow already.
            return to_host(ctx, config, device);
        }
        packet.mtu = mtu;
        return Err(DropReason::TooBig);
    }
    packet::decrement_ttl(ctx, packet)?;
    Ok(helpers::redirect_neigh(out))
}

/// Makes a translated packet what its sender sent, so that an error can quote it. The key's destination is then
/// who is to send that error, and the row is used up.
#[inline(always)]
pub fn turn_back(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Result<(), DropReason> {
    let asked = packet.key;
    let FlowKey { proto, reserved, .. } = asked;
    let Flow { src, dst, sport, dport, .. } = *flow;
    packet.key = FlowKey { src, dst, sport, dport, proto, reserved };
    (flow.src, flow.dst) = (asked.src, asked.dst);
    (flow.sport, flow.dport) = (asked.sport, asked.dport);
    let done = apart::translate(ctx, packet, flow);
    packet.key = asked;
    if let Some(config) = maps::config()
        && maps::endpoint(&asked.src).is_some()
        && !config.gateway_for(&asked.src).is_zero()
    {
        // Not who was asked says so: a pod's router is this node.
        packet.key.dst = config.gateway_for(&asked.src);
    }
    done
}
