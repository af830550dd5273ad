//! Safe wrappers of the few kernel helpers used.
#![expect(unsafe_code, reason = "kernel helpers take raw pointers")]

use core::{
    mem::{MaybeUninit, offset_of},
    ptr,
};

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_INGRESS, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, BPF_FIB_LOOKUP_SRC,
        bpf_check_mtu_flags::BPF_MTU_CHK_SEGS, bpf_fib_lookup, bpf_sock_addr, bpf_sock_tuple,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_tunnel_key,
    },
    helpers::generated,
    programs::{SockAddrContext, TcContext},
};
use ebpf_common::{
    TCP, UDP,
    addr::Addr,
    conntrack::{Flow, FlowKey},
    packet::ETH_LEN,
    service::Peer,
    trace as steps,
    verdict::DropReason,
};

use crate::trace;

/// Packet is ours by destination MAC (`PACKET_HOST` of `linux/if_packet.h`).
const PACKET_HOST: u32 = 0;
/// Linux's `ECONNREFUSED`.
const ECONNREFUSED: i32 = 111;
/// Time to live of tunnel packets (RFC 1700's default).
const TUNNEL_TTL: u8 = 64;
/// `AF_INET`.
const AF_INET: u8 = 2;
/// `AF_INET6`.
const AF_INET6: u8 = 10;
/// `BPF_FIB_LKUP_RET_NOT_FWDED`: the destination is this machine or several.
const FIB_NOT_FORWARDED: i64 = 4;
/// `BPF_FIB_LKUP_RET_NO_NEIGH`: the route is known, the neighbour's MAC is not yet.
const FIB_NO_NEIGHBOUR: i64 = 7;
/// `BPF_FIB_LKUP_RET_NO_SRC_ADDR`: there is a route, and no address to use.
const FIB_NO_SOURCE: i64 = 9;
/// `-EINVAL`.
const FIB_UNKNOWN_FLAG: i64 = -22;
/// `BPF_F_CURRENT_NETNS`: the namespace of the packet's device.
const CURRENT_NETNS: u64 = u64::MAX;
/// `BPF_TCP_LISTEN`.
const TCP_LISTEN: u32 = 10;

#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments, always allowed.
    unsafe { generated::bpf_get_prandom_u32() }
}

/// Ticks of the kernel's clock, of which a second has 100 to 1000; a load in place of a call (5.5).
#[inline(always)]
pub fn ticks() -> u32 {
    // SAFETY: no arguments, always allowed.
    unsafe { generated::bpf_jiffies64() as u32 }
}

/// Seconds of the monotonic clock; wraps after 136 years.
#[inline(always)]
pub fn now_s() -> u32 {
    // The clock of the last tick: exact enough for seconds, and without reading a counter (5.11).
    // SAFETY: no arguments, always allowed.
    let ns = unsafe { generated::bpf_ktime_get_coarse_ns() };
    (ns / 1_000_000_000) as u32
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments, always allowed.
    unsafe { generated::bpf_ktime_get_ns() }
}

/// Sends the packet out of a device.
#[inline(always)]
pub fn redirect(ifindex: u32) -> i32 {
    trace::step(steps::REDIRECT, &[ifindex, steps::PLAIN]);
    // SAFETY: plain integers; a wrong index drops the packet.
    unsafe { generated::bpf_redirect(ifindex, 0) as i32 }
}

/// Lets the packet come in at the other end of a veth pair, in its namespace.
#[inline(always)]
pub fn redirect_peer(ifindex: u32) -> i32 {
    trace::step(steps::REDIRECT, &[ifindex, steps::PEER]);
    // SAFETY: plain integers; a wrong index drops the packet.
    unsafe { generated::bpf_redirect_peer(ifindex, 0) as i32 }
}

