//! What the agent keeps of API objects: compact rows, parsed once when an object arrives.
//!
//! Pure types. A row holds only what a subsystem of this node reads, since a node must afford tens of
//! thousands of them. Rows are shared by the dataplane, the overlay and the DNS server.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

/// Namespace and name of an object; cluster-scoped objects have an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub namespace: Box<str>,
    pub name: Box<str>,
}

impl ObjectKey {
    /// Builds a key; pass `""` as namespace for cluster-scoped objects.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Transport protocol of a service port; the values are the IP protocol numbers (IANA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Protocol {
    Tcp = 6,
    Udp = 17,
    Sctp = 132,
}

/// `Service.spec.type`; `Headless` is a `ClusterIP` service whose cluster IP is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    ClusterIp,
    Headless,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// One `Service`, as far as this node needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRow {
    pub kind: ServiceKind,
    /// `spec.clusterIPs`; empty for headless and `ExternalName` services.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs` and the IPs of `status.loadBalancer.ingress`.
    pub external_ips: Vec<IpAddr>,
    /// `spec.externalName`, empty for other kinds.
    pub external_name: Box<str>,
    pub ports: Vec<ServicePort>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Field paths that this agent does not implement; a service with any of them is not programmed.
    pub unsupported: Vec<Box<str>>,
}

/// One entry of `Service.spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty when the service has one unnamed port.
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
    /// 0 when the port has no node port.
    pub node_port: u16,
}

/// One `EndpointSlice`: its key's service is in `service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSliceRow {
    /// The service it belongs to (`kubernetes.io/service-name` and the slice's namespace).
    pub service: ObjectKey,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<EndpointRow>,
}

/// One entry of `EndpointSlice.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
}

/// One entry of `EndpointSlice.endpoints` (its first address; upstream writes exactly one).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRow {
    pub ip: IpAddr,
    /// `conditions.ready`; absent means ready.
    pub ready: bool,
    /// `conditions.serving`; absent means the value of `ready`.
    pub serving: bool,
    pub terminating: bool,
    /// `hostname`, for the DNS names of a headless service's pods; may be empty.
    pub hostname: Box<str>,
    /// `nodeName`; may be empty.
    pub node: Box<str>,
}

/// One `Node`, as far as the overlay needs it. The key is its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    /// The `InternalIP` addresses of its status.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    pub ready: bool,
    pub labels: BTreeMap<String, String>,
}

/// A pod of this node as the packet path sees it: the CNI server writes it, the dataplane reads it.
/// The key of its table is the pod's IP address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// Namespace and name of the pod, or of the CNI container id when another runtime called us.
    pub pod: ObjectKey,
    pub ip: Ipv4Addr,
    /// Interface index of the host's end of the veth pair.
    pub host_ifindex: u32,
    pub host_mac: [u8; 6],
    pub pod_mac: [u8; 6],
}
