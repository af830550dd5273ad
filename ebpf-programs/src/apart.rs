//! What the verifier follows apart: BPF's global functions, each checked once for a program, with
//! arguments of which nothing is known but their type (`do_check_subprogs`, kernel/bpf/verifier.c, 5.6;
//! pointers to structures: 5.13). A function that is not global is followed anew from each call and each
//! state of its caller, which took a hundred times as many steps.
//!
//! Such a function takes the context, integers and pointers to whole structures that may be null for all the
//! verifier knows, and gives an integer. All of what a pointer leads to must have been written before. Each has a
//! wrapper of the same meaning; callers use those.
#![expect(unsafe_code, reason = "global functions take raw pointers")]

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use ebpf_common::{
    addr::Addr,
    config::Config,
    conntrack::{Flow, FlowKey},
    endpoint::Endpoint,
    verdict::DropReason,
};

use crate::{
    count, fragment, helpers,
    icmp::{self, Quote},
    maps, meeting,
    nat::{self, From, Step},
    packet::{self, ERROR, FLOW, Packet},
    refuse, rewrite, route,
};

/// No pointer is null. What the compiler keeps is what the verifier asks for.
macro_rules! given {
    ($($pointer:ident),+; else $lost:expr) => {
        $(
            // SAFETY: the wrapper of this function hands in a reference, and nobody else calls it.
            let Some($pointer) = (unsafe { $pointer.as_mut() }) else { return $lost };
        )+
    };
}

pub(crate) use given;

/// What a function gives whose result is no step: 0, or a reason's number plus one.
const fn code(result: Result<(), DropReason>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(reason) => reason as u32 + 1,
    }
}

#[inline(always)]
fn result(code: u32) -> Result<(), DropReason> {
    match code.checked_sub(1) {
        None => Ok(()),
        Some(number) => Err(DropReason::of(number)),
    }
}

