//! Packets as bytes, with right checksums.

use std::net::Ipv4Addr;

/// A frame with IPv4 and TCP or UDP in it, written out with right checksums.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) dst_mac: [u8; 6],
    pub(crate) src_mac: [u8; 6],
    pub(crate) ttl: u8,
    pub(crate) proto: u8,
    pub(crate) src: (Ipv4Addr, u16),
    pub(crate) dst: (Ipv4Addr, u16),
    pub(crate) tcp_flags: u8,
    pub(crate) payload: Vec<u8>,
    /// UDP without a checksum.
    pub(crate) unchecked: bool,
}

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;
pub(crate) const FIN: u8 = 1;

impl Frame {
    pub(crate) fn tcp(src: (&str, u16), dst: (&str, u16)) -> Self {
        Self {
            dst_mac: [0; 6],
            src_mac: [2, 0, 0, 0, 0, 9],
            ttl: 64,
            proto: 6,
            src: (src.0.parse().unwrap(), src.1),
            dst: (dst.0.parse().unwrap(), dst.1),
            tcp_flags: SYN,
            payload: b"hello, world".to_vec(),
            unchecked: false,
        }
    }

    pub(crate) fn udp(src: (&str, u16), dst: (&str, u16)) -> Self {
        Self { proto: 17, ..Self::tcp(src, dst) }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let transport = self.transport();
        let length = u16::try_from(20 + transport.len()).unwrap();
        let mut ip = vec![0x45, 0];
        ip.extend(length.to_be_bytes());
        ip.extend([0x12, 0x34, 0x40, 0, self.ttl, self.proto, 0, 0]);
        ip.extend(self.src.0.octets());
        ip.extend(self.dst.0.octets());
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        [&self.dst_mac[..], &self.src_mac, &[8, 0], &ip, &transport].concat()
    }

    fn transport(&self) -> Vec<u8> {
        let ports = [self.src.1.to_be_bytes(), self.dst.1.to_be_bytes()].concat();
        let (mut bytes, at) = if self.proto == 6 {
            let rest = [0, 0, 0, 1, 0, 0, 0, 2, 0x50, self.tcp_flags, 0xff, 0xff, 0, 0, 0, 0];
            ([&ports[..], &rest].concat(), 16)
        } else {
            let length = u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes();
            ([&ports[..], &length, &[0, 0]].concat(), 6)
        };
        bytes.extend(&self.payload);
        if self.unchecked {
            return bytes;
        }
        let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
        let pseudo = [&self.src.0.octets()[..], &self.dst.0.octets(), &[0, self.proto], &length];
        let sum = checksum(&[&pseudo.concat()[..], &bytes].concat());
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}
