//! The Internet checksum, changed by what a translation changes (RFC 1624, equation 3).
//!
//! Words are taken as they lie in memory: the one's complement sum does not depend on the order of
//! bytes as long as all of them have the same (RFC 1071, section 2 B).

use crate::addr::Addr;

/// What a checksum has to take up: the sum of old words' complements and new words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    sum: u64,
}

impl Change {
    /// Nothing changed.
    #[inline(always)]
    #[must_use]
    pub const fn none() -> Self {
        Self { sum: 0 }
    }

    /// Further, a word that was replaced; it lies at an even offset.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, old: u32, new: u32) -> Self {
        Self { sum: self.sum + !old as u64 + new as u64 }
    }

    /// Further, two bytes that were replaced; they lie at an even offset.
    #[inline(always)]
    #[must_use]
    pub const fn half(self, old: u16, new: u16) -> Self {
        Self { sum: self.sum + (!old) as u64 + new as u64 }
    }

    /// The checksum after the change. Words and checksum in the order of memory.
    #[inline(always)]
    #[must_use]
    pub const fn apply(self, checksum: u16) -> u16 {
        !fold(self.sum + (!checksum) as u64)
    }

    /// As [`Self::apply`] for UDP, whose zero says "no checksum": it stays so, and none becomes it.
    #[inline(always)]
    #[must_use]
    pub const fn apply_udp(self, checksum: u16) -> u16 {
        if checksum == 0 {
            return 0;
        }
        match self.apply(checksum) {
            0 => u16::MAX,
            other => other,
        }
    }
}

/// The one's complement sum of words in 16 bits, from a plain sum of at most 2^32 of them.
#[inline(always)]
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the carries have been folded in")]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The sum of the pseudo header of either family (RFC 9293, section 3.1; RFC 8200, section 8.1): what lies in the place
/// of a checksum that a device is still to finish. `length` is that of transport header and data.
///
/// IPv4's addresses are summed in their long form, whose prefix of all ones is a zero of this arithmetic.
#[inline(always)]
#[must_use]
pub const fn pseudo_header(src: &Addr, dst: &Addr, proto: u8, length: u16) -> u16 {
    let (src, dst) = (src.words(), dst.words());
    let mut sum = (proto as u16).to_be() as u64 + length.to_be() as u64;
    let mut at = 0;
    while at < src.len() {
        sum += src[at] as u64 + dst[at] as u64;
        at += 1;
    }
    fold(sum)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, from the words.
    fn checksum(words: &[u32]) -> u16 {
        !fold(words.iter().map(|word| u64::from(*word)).sum())
    }

    proptest! {
        #[test]
        fn a_changed_packet_keeps_a_right_checksum(
            packet in prop::collection::vec(any::<u32>(), 3..40), one: u32, other: u16,
        ) {
            let before = checksum(&packet);
            let mut after: Vec<u32> = packet.clone();
            after[0] = one;
            let [a, b, c, d] = packet[1].to_ne_bytes();
            let [e, f] = other.to_ne_bytes();
            after[1] = u32::from_ne_bytes([e, f, c, d]);
            let change = Change::none()
                .word(packet[0], one)
                .half(u16::from_ne_bytes([a, b]), other);
            let got = change.apply(before);
            // With its checksum a packet sums to all ones; both forms of zero do.
            let sum: u64 = after.iter().map(|word| u64::from(*word)).sum();
            prop_assert_eq!(fold(sum + u64::from(got)), u16::MAX);
            prop_assert!(change.apply_udp(before) != 0 || before == 0);
            prop_assert_eq!(change.apply_udp(0), 0, "no checksum stays none");
        }
    }

    #[test]
    fn the_sum_of_a_pseudo_header_is_what_linux_leaves_for_a_device() {
        // A SYN of 40 bytes from 192.168.0.99 to 192.168.0.2, and of 44 between 2001:db8::99 and 2001:db8::2.
        let (four, two) = (Addr::v4([192, 168, 0, 99]), Addr::v4([192, 168, 0, 2]));
        // c0a8 + 0063 + c0a8 + 0002 + 0006 + 0028
        assert_eq!(pseudo_header(&four, &two, 6, 40), 0x81e4_u16.to_be());
        let mut octets = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99];
        let six = Addr::from_octets(octets);
        octets[15] = 2;
        // 2 * (2001 + 0db8) + 0099 + 0002 + 0006 + 002c
        assert_eq!(pseudo_header(&six, &Addr::from_octets(octets), 6, 44), 0x5c3f_u16.to_be());
    }

    #[test]
    fn the_example_of_the_rfc() {
        // RFC 1624, section 4: checksum 0xdd2f, 0x5555 becomes 0x3285.
        let change = Change::none().half(0x5555, 0x3285);
        assert_eq!(change.apply(0xdd2f), 0x0000);
    }
}
