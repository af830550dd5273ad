//! Frames with TCP or UDP as bytes, for what needs every field and for tunnels around them.

use std::net::IpAddr;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;
pub(crate) const FIN: u8 = 1;

/// A frame, written out with right checksums.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) macs: [[u8; 6]; 2],
    pub(crate) class: u8,
    pub(crate) ttl: u8,
    pub(crate) proto: u8,
    pub(crate) src: (IpAddr, u16),
    pub(crate) dst: (IpAddr, u16),
    pub(crate) flags: u8,
    pub(crate) payload: Vec<u8>,
    /// UDP without a checksum.
    pub(crate) unchecked: bool,
}

impl Wire {
    pub(crate) fn new(proto: u8, src: (&str, u16), dst: (&str, u16)) -> Self {
        Self {
            macs: [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 9, 9]],
            class: 0,
            ttl: 64,
            proto,
            src: (src.0.parse().unwrap(), src.1),
            dst: (dst.0.parse().unwrap(), dst.1),
            flags: if proto == TCP { ACK } else { 0 },
            payload: b"hello, world".to_vec(),
            unchecked: false,
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let body = self.transport();
        let length = u16::try_from(body.len()).unwrap();
        let mut frame = self.macs.concat();
        match (self.src.0, self.dst.0) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut ip = vec![0x45, self.class];
                ip.extend((20 + length).to_be_bytes());
                ip.extend([0x12, 0x34, 0x40, 0, self.ttl, self.proto, 0, 0]);
                ip.extend(src.octets());
                ip.extend(dst.octets());
                let sum = checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend([8, 0]);
                frame.extend(ip);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                frame.extend([0x86, 0xdd, 0x60 | self.class >> 4, self.class << 4, 0, 0]);
                frame.extend(length.to_be_bytes());
                frame.extend([self.proto, self.ttl]);
                frame.extend(src.octets());
                frame.extend(dst.octets());
            }
            _ => panic!("two families in one packet"),
        }
        frame.extend(body);
        frame
    }

    fn transport(&self) -> Vec<u8> {
        let mut body = [self.src.1.to_be_bytes(), self.dst.1.to_be_bytes()].concat();
        let at = if self.proto == TCP {
            body.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        } else {
            body.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
            body.extend([0, 0]);
            6
        };
        body.extend(&self.payload);
        if !self.unchecked {
            let ends = [self.src.0, self.dst.0].map(|ip| match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            });
            let length = u16::try_from(body.len()).unwrap().to_be_bytes();
            let pseudo = [&ends.concat()[..], &[0, self.proto], &length].concat();
            let sum = checksum(&[&pseudo[..], &body].concat());
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        body
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
