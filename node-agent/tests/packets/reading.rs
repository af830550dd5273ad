//! A reading of packets that shares nothing with the programs': where everything lies that a translation may
//! touch, and how wrong each checksum is.

use std::{collections::BTreeSet, ops::Range};

use ebpf_common::addr::Addr;

use crate::frame::{ICMP, ICMPV6, SCTP, TCP, UDP};

pub(crate) type End = (Addr, u16);

/// A packet in an Ethernet frame.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) proto: u8,
    /// Offset of the transport's header.
    pub(crate) l4: usize,
    /// Source and destination, with ports where they can be read.
    pub(crate) ends: (End, End),
    /// As the connection table has them.
    pub(crate) flow: (End, End),
    /// A fragment without the transport's header.
    pub(crate) is_later: bool,
    /// The packet that an ICMP error is about, as far as it can be read.
    pub(crate) quoted: Option<Box<Quoted>>,
    /// What has a checksum.
    pub(crate) parts: Vec<Part>,
    v4: bool,
}

#[derive(Debug)]
pub(crate) struct Quoted {
    pub(crate) proto: u8,
    pub(crate) ends: (End, End),
    l3: usize,
    l4: usize,
    v4: bool,
    length: usize,
}

/// What a checksum covers, and where it is; zero may stand for none.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    covers: [Range<usize>; 2],
    at: usize,
    zero_is_none: bool,
    /// Length and protocol, as the pseudo header has them.
    more: u32,
}

/// How much a checksum is off: 0 for a right one. What a correct incremental update keeps.
pub(crate) fn residual(part: &Part, bytes: &[u8]) -> u32 {
    if part.zero_is_none && bytes[part.at..part.at + 2] == [0, 0] {
        // None before must be none after.
        return u32::MAX;
    }
    let mut sum = part.more;
    for range in &part.covers {
        for pair in bytes[range.clone()].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
    }
    // Ones' complement: zero and minus zero are the same.
    sum % 0xffff
}

/// Reads a packet; `None` if it is not IP, or too short for what it says it is.
pub(crate) fn read(bytes: &[u8]) -> Option<Packet> {
    let v4 = match bytes.get(12..14)? {
        [0x08, 0x00] => true,
        [0x86, 0xdd] => false,
        _ => return None,
    };
    let head = if v4 { header4(bytes, 14)? } else { header6(bytes, 14)? };
    let Header { proto, l4, src, dst, later } = head;
    let has_ports = matches!(proto, TCP | UDP | SCTP);
    let is_icmp = proto == if v4 { ICMP } else { ICMPV6 };
    let mut ends = ((src, 0), (dst, 0));
    let mut flow = ends;
    let mut quoted = None;
    if !later && has_ports {
        bytes.get(l4..l4 + if proto == UDP { 8 } else { 14 })?;
        (ends.0.1, ends.1.1) = (word(bytes, l4)?, word(bytes, l4 + 2)?);
        flow = ends;
    }
    if !later && is_icmp {
        bytes.get(l4..l4 + 8)?;
        let id = word(bytes, l4 + 4)?;
        match (proto, bytes[l4]) {
            (ICMP, 8) | (ICMPV6, 128) => ends.0.1 = id,
            (ICMP, 0) | (ICMPV6, 129) => ends.1.1 = id,
            (ICMP, 3 | 4 | 11 | 12) | (ICMPV6, 1..=127) => quoted = quote(bytes, (l4 + 8, v4)),
            _ => {}
        }
        flow = ends;
    }
    let mut packet =
        Packet { proto, l4, ends, flow, is_later: later, quoted, parts: Vec::new(), v4 };
    packet.parts = parts(&packet, bytes);
    Some(packet)
}

struct Header {
    proto: u8,
    l4: usize,
    src: Addr,
    dst: Addr,
    later: bool,
}

