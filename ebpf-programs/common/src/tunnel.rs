//! Pods of other nodes.

/// Where the pods of a CIDR are reached. A row whose key is the node's own address (prefix 32) serves
/// pods that speak to the node itself: the underlay need not know pod addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// The node's address, network order: the far end of the tunnel.
    pub node: [u8; 4],
    /// Zero; room for a key or an encryption index.
    pub reserved: u32,
}
const _: () = assert!(size_of::<Tunnel>() == 8 && align_of::<Tunnel>() == 4);
