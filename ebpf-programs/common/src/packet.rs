//! Where things are in a packet, and arithmetic on headers. Pure; used by the kernel side's views.

/// Bytes of an Ethernet header.
pub const ETH_LEN: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// `EtherType` of IPv4.
pub const ETH_IPV4: [u8; 2] = [0x08, 0x00];

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

/// Whether an IPv4 flags/offset word belongs to a fragment (more to come, or not the first).
#[inline(always)]
#[must_use]
pub const fn is_fragment(word: [u8; 2]) -> bool {
    u16::from_be_bytes(word) & 0x3fff != 0
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

    #[test]
    fn fragments_are_told_by_offset_and_more() {
        assert!(!is_fragment([0x40, 0]), "do not fragment");
        assert!(is_fragment([0x20, 0]), "first fragment");
        assert!(is_fragment([0x00, 0xb9]), "last fragment");
    }
}
