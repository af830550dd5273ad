//! What comes in by a network device, before the kernel makes a socket buffer of it: service traffic
//! from outside, and the answers to it.
//!
//! Only the common case, whole: packets of flows that are known or that clients of services open, whose
//! way is clear. All else passes untouched to `tc_from_underlay`, which has the same connection table
//! and opens flows of every kind and ends them. So nothing is refused here, and nothing dropped but what
//! no longer fits its frame.

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use ebpf_common::{
    TCP, UDP,
    conntrack::{FORWARD, FlowKey},
    service::BackendKey,
};

use crate::{
    apart_xdp, carry,
    driver_frame::{self, Family, Frame},
    events, helpers, log, maps, nat, next_hop,
    pass::Pass,
};

#[xdp(frags)]
pub fn xdp_entry(ctx: XdpContext) -> u32 {
    log::told(try_entry(&ctx).unwrap_or(xdp_action::XDP_PASS))
}

#[inline(always)]
fn try_entry(ctx: &XdpContext) -> Option<u32> {
    match driver_frame::family(ctx)? {
        Family::V4 => steps::<false>(ctx),
        Family::V6 => steps::<true>(ctx),
    }
}

/// No actions of XDP: the packet's flow has to be opened first, the way to its backend looked up.
const FLOW_UNKNOWN: u32 = 256;
const WAY_UNKNOWN: u32 = 257;

/// What is rare is done beside the path of an established flow, in functions of their own, since all
/// together need more stack than there is; then that path is taken again.
#[inline(always)]
fn steps<const V6: bool>(ctx: &XdpContext) -> Option<u32> {
    let mut is_new = 0;
    let mut action = apart_xdp::carry::<V6>(ctx, is_new);
    if action == FLOW_UNKNOWN {
        is_new = apart_xdp::open::<V6>(ctx);
        if is_new == 0 {
            return None;
        }
        action = apart_xdp::carry::<V6>(ctx, is_new);
    }
    if action == WAY_UNKNOWN && apart_xdp::learn::<V6>(ctx) == 1 {
        action = apart_xdp::carry::<V6>(ctx, is_new);
    }
    (action < FLOW_UNKNOWN).then_some(action)
}

/// Carries a packet of a known flow; `is_new` says that it has opened it just now.
#[inline(always)]
pub fn carry<const V6: bool>(ctx: &XdpContext, is_new: bool) -> u32 {
    try_carry::<V6>(ctx, is_new).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn try_carry<const V6: bool>(ctx: &XdpContext, is_new: bool) -> Option<u32> {
    let mut key = FlowKey::default();
    let frame = Frame::<V6>::parse(ctx, &mut key)?;
    let config = maps::config()?;
    if frame.proto == UDP && key.dport == config.vxlan_port.to_be_bytes() {
        return None;
    }
    if frame.is_syn() && !is_new {
        return Some(FLOW_UNKNOWN);
    }
    let Some(flow) = maps::flow(&key) else {
        log::passed(Pass::NoFlow, &key);
        return (frame.proto == UDP && !is_new).then_some(FLOW_UNKNOWN);
    };
    let Some(path) = next_hop::path(ctx, &flow.dst) else { return Some(WAY_UNKNOWN) };
    // Pods' own connections, and what is for the node itself, are tc's.
    if flow.flags != 0 || !driver_frame::is_for(ctx, path.mac) {
        log::passed(Pass::NotForDriver, &key);
        return None;
    }
    let is_ours = if flow.direction == FORWARD {
        frame.proto == TCP || nat::is_at(&BackendKey { set: flow.set, slot: flow.slot }, flow)
    } else {
        // An answer of a backend, and the way back is the way in.
        flow.ifindex == path.ifindex && config.is_gateway(&key.dst)
    };
    if !is_ours {
        log::passed(Pass::NotOurs, &key);
        return None;
    }
    events::touch(&key, flow, nat::seen(frame.flags), path.asked_s);
    let action = carry::carry(ctx, &frame, flow, path);
    if action.is_none() {
        log::passed(Pass::NotCarried, &key);
    }
    action
}

/// Looks up the way that a packet's flow takes.
#[inline(always)]
pub fn learn<const V6: bool>(ctx: &XdpContext) -> Option<()> {
    let mut key = FlowKey::default();
    let _frame: Frame<'_, V6> = Frame::parse(ctx, &mut key)?;
    let flow = maps::flow(&key)?;
    next_hop::learn(ctx, maps::config()?, &flow.dst, helpers::now_s())
}
