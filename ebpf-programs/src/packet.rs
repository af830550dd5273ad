//! Reading of headers: one form of a packet for both families.
#![expect(unsafe_code, reason = "packet memory is reached through raw pointers")]

use ebpf_common::{
    ICMP, ICMPV6, SCTP, TCP, UDP,
    addr::Addr,
    conntrack::FlowKey,
    packet::{
        ETH_IPV4, ETH_IPV6, ETH_LEN, IPV4_LEN, IPV6_LEN, Icmp, TCP_ACK, checksum_after_ttl,
        fragment_offset, is_fragment, sctp_flags,
    },
    verdict::DropReason,
};

use crate::frame::Frame;

/// Not IP: no field says anything.
pub const NOT_IP: u8 = 0;
/// No flow can be told from it: another protocol.
pub const OTHER: u8 = 1;
/// It belongs to the flow of its key. An echo has its identifier as port of who asks.
pub const FLOW: u8 = 2;
/// An ICMP error about another packet.
pub const ERROR: u8 = 3;

/// It is whole.
pub const WHOLE: u8 = 0;
/// The first of its fragments, with the transport's header.
pub const FIRST: u8 = 1;
/// Another fragment, without the transport's header; the key's ports are not known yet.
pub const LATER: u8 = 2;

/// Where the transport's header lies behind an IP header without options or extensions.
const V4_TRANSPORT: usize = ETH_LEN + IPV4_LEN;
const V6_TRANSPORT: usize = ETH_LEN + IPV6_LEN;

/// IPv6 extension headers that are followed. Real packets have one or two; each costs every packet's
/// path a step.
pub const EXTENSIONS: u32 = 6;
/// Hop-by-hop options, routing, fragment, destination options (RFC 8200, section 4.1).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// In the first byte of IPv4's flags and offset: "don't fragment" (RFC 791).
const DONT_FRAGMENT: u8 = 0x40;

/// In place of an MTU, of which every link has more: no way leads to the destination.
pub const NO_WAY: u32 = 1;

/// What is known of a packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Packet {
    /// Whose it is, as the connection table has it.
    pub key: FlowKey,
    /// Offset of the transport's header.
    pub l4: u32,
    /// Identification that its fragments share.
    pub id: u32,
    /// What its way out takes, if it is larger than that; [`NO_WAY`]; else 0.
    pub mtu: u32,
    /// Hops it may still go.
    pub ttl: u8,
    /// What it says about its connection, as TCP's flags.
    pub flags: u8,
    /// [`NOT_IP`], [`OTHER`], [`FLOW`], [`ERROR`].
    pub kind: u8,
    /// [`WHOLE`], [`FIRST`], [`LATER`].
    pub fragment: u8,
}

impl Packet {
    #[inline(always)]
    pub const fn new() -> Self {
        let key = FlowKey {
            src: Addr::ANY_V6,
            dst: Addr::ANY_V6,
            sport: [0; 2],
            dport: [0; 2],
            proto: 0,
            reserved: [0; 3],
        };
        Self { key, l4: 0, id: 0, mtu: 0, ttl: 0, flags: 0, kind: NOT_IP, fragment: WHOLE }
    }

    /// Whether it opens a connection of TCP.
    #[inline(always)]
    pub const fn is_syn(&self) -> bool {
        use ebpf_common::packet::TCP_SYN;
        self.key.proto == TCP && self.flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    /// Whether it may be the first of a flow: no reset, no later fragment, and no echo that nobody asked for.
    #[inline(always)]
    pub const fn may_open(&self) -> bool {
        let is_echo = matches!(self.key.proto, ICMP | ICMPV6);
        let answers = self.flags & TCP_ACK != 0;
        self.kind == FLOW
            && self.has_transport()
            && self.flags & ebpf_common::packet::TCP_RST == 0
            && !(is_echo && answers)
    }

    /// Whether the transport's header lies in it.
    #[inline(always)]
    pub const fn has_transport(&self) -> bool {
        self.fragment != LATER
    }
}

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
    proto: u8,
    pub checksum: [u8; 2],
    src: [u8; 4],
    dst: [u8; 4],
}
const _: () = assert!(size_of::<Ipv4>() == IPV4_LEN && align_of::<Ipv4>() == 1);

/// An IPv6 header as it lies in the packet.
#[repr(C, packed(2))]
#[derive(Clone, Copy)]
struct Ipv6 {
    version: u8,
    label: [u8; 3],
    length: [u8; 2],
    next: u8,
    hops: u8,
    src: [u32; 4],
    dst: [u32; 4],
}
const _: () = assert!(size_of::<Ipv6>() == IPV6_LEN);

