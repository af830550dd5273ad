//! Pods of this node.

/// How a packet reaches a pod of this node. The key is the pod's address in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Interface index of the host's end of the veth pair.
    pub ifindex: u32,
    /// MAC address of the host's end: source of frames to the pod.
    pub host_mac: [u8; 6],
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
}
const _: () = assert!(size_of::<Endpoint>() == 16 && align_of::<Endpoint>() == 4);
