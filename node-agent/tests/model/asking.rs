//! The reference's answers to sockets: what a process of the node or of a pod gets that connects or sends a
//! datagram.

use std::net::IpAddr;

use ebpf_common::verdict::DropReason;

use super::{
    frame::UDP,
    reference::{Client, Reference},
    rules::{self, Found, Frontend, PortId},
    world::{End, GATEWAY, PODS, World, ip},
};

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    Pod(usize),
    Node,
    /// A process in a namespace that Orlop does not know.
    Stranger,
}

impl Asker {
    /// What stands for the namespace's cookie.
    pub(crate) const fn cookie(self) -> u64 {
        match self {
            Self::Pod(index) => 100 + index as u64,
            Self::Node => 1,
            Self::Stranger => 999,
        }
    }

    fn client(self, v6: bool) -> Client {
        match self {
            Self::Pod(index) => Client::Ip(ip(PODS[index], v6)),
            Self::Node => Client::Ip(ip(GATEWAY, v6)),
            Self::Stranger => Client::Namespace(self.cookie()),
        }
    }
}

/// A question.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    pub(crate) asker: Asker,
    pub(crate) proto: u8,
    /// A datagram of a socket that is not connected; else it connects.
    pub(crate) datagram: bool,
    pub(crate) to: End,
    /// What the choice hangs on; the same number for the same socket.
    pub(crate) random: u32,
}

/// What it may be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// It goes where it wants to.
    Left,
    Refused(DropReason),
    /// To one of these, which its client then keeps if the port remembers its clients.
    OneOf(Vec<End>, PortId),
}

impl Reply {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Left => "sockets left alone",
            Self::Refused(_) => "sockets refused",
            Self::OneOf(..) => "sockets translated",
        }
    }
}

impl Reference {
    pub(crate) fn reply(&self, question: &Question) -> Reply {
        let Question { asker, proto, datagram, to, .. } = *question;
        let v6 = to.0.is_ipv6();
        let frontend = if is_loopback(&to.0) {
            // A pod's loopback address is its own.
            let is_served = asker == Asker::Node;
            is_served.then(|| rules::at_loopback(&self.world, to, proto)).flatten()
        } else {
            match rules::find(&self.world, to, proto, false) {
                Found::Frontend(frontend) => Some(frontend),
                Found::Nobody => return Reply::Refused(DropReason::UnknownService),
                Found::Nothing => None,
            }
        };
        let Some(frontend) = frontend else { return Reply::Left };
        if frontend.backends.is_empty() {
            return Reply::Refused(DropReason::NoBackend);
        }
        let client = asker.client(v6);
        if !admits(&frontend, client) {
            return Reply::Refused(DropReason::SourceRange);
        }
        // The packet path translates a connected socket's packets where it sees them, since there they
        // can move to another backend. It sees all of a pod's, and of the node those to service addresses.
        let is_seen = match asker {
            Asker::Pod(_) => true,
            Asker::Node => World::is_service_address(&to.0),
            Asker::Stranger => false,
        };
        if proto == UDP && !datagram && is_seen && !frontend.node_local {
            return Reply::Left;
        }
        Reply::OneOf(self.choices(&frontend, client), frontend.set.port)
    }

    /// Takes over what a socket got.
    pub(crate) fn take_reply(&mut self, question: &Question, port: PortId, backend: End) {
        let client = question.asker.client(question.to.0.is_ipv6());
        self.remember(port, client, backend);
    }
}

fn admits(frontend: &Frontend, client: Client) -> bool {
    let Some(ranges) = &frontend.ranges else { return true };
    match client {
        Client::Ip(client) => ranges.iter().any(|range| range.contains(&client)),
        // It has no address that is known, but it has one.
        Client::Namespace(_) => ranges.iter().any(|range| range.prefix_len() == 0),
    }
}

fn is_loopback(addr: &IpAddr) -> bool {
    addr.is_loopback()
}
