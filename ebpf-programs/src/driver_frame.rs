//! A frame as XDP has it: headers at constant offsets, read and written in words. Beside `packet.rs`,
//! which does the same on socket buffers by helpers, the one place with pointers into frames.
//!
//! Words are read where they lie, which may be at an odd multiple of two bytes: BPF has no alignment
//! faults, and on machines that have them the verifier refuses the program instead.
#![expect(unsafe_code, reason = "packet memory is reached through raw pointers")]

use aya_ebpf::{EbpfContext as _, helpers::generated, programs::XdpContext};
use ebpf_common::{
    TCP, UDP,
    addr::Addr,
    conntrack::{Flow, FlowKey},
    csum::{self, Change},
    packet::{ETH_IPV4, ETH_IPV6, ETH_LEN, IPV4_LEN, IPV6_LEN, TCP_ACK, TCP_SYN},
};

/// An Ethernet header.
#[repr(C)]
struct Ethernet {
    dst: [u16; 3],
    src: [u16; 3],
    ether_type: [u8; 2],
}
const _: () = assert!(size_of::<Ethernet>() == ETH_LEN);

/// An IPv4 header without options.
#[repr(C)]
struct Ipv4 {
    version_length: u8,
    tos: u8,
    length: [u8; 2],
    id: u16,
    fragment: [u8; 2],
    ttl: u8,
    proto: u8,
    checksum: u16,
    src: u32,
    dst: u32,
}
const _: () = assert!(size_of::<Ipv4>() == IPV4_LEN);

/// An IPv6 header.
#[repr(C)]
struct Ipv6 {
    version_class_label: u32,
    length: [u8; 2],
    next: u8,
    hops: u8,
    src: [u32; 4],
    dst: [u32; 4],
}
const _: () = assert!(size_of::<Ipv6>() == IPV6_LEN);

/// A TCP header without options; UDP's ports and checksum lie in its first eight bytes.
#[repr(C)]
struct Tcp {
    ports: u32,
    sequence: u32,
    acknowledged: u32,
    offset: u8,
    flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}
const _: () = assert!(size_of::<Tcp>() == 20);

/// A UDP header.
#[repr(C)]
struct Udp {
    ports: u32,
    length: u16,
    checksum: u16,
}
const _: () = assert!(size_of::<Udp>() == 8);

/// What XDP works on: TCP and UDP over IP without options or fragments, in one piece of memory.
/// `V6` is the family.
pub struct Frame<'a, const V6: bool> {
    ctx: &'a XdpContext,
    pub proto: u8,
    /// Both ports as the word that lies in the packet.
    pub ports: u32,
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
    /// Traffic class with the ECN bits.
    pub class: u8,
    /// Bytes of the whole frame.
    pub len: usize,
}

/// The family of a frame's network header.
pub enum Family {
    V4,
    V6,
}

/// The frame's family.
#[inline(always)]
pub fn family(ctx: &XdpContext) -> Option<Family> {
    let header = at::<Ethernet>(ctx, 0)?;
    // SAFETY: `at` has checked that the whole header lies inside the frame; alignment is 2.
    match unsafe { (*header).ether_type } {
        ETH_IPV4 => Some(Family::V4),
        ETH_IPV6 => Some(Family::V6),
        _ => None,
    }
}

/// Whether the frame is for a device with this MAC.
#[inline(always)]
pub fn is_for(ctx: &XdpContext, mac: [u16; 3]) -> bool {
    let Some(header) = at::<Ethernet>(ctx, 0) else { return false };
    // SAFETY: `at` has checked that the whole header lies inside the frame; alignment is 2.
    let dst = unsafe { (*header).dst };
    (dst[0] ^ mac[0]) | (dst[1] ^ mac[1]) | (dst[2] ^ mac[2]) == 0
}

impl<'a, const V6: bool> Frame<'a, V6> {
    /// Offset of the transport header.
    const TRANSPORT: usize = ETH_LEN + if V6 { IPV6_LEN } else { IPV4_LEN };

