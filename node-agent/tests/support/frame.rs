//! Packets of both families as bytes, with right checksums.

use std::net::IpAddr;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;
pub(crate) const FIN: u8 = 1;
pub(crate) const RST: u8 = 4;

/// A frame with IP and a transport in it, written out with right checksums.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) dst_mac: [u8; 6],
    pub(crate) src_mac: [u8; 6],
    pub(crate) ttl: u8,
    pub(crate) proto: u8,
    pub(crate) src: (IpAddr, u16),
    pub(crate) dst: (IpAddr, u16),
    /// TCP's flags; type of an ICMP message, which has its code and rest in the payload.
    pub(crate) flags: u8,
    pub(crate) payload: Vec<u8>,
    /// UDP without a checksum.
    pub(crate) unchecked: bool,
    /// From which byte of the transport's packet on, how many, and whether more follow.
    pub(crate) fragment: Option<(usize, usize, bool)>,
    /// IPv6 extension headers by number, each of eight bytes.
    pub(crate) extensions: Vec<u8>,
}

pub(crate) type End<'a> = (&'a str, u16);

impl Frame {
    pub(crate) fn new(proto: u8, src: End<'_>, dst: End<'_>) -> Self {
        let end = |end: End<'_>| (end.0.parse().unwrap(), end.1);
        Self::between(proto, end(src), end(dst))
    }

    pub(crate) fn between(proto: u8, src: (IpAddr, u16), dst: (IpAddr, u16)) -> Self {
        Self {
            dst_mac: [0; 6],
            src_mac: [2, 0, 0, 0, 0, 9],
            ttl: 64,
            proto,
            src,
            dst,
            flags: if proto == TCP { SYN } else { 0 },
            payload: b"hello, world".to_vec(),
            unchecked: false,
            fragment: None,
            extensions: Vec::new(),
        }
    }

    pub(crate) fn tcp(src: End<'_>, dst: End<'_>) -> Self {
        Self::new(TCP, src, dst)
    }

    pub(crate) fn udp(src: End<'_>, dst: End<'_>) -> Self {
        Self::new(UDP, src, dst)
    }

    /// An echo request of the family of `src`, whose port is its identifier.
    pub(crate) fn ping(src: End<'_>, dst: &str) -> Self {
        let frame = Self::new(ICMP, src, (dst, 0));
        if frame.src.0.is_ipv4() {
            Self { flags: 8, ..frame }
        } else {
            Self { proto: ICMPV6, flags: 128, ..frame }
        }
    }

    /// The answer to this echo request, or the answer of this frame's receiver.
    pub(crate) fn answer(&self) -> Self {
        let flags = match (self.proto, self.flags) {
            (ICMP, _) => 0,
            (ICMPV6, _) => 129,
            (TCP, SYN) => SYN | ACK,
            (_, flags) => flags,
        };
        Self { src: self.dst, dst: self.src, flags, ..self.clone() }
    }

    /// An ICMP error that `from` sends to the sender of `about`: the packet is too big.
    pub(crate) fn error(from: &str, about: &Self, quoted: usize) -> Self {
        // Fragmentation needed (RFC 792, RFC 1191); packet too big (RFC 4443).
        let (kind, code) = if about.src.0.is_ipv4() { (3, 4) } else { (2, 0) };
        Self::error_of((kind, code, [0, 0, 5, 120]), from, about, quoted)
    }

    /// An ICMP error of that type, code and rest of the header.
    pub(crate) fn error_of(
        kind: (u8, u8, [u8; 4]),
        from: &str,
        about: &Self,
        quoted: usize,
    ) -> Self {
        let mut quote = about.bytes().split_off(14);
        quote.truncate(quoted);
        Self::error_quoting(kind, (from.parse().unwrap(), about.src.0), &quote)
    }

    /// An ICMP error with the beginning of a packet in it.
    pub(crate) fn error_quoting(
        (kind, code, rest): (u8, u8, [u8; 4]),
        (from, to): (IpAddr, IpAddr),
        quote: &[u8],
    ) -> Self {
        Self {
            proto: if to.is_ipv4() { ICMP } else { ICMPV6 },
            flags: kind,
            payload: [&[code, 0, 0][..], &rest, quote].concat(),
            ..Self::between(UDP, (from, 0), (to, 0))
        }
    }

