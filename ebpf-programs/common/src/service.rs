//! Services and their backends, and the choice between backends.

use crate::{addr::Addr, verdict::DropReason};

/// Scope of traffic that starts in the cluster: pods and nodes. Every frontend has a row of it.
pub const SCOPE_INTERNAL: u8 = 0;
/// Scope of traffic that comes in from outside. A row of it is there only where it differs; without
/// one the internal row holds.
pub const SCOPE_EXTERNAL: u8 = 1;

/// Scope of a port at one of the node's loopback addresses: for sockets of the node itself. Packets never
/// ask for it, whatever addresses they bear.
pub const SCOPE_LOOPBACK: u8 = 2;

/// A frontend: where clients connect to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Service address; "any" of its family for a node port.
    pub addr: Addr,
    /// Port, network order.
    pub port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// [`SCOPE_INTERNAL`], [`SCOPE_EXTERNAL`] or [`SCOPE_LOOPBACK`].
    pub scope: u8,
}
const _: () = assert!(size_of::<ServiceKey>() == 20 && align_of::<ServiceKey>() == 4);

/// The client's source address is kept: backends are on this node (`externalTrafficPolicy: Local`).
pub const KEEP_SOURCE: u16 = 1;
/// Only clients in the service's source ranges are let in.
pub const SOURCE_RANGES: u16 = 2;
/// The backend is this node itself and never goes: connected UDP sockets are translated at once.
pub const AT_SOCKET: u16 = 4;
/// The row has no backend, and other nodes have some: whoever balances the load outside is to find them, so
/// that its clients' packets are dropped and sent again, as kube-proxy does it.
pub const ELSEWHERE: u16 = 8;

/// What a frontend leads to: backends `{set, 0}` to `{set, count - 1}`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service {
    /// Names the set of backends. Never 0. Frontends share sets.
    pub set: u32,
    /// Backends that may be chosen; 0 refuses every client, or drops what it sends ([`ELSEWHERE`]).
    pub count: u32,
    /// Names the service port: what affinity and source ranges hang on. Never 0.
    pub service: u32,
    /// Seconds for which a client stays with its backend; 0: no affinity.
    pub affinity_s: u32,
    /// [`KEEP_SOURCE`], [`SOURCE_RANGES`], [`AT_SOCKET`], [`ELSEWHERE`].
    pub flags: u16,
    /// Bits of a flow's hash that name its Maglev cell ([`crate::maglev::bits_for`]); 0: chosen by chance.
    pub maglev_bits: u8,
    /// Zero.
    pub reserved: u8,
}
const _: () = assert!(size_of::<Service>() == 20 && align_of::<Service>() == 4);

impl Service {
    /// Why a client gets no backend where there is none.
    #[inline(always)]
    #[must_use]
    pub const fn lack(&self) -> DropReason {
        if self.flags & ELSEWHERE == 0 { DropReason::NoBackend } else { DropReason::NoLocalBackend }
    }
}

/// Which backend of which set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendKey {
    /// [`Service::set`].
    pub set: u32,
    /// 0 to [`Service::count`] - 1.
    pub slot: u32,
}
const _: () = assert!(size_of::<BackendKey>() == 8 && align_of::<BackendKey>() == 4);

/// One backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Address.
    pub addr: Addr,
    /// Port, network order.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
}
const _: () = assert!(size_of::<Backend>() == 20 && align_of::<Backend>() == 4);

/// An address and a port in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// Address.
    pub addr: Addr,
    /// Port.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
}
const _: () = assert!(size_of::<Peer>() == 20 && align_of::<Peer>() == 4);

/// A range of clients that a service lets in. As key of a trie: 32 bits of service, then the address's
/// prefix (IPv4's 96 bits longer than it is written).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceRange {
    /// [`Service::service`].
    pub service: u32,
    /// Network address.
    pub addr: Addr,
}
const _: () = assert!(size_of::<SourceRange>() == 20 && align_of::<SourceRange>() == 4);