/// Reads a packet's headers. What is not IP is no error.
#[inline(always)]
pub fn parse<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), DropReason> {
    match frame.ether_type()? {
        ETH_IPV4 => parse_v4(frame, packet)?,
        ETH_IPV6 => parse_v6(frame, packet)?,
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn parse_v4<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), DropReason> {
    let header = header::<F, Ipv4>(frame)?;
    let length = u32::from(header.version_length & 0x0f) * 4;
    if header.version_length >> 4 != 4 || length < IPV4_LEN as u32 {
        return Err(DropReason::Malformed);
    }
    packet.key.src = Addr::v4(header.src);
    packet.key.dst = Addr::v4(header.dst);
    packet.key.proto = header.proto;
    packet.ttl = header.ttl;
    packet.l4 = ETH_LEN as u32 + length;
    packet.kind = OTHER;
    if is_fragment(header.fragment) {
        packet.id = u32::from_ne_bytes([header.id[0], header.id[1], 0, 0]);
        packet.fragment = if fragment_offset(header.fragment) == 0 { FIRST } else { LATER };
    }
    transport(frame, packet)
}

#[inline(always)]
fn parse_v6<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), DropReason> {
    let header = header::<F, Ipv6>(frame)?;
    if header.version >> 4 != 6 {
        return Err(DropReason::Malformed);
    }
    packet.key.src = Addr::from_words(header.src);
    packet.key.dst = Addr::from_words(header.dst);
    packet.ttl = header.hops;
    packet.kind = OTHER;
    packet.l4 = (ETH_LEN + IPV6_LEN) as u32;
    let mut next = header.next;
    if is_extension(next) {
        next = extensions(frame, packet, next)?;
    }
    packet.key.proto = next;
    transport(frame, packet)
}

/// Whether a header is one of those between IPv6's and the transport's.
#[inline(always)]
pub const fn is_extension(next: u8) -> bool {
    matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION)
}

/// Steps over extension headers; gives the transport's protocol.
#[inline(always)]
fn extensions<F: Frame>(frame: &F, packet: &mut Packet, first: u8) -> Result<u8, DropReason> {
    let mut next = first;
    let mut step = 0;
    while step < EXTENSIONS {
        // All begin with the next header's number and their own length in units of eight bytes.
        let header: [u8; 8] = match next {
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT => frame.load(packet.l4 as usize)?,
            _ => return Ok(next),
        };
        if next == FRAGMENT {
            packet.id = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
            let word = u16::from_be_bytes([header[2], header[3]]);
            // Offset zero and no more to come is a whole packet (RFC 6946).
            packet.fragment = match (word & 0xfff8, word & 1) {
                (0, 0) => WHOLE,
                (0, _) => FIRST,
                _ => LATER,
            };
            packet.l4 += 8;
            if packet.fragment == LATER {
                return Ok(header[0]);
            }
        } else {
            packet.l4 += (u32::from(header[1]) + 1) * 8;
        }
        next = header[0];
        step += 1;
    }
    Err(DropReason::Extensions)
}

/// Ports and flags.
#[inline(always)]
fn transport<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), DropReason> {
    let offset = packet.l4 as usize;
    let proto = packet.key.proto;
    if !matches!(proto, TCP | UDP | SCTP | ICMP | ICMPV6) {
        return Ok(());
    }
    if !packet.has_transport() {
        packet.kind = FLOW;
        return Ok(());
    }
    if proto == ICMP || proto == ICMPV6 {
        // One family's messages in a packet of the other are nobody's.
        if (proto == ICMP) != packet.key.src.is_v4() {
            return Ok(());
        }
        return echo(frame, packet);
    }
    if proto == UDP {
        // The whole header: a piece of one is no packet.
        let header: [u16; 4] = transport_header(frame, offset)?;
        packet.key.sport = header[0].to_ne_bytes();
        packet.key.dport = header[1].to_ne_bytes();
    } else {
        // Up to TCP's flags, and to the type of SCTP's first chunk.
        let header: [u16; 7] = transport_header(frame, offset)?;
        packet.key.sport = header[0].to_ne_bytes();
        packet.key.dport = header[1].to_ne_bytes();
        let [chunk, flags] = header[6].to_ne_bytes();
        packet.flags = if proto == TCP { flags } else { sctp_flags(chunk) };
    }
    packet.kind = FLOW;
    Ok(())
}

