//! VXLAN by hand (RFC 7348), for XDP: the outer headers are made once per far node and kept, with zero in
//! the fields that differ between packets are zero; a packet costs a few ORs and stores.

use aya_ebpf::programs::XdpContext;
use ebpf_common::{
    UDP,
    addr::Addr,
    config::Config,
    csum,
    packet::{ETH_IPV4, ETH_IPV6, ETH_LEN},
};

use crate::driver_frame;

/// Ethernet, IP, UDP and VXLAN over IPv4 and over IPv6.
const LEN4: usize = ETH_LEN + 20 + 8 + 8;
const LEN6: usize = ETH_LEN + 40 + 8 + 8;
/// Room for either, in whole words.
const ROOM: usize = LEN6.next_multiple_of(8);

/// Time to live of tunnel packets (RFC 1700's default), as the tc path sets it.
const TTL: u8 = 64;
/// The VXLAN header's flag for a valid identifier.
const VNI_VALID: u8 = 0x08;
/// First of the 16,384 source ports, from which the underlay tells flows (RFC 7348, section 4.1, asks
/// for the dynamic range).
const PORTS: u16 = 49_152;

/// Headers in front of a packet, or the MACs alone of one that is only sent on.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Outer {
    bytes: [u8; ROOM],
    /// Sum of the IPv4 header's words, for its checksum.
    sum: u32,
    /// 1: over IPv6.
    v6: u32,
}

/// What differs between the packets to one far node.
pub struct Variable {
    /// Bytes of the inner frame.
    pub len: usize,
    /// Traffic class of the inner packet.
    pub class: u8,
    /// A number that differs between flows.
    pub flow: u32,
    /// A number that differs between packets.
    pub id: u16,
}

impl Outer {
    /// Nothing in front.
    #[inline(always)]
    pub const fn none() -> Self {
        Self { bytes: [0; ROOM], sum: 0, v6: 0 }
    }

    /// Sets the MACs, given as the words in which they lie in a frame.
    #[inline(always)]
    pub fn set_macs(&mut self, macs: &[u32; 3]) {
        self.put(0, &macs[0].to_ne_bytes());
        self.put(4, &macs[1].to_ne_bytes());
        self.put(8, &macs[2].to_ne_bytes());
    }

