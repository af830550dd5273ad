//! Packets in pieces: the first fragment has the ports, the others only share its identification.

use crate::addr::Addr;

/// What the fragments of one packet have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification as it lies in the packet; IPv4's 16 bits in the first two bytes.
    pub id: u32,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub reserved: [u8; 3],
}
const _: () = assert!(size_of::<FragmentKey>() == 40 && align_of::<FragmentKey>() == 4);

/// What only the first fragment shows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Source port.
    pub sport: [u8; 2],
    /// Destination port.
    pub dport: [u8; 2],
}
const _: () = assert!(size_of::<Fragment>() == 4);