/// Reads a packet's headers.
#[inline(always)]
pub fn parse(ctx: &TcContext, packet: &mut Packet) -> Result<(), DropReason> {
    result(apart_parse(ctx.skb.skb, packet))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_parse(skb: *mut __sk_buff, packet: *mut Packet) -> u32 {
    given!(packet; else 1);
    code(packet::parse(&TcContext::new(skb), packet))
}

/// Translates a packet of a known flow, or an error about one, and copies out what its row says of the way.
#[inline(always)]
pub fn follow(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> Step {
    match packet.kind {
        FLOW => Step::from_number(apart_known(ctx.skb.skb, packet, flow)),
        ERROR => Step::from_number(apart_error(ctx.skb.skb, packet, flow)),
        _ => Step::Unknown,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_known(skb: *mut __sk_buff, packet: *mut Packet, flow: *mut Flow) -> u32 {
    given!(packet, flow; else Step::Dropped as u32);
    nat::known(&TcContext::new(skb), packet, flow) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_error(skb: *mut __sk_buff, packet: *mut Packet, flow: *mut Flow) -> u32 {
    given!(packet, flow; else Step::Dropped as u32);
    icmp::follow(&TcContext::new(skb), packet, flow) as u32
}

/// Reads the packet that an error quotes: whether there is one that may have a flow.
#[inline(always)]
pub fn quote(ctx: &TcContext, packet: &Packet, quote: &mut Quote) -> Result<bool, DropReason> {
    match apart_quote(ctx.skb.skb, packet, quote) {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(DropReason::of(other.wrapping_sub(2))),
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_quote(skb: *mut __sk_buff, packet: *const Packet, quote: *mut Quote) -> u32 {
    let packet = packet.cast_mut();
    given!(packet, quote; else 0);
    match icmp::read(&TcContext::new(skb), packet, quote) {
        Ok(found) => u32::from(found),
        Err(reason) => reason as u32 + 2,
    }
}

/// Replaces addresses and ports.
#[inline(always)]
pub fn translate(ctx: &TcContext, packet: &Packet, flow: &Flow) -> Result<(), DropReason> {
    result(apart_translate(ctx.skb.skb, packet, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_translate(
    skb: *mut __sk_buff,
    packet: *const Packet,
    flow: *const Flow,
) -> u32 {
    let (packet, flow) = (packet.cast_mut(), flow.cast_mut());
    given!(packet, flow; else 1);
    code(rewrite::translate(&TcContext::new(skb), packet, flow))
}

/// Completes the key of a later fragment, and remembers that of a first one.
#[inline(always)]
pub fn resolve(packet: &mut Packet) -> Result<(), DropReason> {
    result(apart_resolve(packet))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_resolve(packet: *mut Packet) -> u32 {
    given!(packet; else 1);
    code(fragment::resolve(packet))
}

/// Fills in what a new flow to a service is translated to, but for the source.
#[inline(always)]
pub fn find_service(packet: &Packet, flow: &mut Flow, from: From) -> Step {
    Step::from_number(apart_find_service(packet, flow, from as u32))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_find_service(packet: *const Packet, flow: *mut Flow, from: u32) -> u32 {
    let packet = packet.cast_mut();
    given!(packet, flow; else Step::Dropped as u32);
    nat::find_service(packet, flow, From::from_number(from)) as u32
}

/// Opens a flow for a packet to a service, whose row it fills in, and translates the packet.
/// [`Step::Unknown`]: its destination is no service.
#[inline(always)]
pub fn open_service(ctx: &TcContext, packet: &Packet, flow: &mut Flow, from: From) -> Step {
    match find_service(packet, flow, from) {
        Step::Translated => {}
        other => return other,
    }
    let _zero: u32 = apart_choose_source(ctx.skb.skb, &packet.key, flow, from as u32);
    let flags = nat::reverse_flags(flow, from);
    open(ctx, packet, flow, flags)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_choose_source(
    skb: *mut __sk_buff,
    key: *const FlowKey,
    flow: *mut Flow,
    from: u32,
) -> u32 {
    let key = key.cast_mut();
    given!(key, flow; else 0);
    nat::choose_source(&TcContext::new(skb), key, flow, From::from_number(from));
    0
}

/// Opens a flow for a pod's packet to the outside. [`Step::Unknown`]: the way out has no address of
/// this node.
#[inline(always)]
pub fn masquerade(ctx: &TcContext, packet: &Packet, flow: &mut Flow) -> Step {
    Step::from_number(apart_masquerade(ctx.skb.skb, packet, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_masquerade(skb: *mut __sk_buff, packet: *const Packet, flow: *mut Flow) -> u32 {
    let packet = packet.cast_mut();
    given!(packet, flow; else Step::Dropped as u32);
    nat::masquerade(&TcContext::new(skb), packet, flow) as u32
}

/// Whether a flow that goes on would take the answers to a packet that nothing translates.
#[inline(always)]
pub fn is_met(packet: &Packet) -> bool {
    apart_is_met(packet) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_is_met(packet: *const Packet) -> u32 {
    let packet = packet.cast_mut();
    given!(packet; else 0);
    u32::from(meeting::is_met(packet))
}

/// Gives a connection that nothing translates another source port, and translates its packet.
#[inline(always)]
pub fn evade(ctx: &TcContext, packet: &Packet, flow: &mut Flow, way: u16) -> Step {
    Step::from_number(apart_evade(ctx.skb.skb, packet, flow, u32::from(way)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_evade(
    skb: *mut __sk_buff,
    packet: *const Packet,
    flow: *mut Flow,
    way: u32,
) -> u32 {
    let packet = packet.cast_mut();
    given!(packet, flow; else Step::Dropped as u32);
    meeting::evade(&TcContext::new(skb), packet, flow, way as u16) as u32
}

/// Makes both rows of a flow and translates the packet.
#[inline(always)]
pub fn open(ctx: &TcContext, packet: &Packet, flow: &mut Flow, flags: u16) -> Step {
    Step::from_number(apart_open(ctx.skb.skb, packet, flow, u32::from(flags)))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_open(
    skb: *mut __sk_buff,
    packet: *const Packet,
    flow: *mut Flow,
    flags: u32,
) -> u32 {
    let packet = packet.cast_mut();
    given!(packet, flow; else Step::Dropped as u32);
    nat::open(&TcContext::new(skb), packet, flow, flags as u16) as u32
}

/// Whether a flow's packets would now leave by another device or under another address; `now` is for what is found.
#[inline(always)]
pub fn leaves_otherwise(ctx: &TcContext, key: &FlowKey, flow: &Flow, now: &mut Flow) -> bool {
    apart_leaves_otherwise(ctx.skb.skb, key, flow, now) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_leaves_otherwise(
    skb: *mut __sk_buff,
    key: *const FlowKey,
    flow: *const Flow,
    now: *mut Flow,
) -> u32 {
    let (key, flow) = (key.cast_mut(), flow.cast_mut());
    given!(key, flow, now; else 0);
    u32::from(nat::leaves_otherwise(&TcContext::new(skb), key, flow, now))
}

/// Inserts the row of answers; gives the kernel's error number, 0 for none.
#[inline(always)]
pub fn insert_reverse(ctx: &TcContext, key: &FlowKey, flow: &Flow, flags: u16) -> i32 {
    apart_insert_reverse(ctx.skb.skb, key, flow, u32::from(flags))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_insert_reverse(
    skb: *mut __sk_buff,
    key: *const FlowKey,
    flow: *const Flow,
    flags: u32,
) -> i32 {
    let (key, flow) = (key.cast_mut(), flow.cast_mut());
    given!(key, flow; else maps::EEXIST);
    nat::insert_reverse(&TcContext::new(skb), key, flow, flags as u16)
}

/// Inserts the row of questions when that of answers is there.
#[inline(always)]
pub fn insert_forward(key: &FlowKey, flow: &mut Flow) -> Result<(), DropReason> {
    result(apart_insert_forward(key, flow))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_insert_forward(key: *const FlowKey, flow: *mut Flow) -> u32 {
    let key = key.cast_mut();
    given!(key, flow; else 1);
    code(nat::insert_forward(key, flow))
}

/// The device by which `dst` is reached; 0 for this node itself.
#[inline(always)]
pub fn route(ctx: &TcContext, src: &Addr, dst: &Addr) -> Result<u32, DropReason> {
    device(apart_route(ctx.skb.skb, src, dst))
}

/// The same for what leaves under this node's address, which takes the place of `src`; zero: not known.
#[inline(always)]
pub fn way_out(ctx: &TcContext, src: &mut Addr, dst: &Addr) -> Result<u32, DropReason> {
    device(apart_way_out(ctx.skb.skb, src, dst))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_way_out(skb: *mut __sk_buff, src: *mut Addr, dst: *const Addr) -> u32 {
    let dst = dst.cast_mut();
    given!(src, dst; else NO_ROUTE);
    let ctx = TcContext::new(skb);
    helpers::way_out(&ctx, helpers::ifindex(&ctx), src, dst).unwrap_or(NO_ROUTE)
}

/// No device has this index.
pub const NO_ROUTE: u32 = u32::MAX;

/// The device that a function has found.
#[inline(always)]
pub fn device(found: u32) -> Result<u32, DropReason> {
    if found == NO_ROUTE { Err(DropReason::NoRoute) } else { Ok(found) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_route(skb: *mut __sk_buff, src: *const Addr, dst: *const Addr) -> u32 {
    let (src, dst) = (src.cast_mut(), dst.cast_mut());
    given!(src, dst; else NO_ROUTE);
    let ctx = TcContext::new(skb);
    helpers::route(&ctx, helpers::ifindex(&ctx), src, dst).unwrap_or(NO_ROUTE)
}

/// Whether a socket of this node speaks to what a packet of `key` comes from, or, for UDP, may.
#[inline(always)]
pub fn has_socket(ctx: &TcContext, key: &FlowKey) -> bool {
    apart_has_socket(ctx.skb.skb, key) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_has_socket(skb: *mut __sk_buff, key: *const FlowKey) -> u32 {
    let key = key.cast_mut();
    given!(key; else 1);
    u32::from(helpers::has_socket(&TcContext::new(skb), key))
}

/// Into a pod of this node. Gives tc's verdict, as do the functions below.
#[inline(always)]
pub fn deliver(ctx: &TcContext, packet: &Packet, endpoint: &Endpoint) -> i32 {
    apart_deliver(ctx.skb.skb, packet, endpoint)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_deliver(
    skb: *mut __sk_buff,
    packet: *const Packet,
    endpoint: *const Endpoint,
) -> i32 {
    let (packet, endpoint) = (packet.cast_mut(), endpoint.cast_mut());
    given!(packet, endpoint; else count::DROP);
    route::deliver(&TcContext::new(skb), packet, endpoint)
}

/// To wherever a translated packet's new destination is. Who sent one that is too big for its way, or that has
/// none, is told so.
#[inline(always)]
pub fn forward(ctx: &TcContext, packet: &mut Packet, flow: &mut Flow) -> i32 {
    let verdict = apart_forward(ctx.skb.skb, packet, flow);
    if packet.mtu == 0 {
        return verdict;
    }
    // One after the other, since below each other they would take too much stack.
    match result(apart_turn_back(ctx.skb.skb, packet, flow)) {
        Ok(()) => refuse(ctx, packet),
        Err(reason) => count::drop_of(reason, &packet.key),
    }
}

/// The same for a pod's packet that nothing translates. The pod's router, this node, tells it.
#[inline(always)]
pub fn forward_plain(
    ctx: &TcContext,
    config: &Config,
    packet: &mut Packet,
    flow: &mut Flow,
) -> i32 {
    (flow.src, flow.dst) = (packet.key.src, packet.key.dst);
    let verdict = apart_forward(ctx.skb.skb, packet, flow);
    if packet.mtu == 0 {
        return verdict;
    }
    packet.key.dst = config.gateway_for(&packet.key.src);
    refuse(ctx, packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_forward(skb: *mut __sk_buff, packet: *mut Packet, flow: *const Flow) -> i32 {
    let flow = flow.cast_mut();
    given!(packet, flow; else count::DROP);
    route::forward(&TcContext::new(skb), packet, flow)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_turn_back(skb: *mut __sk_buff, packet: *mut Packet, flow: *mut Flow) -> u32 {
    given!(packet, flow; else 1);
    code(route::turn_back(&TcContext::new(skb), packet, flow))
}

/// Tells the packet's sender that nobody answers, that no way leads on, or what its way takes.
#[inline(always)]
pub fn refuse(ctx: &TcContext, packet: &Packet) -> i32 {
    apart_refuse(ctx.skb.skb, packet)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn apart_refuse(skb: *mut __sk_buff, packet: *const Packet) -> i32 {
    let packet = packet.cast_mut();
    given!(packet; else count::DROP);
    refuse::answer(&TcContext::new(skb), packet)
}
