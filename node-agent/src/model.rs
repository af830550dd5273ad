//! What the agent keeps of API objects: compact rows, parsed once when an object arrives.
//!
//! Pure types. A row holds only what a subsystem of this node reads, since a node must afford tens of
//! thousands of them. Rows are shared by the dataplane, the overlay and the DNS server.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    ops::Deref,
    sync::Arc,
};

use ipnet::IpNet;

/// Namespace and name of an object; cluster-scoped objects have an empty namespace. Its texts are
/// shared, since tables, models and plans all hold keys of the same objects.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
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

impl Protocol {
    /// As the API has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// Address family, of a slice or of an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    #[default]
    V4,
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: &IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// As `EndpointSlice.addressType` says it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// `Service.spec.type`; `Headless` is a `ClusterIP` service whose cluster IP is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceKind {
    #[default]
    ClusterIp,
    Headless,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// `spec.internalTrafficPolicy` or `spec.externalTrafficPolicy`: whose endpoints may be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

/// A list that is empty in most rows and then takes eight bytes. It reads as a slice.
#[derive(Clone, PartialEq, Eq)]
pub struct Few<T>(Option<Box<Rest<T>>>);

#[derive(Clone, PartialEq, Eq)]
struct Rest<T> {
    rows: Box<[T]>,
}

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> From<Vec<T>> for Few<T> {
    fn from(rows: Vec<T>) -> Self {
        Self((!rows.is_empty()).then(|| Box::new(Rest { rows: rows.into() })))
    }
}

impl<T> FromIterator<T> for Few<T> {
    fn from_iter<I: IntoIterator<Item = T>>(rows: I) -> Self {
        rows.into_iter().collect::<Vec<T>>().into()
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.as_ref().map_or(&[], |rest| &rest.rows)
    }
}

impl<T: PartialEq, const N: usize> PartialEq<[T; N]> for Few<T> {
    fn eq(&self, other: &[T; N]) -> bool {
        **self == *other
    }
}

impl<'a, T> IntoIterator for &'a Few<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<T: fmt::Debug> fmt::Debug for Few<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// One `Service`, as far as this node needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceRow {
    pub kind: ServiceKind,
    /// `spec.clusterIPs`; empty for headless and `ExternalName` services.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Few<IpAddr>,
    /// The IPs of `status.loadBalancer.ingress` whose `ipMode` is not `Proxy`.
    pub ingress_ips: Few<IpAddr>,
    /// `spec.externalName`, empty for other kinds.
    pub external_name: Box<str>,
    pub ports: Vec<ServicePort>,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// Seconds that a client stays with its backend (`spec.sessionAffinity: ClientIP`); 0 means that
    /// there is no affinity.
    pub affinity_s: u32,
    pub internal_policy: TrafficPolicy,
    /// `Cluster` unless the service can be reached from outside.
    pub external_policy: TrafficPolicy,
    /// `spec.healthCheckNodePort` where it is to be served: a load balancer with the external policy
    /// `Local`. Otherwise 0.
    pub health_check_port: u16,
    /// `spec.loadBalancerSourceRanges`; without one of a family, everybody of it is let in unless `is_closed`.
    pub source_ranges: Few<IpNet>,
    /// Some of `spec.loadBalancerSourceRanges` cannot be read: nobody is let in of a family without ranges.
    pub is_closed: bool,
    /// `metadata.creationTimestamp`, seconds since 1970; of two services that claim the same address
    /// or node port, the older one has it.
    pub created_s: i64,
    /// Paths of fields that this agent does not implement; a service with any of them is not programmed. The ports
    /// that have them are not in `ports`.
    pub unsupported: Few<Box<str>>,
    /// Parts of the object that contradict themselves and were left out, in words that name the field.
    pub rejected: Few<Box<str>>,
}

impl ServiceRow {
    /// Whether anything but a cluster IP leads to the service.
    #[must_use]
    pub fn is_externally_reachable(&self) -> bool {
        !self.external_ips.is_empty()
            || !self.ingress_ips.is_empty()
            || self.ports.iter().any(|port| port.node_port != 0)
    }
}

/// One entry of `Service.spec.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty when the service has one unnamed port. Shared with what is planned of it.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    /// 0 when the port has no node port.
    pub node_port: u16,
}

/// One `EndpointSlice`: its key's service is in `service`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSliceRow {
    /// The service it belongs to (`kubernetes.io/service-name` and the slice's namespace).
    pub service: ObjectKey,
    /// `addressType`; every endpoint's address is of this family.
    pub family: Family,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<EndpointRow>,
    /// Parts of the object that contradict themselves and were left out, in words that name the field.
    pub rejected: Few<Box<str>>,
}

