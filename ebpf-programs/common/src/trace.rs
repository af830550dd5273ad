//! What a traced run of a program notes: one step per row that it looked up, wrote or removed, and per
//! thing that it did.

/// Steps that a run can note; what comes after them is counted only.
pub const STEPS: u32 = 64;
/// Words of the longest key ([`crate::conntrack::FlowKey`]).
pub const KEY_WORDS: usize = 10;
/// Words of the longest row that is noted ([`crate::conntrack::Flow`]).
pub const ROW_WORDS: usize = 16;

/// One step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// One of the constants below: which map, or what was done.
    pub kind: u32,
    /// Of a look-up: 1 if there is a row. Of an insertion: 1 if the key is free.
    pub yes: u32,
    /// The map's key as it lies in memory; zero after its end.
    pub key: [u32; KEY_WORDS],
    /// The map's row as it lies in memory if `yes`; zero after its end.
    pub row: [u32; ROW_WORDS],
}
const _: () = assert!(size_of::<Step>() == 112 && align_of::<Step>() == 4);

/// [`crate::maps::SERVICES`] was looked up.
pub const SERVICE: u32 = 1;
/// [`crate::maps::BACKENDS`] was looked up.
pub const BACKEND: u32 = 2;
/// [`crate::maps::NODE_ADDRS`] was looked up.
pub const NODE_ADDRESS: u32 = 3;
/// [`crate::maps::AFFINITY`] was looked up.
pub const CLIENT: u32 = 4;
/// A row of [`crate::maps::AFFINITY`] would be written.
pub const KEEP_CLIENT: u32 = 5;
/// [`crate::maps::MEMBERS`] was looked up.
pub const MEMBER: u32 = 6;
/// [`crate::maps::SOURCE_RANGES`] was looked up; the key without the length of its prefix.
pub const SOURCE_RANGE: u32 = 7;
/// [`crate::maps::NETNS`] was looked up.
pub const NETNS: u32 = 8;
/// [`crate::maps::ENDPOINTS`] was looked up.
pub const ENDPOINT: u32 = 9;
/// [`crate::maps::TUNNELS`] was looked up; the key is the address.
pub const TUNNEL: u32 = 10;
/// [`crate::maps::CONNTRACK`] was looked up.
pub const FLOW: u32 = 11;
/// A row of [`crate::maps::CONNTRACK`] would be added.
pub const ADD_FLOW: u32 = 12;
/// A row of [`crate::maps::CONNTRACK`] would be removed.
pub const REMOVE_FLOW: u32 = 13;
/// A backend is chosen by the flow's hash ([`crate::maglev`]); the key is the set, then zero.
pub const MAGLEV: u32 = 14;
/// [`crate::maps::FRAGMENTS`] was looked up.
pub const FRAGMENT: u32 = 15;
/// A row of [`crate::maps::FRAGMENTS`] would be written.
pub const KEEP_FRAGMENT: u32 = 16;
/// [`crate::maps::DEVICES`] was looked up.
pub const DEVICE: u32 = 17;
/// A drop would be counted; the key is the reason.
pub const DROP: u32 = 32;
/// The packet is sent on; the key is the interface index, then one of [`PLAIN`], [`PEER`],
/// [`NEIGHBOUR`].
pub const REDIRECT: u32 = 33;
/// A tunnel key is set; the key is the node's address, then the network identifier.
pub const TUNNEL_KEY: u32 = 34;
/// The kernel's routes were asked; the key is the destination, the row the interface index.
pub const ROUTE: u32 = 35;
/// The kernel's routes and neighbours were asked; the key is the destination, the row the interface index,
/// absent also where the neighbour is not known yet.
pub const NEXT_HOP: u32 = 36;

/// By the device as it is.
pub const PLAIN: u32 = 0;
/// Into the namespace at the other end of a veth pair.
pub const PEER: u32 = 1;
/// To the next hop, which the kernel resolves.
pub const NEIGHBOUR: u32 = 2;
/// Into this node's own stack, as if it came in by the device.
pub const INWARD: u32 = 3;
