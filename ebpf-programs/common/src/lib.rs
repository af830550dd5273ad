//! The kernel ABI: what eBPF programs and the agent must agree on, byte for byte.
//!
//! Pure: no allocation, no I/O. Everything here is tested on the host and runs in the kernel.
//!
//! IPv4 only for now. IPv6, NetworkPolicy and affinity get maps of their own beside these (the map
//! names below leave `…6` and `POLICY…` free), so that adding them does not change a layout in use.
#![no_std]
#![warn(missing_docs)]

pub mod config;
pub mod conntrack;
pub mod endpoint;
pub mod packet;
#[cfg(feature = "user")]
mod pod;
pub mod service;
pub mod tunnel;
pub mod verdict;

/// Version of the map layouts. It is part of the pin path, so that two layouts never share a map.
pub const ABI_VERSION: u32 = 1;

/// Protocol number of TCP (IANA).
pub const TCP: u8 = 6;
/// Protocol number of UDP (IANA).
pub const UDP: u8 = 17;

/// Names and sizes of the maps. A name has at most 15 bytes (`BPF_OBJ_NAME_LEN` is 16 with its NUL).
pub mod maps {
    /// [`crate::config::Config`], one row.
    pub const CONFIG: &str = "CONFIG";
    /// [`crate::service::ServiceKey`] to [`crate::service::Service`].
    pub const SERVICES: &str = "SERVICES";
    /// [`crate::service::BackendKey`] to [`crate::service::Backend`].
    pub const BACKENDS: &str = "BACKENDS";
    /// Address of this node to 1: where `NodePort` services answer.
    pub const NODE_ADDRS: &str = "NODE_ADDRS";
    /// MAC of this node (two zero bytes after it) to 1: frames from it that come in are echoes.
    pub const LOCAL_MACS: &str = "LOCAL_MACS";
    /// Pod address to [`crate::endpoint::Endpoint`].
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Pod CIDR of another node (longest prefix) to [`crate::tunnel::Tunnel`].
    pub const TUNNELS: &str = "TUNNELS";
    /// [`crate::conntrack::FlowKey`] to [`crate::conntrack::Flow`]: both halves of every flow that
    /// is translated per packet.
    pub const CONNTRACK: &str = "CONNTRACK";
    /// Packets by [`crate::verdict::DropReason`], per CPU.
    pub const COUNTERS: &str = "COUNTERS";
    /// Per socket: which backend stands for which service ([`crate::service::SocketTranslation`]).
    pub const SOCKETS: &str = "SOCKETS";

    /// 65,536 frontends: the upstream limit of services a cluster is tested with is 10,000, each
    /// with a few ports. Not preallocated, so an empty map costs only its buckets (8 B each).
    pub const SERVICES_MAX: u32 = 65_536;
    /// Four backends for each frontend on average; not preallocated.
    pub const BACKENDS_MAX: u32 = 262_144;
    /// Addresses of one node.
    pub const NODE_ADDRS_MAX: u32 = 256;
    /// Pods of one node: the /24 of a node has 254; room for larger ranges.
    pub const ENDPOINTS_MAX: u32 = 4_096;
    /// Nodes of a cluster (upstream's limit is 5,000).
    pub const TUNNELS_MAX: u32 = 16_384;
    /// Both halves of 65,536 flows.
    pub const CONNTRACK_MAX: u32 = 131_072;
}