/// One entry of `EndpointSlice.ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
}

/// One entry of `EndpointSlice.endpoints` (its first address; upstream writes exactly one).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRow {
    pub ip: IpAddr,
    /// `conditions.ready`; absent means ready.
    pub ready: bool,
    /// `conditions.serving`; absent means serving, as kube-proxy reads it.
    pub serving: bool,
    pub terminating: bool,
    /// `hostname`, for the DNS names of a headless service's pods; may be empty.
    pub hostname: Box<str>,
    /// `nodeName`; may be empty.
    pub node: Box<str>,
    /// `hints`; most endpoints have none.
    pub hints: Option<Box<Hints>>,
}

impl Default for EndpointRow {
    /// A ready endpoint without an address.
    fn default() -> Self {
        Self {
            ip: IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
            ready: true,
            serving: true,
            terminating: false,
            hostname: "".into(),
            node: "".into(),
            hints: None,
        }
    }
}

/// Which clients an endpoint is meant for (`EndpointHints`). Written by whoever writes slices, by
/// `spec.trafficDistribution`; the node only follows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names in `forZones`.
    pub zones: Box<[Box<str>]>,
    /// Names in `forNodes`.
    pub nodes: Box<[Box<str>]>,
}

/// One `Node`, as far as the overlay needs it. The key is its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    /// The `InternalIP` addresses of its status.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    pub ready: bool,
    /// It is being deleted, or the cluster autoscaler has marked it for that: it is to get no new
    /// traffic from outside.
    pub leaving: bool,
    pub labels: BTreeMap<String, String>,
}

/// Where this node's pods get their addresses, and how large their packets may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNetwork {
    /// One pod CIDR, or two of different families; the first one's family is the pods' first.
    pub cidrs: Vec<IpNet>,
    /// Largest packet of a pod, bytes: the underlay's less what the overlay adds.
    pub mtu: u32,
}

/// A pod of this node as the packet path sees it: the CNI server writes it, the dataplane reads it.
/// The key of its table is the pod's IP address; a pod of both families has two rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// Namespace and name of the pod, or of the CNI container id when another runtime called us.
    pub pod: ObjectKey,
    pub ip: IpAddr,
    /// Cookie of the pod's network namespace (`SO_NETNS_COOKIE`); 0 if it is not known.
    pub netns_cookie: u64,
    /// Interface index of the host's end of the veth pair.
    pub host_ifindex: u32,
    pub host_mac: [u8; 6],
    pub pod_mac: [u8; 6],
    /// Ports of the node that lead to the pod, the same for all of its addresses.
    pub host_ports: Arc<[HostPort]>,
}

/// Up to where the dataplane has programmed the pods of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Programmed {
    /// The revision of their table.
    pub revision: u64,
    /// Pods that could not be served yet, and are tried again; all others are.
    pub refused: BTreeSet<IpAddr>,
}

impl Programmed {
    /// Whether a pod that came into the table by this revision is served at all of its addresses.
    #[must_use]
    pub fn serves(&self, revision: u64, ips: impl IntoIterator<Item = IpAddr>) -> bool {
        self.revision >= revision && !ips.into_iter().any(|ip| self.refused.contains(&ip))
    }
}

/// A port of the node that leads to a pod (`hostPort`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// At which of the node's addresses; `None` means all, and loopback's for the node itself.
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub protocol: Protocol,
    /// The pod's port.
    pub container_port: u16,
}

impl HostPort {
    /// Whether two cannot be served at once: the same port and protocol at a common address.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        let is_common = match (self.host_ip, other.host_ip) {
            (Some(one), Some(other)) => one == other,
            (None, _) | (_, None) => true,
        };
        self.host_port == other.host_port && self.protocol == other.protocol && is_common
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host_ip, host_port, protocol, container_port: _ } = self;
        match host_ip {
            Some(ip) => write!(f, "{}/{}", SocketAddr::new(*ip, *host_port), protocol.name()),
            None => write!(f, "{host_port}/{}", protocol.name()),
        }
    }
}

/// How the pods of a CIDR, or a node's own address, are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FarEnd {
    /// The node's address.
    pub node: IpAddr,
    pub path: FarPath,
}

/// By what the pods of a CIDR are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FarPath {
    Tunnel,
    /// The kernel's routes.
    Routes,
    /// The devices of this node's own pods; nobody is at an address that no pod has.
    Here,
}