    /// Reads the headers, and the connection table's key into `key`; `None` for all that is left to
    /// others.
    #[inline(always)]
    pub fn parse(ctx: &'a XdpContext, key: &mut FlowKey) -> Option<Self> {
        let (proto, class, length) = if V6 { ipv6(ctx, key)? } else { ipv4(ctx, key)? };
        let len = ctx.data_end() - ctx.data();
        // Longer: the rest is in further buffers, or was cut off.
        if ETH_LEN + length > len {
            return None;
        }
        let (ports, flags) = match proto {
            TCP => {
                let tcp = at::<Tcp>(ctx, Self::TRANSPORT)?;
                // SAFETY: `at` has checked the bounds; alignment as the module's head says.
                let tcp = unsafe { &*tcp };
                (tcp.ports, tcp.flags)
            }
            UDP => {
                let udp = at::<Udp>(ctx, Self::TRANSPORT)?;
                // SAFETY: as above.
                (unsafe { (*udp).ports }, 0)
            }
            _ => return None,
        };
        let [a, b, c, d] = ports.to_ne_bytes();
        key.sport = [a, b];
        key.dport = [c, d];
        key.proto = proto;
        key.reserved = [0; 3];
        Some(Self { ctx, proto, ports, flags, class, len })
    }

    /// Whether it opens a connection, maybe over an old one.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Bytes of the packet, its Ethernet header not counted.
    #[inline(always)]
    pub const fn packet_len(&self) -> usize {
        self.len - ETH_LEN
    }

    /// Whether the transport's checksum is still to be finished by a device, which the kernel notes beside the packet
    /// (`CHECKSUM_PARTIAL`), where XDP does not see it. One finished checksum in 65,535 looks the same.
    #[inline(always)]
    pub fn is_unfinished(&self, key: &FlowKey) -> Option<bool> {
        let length = if V6 {
            let header = at::<Ipv6>(self.ctx, ETH_LEN)?;
            // SAFETY: `at` has checked the bounds; alignment as the module's head says.
            u16::from_be_bytes(unsafe { (*header).length })
        } else {
            let header = at::<Ipv4>(self.ctx, ETH_LEN)?;
            // SAFETY: as above.
            u16::from_be_bytes(unsafe { (*header).length }).wrapping_sub(IPV4_LEN as u16)
        };
        let checksum = if self.proto == TCP {
            let tcp = at::<Tcp>(self.ctx, Self::TRANSPORT)?;
            // SAFETY: as above.
            unsafe { (*tcp).checksum }
        } else {
            let udp = at::<Udp>(self.ctx, Self::TRANSPORT)?;
            // SAFETY: as above.
            unsafe { (*udp).checksum }
        };
        Some(checksum == csum::pseudo_header(&key.src, &key.dst, self.proto, length))
    }

    /// Replaces addresses and ports and keeps the checksums. `hops` is what the packet's time to live
    /// goes down by. Gives the transport's new checksum, a number that differs between packets.
    ///
    /// What was there is read from the frame again: kept values would have to lie on the stack.
    #[inline(always)]
    pub fn translate(&self, flow: &Flow, hops: u8) -> Option<u16> {
        let addresses =
            if V6 { set_ipv6(self.ctx, flow, hops)? } else { set_ipv4(self.ctx, flow, hops)? };
        let new = ports(flow.sport, flow.dport);
        if self.proto == TCP {
            let tcp = at::<Tcp>(self.ctx, Self::TRANSPORT)?;
            // SAFETY: `at` has checked the bounds; alignment as the module's head says.
            let tcp = unsafe { &mut *tcp };
            tcp.checksum = addresses.word(tcp.ports, new).apply(tcp.checksum);
            tcp.ports = new;
            Some(tcp.checksum)
        } else {
            let udp = at::<Udp>(self.ctx, Self::TRANSPORT)?;
            // SAFETY: as above.
            let udp = unsafe { &mut *udp };
            udp.checksum = addresses.word(udp.ports, new).apply_udp(udp.checksum);
            udp.ports = new;
            Some(udp.checksum)
        }
    }
}

#[inline(always)]
fn set_ipv4(ctx: &XdpContext, flow: &Flow, hops: u8) -> Option<Change> {
    let header = at::<Ipv4>(ctx, ETH_LEN)?;
    // SAFETY: `at` has checked the bounds; alignment as the module's head says.
    let header = unsafe { &mut *header };
    let (src, dst) = (flow.src.words()[3], flow.dst.words()[3]);
    let change = Change::none().word(header.src, src).word(header.dst, dst);
    // The time to live is the first byte of its half-word.
    let ttl = change.half(u16::from(hops), 0);
    header.checksum = ttl.apply(header.checksum);
    header.ttl = header.ttl.wrapping_sub(hops);
    header.src = src;
    header.dst = dst;
    Some(change)
}

