//! What programs tell whoever listens: a row a connection that begins, ends or is refused, by a ring.
//!
//! Nothing is told per packet, and nothing at all unless [`crate::config::EVENTS`] is set.

use crate::{addr::Addr, conntrack::FlowKey, service::Peer};

/// Bytes of the ring, a power of two of whole pages: some 4,600 events, of which a listener that keeps up
/// has few at a time. When it is full, events are counted instead ([`crate::maps::EVENTS_LOST`]).
pub const RING_BYTES: u32 = 512 << 10;

/// A connection begins.
pub const OPENED: u8 = 1;
/// A connection ends, as its ends or its backend's going say.
pub const CLOSED: u8 = 2;
/// A packet is dropped or a connection refused, for [`Event::reason`].
pub const DROPPED: u8 = 3;

/// Decided where a socket connects or sends: there are no packets of it to be seen.
pub const SOCKET: u8 = 1;
/// Decided per packet.
pub const PACKET: u8 = 2;

/// One event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of the monotonic clock.
    pub at: u64,
    /// Cookie of the network namespace of a socket; 0 for packets.
    pub netns: u64,
    /// The packet as it came: who asks whom. A socket that connects has no source yet; of a packet that
    /// could not be read everything is zero.
    pub key: FlowKey,
    /// Under which source the far end sees it; zero where nothing was translated, and for sockets.
    pub source: Peer,
    /// Where it goes; zero where nothing was translated.
    pub to: Peer,
    /// [`OPENED`], [`CLOSED`] or [`DROPPED`].
    pub kind: u8,
    /// [`SOCKET`] or [`PACKET`].
    pub path: u8,
    /// Number of the [`crate::verdict::DropReason`].
    pub reason: u8,
    /// The row of a flow that tells of its end ([`crate::conntrack::Flow::direction`]).
    pub direction: u8,
    /// Zero.
    pub reserved: u32,
}
const _: () = assert!(size_of::<Event>() == 104 && align_of::<Event>() == 8);

impl Event {
    /// Reads an event as it lies in the ring; `None` if it is too short for one.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let event = Self {
            at: u64::from_ne_bytes(take(&mut rest)?),
            netns: u64::from_ne_bytes(take(&mut rest)?),
            key: FlowKey {
                src: Addr::from_octets(take(&mut rest)?),
                dst: Addr::from_octets(take(&mut rest)?),
                sport: take(&mut rest)?,
                dport: take(&mut rest)?,
                proto: u8::from_ne_bytes(take(&mut rest)?),
                reserved: take(&mut rest)?,
            },
            source: peer(&mut rest)?,
            to: peer(&mut rest)?,
            kind: u8::from_ne_bytes(take(&mut rest)?),
            path: u8::from_ne_bytes(take(&mut rest)?),
            reason: u8::from_ne_bytes(take(&mut rest)?),
            direction: u8::from_ne_bytes(take(&mut rest)?),
            reserved: u32::from_ne_bytes(take(&mut rest)?),
        };
        Some(event)
    }
}

fn peer(rest: &mut &[u8]) -> Option<Peer> {
    let addr = Addr::from_octets(take(rest)?);
    Some(Peer { addr, port: take(rest)?, reserved: take(rest)? })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_field_by_field_and_a_piece_of_one_is_none() {
        let mut bytes = [0_u8; size_of::<Event>()];
        for (byte, value) in bytes.iter_mut().zip(1..) {
            *byte = value;
        }
        let event = Event::read(&bytes).unwrap();
        // Offsets by the layout that the kernel side writes.
        assert_eq!(event.at, u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!(event.netns.to_ne_bytes()[0], 9);
        let key = event.key;
        assert_eq!((key.src.octets()[0], key.dst.octets()[0]), (17, 33));
        assert_eq!((key.sport, key.dport, key.proto), ([49, 50], [51, 52], 53));
        assert_eq!((event.source.addr.octets()[0], event.source.port), (57, [73, 74]));
        assert_eq!((event.to.addr.octets()[0], event.to.port), (77, [93, 94]));
        assert_eq!((event.kind, event.path, event.reason, event.direction), (97, 98, 99, 100));
        assert_eq!(core::mem::offset_of!(Event, kind), 96);
        assert_eq!(core::mem::offset_of!(Event, to), 76);
        assert_eq!(Event::read(&bytes[..103]), None);
    }
}