/// Sends the packet out of a device to the next hop of its destination; the kernel resolves it.
#[inline(always)]
pub fn redirect_neigh(ifindex: u32) -> i32 {
    trace::step(steps::REDIRECT, &[ifindex, steps::NEIGHBOUR]);
    // SAFETY: a null pointer of length 0 asks for the packet's own destination.
    unsafe { generated::bpf_redirect_neigh(ifindex, ptr::null_mut(), 0, 0) as i32 }
}

/// Sets the tunnel's far end for a collect-metadata device.
#[inline(always)]
pub fn set_tunnel_key(ctx: &TcContext, vni: u32, node: &Addr) -> Result<(), DropReason> {
    // SAFETY: a structure of integers, for which zero bytes are a value.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    trace::step(steps::TUNNEL_KEY, &(*node, vni));
    key.tunnel_id = vni;
    key.tunnel_ttl = TUNNEL_TTL;
    let mut flags = u64::from(BPF_F_ZERO_CSUM_TX);
    if node.is_v4() {
        // The helper converts from host order.
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(node.words()[3]);
    } else {
        key.__bindgen_anon_1.remote_ipv6 = node.words();
        flags |= u64::from(BPF_F_TUNINFO_IPV6);
    }
    // Up to the label: a length that every kernel accepts (bpf_skb_set_tunnel_key, net/core/filter.c).
    let length = offset_of!(bpf_tunnel_key, tunnel_label) as u32;
    // SAFETY: the context is this program's own, the key outlives the call and has `length` bytes.
    let result =
        unsafe { generated::bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, length, flags) };
    if result == 0 { Ok(()) } else { Err(DropReason::TunnelKey) }
}

/// The device by which `dst` is reached from a packet that came in by `ifindex`; 0 for this node itself.
#[inline(always)]
pub fn route<C: EbpfContext>(
    ctx: &C,
    ifindex: u32,
    src: &Addr,
    dst: &Addr,
) -> Result<u32, DropReason> {
    let mut query = fib_query(ifindex, src, dst);
    let result = look_up(ctx, &mut query, 0);
    answer(result, &query, dst)
}

/// The same for what leaves under this node's address, which takes the place of `src`: the one that the node's
/// stack would choose, of those that the device and others have. Zero where the kernel does not say (before 6.7).
#[inline(always)]
pub fn way_out<C: EbpfContext>(
    ctx: &C,
    ifindex: u32,
    src: &mut Addr,
    dst: &Addr,
) -> Result<u32, DropReason> {
    let mut query = fib_query(ifindex, src, dst);
    *src = Addr::ANY_V6;
    let mut result = look_up(ctx, &mut query, BPF_FIB_LOOKUP_SRC);
    if matches!(result, 0 | FIB_NO_NEIGHBOUR) {
        // SAFETY: the fields that the kernel fills in for the family that was asked.
        *src = unsafe {
            if dst.is_v4() {
                Addr::v4(query.__bindgen_anon_3.ipv4_src.to_ne_bytes())
            } else {
                Addr::from_words(query.__bindgen_anon_3.ipv6_src)
            }
        };
    } else if result == FIB_UNKNOWN_FLAG || result == FIB_NO_SOURCE {
        result = look_up(ctx, &mut query, 0);
    }
    answer(result, &query, dst)
}

#[inline(always)]
fn fib_query(ifindex: u32, src: &Addr, dst: &Addr) -> bpf_fib_lookup {
    // SAFETY: a structure of integers, for which zero bytes are a value.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    query.ifindex = ifindex;
    // The way does not depend on the packet's length: without one the kernel takes the packet's own, and
    // says of a long one that the way is too narrow ([`exceeded_mtu`] asks that).
    query.__bindgen_anon_1.tot_len = 1;
    if dst.is_v4() {
        query.family = AF_INET;
        query.__bindgen_anon_3.ipv4_src = src.words()[3];
        query.__bindgen_anon_4.ipv4_dst = dst.words()[3];
    } else {
        query.family = AF_INET6;
        query.__bindgen_anon_3.ipv6_src = src.words();
        query.__bindgen_anon_4.ipv6_dst = dst.words();
    }
    query
}

