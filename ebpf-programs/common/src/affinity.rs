//! Clients that stay with their backend (`sessionAffinity: ClientIP`).

use crate::{addr::Addr, service::Peer};

/// A client of a service port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AffinityKey {
    /// The client's address; for a process whose namespace is not known, one that stands for the
    /// namespace's cookie: 0.0.0.0/8 with its low 24 bits, or 100::/64 with all of them.
    pub client: Addr,
    /// [`crate::service::Service::service`].
    pub service: u32,
}
const _: () = assert!(size_of::<AffinityKey>() == 20 && align_of::<AffinityKey>() == 4);

/// Where the client went last.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    /// The backend.
    pub backend: Peer,
    /// Seconds of the monotonic clock when the client last opened a connection.
    pub last_used: u32,
}
const _: () = assert!(size_of::<Affinity>() == 24 && align_of::<Affinity>() == 4);

/// A backend that belongs to a set, whose slot is the row's value; there only for services with affinity and
/// for UDP. A remembered backend that is no member any more is forgotten, and a flow of datagrams moves.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberKey {
    /// [`crate::service::Service::set`].
    pub set: u32,
    /// The backend.
    pub backend: Peer,
}
const _: () = assert!(size_of::<MemberKey>() == 24 && align_of::<MemberKey>() == 4);

/// Whether a choice made `last_used` still holds at `now`, both in seconds of the monotonic clock.
#[inline(always)]
#[must_use]
pub const fn holds(last_used: u32, now: u32, timeout_s: u32) -> bool {
    now.wrapping_sub(last_used) < timeout_s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_holds_up_to_its_time_also_where_the_clock_wraps() {
        assert!(holds(10, 10, 1));
        assert!(holds(10, 10_809, 10_800));
        assert!(!holds(10, 10_810, 10_800));
        assert!(holds(u32::MAX - 1, 3, 6));
        assert!(!holds(u32::MAX - 1, 4, 6));
    }
}
