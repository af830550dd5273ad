//! Where things are in a packet, and arithmetic on headers. Pure; used by the kernel side's views.

use crate::{ICMP, ICMPV6, addr::Addr};

/// Bytes of an Ethernet header.
pub const ETH_LEN: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// `EtherType` of IPv4.
pub const ETH_IPV4: [u8; 2] = [0x08, 0x00];
/// Bytes of an IPv6 header without extensions.
pub const IPV6_LEN: usize = 40;
/// `EtherType` of IPv6.
pub const ETH_IPV6: [u8; 2] = [0x86, 0xdd];

/// TCP flag FIN.
pub const TCP_FIN: u8 = 0x01;
/// TCP flag SYN.
pub const TCP_SYN: u8 = 0x02;
/// TCP flag RST.
pub const TCP_RST: u8 = 0x04;
/// TCP flag ACK.
pub const TCP_ACK: u8 = 0x10;

/// The IPv4 header's checksum after its TTL went down by one (RFC 1141): the TTL is the high byte of
/// its word, so the checksum goes up by 0x0100, with the carry added back.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the carry has been folded in: at most 0xffff")]
pub const fn checksum_after_ttl(checksum: [u8; 2]) -> [u8; 2] {
    let sum = u16::from_be_bytes(checksum) as u32 + 0x0100;
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum as u16).to_be_bytes()
}

/// A checksum after the sum of what it covers went up by `difference` (RFC 1624), which is a ones'
/// complement sum of 16-bit words in memory order, not folded.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the carries have been folded in")]
pub const fn checksum_after_change(checksum: [u8; 2], difference: u32) -> [u8; 2] {
    let sum = !u16::from_ne_bytes(checksum) as u64 + difference as u64;
    let sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

/// The ones' complement sum of two sums.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the carry is added back")]
pub const fn add(one: u32, other: u32) -> u32 {
    let sum = one as u64 + other as u64;
    (sum as u32) + (sum >> 32) as u32
}

/// Whether an address is one of many hosts, or of neighbours only: multicast, the broadcast address,
/// and IPv6's link-local ones. Such packets concern no service.
#[inline(always)]
#[must_use]
pub const fn is_group(addr: &Addr) -> bool {
    let [first, second, ..] = addr.words()[0].to_ne_bytes();
    if addr.is_v4() {
        return addr.v4_octets()[0] >= 224;
    }
    first == 0xff || (first == 0xfe && second & 0xc0 == 0x80)
}

/// Whether an IPv4 flags/offset word belongs to a fragment (more to come, or not the first).
#[inline(always)]
#[must_use]
pub const fn is_fragment(word: [u8; 2]) -> bool {
    u16::from_be_bytes(word) & 0x3fff != 0
}

/// A fragment's place in its packet, in units of eight bytes.
#[inline(always)]
#[must_use]
pub const fn fragment_offset(word: [u8; 2]) -> u16 {
    u16::from_be_bytes(word) & 0x1fff
}

/// What an SCTP packet's first chunk says about its association, in TCP's flags (RFC 9260, section 3.2).
#[inline(always)]
#[must_use]
pub const fn sctp_flags(chunk: u8) -> u8 {
    match chunk {
        // INIT
        1 => TCP_SYN,
        // ABORT
        6 => TCP_RST,
        // SHUTDOWN, SHUTDOWN ACK, SHUTDOWN COMPLETE
        7 | 8 | 14 => TCP_FIN,
        _ => 0,
    }
}

/// Kinds of ICMP messages of both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Icmp {
    /// Asks for an echo.
    Request,
    /// Is one.
    Reply,
    /// Tells that a packet did not arrive; carries its beginning.
    Error,
    /// Neighbours, groups and the like.
    Other,
}

