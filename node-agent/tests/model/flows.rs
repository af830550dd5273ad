//! Flows that a node translates, as the reference remembers them.

use std::collections::BTreeMap;

use crate::{
    frame::{Frame, ICMP, ICMPV6},
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
    /// Which directions have said that they are done.
    pub(crate) closing: [bool; 2],
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

    pub(crate) fn close(&mut self, number: usize, direction: Direction) {
        if let Some(flow) = self.by_number.get_mut(&number) {
            flow.closing[usize::from(direction == Direction::Reverse)] = true;
        }
    }

    /// The flow of a number that counts around.
    pub(crate) fn nth(&self, number: usize) -> Option<Flow> {
        let at = number.checked_rem(self.by_number.len())?;
        self.by_number.values().nth(at).copied()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.by_number.values()
    }
}