    /// Whether its payload quotes a packet.
    fn is_error(&self) -> bool {
        matches!((self.proto, self.flags), (ICMP, 3 | 11) | (ICMPV6, 1..=4))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let whole = self.transport();
        let (body, fragment) = match self.fragment {
            Some((from, length, more)) => {
                (&whole[from..(from + length).min(whole.len())], Some((from, more)))
            }
            None => (&whole[..], None),
        };
        let ip = match (self.src.0, self.dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let length = u16::try_from(20 + body.len()).unwrap();
                let word = fragment.map_or(0x4000, |(from, more)| {
                    u16::try_from(from / 8).unwrap() | if more { 0x2000 } else { 0 }
                });
                let mut ip = vec![0x45, 0];
                ip.extend(length.to_be_bytes());
                ip.extend([0x12, 0x34]);
                ip.extend(word.to_be_bytes());
                ip.extend([self.ttl, self.proto, 0, 0]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                let sum = checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                [&[8, 0][..], &ip].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let extensions = self.chain(fragment);
                let length = u16::try_from(extensions.len() + body.len()).unwrap();
                let first = self.extensions.first().copied();
                let next = first.or_else(|| fragment.map(|_| 44)).unwrap_or(self.proto);
                let mut ip = vec![0x60, 0, 0, 0];
                ip.extend(length.to_be_bytes());
                ip.extend([next, self.ttl]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                ip.extend(extensions);
                [&[0x86, 0xdd][..], &ip].concat()
            }
            _ => unreachable!("two families in one packet"),
        };
        [&self.dst_mac[..], &self.src_mac, &ip, body].concat()
    }

    /// IPv6's extension headers.
    fn chain(&self, fragment: Option<(usize, bool)>) -> Vec<u8> {
        let mut kinds = self.extensions.clone();
        kinds.extend(fragment.map(|_| 44));
        let next = kinds.iter().skip(1).copied().chain([self.proto]);
        let mut bytes = Vec::new();
        for (kind, next) in kinds.iter().zip(next) {
            if *kind == 44 {
                let (from, more) = fragment.unwrap();
                let word = u16::try_from(from).unwrap() | u16::from(more);
                bytes.extend([next, 0]);
                bytes.extend(word.to_be_bytes());
                bytes.extend([0, 0, 0x12, 0x34]);
            } else {
                // Padding of four bytes (RFC 8200, section 4.2).
                bytes.extend([next, 0, 1, 4, 0, 0, 0, 0]);
            }
        }
        bytes
    }

    fn transport(&self) -> Vec<u8> {
        let ports = [self.src.1.to_be_bytes(), self.dst.1.to_be_bytes()].concat();
        let (mut bytes, at) = match self.proto {
            TCP => {
                let rest = [0, 0, 0, 1, 0, 0, 0, 2, 0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0];
                ([&ports[..], &rest].concat(), 16)
            }
            UDP => {
                let length = u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes();
                ([&ports[..], &length, &[0, 0]].concat(), 6)
            }
            // Verification tag, checksum (of its own kind, not looked at), and a chunk: INIT, or SACK.
            SCTP => {
                let chunk = if self.flags & ACK == 0 { 1 } else { 3 };
                ([&ports[..], &[0; 4], &[7; 4], &[chunk, 0, 0, 4]].concat(), 0)
            }
            // Its payload begins with the code and the checksum's place.
            ICMP | ICMPV6 if self.is_error() => (vec![self.flags], 2),
            ICMP | ICMPV6 => {
                let [high, low] = (self.src.1 | self.dst.1).to_be_bytes();
                (vec![self.flags, 0, 0, 0, high, low, 0, 1], 2)
            }
            _ => (Vec::new(), 0),
        };
        bytes.extend(&self.payload);
        if self.unchecked || at == 0 {
            return bytes;
        }
        let sum = if self.proto == ICMP {
            checksum(&bytes)
        } else {
            checksum(&[&self.pseudo(bytes.len())[..], &bytes].concat())
        };
        // Zero stands for no checksum (RFC 768), which IPv6 does not allow (RFC 8200, section 8.1).
        let sum = if self.proto == UDP && sum == 0 { 0xffff } else { sum };
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    fn pseudo(&self, length: usize) -> Vec<u8> {
        let length = u16::try_from(length).unwrap().to_be_bytes();
        match (self.src.0, self.dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                [&src.octets()[..], &dst.octets(), &[0, self.proto], &length].concat()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let tail = [0, 0, length[0], length[1], 0, 0, 0, self.proto];
                [&src.octets()[..], &dst.octets(), &tail].concat()
            }
            _ => unreachable!("two families in one packet"),
        }
    }
}

/// The Internet checksum (RFC 1071).
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}
