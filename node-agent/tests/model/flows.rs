//! Flows that a node translates, as the reference remembers them.

use std::collections::BTreeMap;

use super::{
    frame::{ACK, FIN, Frame, ICMP, ICMPV6, RST, SCTP, SYN, TCP, UDP},
    rules::SetId,
    world::End,
};

/// What a packet says of where it comes from and goes to. An echo has its identifier as port of who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tuple {
    pub(crate) proto: u8,
    pub(crate) src: End,
    pub(crate) dst: End,
}

impl Tuple {
    pub(crate) const fn of(frame: &Frame) -> Self {
        Self { proto: frame.proto, src: frame.src, dst: frame.dst }
    }

    pub(crate) const fn reversed(&self) -> Self {
        Self { proto: self.proto, src: self.dst, dst: self.src }
    }

    /// The packet with these addresses and ports.
    pub(crate) fn carried_by(&self, frame: &Frame) -> Frame {
        Frame { src: self.src, dst: self.dst, ..frame.clone() }
    }
}

/// Whether it is an echo request or an echo.
pub(crate) const fn is_echo(frame: &Frame) -> bool {
    matches!((frame.proto, frame.flags), (ICMP, 0 | 8) | (ICMPV6, 128 | 129))
}

pub(crate) fn has_transport(frame: &Frame) -> bool {
    frame.fragment.is_none_or(|(from, ..)| from == 0)
}

/// Whether a packet belongs to something that has two ends and ports.
pub(crate) fn is_flow(frame: &Frame) -> bool {
    match frame.proto {
        TCP | UDP | SCTP => true,
        ICMP | ICMPV6 => is_echo(frame) || !has_transport(frame),
        _ => false,
    }
}

pub(crate) fn is_syn(frame: &Frame) -> bool {
    frame.proto == TCP && has_transport(frame) && frame.flags & (SYN | ACK) == SYN
}

/// SCTP's request to begin.
pub(crate) fn is_init(frame: &Frame) -> bool {
    frame.proto == SCTP && has_transport(frame) && frame.flags & ACK == 0
}

/// Where a client of a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Inside,
    /// This node's own stack.
    Host,
    Outside,
}

/// Why a flow is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It asks a service; the number tells a service from its successor of the same name.
    Service(SetId, From, u32),
    /// A pod speaks to the outside under the node's address.
    Masquerade,
    /// A connection of the node gave way to a flow that has its port.
    Evaded,
    /// The same of another's connection, which goes on without the node's stack.
    GaveWay,
}

impl Kind {
    /// Whether the node itself has opened it by asking a service.
    pub(crate) const fn is_hosts(&self) -> bool {
        matches!(self, Self::Service(_, From::Host, _))
    }

    /// Whether a client outside has opened it.
    pub(crate) const fn is_outside(&self) -> bool {
        matches!(self, Self::Service(_, From::Outside, _))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Reverse,
}

/// Both directions of what is translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flow {
    /// As its client sends.
    pub(crate) asked: Tuple,
    /// As it is sent on.
    pub(crate) sent: Tuple,
    pub(crate) kind: Kind,
    pub(crate) life: Life,
}

/// What a flow's packets have said of its end, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Life {
    /// Which directions have finished.
    pub(crate) finished: [bool; 2],
    /// Either has broken it off.
    pub(crate) reset: bool,
    /// Which directions have sent more than requests to begin, the one that began it aside.
    pub(crate) went_on: [bool; 2],
    /// The second of the last packet.
    pub(crate) last: u64,
}

impl Life {
    /// Of what a packet begins: also in its middle, when nobody remembers its beginning.
    pub(crate) fn begun_by(frame: &Frame) -> Self {
        let mut life = Self::default();
        life.note(frame, Direction::Forward);
        life
    }

    /// What a packet says of its flow.
    pub(crate) fn note(&mut self, frame: &Frame, direction: Direction) {
        let flags = if frame.proto == TCP && has_transport(frame) { frame.flags } else { 0 };
        let from = usize::from(direction == Direction::Reverse);
        self.went_on[from] |= !is_syn(frame) && !is_init(frame);
        self.reset |= flags & RST != 0;
        self.finished[from] |= flags & FIN != 0;
    }

