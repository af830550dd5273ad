//! Carries a packet whose flow and way are known, from the driver's hook.

use aya_ebpf::{bindings::xdp_action, programs::XdpContext};
use ebpf_common::{conntrack::Flow, trace as steps, verdict::DropReason};

use crate::{
    driver_frame::{self, Frame},
    encap::{self, Variable},
    events, helpers, maps,
    next_hop::{HERE, Path, TUNNEL},
    trace,
};

/// Translates a packet and sends it on its way.
#[inline(always)]
pub fn carry<const V6: bool>(
    ctx: &XdpContext,
    frame: &Frame<'_, V6>,
    flow: &Flow,
    path: &Path,
) -> Option<u32> {
    if path.kind == HERE {
        let _changed: u16 = frame.translate(flow, 0)?;
        driver_frame::mark(ctx, path.mac)?;
        return Some(xdp_action::XDP_PASS);
    }
    let tunnelled = path.kind == TUNNEL;
    let len = if tunnelled { path.outer.packet_len(frame.len) } else { frame.packet_len() };
    // Too big: what is to be done then is tc's to decide.
    if len > path.mtu as usize {
        return None;
    }
    let id = frame.translate(flow, 1)?;
    let addressed = if tunnelled {
        let spread = encap::spread(&flow.src, &flow.dst, frame.ports);
        let packet = Variable { len: frame.len, class: frame.class, flow: spread, id };
        path.outer.push(ctx, &packet)
    } else {
        path.outer.readdress(ctx)
    };
    Some(send(ctx, path.ifindex, addressed))
}

/// Sends a translated packet. What could not be addressed any more (a driver without room in front of
/// its frames) cannot pass either, as nobody would know it.
#[inline(always)]
fn send(ctx: &XdpContext, ifindex: u32, addressed: Option<()>) -> u32 {
    if addressed.is_none() {
        maps::count(DropReason::Rewrite);
        events::dropped(DropReason::Rewrite, None);
        return xdp_action::XDP_DROP;
    }
    if ifindex == ctx.ingress_ifindex() as u32 {
        trace::step(steps::REDIRECT, &[ifindex, steps::PLAIN]);
        return xdp_action::XDP_TX;
    }
    helpers::redirect(ifindex) as u32
}
