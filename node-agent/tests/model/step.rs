//! What happens to a node in a case: packets, questions of sockets, and changes of services.

use std::net::IpAddr;

use super::{
    asking::Question,
    flows::{Direction, Flow, From, Kind, Tuple},
    frame::{ACK, Frame, ICMP, ICMPV6, SCTP, TCP, UDP},
    loaded::UPLINK_MAC,
    world::{Endpoint, GATEWAY, HostPort, Service, World, is},
};

/// Where a packet meets a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    FromPod,
    FromUnderlay,
    FromOverlay,
    FromHost,
    /// `own`: what the node itself sends; else it only passes through the node.
    ToPod {
        own: bool,
    },
    ToUnderlay {
        own: bool,
    },
    ToOverlay {
        own: bool,
    },
}

impl Hook {
    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::FromPod => "tc_from_pod",
            Self::FromUnderlay => "tc_from_underlay",
            Self::FromOverlay => "tc_from_overlay",
            Self::FromHost => "tc_from_host",
            Self::ToPod { .. } => "tc_to_pod",
            Self::ToUnderlay { .. } => "tc_to_underlay",
            Self::ToOverlay { .. } => "tc_to_overlay",
        }
    }

    /// Whether the packet came to this machine by a device.
    pub(crate) const fn came_by_device(self) -> bool {
        match self {
            Self::ToPod { own } | Self::ToUnderlay { own } | Self::ToOverlay { own } => !own,
            Self::FromPod | Self::FromUnderlay | Self::FromOverlay | Self::FromHost => false,
        }
    }
}

/// An ICMP error and the packet that it is about.
#[derive(Clone, Debug)]
pub(crate) struct Error {
    pub(crate) about: Frame,
    pub(crate) from: IpAddr,
    /// Type, code, and rest of the header.
    pub(crate) kind: (u8, u8, [u8; 4]),
    /// Bytes that are quoted.
    pub(crate) quoted: usize,
}

impl Error {
    pub(crate) fn frame(&self) -> Frame {
        let mut quote = self.about.bytes().split_off(14);
        quote.truncate(self.quoted);
        let error = Frame::error_quoting(self.kind, (self.from, self.about.src.0), &quote);
        Frame { dst_mac: self.about.dst_mac, ..error }
    }
}

/// A packet.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    Plain(Frame),
    Error(Error),
}

impl Message {
    pub(crate) fn frame(&self) -> Frame {
        match self {
            Self::Plain(frame) => frame.clone(),
            Self::Error(error) => error.frame(),
        }
    }

    /// As it comes to the device at a hook.
    pub(crate) fn at(&self, hook: Hook) -> Self {
        let mut message = self.clone();
        let frame = match &mut message {
            Self::Plain(frame) => frame,
            Self::Error(error) => &mut error.about,
        };
        if hook == Hook::FromUnderlay {
            frame.dst_mac = UPLINK_MAC;
        }
        if hook == Hook::FromOverlay && frame.src.1.is_multiple_of(2) {
            // As from the stack of another node, whose tunnel has no neighbours.
            frame.src_mac = frame.dst_mac;
        }
        message
    }
}

/// One event.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Send(Hook, Message),
    /// A packet in pieces, one after the other.
    Pieces(Hook, Frame),
    /// Another packet of a known flow, counted around.
    Again {
        flow: usize,
        /// Only those that clients outside have opened, if there are any.
        outside: bool,
        direction: Direction,
        flags: u8,
    },
    /// Who asks in a known flow sends to who answers as if it knew, with the flow's ports.
    Direct {
        flow: usize,
        flags: u8,
    },
    /// An error about a packet of a known flow that went in this direction.
    Tell {
        flow: usize,
        direction: Direction,
        by_router: bool,
        kind: (u8, u8, [u8; 4]),
        quoted: usize,
    },
    Ask(Question),
    /// A service has other endpoints.
    Endpoints(u8, Vec<Endpoint>),
    /// It comes, or goes.
    Service(u8, Option<Box<Service>>),
    /// Other ports of the node lead to pods.
    HostPorts(Vec<HostPort>),
    /// So many seconds go by.
    Wait(u32),
}

