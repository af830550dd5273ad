//! Where XDP sends what it has translated: looked up once and remembered for a second.
//!
//! A row of the tunnel table, a route and a neighbour cost more than all the rest of a packet. What
//! they say is kept per destination and CPU in a map that the agent does not know.
#![expect(unsafe_code, reason = "kernel helpers take raw pointers")]

use aya_ebpf::{
    EbpfContext as _, bindings::bpf_fib_lookup, helpers::generated, programs::XdpContext,
};
use ebpf_common::{addr::Addr, config::Config, device::XDP, trace as steps, tunnel::ROUTED};

use crate::{encap::Outer, helpers, maps, trace};

/// `AF_INET` and `AF_INET6`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Ticks of the kernel's clock for which an answer of the routing table holds: a second on kernels with
/// the fewest (`HZ` is 100 to 1000), so that a change of routes takes at most that to be followed, which is
/// what neighbours' tables take too. Reading ticks costs a load; any other clock, a call for each packet.
const FRESH_TICKS: u32 = 100;
/// Seconds after which one packet goes by the kernel's own path, whose use of the neighbour makes the
/// kernel ask whether it is still there (it forgets by `base_reachable_time`, 30 s).
const CONFIRM_S: u32 = 30;

/// The destination is a pod of this node: tc delivers the translated packet.
pub const HERE: u32 = 0;
/// The next hop takes the packet as it is.
pub const PLAIN: u32 = 1;
/// The packet goes through the tunnel.
pub const TUNNEL: u32 = 2;

/// Binary logarithm of the number of paths that a CPU remembers: 64 KiB a CPU, and destinations that
/// share a place ask the kernel's tables in turns.
const PLACES_BITS: u32 = 9;
/// The length of the map.
pub const PLACES: u32 = 1 << PLACES_BITS;

/// How packets that came in by a device reach a destination.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Path {
    pub outer: Outer,
    dst: Addr,
    ingress: u32,
    /// The device's own MAC: frames to another are not ours.
    pub mac: [u16; 3],
    reserved: u16,
    /// [`HERE`], [`PLAIN`] or [`TUNNEL`].
    pub kind: u32,
    /// Device by which packets leave.
    pub ifindex: u32,
    /// Largest packet that it takes, its Ethernet header not counted.
    pub mtu: u32,
    /// Second in which the routing table was asked, which is now as far as flows' ages go; 0 for a place
    /// that has no path yet.
    pub asked_s: u32,
    /// Tick of the same moment.
    asked_ticks: u32,
    /// Second in which a packet went by the kernel's own path last.
    confirmed_s: u32,
}

/// The place of a path, whosever it is.
#[inline(always)]
fn place(dst: &Addr, ingress: u32) -> Option<&'static mut Path> {
    let [a, b, c, d] = dst.words();
    let mixed = (a ^ b ^ c ^ d ^ ingress).wrapping_mul(0x9e37_79b9);
    maps::path(mixed >> (u32::BITS - PLACES_BITS))
}

/// The way to `dst`, if it is known.
#[inline(always)]
pub fn path(ctx: &XdpContext, dst: &Addr) -> Option<&'static Path> {
    let ingress = ctx.ingress_ifindex() as u32;
    let path = place(dst, ingress)?;
    let known = path.dst == *dst
        && path.ingress == ingress
        && path.asked_s != 0
        && helpers::ticks().wrapping_sub(path.asked_ticks) < FRESH_TICKS;
    known.then_some(path)
}

/// Asks tables and neighbours for the way to `dst`, and remembers it. `None` when XDP has none, and once
/// in a while when it has: tc is to carry the packet.
#[inline(always)]
pub fn learn(ctx: &XdpContext, config: &Config, dst: &Addr, now_s: u32) -> Option<()> {
    let ingress = ctx.ingress_ifindex() as u32;
    let path = place(dst, ingress)?;
    let is_known = path.dst == *dst && path.ingress == ingress && path.asked_s != 0;
    let confirmed_s = if is_known { path.confirmed_s } else { now_s };
    let due = now_s.wrapping_sub(confirmed_s) >= CONFIRM_S;
    // Nobody's until it is whole.
    path.asked_s = 0;
    path.dst = *dst;
    path.ingress = ingress;
    path.mac = maps::device(ingress)?.mac_words();
    path.outer = Outer::none();
    path.kind = HERE;
    path.confirmed_s = if due { now_s } else { confirmed_s };
    find(ctx, config, path)?;
    path.asked_s = now_s;
    path.asked_ticks = helpers::ticks();
    (!due).then_some(())
}

#[inline(always)]
fn find(ctx: &XdpContext, config: &Config, path: &mut Path) -> Option<()> {
    if maps::endpoint(&path.dst).is_some() {
        return Some(());
    }
    if maps::is_node_address(&path.dst) {
        return None;
    }
    // A row for a node's own address is for pods only: between nodes the underlay is shorter.
    let tunnel = maps::tunnel(&path.dst).filter(|tunnel| {
        config.vxlan_ifindex != 0 && tunnel.flags & ROUTED == 0 && tunnel.node != path.dst
    });
    let far = tunnel.map_or(path.dst, |tunnel| tunnel.node);
    let hop = lookup(ctx, &far)?;
    let device = maps::device(hop.ifindex)?;
    // Drivers take frames of others only while they run XDP themselves.
    if hop.ifindex != path.ingress && device.flags & XDP == 0 {
        return None;
    }
    path.kind = PLAIN;
    path.ifindex = hop.ifindex;
    path.mtu = hop.mtu;
    path.outer.set_macs(&hop.macs);
    if tunnel.is_some() {
        let src = device.addr[if far.is_v4() { 0 } else { 1 }];
        if src.is_zero() {
            return None;
        }
        trace::step(steps::TUNNEL_KEY, &(far, config.vni));
        path.kind = TUNNEL;
        path.outer.set_vxlan(&src, &far, config);
    }
    Some(())
}

/// What the routing table and the neighbours' say.
pub struct NextHop {
    /// Destination and source, as the words in which they lie in a frame.
    pub macs: [u32; 3],
    pub ifindex: u32,
    pub mtu: u32,
}

/// Asks the kernel's tables. `None` also when the neighbour is not known yet, or when the kernel would
/// not forward: its own path then says what is to be.
#[inline(always)]
pub fn lookup(ctx: &XdpContext, dst: &Addr) -> Option<NextHop> {
    // SAFETY: a structure of integers, for which zero bytes are a value.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    query.ifindex = ctx.ingress_ifindex() as u32;
    if dst.is_v4() {
        query.family = AF_INET;
        query.__bindgen_anon_4.ipv4_dst = dst.words()[3];
    } else {
        query.family = AF_INET6;
        query.__bindgen_anon_4.ipv6_dst = dst.words();
    }
    let length = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the context is this program's own; the query outlives the call and has that length.
    let result = unsafe { generated::bpf_fib_lookup(ctx.as_ptr(), &raw mut query, length, 0) };
    if result != 0 {
        trace::look_up::<_, u32>(steps::NEXT_HOP, dst, None);
        return None;
    }
    trace::look_up(steps::NEXT_HOP, dst, Some(&query.ifindex));
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (query.dmac, query.smac);
    // SAFETY: on success the kernel has put the route's MTU there (5.12).
    let mtu = u32::from(unsafe { query.__bindgen_anon_1.mtu_result });
    let macs = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes);
    Some(NextHop { macs, ifindex: query.ifindex, mtu })
}
