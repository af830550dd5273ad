//! What the verifier follows apart in XDP's program, as `apart.rs` has it for tc's: global functions and
//! wrappers of the same meaning. What is generic over the family has one for each.
#![expect(unsafe_code, reason = "global functions take raw pointers")]

use aya_ebpf::{EbpfContext as _, bindings::xdp_md, programs::XdpContext};
use ebpf_common::{
    addr::Addr,
    conntrack::{Flow, FlowKey},
    verdict::DropReason,
};

use crate::{
    apart::{self, NO_ROUTE, given},
    frame::Arrival,
    helpers, maps, nat,
    packet::Packet,
    xdp_carry, xdp_open,
};

/// The context as global functions take it.
#[inline(always)]
fn raw(ctx: &XdpContext) -> *mut xdp_md {
    ctx.as_ptr().cast()
}

/// Carries a packet of a known flow; gives an action of XDP, or what is to be done first.
#[inline(always)]
pub fn carry<const V6: bool>(ctx: &XdpContext, known: u32) -> u32 {
    if V6 { apart_carry6(raw(ctx), known) } else { apart_carry4(raw(ctx), known) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_carry4(ctx: *mut xdp_md, known: u32) -> u32 {
    xdp_carry::carry::<false>(&XdpContext::new(ctx), known)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_carry6(ctx: *mut xdp_md, known: u32) -> u32 {
    xdp_carry::carry::<true>(&XdpContext::new(ctx), known)
}

/// Looks up the way that a packet's flow takes; 1 when it is known now.
#[inline(always)]
pub fn learn<const V6: bool>(ctx: &XdpContext) -> u32 {
    if V6 { apart_learn6(raw(ctx)) } else { apart_learn4(raw(ctx)) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_learn4(ctx: *mut xdp_md) -> u32 {
    u32::from(xdp_carry::learn::<false>(&XdpContext::new(ctx)).is_some())
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_learn6(ctx: *mut xdp_md) -> u32 {
    u32::from(xdp_carry::learn::<true>(&XdpContext::new(ctx)).is_some())
}

/// Makes both rows of a new flow; 1 when they are there.
#[inline(always)]
pub fn open<const V6: bool>(ctx: &XdpContext) -> u32 {
    if V6 { apart_open_xdp6(raw(ctx)) } else { apart_open_xdp4(raw(ctx)) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_open_xdp4(ctx: *mut xdp_md) -> u32 {
    u32::from(xdp_open::open::<false>(&XdpContext::new(ctx)).is_some())
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_open_xdp6(ctx: *mut xdp_md) -> u32 {
    u32::from(xdp_open::open::<true>(&XdpContext::new(ctx)).is_some())
}

/// The backend of a packet's flow; nothing is counted. 1 when there is one.
#[inline(always)]
pub fn find(packet: &Packet, flow: &mut Flow) -> bool {
    apart_find_xdp(packet, flow) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_find_xdp(packet: *const Packet, flow: *mut Flow) -> u32 {
    let packet = packet.cast_mut();
    given!(packet, flow; else 0);
    u32::from(xdp_open::find(packet, flow))
}

/// The source under which the backend sees the client.
#[inline(always)]
pub fn choose_source(ctx: &XdpContext, key: &FlowKey, flow: &mut Flow) {
    let _zero: u32 = apart_source_xdp(raw(ctx), key, flow);
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_source_xdp(ctx: *mut xdp_md, key: *const FlowKey, flow: *mut Flow) -> u32 {
    let key = key.cast_mut();
    given!(key, flow; else 0);
    nat::choose_source(&XdpContext::new(ctx), key, flow, nat::From::Outside);
    0
}

/// Inserts both rows of a flow; whether they are there.
#[inline(always)]
pub fn insert(ctx: &XdpContext, key: &FlowKey, flow: &mut Flow) -> bool {
    apart_rows_xdp(raw(ctx), key, flow) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_rows_xdp(ctx: *mut xdp_md, key: *const FlowKey, flow: *mut Flow) -> u32 {
    let key = key.cast_mut();
    given!(key, flow; else 0);
    u32::from(nat::insert(&XdpContext::new(ctx), key, flow, 0).is_ok())
}

impl Arrival for XdpContext {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn route(&self, src: &Addr, dst: &Addr) -> Result<u32, DropReason> {
        apart::device(apart_route_xdp(raw(self), src, dst))
    }

    #[inline(always)]
    fn way_out(&self, src: &mut Addr, dst: &Addr) -> Result<u32, DropReason> {
        // What leaves under another address is opened by tc.
        let ifindex = self.route(src, dst);
        *src = Addr::ANY_V6;
        ifindex
    }

    #[inline(always)]
    fn insert_reverse(&self, key: &FlowKey, flow: &Flow, flags: u16) -> i32 {
        apart_insert_xdp(raw(self), key, flow, u32::from(flags))
    }

    #[inline(always)]
    fn has_socket(&self, key: &FlowKey) -> bool {
        helpers::has_socket(self, key)
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_route_xdp(ctx: *mut xdp_md, src: *const Addr, dst: *const Addr) -> u32 {
    let (src, dst) = (src.cast_mut(), dst.cast_mut());
    given!(src, dst; else NO_ROUTE);
    let ctx = XdpContext::new(ctx);
    helpers::route(&ctx, ctx.ifindex(), src, dst).unwrap_or(NO_ROUTE)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_insert_xdp(
    ctx: *mut xdp_md,
    key: *const FlowKey,
    flow: *const Flow,
    flags: u32,
) -> i32 {
    let (key, flow) = (key.cast_mut(), flow.cast_mut());
    given!(key, flow; else maps::EEXIST);
    nat::insert_reverse(&XdpContext::new(ctx), key, flow, flags as u16)
}
