//! Safe wrappers of the few kernel helpers used.
#![expect(unsafe_code, reason = "kernel helpers take raw pointers")]

use core::{mem::offset_of, ptr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_ZERO_CSUM_TX, bpf_fib_lookup, bpf_sock_addr, bpf_tunnel_key},
    helpers::generated,
    programs::{SockAddrContext, TcContext},
};
use ebpf_common::{TCP, UDP, addr::Addr, service::Peer, trace as steps, verdict::DropReason};

use crate::trace;

/// Packet is ours by destination MAC (`PACKET_HOST` of `linux/if_packet.h`).
const PACKET_HOST: u32 = 0;
/// Linux's `ECONNREFUSED`.
const ECONNREFUSED: i32 = 111;
/// Time to live of tunnel packets (RFC 1700's default).
const TUNNEL_TTL: u8 = 64;
/// `AF_INET`.
const AF_INET: u8 = 2;
/// `BPF_FIB_LKUP_RET_NO_NEIGH`: the route is known, the neighbour's MAC is not yet.
const FIB_NO_NEIGHBOUR: i64 = 7;

#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: no arguments, always allowed.
    unsafe { generated::bpf_get_prandom_u32() }
}

/// Seconds of the monotonic clock; wraps after 136 years.
#[inline(always)]
pub fn now_s() -> u32 {
    // SAFETY: no arguments, always allowed.
    let ns = unsafe { generated::bpf_ktime_get_ns() };
    (ns / 1_000_000_000) as u32
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

/// Sets the tunnel's far end for a collect-metadata device. `node` in network order.
#[inline(always)]
pub fn set_tunnel_key(ctx: &TcContext, vni: u32, node: [u8; 4]) -> Result<(), DropReason> {
    // SAFETY: a structure of integers, for which zero bytes are a value.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    trace::step(steps::TUNNEL_KEY, &(Addr::v4(node), vni));
    key.tunnel_id = vni;
    key.tunnel_ttl = TUNNEL_TTL;
    // The helper converts from host order.
    key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(node);
    // Up to the label: a length that every kernel accepts (bpf_skb_set_tunnel_key, net/core/filter.c).
    let length = offset_of!(bpf_tunnel_key, tunnel_label) as u32;
    // SAFETY: the context is this program's own, the key outlives the call and has `length` bytes.
    let result = unsafe {
        generated::bpf_skb_set_tunnel_key(
            ctx.skb.skb,
            &raw mut key,
            length,
            u64::from(BPF_F_ZERO_CSUM_TX),
        )
    };
    if result == 0 { Ok(()) } else { Err(DropReason::TunnelKey) }
}

/// The device by which `dst` is reached.
#[inline(always)]
pub fn route(ctx: &TcContext, src: [u8; 4], dst: [u8; 4]) -> Result<u32, DropReason> {
    // SAFETY: a structure of integers, for which zero bytes are a value.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    query.family = AF_INET;
    query.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(src);
    query.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(dst);
    query.ifindex = ifindex(ctx);
    let length = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the context is this program's own; the query outlives the call and has that length.
    let result = unsafe { generated::bpf_fib_lookup(ctx.as_ptr(), &raw mut query, length, 0) };
    if result == 0 || result as i64 == FIB_NO_NEIGHBOUR {
        Ok(query.ifindex)
    } else {
        Err(DropReason::NoRoute)
    }
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

/// Incremental checksum difference between two pairs of addresses.
#[inline(always)]
pub fn address_diff(old: &mut [u32; 2], new: &mut [u32; 2]) -> u64 {
    // SAFETY: both arrays outlive the call and have eight bytes.
    unsafe { generated::bpf_csum_diff(old.as_mut_ptr(), 8, new.as_mut_ptr(), 8, 0) as u64 }
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