#[inline(always)]
fn look_up<C: EbpfContext>(ctx: &C, query: &mut bpf_fib_lookup, flags: u32) -> i64 {
    let length = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the context is this program's own; the query outlives the call and has that length.
    i64::from(unsafe { generated::bpf_fib_lookup(ctx.as_ptr(), query, length, flags) })
}

#[inline(always)]
fn answer(result: i64, query: &bpf_fib_lookup, dst: &Addr) -> Result<u32, DropReason> {
    match result {
        0 | FIB_NO_NEIGHBOUR => {
            trace::look_up(steps::ROUTE, dst, Some(&query.ifindex));
            Ok(query.ifindex)
        }
        FIB_NOT_FORWARDED => Ok(0),
        _ => {
            trace::look_up::<_, u32>(steps::ROUTE, dst, None);
            Err(DropReason::NoRoute)
        }
    }
}

/// The MTU of a device if the packet, or one of those that the device is to make of it, is larger.
#[inline(always)]
pub fn exceeded_mtu(ctx: &TcContext, ifindex: u32) -> Option<u32> {
    // SAFETY: a field of this program's context.
    let is_gso = unsafe { (*ctx.skb.skb).gso_size } != 0;
    // Of a packet that is to be cut the kernel knows the pieces. Of another one it would count Ethernet's
    // header, which not every device has: it is told the length without (5.12).
    let (mut mtu, flags) =
        if is_gso { (0, BPF_MTU_CHK_SEGS) } else { (ctx.len().wrapping_sub(ETH_LEN as u32), 0) };
    // SAFETY: the context is this program's own, the length outlives the call.
    let result = unsafe {
        generated::bpf_check_mtu(ctx.as_ptr(), ifindex, &raw mut mtu, 0, u64::from(flags))
    };
    // Below zero: no such device, as sending will show.
    (result > 0).then_some(mtu)
}

/// Whether a socket of this node speaks to what a packet of `key` comes from, or, for UDP, may.
#[inline(always)]
pub fn has_socket<C: EbpfContext>(ctx: &C, key: &FlowKey) -> bool {
    let v4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
        saddr: key.src.words()[3],
        daddr: key.dst.words()[3],
        sport: u16::from_ne_bytes(key.sport),
        dport: u16::from_ne_bytes(key.dport),
    };
    // A key begins as the kernel's tuple of IPv6 does: addresses, then ports.
    let (tuple, size) = if key.dst.is_v4() {
        (ptr::from_ref(&v4).cast::<bpf_sock_tuple>(), 12)
    } else {
        (ptr::from_ref(key).cast::<bpf_sock_tuple>(), 36)
    };
    let tuple = tuple.cast_mut();
    if key.proto == TCP {
        // SAFETY: the context is this program's own, the tuple outlives the call and has that size.
        let socket =
            unsafe { generated::bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, size, CURRENT_NETNS, 0) };
        if socket.is_null() {
            return false;
        }
        // A listener would only meet a connection that the far end opens from the same port.
        // SAFETY: the kernel has found the socket and holds it for us.
        let state = unsafe { (*socket).state };
        // SAFETY: given back once.
        let _zero = unsafe { generated::bpf_sk_release(socket.cast()) };
        return state != TCP_LISTEN;
    }
    // SAFETY: as above.
    let socket =
        unsafe { generated::bpf_sk_lookup_udp(ctx.as_ptr(), tuple, size, CURRENT_NETNS, 0) };
    if socket.is_null() {
        return false;
    }
    // SAFETY: given back once.
    let _zero = unsafe { generated::bpf_sk_release(socket.cast()) };
    true
}

