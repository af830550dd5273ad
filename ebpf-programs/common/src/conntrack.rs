//! Flows that are translated per packet: both halves, the port allocator, and when a flow is over.
//!
//! A flow has two rows, one per direction. The reverse row is inserted first and only if it is free,
//! so that a translated port can never be shared; the map is no LRU, so no half is ever evicted.

use crate::{ICMP, ICMPV6, SCTP, TCP, UDP, addr::Addr};

/// One direction of a flow, as the packet shows it. Network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub sport: [u8; 2],
    /// Destination port.
    pub dport: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub reserved: [u8; 3],
}
const _: () = assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 4);

impl FlowKey {
    /// The key of an answer to a packet of this one that nothing translates.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
            reserved: [0; 3],
        }
    }
}

/// In the flags of rows that say where a destination is ([`crate::endpoint::Endpoint`],
/// [`crate::tunnel::Tunnel`], [`crate::maps::NODE_ADDRS`]): flows lead there that keep their client's address, so
/// that what such a client sends there itself may have the ports of one. Set by the programs, each of whose bits
/// has a byte to itself.
pub const LED_TO: u32 = 1 << 8;

/// The row belongs to packets of the client.
pub const FORWARD: u8 = 0;
/// The row belongs to packets of the backend.
pub const REVERSE: u8 = 1;

/// A direction has sent FIN.
pub const SEEN_FIN: u8 = 1;
/// A direction has sent RST.
pub const SEEN_RST: u8 = 2;
/// A direction has sent anything but a request to begin: who has sent it and asks for no more has heard the other
/// side. On the row of answers it says that somebody answers, on that of questions that the answer was wanted.
pub const SEEN_REPLY: u8 = 4;

/// What this row translates is for this node's own stack, which is to see it come in by the host
/// device: an answer to the node's own question.
pub const FLOW_TO_HOST: u16 = 1;
/// What this row translates is for this node's own stack as it came in.
pub const FLOW_LOCAL: u16 = 2;
/// The port on the far side is one of a device's own address: the node's own connections must not
/// meet it. On both rows.
pub const FLOW_MASQUERADE: u16 = 4;
/// What this row translates goes by the tunnel table also where that leads to a node itself, since
/// the source is a pod.
pub const FLOW_FROM_POD: u16 = 8;

/// What becomes of a packet of this direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// New source address.
    pub src: Addr,
    /// New destination address.
    pub dst: Addr,
    /// New source port.
    pub sport: [u8; 2],
    /// New destination port.
    pub dport: [u8; 2],
    /// Interface by which what this row translates leaves when it is for neither a pod nor this node;
    /// on the reverse row the one by which the client's packets came in. 0: ask the routing table.
    pub ifindex: u32,
    /// Seconds of the monotonic clock when the last packet was seen.
    pub last_seen: u32,
    /// [`FORWARD`] or [`REVERSE`].
    pub direction: u8,
    /// `SEEN_…` bits.
    pub seen: u8,
    /// `FLOW_…` bits.
    pub flags: u16,
    /// [`crate::service::Service::service`]; 0 for a flow that belongs to none.
    pub service: u32,
    /// [`crate::service::Service::set`] from which the backend was chosen; 0 for none.
    pub set: u32,
    /// Where in the set the backend was seen last.
    pub slot: u32,
}
const _: () = assert!(size_of::<Flow>() == 60 && align_of::<Flow>() == 4);

impl Flow {
    /// The key of the other direction: what answers to a packet translated by this row look like.
    #[inline(always)]
    #[must_use]
    pub const fn opposite(&self, proto: u8) -> FlowKey {
        FlowKey {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto,
            reserved: [0; 3],
        }
    }

    /// Whether this direction has said that it is done.
    #[inline(always)]
    #[must_use]
    pub const fn is_closing(&self) -> bool {
        self.seen & (SEEN_FIN | SEEN_RST) != 0
    }
}

/// First port that the node uses as source of translated flows. The range lies below Linux's
/// ephemeral range (`ip_local_port_range` 32768 to 60999) and the node ports, so that it meets
/// neither the node's own connections from the gateway address nor a listener on a node port.
pub const SNAT_FIRST: u16 = 1_024;
/// Last such port.
pub const SNAT_LAST: u16 = 29_999;
/// How many ports are tried for a new flow before it is dropped and counted. Where nine of ten are taken one flow
/// in 850 finds none (of 16 tries it were 18 in a hundred), and the packet that its sender repeats tries others.
/// Linux tries 128 at first (`nf_nat_l4proto_unique_tuple`, net/netfilter/nf_nat_core.c); each costs the verifier
/// some 36 steps in each program.
pub const SNAT_TRIES: u32 = 64;

