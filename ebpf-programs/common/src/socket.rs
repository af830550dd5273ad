//! What a socket asks of the programs: the input of the one function that decides for sockets.

use crate::service::Peer;

/// The socket connects.
pub const CONNECT: u8 = 0;
/// An unconnected socket sends a datagram.
pub const DATAGRAM: u8 = 1;

/// A question of a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// Cookie of the socket's network namespace.
    pub netns: u64,
    /// Where it wants to go.
    pub wanted: Peer,
    /// What the choice of a backend hangs on.
    pub random: u32,
    /// IP protocol number.
    pub proto: u8,
    /// [`CONNECT`] or [`DATAGRAM`].
    pub call: u8,
    /// Zero.
    pub reserved: [u8; 6],
}
const _: () = assert!(size_of::<Ask>() == 40 && align_of::<Ask>() == 8);
