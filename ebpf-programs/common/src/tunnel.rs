//! Pods of other nodes, and what is left of this node's own range.

use crate::addr::Addr;

/// The node is reached by the kernel's routes (L3), not through the tunnel.
pub const ROUTED: u32 = 1;
/// The range is this node's own: an address of it that no endpoint has is the stack's, whose route says that
/// nobody is there. Always with [`ROUTED`].
pub const HERE: u32 = 2;

/// Where the pods of a CIDR are reached. A row whose key is the node's own address (whole prefix) serves
/// pods that speak to the node itself: the underlay need not know pod addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// The node's address: the far end of the tunnel.
    pub node: Addr,
    /// [`ROUTED`], [`HERE`], [`crate::conntrack::LED_TO`].
    pub flags: u32,
}
const _: () = assert!(size_of::<Tunnel>() == 20 && align_of::<Tunnel>() == 4);