/// Whether the packet's destination MAC is the device's own.
#[inline(always)]
pub fn is_for_host(ctx: &TcContext) -> bool {
    // SAFETY: a field of this program's context.
    unsafe { (*ctx.skb.skb).pkt_type == PACKET_HOST }
}

/// Makes the stack that gets the packet take it as its own.
#[inline(always)]
pub fn mark_for_host(ctx: &TcContext) -> Result<(), DropReason> {
    if is_for_host(ctx) {
        return Ok(());
    }
    ctx.change_type(PACKET_HOST).map_err(|_errno| DropReason::Rewrite)
}

/// The device on which the program runs.
#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: a field of this program's context.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// The `EtherType`, network order.
#[inline(always)]
pub fn ether_type(ctx: &TcContext) -> [u8; 2] {
    // SAFETY: a field of this program's context; its low half holds the two bytes as they are sent.
    let protocol = unsafe { (*ctx.skb.skb).protocol };
    (protocol as u16).to_ne_bytes()
}

/// What the ones' complement sum of a packet's addresses goes up by when it is translated. Both kinds
/// of row begin with the two addresses; of IPv4-mapped ones only the last words differ, so that one
/// length serves both families.
#[inline(always)]
pub fn address_difference(key: &FlowKey, flow: &Flow) -> u32 {
    const { assert!(offset_of!(FlowKey, sport) == 32 && offset_of!(Flow, sport) == 32) };
    difference(ptr::from_ref(key).cast(), ptr::from_ref(flow).cast(), 32)
}

/// What the sum of its ports goes up by.
#[inline(always)]
pub fn port_difference(key: &FlowKey, flow: &Flow) -> u32 {
    difference((&raw const key.sport).cast(), (&raw const flow.sport).cast(), 4)
}

/// The ones' complement sum of a region, which is a multiple of four bytes long.
#[inline(always)]
pub fn sum<T>(of: &T) -> u32 {
    const { assert!(size_of::<T>().is_multiple_of(4)) };
    let (of, length) = (ptr::from_ref(of).cast_mut().cast(), size_of::<T>() as u32);
    // SAFETY: the region outlives the call, has that length and is only read; nothing is taken off.
    unsafe { generated::bpf_csum_diff(ptr::null_mut(), 0, of, length, 0) as u32 }
}

/// The ones' complement sum of some words of the packet; `None` if it ends before them.
#[inline(always)]
pub fn sum_at<const WORDS: usize>(ctx: &TcContext, offset: u32) -> Option<u32> {
    let mut copy = MaybeUninit::<[u32; WORDS]>::uninit();
    let length = size_of::<[u32; WORDS]>() as u32;
    let into = copy.as_mut_ptr();
    // SAFETY: the context is this program's own; the copy has that length.
    let result =
        unsafe { generated::bpf_skb_load_bytes(ctx.as_ptr(), offset, into.cast(), length) };
    if result != 0 {
        return None;
    }
    // SAFETY: the helper has filled all of it.
    Some(sum(unsafe { copy.assume_init_ref() }))
}

#[inline(always)]
fn difference(old: *const u32, new: *const u32, length: u32) -> u32 {
    let (old, new) = (old.cast_mut(), new.cast_mut());
    // SAFETY: called above only, with fields of that length side by side; they are only read.
    unsafe { generated::bpf_csum_diff(old, length, new, length, 0) as u32 }
}

/// Adds to the sum that a device took of the whole packet, if it did.
#[inline(always)]
pub fn sum_again(ctx: &TcContext, difference: u32) {
    // SAFETY: the context is this program's own. The error says that there is no such sum.
    let _none = unsafe { generated::bpf_csum_update(ctx.skb.skb, difference) };
}

/// The device by which the packet came to this machine; 0 for what the machine itself sends.
#[inline(always)]
pub fn came_by(ctx: &TcContext) -> u32 {
    // SAFETY: a field of this program's context.
    unsafe { (*ctx.skb.skb).ingress_ifindex }
}

