//! Where a packet goes on, as far as a test run shows it: by its verdict, its hops and its MACs.

use super::{
    flows::{Direction, Flow, From, Kind},
    frame::Frame,
    rig::{HOST_MAC, OWN_MAC, PASS, REDIRECT, pod_mac},
    world::World,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// To the stack that the packet would have met anyway.
    Stack,
    /// Into a pod of this node.
    Pod(usize),
    /// To the node's stack, as if it had come by the host device.
    Host,
    /// By the tunnel, or by a device to the next hop.
    Out,
}

impl Way {
    /// The way of a translated packet.
    pub(crate) fn of(flow: &Flow, direction: Direction) -> Self {
        let to = flow.becomes(direction).dst.0;
        match (flow.kind, direction) {
            (Kind::Evaded, _) => Self::Stack,
            (Kind::Service(_, From::Host, _), Direction::Reverse) => Self::Host,
            (Kind::Service(_, From::Host, _), Direction::Forward) if World::is_node(&to) => {
                Self::Host
            }
            (Kind::Service(..) | Kind::GaveWay, Direction::Forward) if World::is_node(&to) => {
                Self::Stack
            }
            (Kind::Service(..) | Kind::Masquerade | Kind::GaveWay, _) => Self::to(&to),
        }
    }

    /// The way of what is for a pod here or for somebody elsewhere.
    pub(crate) fn to(addr: &std::net::IpAddr) -> Self {
        World::pod(addr).map_or(Self::Out, Self::Pod)
    }

    pub(crate) const fn verdict(self) -> i32 {
        match self {
            Self::Stack => PASS,
            Self::Pod(_) | Self::Host | Self::Out => REDIRECT,
        }
    }

    /// The packet as it is then.
    pub(crate) fn taken(self, frame: &Frame) -> Vec<u8> {
        let ttl = frame.ttl.wrapping_sub(1);
        match self {
            Self::Stack => frame.bytes(),
            Self::Pod(index) => {
                let macs = Frame { dst_mac: pod_mac(index), src_mac: HOST_MAC, ..frame.clone() };
                Frame { ttl, ..macs }.bytes()
            }
            Self::Host => Frame { dst_mac: OWN_MAC, src_mac: [0; 6], ..frame.clone() }.bytes(),
            Self::Out => Frame { ttl, ..frame.clone() }.bytes(),
        }
    }
}
