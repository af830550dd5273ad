//! Addresses of both families in one form, so that one set of maps and one logic serve both.

use core::{
    fmt,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An IPv4 or IPv6 address: 16 bytes in network order, IPv4 as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
///
/// Held as four words so that the kernel's side copies and compares words; each word's bytes lie in
/// memory as they are sent.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialOrd, Ord)]
pub struct Addr {
    words: [u32; 4],
}
const _: () = assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 4);

/// Third word of a mapped IPv4 address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Addr {
    /// `::`, which is also what "any address" of IPv6 is written as.
    pub const ANY_V6: Self = Self { words: [0; 4] };
    /// `::ffff:0.0.0.0`, "any address" of IPv4.
    pub const ANY_V4: Self = Self::v4([0; 4]);

    /// An IPv4 address from its bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn v4(bytes: [u8; 4]) -> Self {
        Self { words: [0, 0, MAPPED, u32::from_ne_bytes(bytes)] }
    }

    /// An address from the four words that lie in a packet or a context.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The four words as they lie in a packet.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// An address from its 16 bytes.
    #[must_use]
    pub const fn from_octets(bytes: [u8; 16]) -> Self {
        let mut words = [0; 4];
        let mut at = 0;
        while at < 4 {
            let from = at * 4;
            words[at] = u32::from_ne_bytes([
                bytes[from],
                bytes[from + 1],
                bytes[from + 2],
                bytes[from + 3],
            ]);
            at += 1;
        }
        Self { words }
    }

    /// The 16 bytes.
    #[must_use]
    pub const fn octets(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let mut at = 0;
        while at < 16 {
            bytes[at] = self.words[at / 4].to_ne_bytes()[at % 4];
            at += 1;
        }
        bytes
    }

    /// Whether it is an IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The last four bytes: the address, if it is one of IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn v4_octets(&self) -> [u8; 4] {
        self.words[3].to_ne_bytes()
    }

    /// Whether every bit is zero: no address at all in a row that may have none.
    #[inline(always)]
    #[must_use]
    pub const fn is_zero(&self) -> bool {
        self.words[0] | self.words[1] | self.words[2] | self.words[3] == 0
    }

    /// Whether it is an address of the host itself: 127.0.0.0/8 or `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        let [first, ..] = self.v4_octets();
        if self.is_v4() {
            return first == 127;
        }
        self.words[0] | self.words[1] | self.words[2] == 0
            && self.words[3] == u32::from_ne_bytes([0, 0, 0, 1])
    }

    /// "Any address" of this address's family, as node ports are keyed by.
    #[inline(always)]
    #[must_use]
    pub const fn any(&self) -> Self {
        if self.is_v4() { Self::ANY_V4 } else { Self::ANY_V6 }
    }

    /// The address as the standard library has it.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        let [a, b, c, d] = self.v4_octets();
        if self.is_v4() {
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        } else {
            IpAddr::V6(Ipv6Addr::from_octets(self.octets()))
        }
    }
}

impl PartialEq for Addr {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        let (one, two) = (&self.words, &other.words);
        (one[0] ^ two[0]) | (one[1] ^ two[1]) | (one[2] ^ two[2]) | (one[3] ^ two[3]) == 0
    }
}

impl Eq for Addr {}

impl Hash for Addr {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.words.hash(state);
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::v4(ip.octets()),
            IpAddr::V6(ip) => Self::from_octets(ip.octets()),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::v4(ip.octets())
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.ip(), f)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.ip(), f)
    }
}

/// A range of addresses as programs compare it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Net {
    /// Network address.
    pub addr: Addr,
    /// Its mask; IPv4's has all bits set before the last 32. All zero: no range, nothing matches.
    pub mask: Addr,
}
const _: () = assert!(size_of::<Net>() == 32 && align_of::<Net>() == 4);

impl Net {
    /// The range of `ip` with a prefix of `length` bits of its own family.
    #[must_use]
    pub fn new(ip: IpAddr, length: u8) -> Self {
        let bits = u32::from(length) + if ip.is_ipv4() { 96 } else { 0 };
        let mut mask = [0_u32; 4];
        let mut at = 0;
        while at < 4 {
            let covered = bits.saturating_sub(at * 32).min(32);
            let word = if covered == 0 { 0 } else { u32::MAX << (32 - covered) };
            mask[at as usize] = u32::from_ne_bytes(word.to_be_bytes());
            at += 1;
        }
        let addr = Addr::from(ip);
        let mut masked = addr.words;
        for (word, mask) in masked.iter_mut().zip(mask) {
            *word &= mask;
        }
        Self { addr: Addr { words: masked }, mask: Addr { words: mask } }
    }

    /// Whether the range holds `addr`.
    #[inline(always)]
    #[must_use]
    pub const fn contains(&self, addr: &Addr) -> bool {
        let (net, mask, addr) = (&self.addr.words, &self.mask.words, &addr.words);
        let differs = (addr[0] & mask[0] ^ net[0])
            | (addr[1] & mask[1] ^ net[1])
            | (addr[2] & mask[2] ^ net[2])
            | (addr[3] & mask[3] ^ net[3]);
        // A mask of zero bits would hold everything; it stands for "none".
        differs == 0 && !self.mask.is_zero()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString as _;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn both_families_go_in_and_out() {
        for text in [
            "10.244.1.7",
            "0.0.0.0",
            "255.255.255.255",
            "127.0.0.5",
            "fd00::1",
            "::",
            "::1",
            "127::1",
            "2001:db8::ffff:1",
        ] {
            let addr = Addr::from(ip(text));
            assert_eq!(addr.ip(), ip(text));
            assert_eq!(addr.to_string(), text);
            assert_eq!(Addr::from_octets(addr.octets()), addr);
            assert_eq!(addr.is_v4(), ip(text).is_ipv4());
            assert_eq!(addr.is_loopback(), ip(text).is_loopback());
        }
        assert_eq!(Addr::from(ip("10.1.2.3")).octets()[10..], [0xff, 0xff, 10, 1, 2, 3]);
        assert_eq!(Addr::from(ip("10.1.2.3")).any(), Addr::ANY_V4);
        assert_eq!(Addr::from(ip("fd00::1")).any(), Addr::ANY_V6);
        assert_ne!(Addr::ANY_V4, Addr::ANY_V6);
    }

    #[test]
    fn a_range_has_its_edges_where_the_prefix_says() {
        let cases: &[(&str, u8, &[&str], &[&str])] = &[
            (
                "10.96.0.0",
                16,
                &["10.96.0.0", "10.96.255.255"],
                &["10.97.0.0", "10.95.255.255", "::"],
            ),
            ("10.96.3.3", 12, &["10.111.255.255"], &["10.112.0.0"]),
            ("0.0.0.0", 0, &["1.2.3.4"], &["fd00::1"]),
            ("192.0.2.1", 32, &["192.0.2.1"], &["192.0.2.2"]),
            ("fd00:10:96::", 108, &["fd00:10:96::1", "fd00:10:96::f:ffff"], &["fd00:10:96::10:0"]),
            ("fd00::", 64, &["fd00::ffff"], &["fd00:0:0:1::", "10.0.0.1"]),
        ];
        for (net, length, inside, outside) in cases {
            let range = Net::new(ip(net), *length);
            for one in *inside {
                assert!(range.contains(&Addr::from(ip(one))), "{one} in {net}/{length}");
            }
            for one in *outside {
                assert!(!range.contains(&Addr::from(ip(one))), "{one} not in {net}/{length}");
            }
        }
        assert!(!Net::default().contains(&Addr::ANY_V6), "no range is no range");
    }
}