/// A copy of the transport's header, read where it lies if nothing comes between it and the IP header.
#[inline(always)]
fn transport_header<F: Frame, T: Copy>(frame: &F, offset: usize) -> Result<T, DropReason> {
    let place = match offset {
        V4_TRANSPORT => frame.at::<T>(V4_TRANSPORT),
        V6_TRANSPORT => frame.at::<T>(V6_TRANSPORT),
        _ => None,
    };
    // SAFETY: `at` has checked that the whole header lies inside the packet; headers begin at even
    // addresses, and halves of words are all that is read.
    place.map_or_else(|| frame.load(offset), |header| Ok(unsafe { header.read() }))
}

#[inline(always)]
fn echo<F: Frame>(frame: &F, packet: &mut Packet) -> Result<(), DropReason> {
    let header: [u8; 8] = frame.load(packet.l4 as usize)?;
    let id = [header[4], header[5]];
    match Icmp::of(packet.key.proto, header[0]) {
        Icmp::Request => {
            packet.key.sport = id;
            packet.kind = FLOW;
        }
        Icmp::Reply => {
            packet.key.dport = id;
            // An identifier of zero does not tell an answer from a question.
            packet.flags = TCP_ACK;
            packet.kind = FLOW;
        }
        Icmp::Error => packet.kind = ERROR,
        Icmp::Other => {}
    }
    Ok(())
}

/// A copy of the header that follows Ethernet's.
#[inline(always)]
fn header<F: Frame, T: Copy>(frame: &F) -> Result<T, DropReason> {
    let mut header = frame.at::<T>(ETH_LEN);
    if header.is_none() {
        // The header is not in the linear part yet.
        frame.pull((ETH_LEN + size_of::<T>()) as u32)?;
        header = frame.at::<T>(ETH_LEN);
    }
    let header = header.ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the whole header lies inside the packet; both kinds of header
    // may lie at any even address, and 14 bytes after the frame's start is one.
    Ok(unsafe { header.read() })
}

/// The frame's source MAC.
#[inline(always)]
pub fn source_mac<F: Frame>(frame: &F) -> Result<[u8; 6], DropReason> {
    let mac = frame.at::<[u8; 6]>(6).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the bytes lie inside the packet; alignment is 1.
    Ok(unsafe { *mac })
}

/// Whether the frame comes from the MAC that it is for.
#[inline(always)]
pub fn is_from_itself<F: Frame>(frame: &F) -> bool {
    let Some(macs) = frame.at::<[[u8; 6]; 2]>(0) else { return false };
    // SAFETY: `at` has checked that the bytes lie inside the packet; alignment is 1.
    let [dst, src] = unsafe { *macs };
    dst == src
}

/// Writes both MACs.
#[inline(always)]
pub fn set_macs<F: Frame>(frame: &F, dst: [u8; 6], src: [u8; 6]) -> Result<(), DropReason> {
    let macs = frame.at::<[[u8; 6]; 2]>(0).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the bytes lie inside the packet; alignment is 1.
    unsafe { *macs = [dst, src] };
    Ok(())
}

/// Whether routers may cut the packet: in IPv6 none may, in IPv4 its sender says.
#[inline(always)]
pub fn may_be_cut<F: Frame>(frame: &F, packet: &Packet) -> Result<bool, DropReason> {
    if !packet.key.src.is_v4() {
        return Ok(false);
    }
    let header = frame.at::<Ipv4>(ETH_LEN).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the whole header lies inside the packet; alignment is 1.
    let [flags, _] = unsafe { (*header).fragment };
    Ok(flags & DONT_FRAGMENT == 0)
}

/// One hop less. The caller has seen to it that the packet may still go more than one.
#[inline(always)]
pub fn decrement_ttl<F: Frame>(frame: &F, packet: &Packet) -> Result<(), DropReason> {
    if packet.key.src.is_v4() {
        let header = frame.at::<Ipv4>(ETH_LEN).ok_or(DropReason::Malformed)?;
        // SAFETY: `at` has checked that the whole header lies inside the packet; alignment is 1.
        let header = unsafe { &mut *header };
        header.ttl = header.ttl.wrapping_sub(1);
        header.checksum = checksum_after_ttl(header.checksum);
        return Ok(());
    }
    // The hop limit is the eighth byte.
    let hops = frame.at::<u8>(ETH_LEN + 7).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked that the byte lies inside the packet.
    unsafe { *hops = (*hops).wrapping_sub(1) };
    Ok(())
}
