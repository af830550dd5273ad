//! Pods of this node.

/// A flow of the pod is translated per packet: what is delivered to it may be an answer of such a flow.
/// Set by the programs.
pub const HAS_FLOWS: u32 = 1;

/// How a packet reaches a pod of this node. The key is the pod's address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Interface index of the host's end of the veth pair.
    pub ifindex: u32,
    /// MAC address of the host's end: source of frames to the pod.
    pub host_mac: [u8; 6],
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
    /// [`HAS_FLOWS`], [`crate::conntrack::LED_TO`].
    pub flags: u32,
}
const _: () = assert!(size_of::<Endpoint>() == 20 && align_of::<Endpoint>() == 4);