    /// Sets the headers behind the MACs: of packets from this node to another.
    #[inline(always)]
    pub fn set_vxlan(&mut self, src: &Addr, dst: &Addr, config: &Config) {
        let port = config.vxlan_port.to_be_bytes();
        let [_, a, b, c] = config.vni.to_be_bytes();
        let vxlan = [VNI_VALID, 0, 0, 0, a, b, c, 0];
        if dst.is_v4() {
            let (src, dst) = (src.v4_octets(), dst.v4_octets());
            let half = |bytes: [u8; 4], at: usize| {
                u32::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]))
            };
            let fixed = half([0x45, 0, TTL, UDP], 0) + half([0x45, 0, TTL, UDP], 2);
            self.sum = fixed + half(src, 0) + half(src, 2) + half(dst, 0) + half(dst, 2);
            self.put(12, &ETH_IPV4);
            self.bytes[14] = 0x45;
            self.bytes[22] = TTL;
            self.bytes[23] = UDP;
            self.put(26, &src);
            self.put(30, &dst);
            self.put(36, &port);
            self.put(42, &vxlan);
            return;
        }
        self.v6 = 1;
        self.put(12, &ETH_IPV6);
        self.bytes[14] = 0x60;
        self.bytes[20] = UDP;
        self.bytes[21] = TTL;
        self.put(22, &src.octets());
        self.put(38, &dst.octets());
        self.put(56, &port);
        self.put(62, &vxlan);
    }

    #[inline(always)]
    fn put<const N: usize>(&mut self, at: usize, part: &[u8; N]) {
        let mut index = 0;
        while index < N {
            self.bytes[at + index] = part[index];
            index += 1;
        }
    }

    #[inline(always)]
    const fn word(&self, index: usize) -> u64 {
        let (bytes, at) = (&self.bytes, index * 8);
        u64::from_ne_bytes([
            bytes[at],
            bytes[at + 1],
            bytes[at + 2],
            bytes[at + 3],
            bytes[at + 4],
            bytes[at + 5],
            bytes[at + 6],
            bytes[at + 7],
        ])
    }

    /// Bytes of the outer packet, its Ethernet header not counted, around a frame of `len` bytes.
    #[inline(always)]
    pub const fn packet_len(&self, len: usize) -> usize {
        len + if self.v6 == 0 { LEN4 } else { LEN6 } - ETH_LEN
    }

    /// Writes the MACs over those of the frame.
    #[inline(always)]
    pub fn readdress(&self, ctx: &XdpContext) -> Option<()> {
        driver_frame::write(ctx, 0, &self.word(0))?;
        driver_frame::write(ctx, 8, &(self.word(1) as u32))
    }

    /// Puts the headers in front of the frame. `None` leaves it as it was.
    ///
    /// The outer checksum of UDP is zero, as in the tc path: over IPv6 too (RFC 6935), since the inner
    /// packet has one.
    #[inline(always)]
    pub fn push(&self, ctx: &XdpContext, packet: &Variable) -> Option<()> {
        // The mark for capability goes outside; one for congestion stays inside and is ECT(0) outside, as
        // the kernel's tunnels have it (INET_ECN_encapsulate; RFC 3168, section 9.1.1).
        let ecn = u64::from(if packet.class & 3 == 3 { 2 } else { packet.class & 3 });
        let port = u64::from((PORTS | (packet.flow >> 18) as u16).to_be());
        if self.v6 == 0 {
            let total = u64::from(((packet.len + LEN4 - ETH_LEN) as u16).to_be());
            let udp = u64::from(((packet.len + LEN4 - ETH_LEN - 20) as u16).to_be());
            let id = u64::from(packet.id);
            // The class is the second byte of the header's first half-word.
            let sum = u64::from(self.sum) + total + id + (ecn << 8);
            let checksum = u64::from(!csum::fold(sum));
            driver_frame::grow(ctx, LEN4)?;
            driver_frame::write(
                ctx,
                0,
                &[
                    self.word(0),
                    self.word(1) | ecn << 56,
                    self.word(2) | total | id << 16,
                    self.word(3) | checksum,
                    self.word(4) | port << 16 | udp << 48,
                    self.word(5),
                ],
            )?;
            return driver_frame::write(ctx, 48, &(self.word(6) as u16));
        }
        let udp = u64::from(((packet.len + LEN6 - ETH_LEN - 40) as u16).to_be());
        driver_frame::grow(ctx, LEN6)?;
        driver_frame::write(
            ctx,
            0,
            &[
                self.word(0),
                self.word(1) | ecn << 60,
                self.word(2) | udp << 16,
                self.word(3),
                self.word(4),
                self.word(5),
                self.word(6) | port << 48,
                self.word(7) | udp << 16,
            ],
        )?;
        driver_frame::write(ctx, 64, &(self.word(8) as u32))?;
        driver_frame::write(ctx, 68, &((self.word(8) >> 32) as u16))
    }
}

/// A number that differs between flows, in its upper bits most.
#[inline(always)]
pub const fn spread(src: &Addr, dst: &Addr, ports: u32) -> u32 {
    let (src, dst) = (src.words(), dst.words());
    let word =
        src[0] ^ src[1] ^ src[2] ^ src[3] ^ dst[0] ^ dst[1] ^ dst[2] ^ dst[3].rotate_left(16);
    // 2^32 over the golden ratio, twice, so that every bit reaches the upper ones.
    let mixed = (word ^ ports).wrapping_mul(0x9e37_79b9);
    (mixed ^ mixed >> 15).wrapping_mul(0x9e37_79b9)
}
