//! What comes in by a network device, before the kernel makes a socket buffer of it: service traffic
//! from outside, and the answers to it.
//!
//! Only the common case, whole: packets of flows that are known, whose way is clear. All else passes
//! untouched to `tc_from_underlay`, which has the same connection table, opens flows and ends
//! them. So nothing is refused here, and nothing dropped but what no longer fits its frame.

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use ebpf_common::{
    TCP,
    conntrack::{FORWARD, FlowKey},
    service::BackendKey,
};

use crate::{
    carry,
    driver_frame::{self, Family, Frame},
    helpers, maps, nat, next_hop,
};

#[xdp(frags)]
pub fn xdp_entry(ctx: XdpContext) -> u32 {
    try_entry(&ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn try_entry(ctx: &XdpContext) -> Option<u32> {
    match driver_frame::family(ctx)? {
        Family::V4 => steps::<false>(ctx),
        Family::V6 => steps::<true>(ctx),
    }
}

/// No action of XDP: the way to the backend has to be looked up first.
const WAY_UNKNOWN: u32 = 256;

/// What is rare is done beside the path of an established flow, in programs of their own, since all
/// together need more stack than there is; then that path is taken again. Such programs can only give a
/// number back.
#[inline(always)]
fn steps<const V6: bool>(ctx: &XdpContext) -> Option<u32> {
    let mut action = carry::<V6>(ctx);
    if action == WAY_UNKNOWN && learn::<V6>(ctx) == 1 {
        action = carry::<V6>(ctx);
    }
    (action < WAY_UNKNOWN).then_some(action)
}

#[inline(never)]
fn carry<const V6: bool>(ctx: &XdpContext) -> u32 {
    try_carry::<V6>(ctx).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn try_carry<const V6: bool>(ctx: &XdpContext) -> Option<u32> {
    let mut key = FlowKey::default();
    let frame = Frame::<V6>::parse(ctx, &mut key)?;
    let flow = maps::flow(&key)?;
    let now_s = helpers::now_s();
    let Some(path) = next_hop::path(ctx, &flow.dst, now_s) else { return Some(WAY_UNKNOWN) };
    // Pods' own connections, and what is for the node itself, are tc's.
    if flow.flags != 0 || !driver_frame::is_for(ctx, path.mac) {
        return None;
    }
    let is_ours = if flow.direction == FORWARD {
        frame.proto == TCP || nat::is_at(&BackendKey { set: flow.set, slot: flow.slot }, flow)
    } else {
        // An answer of a backend, and the way back is the way in.
        flow.ifindex == path.ifindex && maps::config()?.is_gateway(&key.dst)
    };
    if !is_ours {
        return None;
    }
    maps::touch(flow, nat::seen(frame.flags), now_s);
    carry::carry(ctx, &frame, flow, path)
}

/// Looks up the way that a packet's flow takes. Gives 1 when it is known now.
#[inline(never)]
fn learn<const V6: bool>(ctx: &XdpContext) -> u32 {
    u32::from(try_learn::<V6>(ctx).is_some())
}

#[inline(always)]
fn try_learn<const V6: bool>(ctx: &XdpContext) -> Option<()> {
    let mut key = FlowKey::default();
    let _frame: Frame<'_, V6> = Frame::parse(ctx, &mut key)?;
    let flow = maps::flow(&key)?;
    next_hop::learn(ctx, maps::config()?, &flow.dst, helpers::now_s())
}
