//! What comes in by a network device, before the kernel makes a socket buffer of it: service traffic
//! from outside, and the answers to it.
//!
//! Only the common case, whole: packets of flows that are known or that clients of services open, whose
//! way is clear. All else passes untouched to `tc_from_underlay`, which has the same connection table
//! and opens flows of every kind and ends them. So nothing is refused here, and nothing dropped but what
//! no longer fits its frame.

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};

use crate::{
    apart_xdp,
    driver_frame::{self, Family},
    log,
    xdp_carry::{FLOW_UNKNOWN, NEW, WAY_UNKNOWN},
};

#[xdp(frags)]
pub fn xdp_entry(ctx: XdpContext) -> u32 {
    log::told(enter(&ctx, 0))
}

/// Handles a packet; gives an action of XDP.
#[inline(always)]
pub fn enter(ctx: &XdpContext, known: u32) -> u32 {
    try_enter(ctx, known).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn try_enter(ctx: &XdpContext, known: u32) -> Option<u32> {
    match driver_frame::family(ctx)? {
        Family::V4 => steps::<false>(ctx, known),
        Family::V6 => steps::<true>(ctx, known),
    }
}

/// What is rare is done beside the path of an established flow, in functions of their own, since all
/// together need more stack than there is; then that path is taken again.
#[inline(always)]
fn steps<const V6: bool>(ctx: &XdpContext, mut known: u32) -> Option<u32> {
    let mut action = apart_xdp::carry::<V6>(ctx, known);
    if action == FLOW_UNKNOWN {
        if apart_xdp::open::<V6>(ctx) == 0 {
            return None;
        }
        known |= NEW;
        action = apart_xdp::carry::<V6>(ctx, known);
    }
    if action == WAY_UNKNOWN && apart_xdp::learn::<V6>(ctx) == 1 {
        action = apart_xdp::carry::<V6>(ctx, known);
    }
    (action < FLOW_UNKNOWN).then_some(action)
}
