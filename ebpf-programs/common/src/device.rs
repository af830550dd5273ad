//! The node's network devices.

use crate::addr::Addr;

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
    /// Zero.
    pub reserved: [u8; 2],
}
const _: () = assert!(size_of::<Device>() == 44 && align_of::<Device>() == 4);
