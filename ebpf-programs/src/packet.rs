//! Bounds-checked reading and writing of headers: the one place with pointers into packets.
#![expect(unsafe_code, reason = "packet memory is reached through raw pointers")]

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::TcContext,
};
use ebpf_common::{
    TCP, UDP,
    addr::Addr,
    conntrack::{Flow, FlowKey},
    packet::{ETH_IPV4, ETH_LEN, IPV4_LEN, checksum_after_ttl, is_fragment},
    verdict::DropReason,
};

use crate::helpers;

/// An IPv4 header without options, as it lies in the packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4 {
    version_length: u8,
    tos: u8,
    length: [u8; 2],
    id: [u8; 2],
    fragment: [u8; 2],
    pub ttl: u8,
    pub proto: u8,
    checksum: [u8; 2],
    src: [u8; 4],
    dst: [u8; 4],
}
const _: () = assert!(size_of::<Ipv4>() == IPV4_LEN && align_of::<Ipv4>() == 1);

/// What the two transports with ports have in common.
#[derive(Clone, Copy)]
pub struct Transport {
    pub sport: [u8; 2],
    pub dport: [u8; 2],
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
    /// Offset of the header in the packet.
    pub offset: usize,
}

impl Ipv4 {
    #[inline(always)]
    pub const fn src(&self) -> Addr {
        Addr::v4(self.src)
    }

    #[inline(always)]
    pub const fn dst(&self) -> Addr {
        Addr::v4(self.dst)
    }

    /// Bytes of the header with its options.
    #[inline(always)]
    const fn header_len(&self) -> usize {
        ((self.version_length & 0x0f) as usize) * 4
    }
}

/// The packet's IPv4 header; `None` for another protocol.
#[inline(always)]
pub fn ipv4(ctx: &TcContext) -> Result<Option<Ipv4>, DropReason> {
    if helpers::ether_type(ctx) != ETH_IPV4 {
        return Ok(None);
    }
    let mut header = at::<Ipv4>(ctx, ETH_LEN);
    if header.is_none() {
        // The header is not in the linear part yet.
        ctx.pull_data((ETH_LEN + IPV4_LEN) as u32).map_err(|_errno| DropReason::Malformed)?;
        header = at::<Ipv4>(ctx, ETH_LEN);
    }
    // SAFETY: `at` has checked that the whole header lies inside the packet; alignment is 1.
    let header = unsafe { *header.ok_or(DropReason::Malformed)? };
    if header.version_length >> 4 != 4 || header.header_len() < IPV4_LEN {
        return Err(DropReason::Malformed);
    }
    Ok(Some(header))
}

/// Ports and flags; `None` for fragments and for protocols without ports.
#[inline(always)]
pub fn transport(ctx: &TcContext, ip: &Ipv4) -> Result<Option<Transport>, DropReason> {
    if is_fragment(ip.fragment) || (ip.proto != TCP && ip.proto != UDP) {
        return Ok(None);
    }
    let offset = ETH_LEN + ip.header_len();
    let ports: [u8; 4] = ctx.load(offset).map_err(|_errno| DropReason::Malformed)?;
    let flags = if ip.proto == TCP {
        ctx.load(offset + 13).map_err(|_errno| DropReason::Malformed)?
    } else {
        0
    };
    Ok(Some(Transport { sport: [ports[0], ports[1]], dport: [ports[2], ports[3]], flags, offset }))
}

/// The connection table's key for a packet.
#[inline(always)]
pub fn flow_key(ip: &Ipv4, transport: &Transport) -> FlowKey {
    FlowKey {
        src: ip.src(),
        dst: ip.dst(),
        sport: transport.sport,
        dport: transport.dport,
        proto: ip.proto,
        reserved: [0; 3],
    }
}

/// The frame's source MAC.
#[inline(always)]
pub fn source_mac(ctx: &TcContext) -> Result<[u8; 6], DropReason> {
    let mac = at::<[u8; 6]>(ctx, 6).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the bytes lie inside the packet; alignment is 1.
    Ok(unsafe { *mac })
}

/// Writes both MACs.
#[inline(always)]
pub fn set_macs(ctx: &TcContext, dst: [u8; 6], src: [u8; 6]) -> Result<(), DropReason> {
    let macs = at::<[[u8; 6]; 2]>(ctx, 0).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the bytes lie inside the packet; alignment is 1.
    unsafe { *macs = [dst, src] };
    Ok(())
}

/// One hop less. The caller has seen to it that the TTL is above 1.
#[inline(always)]
pub fn decrement_ttl(ctx: &TcContext) -> Result<(), DropReason> {
    let header = at::<Ipv4>(ctx, ETH_LEN).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the whole header lies inside the packet; alignment is 1.
    let header = unsafe { &mut *header };
    header.ttl = header.ttl.wrapping_sub(1);
    header.checksum = checksum_after_ttl(header.checksum);
    Ok(())
}

/// Replaces addresses and ports, and keeps both checksums exact, also where the device is still to
/// finish them.
#[inline(always)]
pub fn translate(
    ctx: &TcContext,
    ip: &Ipv4,
    transport: &Transport,
    flow: &Flow,
) -> Result<(), DropReason> {
    let failed = |_errno| DropReason::Rewrite;
    let mut old = [u32::from_ne_bytes(ip.src), u32::from_ne_bytes(ip.dst)];
    let mut new =
        [u32::from_ne_bytes(flow.src.v4_octets()), u32::from_ne_bytes(flow.dst.v4_octets())];
    let addresses = helpers::address_diff(&mut old, &mut new);
    let old_ports = [transport.sport, transport.dport];
    let new_ports = [flow.sport, flow.dport];
    // A UDP checksum of zero means none and stays so.
    let (checksum, zero) = if ip.proto == TCP {
        (transport.offset + 16, 0)
    } else {
        (transport.offset + 6, u64::from(BPF_F_MARK_MANGLED_0))
    };
    let pseudo = u64::from(BPF_F_PSEUDO_HDR) | zero;
    ctx.l4_csum_replace(checksum, 0, addresses, pseudo).map_err(failed)?;
    let (from, to) = (word(old_ports), word(new_ports));
    ctx.l4_csum_replace(checksum, from, to, zero | 4).map_err(failed)?;
    ctx.l3_csum_replace(ETH_LEN + 10, 0, addresses, 0).map_err(failed)?;
    ctx.store(ETH_LEN + 12, &new, 0).map_err(failed)?;
    ctx.store(transport.offset, &new_ports, 0).map_err(failed)
}

/// Both ports as the word that lies in the packet.
#[inline(always)]
fn word(ports: [[u8; 2]; 2]) -> u64 {
    u64::from(u32::from_ne_bytes([ports[0][0], ports[0][1], ports[1][0], ports[1][1]]))
}

/// A pointer to a `T` at a constant offset if it lies wholly in the packet's linear part.
#[inline(always)]
fn at<T>(ctx: &TcContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some(start as *mut T)
}