    /// Whether either direction has said that it is done.
    pub(crate) fn is_closing(&self) -> bool {
        self.reset || self.finished != [false; 2]
    }

    /// Seconds without a packet after which nobody speaks any more: RFC 5382, section 5 (TCP), RFC 4787,
    /// section 4.3 (UDP), RFC 9260 (seven heartbeats of SCTP); sooner where both ends have agreed that it is
    /// over, where nobody has answered yet, or where who asked has not gone on from the answer.
    const fn limit(&self, proto: u8) -> u64 {
        const HOURS: u64 = 3_600;
        match (proto, self.finished, self.went_on) {
            (TCP | SCTP, ..) if self.reset => 10,
            (TCP, [true, true], _) => 30,
            (TCP, [true, _] | [_, true], _) => 240,
            (TCP, _, [true, true]) => 2 * HOURS + 240,
            (SCTP, _, [true, true]) => 210,
            (TCP | SCTP, ..) => 60,
            (UDP, _, [_, true]) => 180,
            // And echoes.
            _ => 30,
        }
    }
}

impl Flow {
    /// What packets of a direction become.
    pub(crate) const fn becomes(&self, direction: Direction) -> Tuple {
        match direction {
            Direction::Forward => self.sent,
            Direction::Reverse => self.asked.reversed(),
        }
    }

    /// What packets of a direction look like.
    pub(crate) const fn looks_like(&self, direction: Direction) -> Tuple {
        match direction {
            Direction::Forward => self.asked,
            Direction::Reverse => self.sent.reversed(),
        }
    }
}

/// Every flow.
#[derive(Debug, Default)]
pub(crate) struct Flows {
    by_number: BTreeMap<usize, Flow>,
    by_tuple: BTreeMap<Tuple, (usize, Direction)>,
    next: usize,
}

impl Flows {
    pub(crate) fn insert(&mut self, flow: Flow) {
        let number = self.next;
        self.next += 1;
        for direction in [Direction::Forward, Direction::Reverse] {
            let old = self.by_tuple.insert(flow.looks_like(direction), (number, direction));
            assert!(old.is_none(), "the reference itself gave a tuple to two flows");
        }
        self.by_number.insert(number, flow);
    }

    pub(crate) fn remove(&mut self, number: usize) {
        let Some(flow) = self.by_number.remove(&number) else { return };
        for direction in [Direction::Forward, Direction::Reverse] {
            self.by_tuple.remove(&flow.looks_like(direction));
        }
    }

    pub(crate) fn is_taken(&self, tuple: &Tuple) -> bool {
        self.by_tuple.contains_key(tuple)
    }

    pub(crate) fn find(&self, tuple: &Tuple) -> Option<(usize, Flow, Direction)> {
        let (number, direction) = self.by_tuple.get(tuple)?;
        Some((*number, self.by_number[number], *direction))
    }

    /// What has become of a flow.
    pub(crate) fn life(&mut self, number: usize) -> Option<&mut Life> {
        self.by_number.get_mut(&number).map(|flow| &mut flow.life)
    }

    /// Ends the flows that have been silent for too long at `now`; gives how many.
    pub(crate) fn expire(&mut self, now: u64) -> usize {
        let is_over = |flow: &Flow| now - flow.life.last > flow.life.limit(flow.asked.proto);
        let over = self.by_number.iter().filter(|(_, flow)| is_over(flow));
        let over: Vec<usize> = over.map(|(number, _)| *number).collect();
        over.iter().for_each(|number| self.remove(*number));
        over.len()
    }

    /// Of flows of some kinds the one of a number that counts around.
    pub(crate) fn nth(&self, number: usize, is_of: impl Fn(&Kind) -> bool) -> Option<Flow> {
        let flows = || self.by_number.values().filter(|flow| is_of(&flow.kind));
        let at = number.checked_rem(flows().count())?;
        flows().nth(at).copied()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.by_number.values()
    }
}
