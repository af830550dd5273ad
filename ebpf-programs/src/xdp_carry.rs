//! XDP's carrying of packets whose flow is known.

use aya_ebpf::{bindings::xdp_action, programs::XdpContext};
use ebpf_common::{
    TCP, UDP,
    conntrack::{FORWARD, FlowKey},
    service::BackendKey,
};

use crate::{
    carry,
    driver_frame::{self, Frame},
    events, helpers, log, maps, nat,
    next_hop::{self, HERE},
    pass::Pass,
};

/// What is known of a packet beside itself, as bits: its flow was opened just now.
pub const NEW: u32 = 1;
/// It has a socket buffer already (generic XDP).
pub const IN_STACK: u32 = 2;

/// No actions of XDP: the packet's flow has to be opened first, the way to its backend looked up.
pub const FLOW_UNKNOWN: u32 = 256;
pub const WAY_UNKNOWN: u32 = 257;

/// Carries a packet of a known flow; `known` is of [`NEW`] and [`IN_STACK`].
#[inline(always)]
pub fn carry<const V6: bool>(ctx: &XdpContext, known: u32) -> u32 {
    try_carry::<V6>(ctx, known).unwrap_or(xdp_action::XDP_PASS)
}

#[inline(always)]
fn try_carry<const V6: bool>(ctx: &XdpContext, known: u32) -> Option<u32> {
    let (is_new, in_stack) = (known & NEW != 0, known & IN_STACK != 0);
    let mut key = FlowKey::default();
    let frame = Frame::<V6>::parse(ctx, &mut key)?;
    let config = maps::config()?;
    if frame.proto == UDP && key.dport == config.vxlan_port.to_be_bytes() {
        return None;
    }
    if in_stack && frame.is_unfinished(&key)? {
        log::passed(Pass::Unfinished, &key);
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
    // The kernel may have the sum that a card took of the whole packet, which only tc can keep right.
    if in_stack && path.kind == HERE {
        log::passed(Pass::Here, &key);
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