impl Icmp {
    /// The kind of a message of `proto` (ICMP or `ICMPv6`) with that type.
    #[inline(always)]
    #[must_use]
    pub const fn of(proto: u8, kind: u8) -> Self {
        match (proto, kind) {
            // Unreachable, source quench, time exceeded, parameter problem; redirects (5) concern the
            // local network only (RFC 792). In ICMPv6 all below 128 are errors (RFC 4443, section 2.1).
            (ICMP, 3 | 4 | 11 | 12) | (ICMPV6, 1..=127) => Self::Error,
            (ICMP, 8) | (ICMPV6, 128) => Self::Request,
            (ICMP, 0) | (ICMPV6, 129) => Self::Reply,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn checksum(header: &[u8; 20]) -> u16 {
        let mut sum: u32 = header
            .chunks_exact(2)
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    proptest! {
        #[test]
        fn the_updated_checksum_verifies(mut header in any::<[u8; 20]>(), ttl in 1_u8..) {
            header[8] = ttl;
            header[10..12].fill(0);
            let sum = checksum(&header).to_be_bytes();
            header[8] -= 1;
            header[10..12].copy_from_slice(&checksum_after_ttl(sum));
            prop_assert_eq!(checksum(&header), 0, "a header with its checksum sums to zero");
        }
    }

    proptest! {
        #[test]
        fn a_changed_header_verifies(mut header in any::<[u8; 20]>(), new in any::<[u8; 8]>()) {
            header[10..12].fill(0);
            let sum = checksum(&header).to_be_bytes();
            // What the kernel's csum_diff gives: new words added, complements of the old ones too.
            let words = |bytes: &[u8]| -> u64 {
                bytes.chunks_exact(4).map(|w| u64::from(u32::from_ne_bytes([w[0], w[1], w[2], w[3]]))).sum()
            };
            let old: [u8; 8] = header[12..20].try_into().unwrap();
            let complement = old.map(|byte| !byte);
            let mut total = words(&new) + words(&complement);
            while total > u64::from(u32::MAX) {
                total = (total & 0xffff_ffff) + (total >> 32);
            }
            header[12..20].copy_from_slice(&new);
            let changed = checksum_after_change(sum, u32::try_from(total).unwrap());
            header[10..12].copy_from_slice(&changed);
            prop_assert_eq!(checksum(&header), 0);
        }
    }

    #[test]
    fn groups_and_neighbours_are_told_from_hosts() {
        for (text, expect) in [
            ("224.0.0.1", true),
            ("255.255.255.255", true),
            ("223.255.255.255", false),
            ("169.254.169.254", false),
            ("ff02::1", true),
            ("fe80::1", true),
            ("febf::1", true),
            ("fec0::1", false),
            ("fd00::1", false),
        ] {
            let ip: core::net::IpAddr = text.parse().unwrap();
            assert_eq!(is_group(&Addr::from(ip)), expect, "{text}");
        }
    }

    #[test]
    fn icmp_messages_have_their_kind() {
        for (proto, kind, expect) in [
            (ICMP, 0, Icmp::Reply),
            (ICMP, 3, Icmp::Error),
            (ICMP, 5, Icmp::Other),
            (ICMP, 8, Icmp::Request),
            (ICMP, 11, Icmp::Error),
            (ICMPV6, 0, Icmp::Other),
            (ICMPV6, 1, Icmp::Error),
            (ICMPV6, 2, Icmp::Error),
            (ICMPV6, 128, Icmp::Request),
            (ICMPV6, 129, Icmp::Reply),
            (ICMPV6, 135, Icmp::Other),
        ] {
            assert_eq!(Icmp::of(proto, kind), expect, "{proto} {kind}");
        }
    }

    #[test]
    fn fragments_are_told_by_offset_and_more() {
        assert!(!is_fragment([0x40, 0]), "do not fragment");
        assert!(is_fragment([0x20, 0]), "first fragment");
        assert!(is_fragment([0x00, 0xb9]), "last fragment");
        assert_eq!(fragment_offset([0x20, 0]), 0);
        assert_eq!(fragment_offset([0x20, 0xb9]), 0xb9);
    }
}