fn header4(bytes: &[u8], l3: usize) -> Option<Header> {
    let head = bytes.get(l3..l3 + 20)?;
    let length = usize::from(head[0] & 15) * 4;
    if head[0] >> 4 != 4 || length < 20 {
        return None;
    }
    let addr = |at: usize| Addr::v4([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let later = (u16::from_be_bytes([head[6], head[7]]) & 0x1fff) != 0;
    Some(Header { proto: head[9], l4: l3 + length, src: addr(12), dst: addr(16), later })
}

fn header6(bytes: &[u8], l3: usize) -> Option<Header> {
    let head = bytes.get(l3..l3 + 40)?;
    if head[0] >> 4 != 6 {
        return None;
    }
    let addr = |at: usize| Addr::from_octets(head[at..at + 16].try_into().unwrap());
    let (src, dst) = (addr(8), addr(24));
    let (mut proto, mut l4, mut later) = (head[6], l3 + 40, false);
    while let 0 | 43 | 44 | 60 = proto {
        let extension = bytes.get(l4..l4 + 8)?;
        if proto == 44 {
            later = u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0;
            l4 += 8;
        } else {
            l4 += (usize::from(extension[1]) + 1) * 8;
        }
        proto = extension[0];
        if later {
            break;
        }
    }
    Some(Header { proto, l4, src, dst, later })
}

fn quote(bytes: &[u8], (l3, v4): (usize, bool)) -> Option<Box<Quoted>> {
    let (head, is_later) = if v4 {
        let head = header4(bytes, l3)?;
        let later = head.later || bytes[l3 + 6] & 0x20 != 0;
        (head, later)
    } else {
        let head = bytes.get(l3..l3 + 40)?;
        let addr = |at: usize| Addr::from_octets(head[at..at + 16].try_into().unwrap());
        let (src, dst) = (addr(8), addr(24));
        (Header { proto: head[6], l4: l3 + 40, src, dst, later: false }, false)
    };
    let Header { proto, l4, src, dst, .. } = head;
    bytes.get(l4..l4 + 8).filter(|_| !is_later)?;
    let mut ends = ((src, 0), (dst, 0));
    match (proto, bytes[l4]) {
        // One family's messages in a packet of the other are nobody's.
        (ICMP, _) if !v4 => return None,
        (ICMPV6, _) if v4 => return None,
        (TCP | UDP | SCTP, _) => {
            (ends.0.1, ends.1.1) = (word(bytes, l4)?, word(bytes, l4 + 2)?);
        }
        (ICMP, 8) | (ICMPV6, 128) => ends.0.1 = word(bytes, l4 + 4)?,
        (ICMP, 0) | (ICMPV6, 129) => ends.1.1 = word(bytes, l4 + 4)?,
        _ => return None,
    }
    Some(Box::new(Quoted { proto, ends, l3, l4, v4, length: bytes.len() }))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Where a transport's checksum is, and whether zero stands for none.
const fn checksum_at(proto: u8, v4: bool) -> Option<(usize, bool)> {
    match proto {
        TCP => Some((16, false)),
        UDP => Some((6, v4)),
        ICMP if v4 => Some((2, false)),
        ICMPV6 if !v4 => Some((2, false)),
        _ => None,
    }
}

fn parts(packet: &Packet, bytes: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    if packet.v4 {
        // Options are covered where the packet has them all.
        let end = packet.l4.min(bytes.len());
        let covers = [14..end, 0..0];
        parts.push(Part { covers, at: 24, zero_is_none: false, more: 0 });
    }
    let addresses = if packet.v4 { 26..34 } else { 22..54 };
    let checksum = checksum_at(packet.proto, packet.v4).filter(|_| !packet.is_later);
    if let Some((at, zero_is_none)) = checksum
        && packet.l4 + at + 2 <= bytes.len()
    {
        let mut covers = [packet.l4..bytes.len(), 0..0];
        let mut more = 0;
        if packet.proto != ICMP {
            covers[1] = addresses;
            more = u32::try_from(bytes.len() - packet.l4).unwrap() + u32::from(packet.proto);
        }
        parts.push(Part { covers, at: packet.l4 + at, zero_is_none, more });
    }
    parts
}

impl Packet {
    /// Where the hops and what follows from them lie.
    pub(crate) fn hops(&self) -> BTreeSet<usize> {
        if self.v4 { BTreeSet::from([22, 24, 25]) } else { BTreeSet::from([21]) }
    }

    /// Every byte that a translation may change.
    pub(crate) fn changeable(&self) -> BTreeSet<usize> {
        let mut bytes = self.hops();
        bytes.extend(if self.v4 { 26..34 } else { 22..54 });
        if !self.is_later {
            bytes.extend(transport(self.proto, self.l4, self.v4));
        }
        if let Some(Quoted { proto, l3, l4, v4, length, .. }) = self.quoted.as_deref() {
            bytes.extend(if *v4 { l3 + 10..l3 + 20 } else { l3 + 8..l3 + 40 });
            bytes.extend(transport(*proto, *l4, *v4));
            bytes.retain(|at| at < length);
        }
        bytes
    }
}

/// Ports or identifier, and checksum.
fn transport(proto: u8, l4: usize, v4: bool) -> Vec<usize> {
    let ports = if matches!(proto, ICMP | ICMPV6) { l4 + 4..l4 + 6 } else { l4..l4 + 4 };
    let checksum = checksum_at(proto, v4).into_iter().flat_map(|(at, _)| l4 + at..l4 + at + 2);
    ports.chain(checksum).collect()
}
