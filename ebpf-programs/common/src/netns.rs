//! Network namespaces whose packets pass Orlop's programs.

use crate::addr::Addr;

/// A namespace; the key is its cookie (`SO_NETNS_COOKIE`). Sockets in a namespace that has a row are
/// seen by the packet path too, so what must follow its backends is left to that path.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Netns {
    /// Address by family (IPv4, IPv6) under which its packets are seen: a pod's own, or the node's
    /// gateway addresses. Zero: none.
    pub addr: [Addr; 2],
}
const _: () = assert!(size_of::<Netns>() == 32 && align_of::<Netns>() == 4);