/// The packet of a known flow, and where it meets a program.
pub(crate) fn again(world: &World, flow: &Flow, direction: Direction, flags: u8) -> (Hook, Frame) {
    let mut frame = frame(flow.looks_like(direction));
    match frame.proto {
        TCP => frame.flags = flags,
        SCTP => frame.flags = flags & ACK,
        _ => {}
    }
    if matches!(frame.proto, ICMP | ICMPV6) && direction == Direction::Reverse {
        frame.flags = if frame.proto == ICMP { 0 } else { 129 };
    }
    (hook(world, flow, direction), frame)
}

/// A packet as its client's packets are sent on, but from the client itself.
pub(crate) fn direct(world: &World, flow: &Flow, flags: u8) -> (Hook, Frame) {
    let direct = Flow { asked: flow.sent, kind: Kind::GaveWay, ..*flow };
    again(world, &direct, Direction::Forward, flags)
}

/// Where packets of a flow meet a program.
pub(crate) fn hook(world: &World, flow: &Flow, direction: Direction) -> Hook {
    let from_host = matches!(flow.kind, Kind::Service(_, From::Host, _));
    let (sender, receiver) = match direction {
        Direction::Forward => (flow.asked.src.0, flow.asked.dst.0),
        Direction::Reverse => (flow.sent.dst.0, flow.sent.src.0),
    };
    let far = World::far_node_of_pod(&sender);
    if World::pod(&sender).is_some() {
        Hook::FromPod
    } else if from_host && (direction == Direction::Forward || World::is_node(&sender)) {
        Hook::FromHost
    } else if World::is_node(&sender) || is(GATEWAY, &sender) {
        let far = World::far_node_of_pod(&receiver);
        match far {
            _ if World::pod(&receiver).is_some() => Hook::ToPod { own: true },
            Some(node) if world.is_tunnelled(node) => Hook::ToOverlay { own: true },
            _ => Hook::ToUnderlay { own: true },
        }
    } else if far.is_some_and(|node| world.is_tunnelled(node)) {
        Hook::FromOverlay
    } else {
        Hook::FromUnderlay
    }
}

/// A packet with these addresses and ports, the first of its kind.
pub(crate) fn frame(tuple: Tuple) -> Frame {
    let mut frame = Frame::between(tuple.proto, tuple.src, tuple.dst);
    match tuple.proto {
        ICMP => frame.flags = 8,
        ICMPV6 => frame.flags = 128,
        _ => {}
    }
    frame
}

/// The pieces of a packet: a first one, one in the middle, the last one.
pub(crate) fn pieces(whole: &Frame) -> [Frame; 3] {
    let whole = Frame { payload: vec![7; 60], ..whole.clone() };
    let piece = |fragment| Frame { fragment: Some(fragment), ..whole.clone() };
    [piece((0, 24, true)), piece((24, 16, true)), piece((40, 100, false))]
}

/// The error that a packet of a flow brings about once it was translated.
pub(crate) fn told(
    flow: &Flow,
    direction: Direction,
    (by_router, kind, quoted): (Option<IpAddr>, (u8, u8, [u8; 4]), usize),
) -> Error {
    let mut about = frame(flow.becomes(direction));
    if about.proto == TCP {
        about.flags = ACK;
    }
    if matches!(about.proto, ICMP | ICMPV6) && direction == Direction::Reverse {
        about.flags = if about.proto == ICMP { 0 } else { 129 };
    }
    debug_assert!(about.proto != UDP || about.flags == 0);
    let from = by_router.unwrap_or(about.dst.0);
    Error { about, from, kind, quoted }
}