/// Translations remembered per socket: an unconnected UDP socket that speaks to more services than
/// this at once sees a backend's address in `recvfrom` for the oldest.
pub const TRANSLATIONS: usize = 4;

/// What a socket's connection or datagrams were translated from and to. Lives and dies with the socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketTranslation {
    /// What the program asked for.
    pub service: [Peer; TRANSLATIONS],
    /// What it got.
    pub backend: [Peer; TRANSLATIONS],
    /// Slot to be written next.
    pub next: u32,
    /// Zero.
    pub reserved: u32,
}
const _: () = assert!(size_of::<SocketTranslation>() == 168);

impl SocketTranslation {
    /// Remembers a translation unless it is already known; whether it was not.
    #[inline(always)]
    pub fn remember(&mut self, service: Peer, backend: Peer) -> bool {
        let mut slot = 0;
        while slot < TRANSLATIONS {
            if self.backend[slot] == backend && self.service[slot] == service {
                return false;
            }
            slot += 1;
        }
        let slot = self.next as usize & (TRANSLATIONS - 1);
        self.service[slot] = service;
        self.backend[slot] = backend;
        self.next = self.next.wrapping_add(1);
        true
    }

    /// The service for which `backend` stands on this socket; the newest when there are several.
    #[inline(always)]
    #[must_use]
    pub fn service_of(&self, backend: Peer) -> Option<Peer> {
        let mut age = 1;
        while age <= TRANSLATIONS {
            let slot = (self.next as usize).wrapping_sub(age) & (TRANSLATIONS - 1);
            if self.backend[slot] == backend {
                return Some(self.service[slot]);
            }
            age += 1;
        }
        None
    }
}

/// Maps 32 uniformly random bits onto `0..count` without division (multiply and shift); `None` when
/// there is nothing to choose from. Its bias is below `count / 2^32`.
#[inline(always)]
#[must_use]
pub const fn choose(random: u32, count: u32) -> Option<u32> {
    if count == 0 {
        return None;
    }
    Some(((random as u64 * count as u64) >> 32) as u32)
}

/// Mixes 64 bits into 32 (the finaliser of splitmix64): equal inputs always give the same choice.
#[inline(always)]
#[must_use]
pub const fn mix(value: u64) -> u32 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((value ^ (value >> 31)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> Peer {
        Peer { addr: Addr::v4([10, 0, 0, last]), port: [0, 80], reserved: [0; 2] }
    }

    #[test]
    fn the_choice_covers_every_slot_evenly_and_nothing_else() {
        assert_eq!(choose(7, 0), None);
        assert_eq!(choose(0, 3), Some(0));
        assert_eq!(choose(u32::MAX, 3), Some(2));
        let mut seen = [0_u32; 3];
        for cookie in 0..30_000 {
            let slot = choose(mix(cookie), 3).unwrap();
            seen[slot as usize] += 1;
        }
        // Chi-squared with two degrees of freedom: 13.8 is exceeded once in a thousand.
        let chi: f64 = seen.iter().map(|n| (f64::from(*n) - 10_000.0).powi(2) / 10_000.0).sum();
        assert!(chi < 13.8, "{seen:?}");
    }

    #[test]
    fn a_socket_remembers_its_last_four_services() {
        let mut socket = SocketTranslation::default();
        assert_eq!(socket.service_of(peer(1)), None);
        for last in 1..=4 {
            assert!(socket.remember(peer(100 + last), peer(last)));
            assert!(!socket.remember(peer(100 + last), peer(last)));
        }
        for last in 1..=4 {
            assert_eq!(socket.service_of(peer(last)), Some(peer(100 + last)));
        }
        assert!(socket.remember(peer(105), peer(5)));
        assert_eq!(socket.service_of(peer(1)), None);
        assert_eq!(socket.service_of(peer(5)), Some(peer(105)));
        assert!(socket.remember(peer(106), peer(5)));
        assert_eq!(socket.service_of(peer(5)), Some(peer(106)), "the newest wins");
    }
}
