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

/// What the twin of the socket programs returns: the socket goes where it wants to.
pub const LEFT: i32 = 0;
/// It goes to the [`Peer`] that lies where the question lay.
pub const TRANSLATED: i32 = 1;
/// The packet held no question.
pub const NO_QUESTION: i32 = 2;
/// It is refused; the reason's number is added to this.
pub const REFUSED: i32 = 256;

impl Ask {
    /// The question as the twin reads it.
    #[must_use]
    pub fn bytes(&self) -> [u8; size_of::<Self>()] {
        let mut bytes = [0; size_of::<Self>()];
        bytes[..8].copy_from_slice(&self.netns.to_ne_bytes());
        bytes[8..24].copy_from_slice(&self.wanted.addr.octets());
        bytes[24..26].copy_from_slice(&self.wanted.port);
        bytes[28..32].copy_from_slice(&self.random.to_ne_bytes());
        bytes[32..34].copy_from_slice(&[self.proto, self.call]);
        bytes
    }
}
