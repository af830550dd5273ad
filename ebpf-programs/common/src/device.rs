//! The node's network devices.

use crate::addr::Addr;

/// Our XDP program runs in the device's driver: frames may be handed to it from XDP.
pub const XDP: u16 = 1;

/// What programs need of a device by which packets leave. The key is its interface index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// The node's address on it by family (IPv4, IPv6), source of what is masqueraded; zero: none.
    pub addr: [Addr; 2],
    /// Largest packet in bytes, Ethernet header not counted.
    pub mtu: u32,
    /// Its MAC.
    pub mac: [u8; 6],
    /// [`XDP`].
    pub flags: u16,
}
const _: () = assert!(size_of::<Device>() == 44 && align_of::<Device>() == 4);

impl Device {
    /// Its MAC as the words in which it lies in a frame.
    #[inline(always)]
    #[must_use]
    pub const fn mac_words(&self) -> [u16; 3] {
        let [a, b, c, d, e, f] = self.mac;
        [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
    }
}