#[inline(always)]
fn set_ipv6(ctx: &XdpContext, flow: &Flow, hops: u8) -> Option<Change> {
    let header = at::<Ipv6>(ctx, ETH_LEN)?;
    // SAFETY: `at` has checked the bounds; alignment as the module's head says.
    let header = unsafe { &mut *header };
    let mut change = Change::none();
    let mut at = 0;
    while at < 4 {
        let (src, dst) = (flow.src.words()[at], flow.dst.words()[at]);
        change = change.word(header.src[at], src).word(header.dst[at], dst);
        header.src[at] = src;
        header.dst[at] = dst;
        at += 1;
    }
    header.hops = header.hops.wrapping_sub(hops);
    Some(change)
}

/// Grows the frame at its front. On success all views of it are void.
#[inline(always)]
pub fn grow(ctx: &XdpContext, bytes: usize) -> Option<()> {
    // SAFETY: the context is this program's own; the helper checks the room.
    let result = unsafe { generated::bpf_xdp_adjust_head(ctx.ctx, -(bytes as i32)) };
    (result == 0).then_some(())
}

/// Marks a frame that is translated and passed on: it comes from the device that it is for, whose MAC this is,
/// as none from the wire does. A packet's own mark is not there before the kernel has a socket buffer, and
/// bytes in front of the frame (`bpf_xdp_adjust_meta`) not in every driver.
#[inline(always)]
pub fn mark(ctx: &XdpContext, mac: [u16; 3]) -> Option<()> {
    let header = at::<Ethernet>(ctx, 0)?;
    // SAFETY: `at` has checked that the whole header lies inside the frame; alignment is 2.
    unsafe { (*header).src = mac };
    Some(())
}

/// Writes a value at a constant offset.
#[inline(always)]
pub fn write<T: Copy>(ctx: &XdpContext, offset: usize, value: &T) -> Option<()> {
    let place = at::<T>(ctx, offset)?;
    // SAFETY: `at` has checked the bounds; alignment as the module's head says.
    unsafe { *place = *value };
    Some(())
}

/// Protocol, traffic class and length of an IPv4 packet; its source and destination go to where they are
/// wanted, as there are no registers for them.
#[inline(always)]
fn ipv4(ctx: &XdpContext, key: &mut FlowKey) -> Option<(u8, u8, usize)> {
    let header = at::<Ipv4>(ctx, ETH_LEN)?;
    // SAFETY: `at` has checked the bounds; alignment as the module's head says.
    let header = unsafe { &*header };
    // Options, fragments (more to come, or not the first) and the last hop are the stack's.
    let fragment = u16::from_be_bytes(header.fragment) & 0x3fff;
    if header.version_length != 0x45 || fragment != 0 || header.ttl <= 1 {
        return None;
    }
    let length = u16::from_be_bytes(header.length) as usize;
    key.src = Addr::v4(header.src.to_ne_bytes());
    key.dst = Addr::v4(header.dst.to_ne_bytes());
    Some((header.proto, header.tos, length))
}

/// The same of an IPv6 packet; extension headers are no protocol that XDP knows.
#[inline(always)]
fn ipv6(ctx: &XdpContext, key: &mut FlowKey) -> Option<(u8, u8, usize)> {
    let header = at::<Ipv6>(ctx, ETH_LEN)?;
    // SAFETY: `at` has checked the bounds; alignment as the module's head says.
    let header = unsafe { &*header };
    let first = u32::from_be(header.version_class_label);
    if first >> 28 != 6 || header.hops <= 1 {
        return None;
    }
    let length = IPV6_LEN + u16::from_be_bytes(header.length) as usize;
    key.src = Addr::from_words(header.src);
    key.dst = Addr::from_words(header.dst);
    Some((header.next, (first >> 20) as u8, length))
}

/// Both ports as the word that lies in the packet.
#[inline(always)]
const fn ports(src: [u8; 2], dst: [u8; 2]) -> u32 {
    u32::from_ne_bytes([src[0], src[1], dst[0], dst[1]])
}

/// A pointer to a `T` at a constant offset if it lies wholly in the frame.
#[inline(always)]
fn at<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some(start as *mut T)
}
