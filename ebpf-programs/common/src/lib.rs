//! The kernel ABI: what eBPF programs and the agent must agree on, byte for byte.
//!
//! Pure: no allocation, no I/O. Everything here is tested on the host and runs in the kernel.
//!
//! One form of address serves both families ([`addr::Addr`]), so there is one set of maps. NetworkPolicy
//! gets maps of its own beside these (`POLICY…` is free), so that adding it changes no layout in use.
#![no_std]
#![warn(missing_docs)]

pub mod addr;
pub mod affinity;
pub mod config;
pub mod conntrack;
pub mod csum;
pub mod device;
pub mod endpoint;
pub mod event;
pub mod fragment;
pub mod maglev;
pub mod netns;
pub mod packet;
#[cfg(feature = "user")]
mod pod;
pub mod service;
pub mod socket;
pub mod trace;
pub mod tunnel;
pub mod verdict;

/// Version of the map layouts. It is part of the pin path, so that two layouts never share a map.
pub const ABI_VERSION: u32 = 4;

/// Protocol number of TCP (IANA).
pub const TCP: u8 = 6;
/// Protocol number of UDP (IANA).
pub const UDP: u8 = 17;
/// Protocol number of SCTP (IANA).
pub const SCTP: u8 = 132;
/// Protocol number of ICMP (IANA).
pub const ICMP: u8 = 1;
/// Protocol number of ICMPv6 (IANA).
pub const ICMPV6: u8 = 58;

/// Names and sizes of the maps. A name has at most 15 bytes (`BPF_OBJ_NAME_LEN` is 16 with its NUL).
pub mod maps {
    /// [`crate::config::Config`], one row.
    pub const CONFIG: &str = "CONFIG";
    /// [`crate::service::ServiceKey`] to [`crate::service::Service`].
    pub const SERVICES: &str = "SERVICES";
    /// [`crate::service::BackendKey`] to [`crate::service::Backend`].
    pub const BACKENDS: &str = "BACKENDS";
    /// Address of this node, where `NodePort` services answer, to 1, with [`crate::conntrack::LED_TO`] beside it.
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
    /// The connection table before it grew; rows are looked up here when [`CONNTRACK`] has none. Its
    /// place is taken by an empty table of one row while nothing grows.
    pub const CONNTRACK_OLD: &str = "CONNTRACK_OLD";
    /// [`crate::affinity::MemberKey`] to its slot: who may be chosen by affinity, and whose flows of datagrams stay.
    pub const MEMBERS: &str = "MEMBERS";
    /// [`crate::affinity::AffinityKey`] to [`crate::affinity::Affinity`], least recently used go first.
    pub const AFFINITY: &str = "AFFINITY";
    /// [`crate::service::SourceRange`] (longest prefix; 32 bits of service, then the address) to 1.
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    /// [`crate::maglev::MaglevKey`] to [`crate::maglev::MaglevBlock`].
    pub const MAGLEV: &str = "MAGLEV";
    /// Cookie of a network namespace to [`crate::netns::Netns`].
    pub const NETNS: &str = "NETNS";
    /// Interface index to [`crate::device::Device`].
    pub const DEVICES: &str = "DEVICES";
    /// [`crate::fragment::FragmentKey`] to [`crate::fragment::Fragment`], least recently used go first.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Answers that tell of refusals in this second ([`crate::verdict::Budget`]), one row per CPU.
    pub const REFUSALS: &str = "REFUSALS";
    /// Ring of [`crate::event::Event`]; each load of the programs has its own.
    pub const EVENTS: &str = "EVENTS";
    /// Events for which the ring had no room, one row per CPU; as [`EVENTS`].
    pub const EVENTS_LOST: &str = "EVENTS_LOST";
    /// Per socket: which backend stands for which service ([`crate::service::SocketTranslation`]).
    pub const SOCKETS: &str = "SOCKETS";

    /// What a traced run noted ([`crate::trace::Step`]); each copy of the programs has its own.
    pub const TRACE: &str = "TRACE";
    /// How many steps it noted.
    pub const TRACE_LENGTH: &str = "TRACE_LENGTH";
    /// Flows that it would have added, as in [`CONNTRACK`].
    pub const TRACE_FLOWS: &str = "TRACE_FLOWS";
    /// The constant in read-only data that makes a copy of the programs trace.
    pub const TRACING: &str = "TRACING";

    /// 65,536 frontends: the upstream limit of services a cluster is tested with is 10,000, each
    /// with a few ports. Not preallocated, so an empty map costs only its buckets (16 B each). This
    /// and the sizes below are what a map has when the agent asks for nothing else.
    pub const SERVICES_MAX: u32 = 65_536;
    /// Four backends for each frontend on average; not preallocated.
    pub const BACKENDS_MAX: u32 = 262_144;
    /// Backends of services with affinity, and of UDP.
    pub const MEMBERS_MAX: u32 = 65_536;
    /// Clients that are remembered; the least recently used are forgotten first.
    pub const AFFINITY_MAX: u32 = 65_536;
    /// Ranges of all services together.
    pub const SOURCE_RANGES_MAX: u32 = 65_536;
    /// Blocks of 64 slots: 1,024 externally reachable services with 64 backends each.
    pub const MAGLEV_MAX: u32 = 131_072;
    /// Network namespaces: pods of one node and the node itself.
    pub const NETNS_MAX: u32 = 4_096;
    /// Network devices of the node that carry traffic of pods.
    pub const DEVICES_MAX: u32 = 256;
    /// Fragmented packets under way.
    pub const FRAGMENTS_MAX: u32 = 8_192;
    /// Addresses of one node.
    pub const NODE_ADDRS_MAX: u32 = 256;
    /// Addresses of the pods of one node: a /24 has 254 of one family; room for larger ranges.
    pub const ENDPOINTS_MAX: u32 = 8_192;
    /// Two families of pod CIDRs and addresses of each node of a cluster (upstream's limit is 5,000).
    pub const TUNNELS_MAX: u32 = 32_768;
    /// Both halves of 65,536 flows.
    pub const CONNTRACK_MAX: u32 = 131_072;
    /// Both halves of the flows that one traced packet would open on its way; a program opens one.
    pub const TRACE_FLOWS_MAX: u32 = 16;
}