/// The port for try number `attempt` (from 0): the client's own if it lies in the range, then steps
/// of a stride that is coprime to the range's length, from a start spread by `random`.
#[inline(always)]
#[must_use]
pub const fn snat_port(client_port: u16, random: u32, attempt: u32) -> u16 {
    const LENGTH: u32 = SNAT_LAST as u32 - SNAT_FIRST as u32 + 1;
    // 7919 is prime and does not divide the length (28,976 = 2^4 * 1811).
    const STRIDE: u32 = 7_919;
    if attempt == 0 && client_port >= SNAT_FIRST && client_port <= SNAT_LAST {
        return client_port;
    }
    let offset = ((random & 0xffff) + attempt * STRIDE) % LENGTH;
    SNAT_FIRST + offset as u16
}

/// Seconds without a packet after which a flow is over.
///
/// Sources: RFC 5382 section 5 asks for at least 2 h 4 min for an established TCP connection and
/// 4 min for a closing one; RFC 4787 section 4.3 for at least 2 min for UDP, more than 2 min once
/// answers came. Closing flows are dropped sooner since both ends have agreed. A connection whose
/// client has not answered the backend's SYN-ACK is given Linux's 60 s (`tcp_timeouts`, `SYN_RECV`,
/// net/netfilter/nf_conntrack_proto_tcp.c) instead of the RFC's 4 min: whoever invents clients'
/// addresses fills the table with such. SCTP sends a heartbeat every 30 s (RFC 9260, HB.interval), of
/// which seven may be lost. An echo is answered within seconds or not at all.
#[must_use]
pub const fn idle_limit_s(proto: u8, forward_seen: u8, reverse_seen: u8) -> u32 {
    let either = forward_seen | reverse_seen;
    let is_begun = forward_seen & reverse_seen & SEEN_REPLY != 0;
    match proto {
        TCP if either & SEEN_RST != 0 => 10,
        TCP if forward_seen & reverse_seen & SEEN_FIN != 0 => 30,
        TCP if either & SEEN_FIN != 0 => 240,
        TCP if !is_begun => 60,
        TCP => 7_440,
        SCTP if either & SEEN_RST != 0 => 10,
        SCTP if either & SEEN_FIN != 0 => 30,
        SCTP if !is_begun => 60,
        SCTP => 210,
        ICMP | ICMPV6 => 30,
        UDP if reverse_seen & SEEN_REPLY == 0 => 30,
        _ => 180,
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ports_stay_in_range_differ_and_keep_the_clients_when_they_can() {
        assert_eq!(snat_port(2_000, 99, 0), 2_000);
        assert_ne!(snat_port(40_000, 99, 0), 40_000);
        for random in [0, 1, 65_535, u32::MAX] {
            let ports: BTreeSet<u16> =
                (0..SNAT_TRIES).map(|attempt| snat_port(40_000, random, attempt)).collect();
            assert_eq!(ports.len(), SNAT_TRIES as usize, "no try is wasted");
            assert!(ports.iter().all(|port| (SNAT_FIRST..=SNAT_LAST).contains(port)));
        }
    }

    #[test]
    fn a_flow_and_its_answer_find_each_other() {
        let flow = Flow {
            src: Addr::v4([10, 244, 1, 1]),
            dst: Addr::v4([10, 244, 2, 7]),
            sport: [4, 0],
            dport: [0, 80],
            ..Flow::default()
        };
        let answer = flow.opposite(TCP);
        assert_eq!((answer.src, answer.sport), (Addr::v4([10, 244, 2, 7]), [0, 80]));
        assert_eq!((answer.dst, answer.dport), (Addr::v4([10, 244, 1, 1]), [4, 0]));
    }

    #[test]
    fn limits_shrink_as_a_connection_ends() {
        assert_eq!(idle_limit_s(TCP, SEEN_REPLY, SEEN_REPLY), 7_440);
        assert_eq!(idle_limit_s(TCP, 0, 0), 60);
        assert_eq!(idle_limit_s(TCP, 0, SEEN_REPLY), 60, "the client may not exist");
        assert_eq!(idle_limit_s(TCP, SEEN_REPLY, 0), 60, "nobody answers");
        assert_eq!(idle_limit_s(TCP, SEEN_FIN, SEEN_REPLY), 240);
        assert_eq!(idle_limit_s(TCP, SEEN_FIN, SEEN_FIN | SEEN_REPLY), 30);
        assert_eq!(idle_limit_s(TCP, SEEN_RST, SEEN_REPLY), 10);
        assert_eq!(idle_limit_s(SCTP, SEEN_REPLY, SEEN_REPLY), 210);
        assert_eq!(idle_limit_s(SCTP, 0, SEEN_REPLY), 60);
        assert_eq!(idle_limit_s(SCTP, SEEN_FIN, SEEN_REPLY), 30);
        assert_eq!(idle_limit_s(ICMP, 0, SEEN_REPLY), idle_limit_s(ICMPV6, 0, 0));
        assert_eq!(idle_limit_s(UDP, 0, 0), 30);
        assert_eq!(idle_limit_s(UDP, 0, SEEN_REPLY), 180);
    }
}