/// Lets the packet come in by a device of this machine.
#[inline(always)]
pub fn redirect_in(ifindex: u32) -> i32 {
    trace::step(steps::REDIRECT, &[ifindex, steps::INWARD]);
    // SAFETY: plain integers; a wrong index drops the packet.
    unsafe { generated::bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}

/// Cuts the packet to a length, or fills it up.
#[inline(always)]
pub fn set_length(ctx: &TcContext, length: u32) -> Result<(), DropReason> {
    // SAFETY: the context is this program's own.
    let result = unsafe { generated::bpf_skb_change_tail(ctx.skb.skb, length, 0) };
    if result == 0 { Ok(()) } else { Err(DropReason::Rewrite) }
}

/// Makes room before the packet.
#[inline(always)]
pub fn add_head(ctx: &TcContext, length: u32) -> Result<(), DropReason> {
    // SAFETY: the context is this program's own.
    let result = unsafe { generated::bpf_skb_change_head(ctx.skb.skb, length, 0) };
    if result == 0 { Ok(()) } else { Err(DropReason::Rewrite) }
}

/// Where the program wants to go, or where its datagram came from. `V6` is the hook's family: each
/// may touch the fields of its own only.
#[inline(always)]
pub fn user_peer<const V6: bool>(ctx: &SockAddrContext) -> Peer {
    let context: *const bpf_sock_addr = ctx.sock_addr;
    let addr = if V6 {
        let mut words = [0; 4];
        let mut at = 0;
        while at < 4 {
            // SAFETY: a field of this program's context. Volatile, so that no two reads become one
            // at an address that the verifier cannot follow.
            words[at] = unsafe { ptr::read_volatile(&raw const (*context).user_ip6[at]) };
            at += 1;
        }
        Addr::from_words(words)
    } else {
        // SAFETY: a field of this program's context.
        Addr::v4(unsafe { ptr::read_volatile(&raw const (*context).user_ip4) }.to_ne_bytes())
    };
    // SAFETY: a field of this program's context; its low half holds the two bytes as they are sent.
    let port = unsafe { ptr::read_volatile(&raw const (*context).user_port) };
    Peer { addr, port: (port as u16).to_ne_bytes(), reserved: [0; 2] }
}

/// Replaces the address that the kernel (connect, sendmsg) or the program (recvmsg) goes on with.
#[inline(always)]
pub fn set_user_peer<const V6: bool>(ctx: &SockAddrContext, peer: Peer) {
    let words = peer.addr.words();
    let context = ctx.sock_addr;
    if V6 {
        let mut at = 0;
        while at < 4 {
            // SAFETY: a field of this program's context that this hook may write.
            unsafe { ptr::write_volatile(&raw mut (*context).user_ip6[at], words[at]) };
            at += 1;
        }
    } else {
        // SAFETY: as above.
        unsafe { ptr::write_volatile(&raw mut (*context).user_ip4, words[3]) };
    }
    let port = u32::from(u16::from_ne_bytes(peer.port));
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*context).user_port, port) };
}

/// The socket's protocol if services have it.
#[inline(always)]
pub fn socket_protocol(ctx: &SockAddrContext) -> Option<u8> {
    // SAFETY: a field of this program's context.
    match unsafe { (*ctx.sock_addr).protocol } {
        6 => Some(TCP),
        17 => Some(UDP),
        _ => None,
    }
}

/// A number that names the socket for its whole life.
#[inline(always)]
pub fn socket_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is this program's own.
    unsafe { generated::bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// A number that names the socket's network namespace until the machine restarts.
#[inline(always)]
pub fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is this program's own.
    unsafe { generated::bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Makes a refused system call fail as if the far end had refused, instead of with EPERM.
#[inline(always)]
pub fn refuse_connection() {
    // SAFETY: a plain integer.
    let _previous: i32 = unsafe { generated::bpf_set_retval(-ECONNREFUSED) };
}
