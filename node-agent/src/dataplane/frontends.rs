//! What one service should have in the maps: its frontends, and the backends behind them.
//!
//! Pure. Frontends of one service port in one family share sets of backends: one of all that may be
//! chosen and, where a policy `Local` asks for it, one of those on this node. Traffic that starts in
//! the cluster goes by the internal policy at the cluster IP, and to all backends at addresses that
//! are reachable from outside, as kube-proxy has it; only what comes in from outside is bound by the
//! external policy. Where that finds nobody on this node but somebody on another, what comes in is dropped:
//! a load balancer is about to hear so from the health check, and its clients try again. Inside the cluster
//! nobody balances by nodes; there the port is as one without endpoints, as the API has it.

use std::{net::IpAddr, sync::Arc};

use ebpf_common::{
    addr::Addr,
    service::{
        AT_SOCKET, Backend, ELSEWHERE, KEEP_SOURCE, SCOPE_EXTERNAL, SCOPE_INTERNAL, SCOPE_LOOPBACK,
        SOURCE_RANGES, ServiceKey,
    },
};
use ipnet::IpNet;

use super::select::{self, Place, Target};
use crate::model::{
    EndpointSliceRow, Family, Protocol, ServiceKind, ServicePort, ServiceRow, TrafficPolicy,
};

/// Backends of one port of a service; further ones are left out and the service is reported. The
/// largest cluster that upstream tests has 5,000 nodes and 10 endpoints a service on average.
pub const BACKENDS: usize = 10_000;

/// Which set of a port's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Cluster,
    Local,
}

/// One service port in one family: what shares sets, affinity and source ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub id: PortId,
    /// By [`Which`]; sorted, each once.
    pub backends: [Vec<Backend>; 2],
    pub frontends: Vec<Frontend>,
    pub affinity_s: u32,
    /// Prefix length in bits of the 128 of an address, and network address.
    pub ranges: Vec<(u32, Addr)>,
}

/// What makes a port the same one after a change, as upstream's `ServicePortName` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortId {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub family: Family,
}

/// One row that leads to a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    pub key: ServiceKey,
    pub which: Which,
    /// As in [`ebpf_common::service::Service::flags`].
    pub flags: u16,
    /// Traffic from outside finds this row: its choice is to be the same on every node.
    pub is_consistent: bool,
}

/// A service as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    pub ports: Vec<Port>,
    /// What is wrong with it, in words that name the field.
    pub problems: Vec<String>,
}

/// What this node adds.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    pub place: &'a Place,
    /// The address that answers for this service on this node itself.
    pub answers: Option<IpAddr>,
    /// First and last node port that the programs look for.
    pub node_ports: (u16, u16),
}

/// Everything that should be programmed for a service. `owns` says whether a frontend is this
/// service's: another may have claimed it before.
#[must_use]
pub fn desired(
    row: &ServiceRow,
    slices: &[impl AsRef<EndpointSliceRow>],
    node: Node<'_>,
    owns: impl Fn(&ServiceKey) -> bool,
) -> Desired {
    let mut desired = Desired::default();
    if !is_programmed(row) {
        return desired;
    }
    let families = families(row);
    for ip in row.external_ips.iter().chain(&row.ingress_ips) {
        if !families.contains(&Family::of(ip)) {
            let words = format!("{ip} is of a family that spec.clusterIPs lacks");
            desired.problems.push(words);
        }
    }
    desired.problems.extend(closed(row, &families));
    let mut seen = Vec::new();
    let (first, last) = node.node_ports;
    for (index, port) in row.ports.iter().enumerate() {
        let number = port.node_port;
        let is_outside = number != 0 && !(first..=last).contains(&number);
        if is_outside {
            desired.problems.push(format!(
                "spec.ports[{index}].nodePort: {number} is not in this node's --service-node-port-range \
                 {first}-{last} and does not answer here"
            ));
        }
        for family in &families {
            let mut frontends = frontends(row, port, *family);
            frontends.retain(|one| !(is_outside && is_node_port(&one.key)));
            let all = frontends.len();
            frontends.retain(|frontend| !seen.contains(&frontend.key));
            if frontends.len() < all {
                let words = format!("spec.ports[{index}]: its port or nodePort stands twice");
                note(&mut desired.problems, words);
            }
            seen.extend(frontends.iter().map(|frontend| frontend.key));
            frontends.retain(|frontend| owns(&claim(&frontend.key)));
            let backends = backends(row, port, slices, (*family, node));
            let built = build(row, (index, port), frontends, backends);
            built.problems.into_iter().for_each(|words| note(&mut desired.problems, words));
            desired.ports.extend(built.ports);
        }
    }
    desired
}

/// Words for the families of which nobody is let in, since no range can be read.
fn closed(row: &ServiceRow, families: &[Family]) -> impl Iterator<Item = String> {
    let is_closed = row.is_closed && !row.ingress_ips.is_empty();
    let closed = families.iter().filter(move |family| is_closed && !has_ranges(row, **family));
    closed.map(|family| {
        let name = family.name();
        format!(
            "spec.loadBalancerSourceRanges: no range of {name} can be read, so no client is let in \
             at the load balancer's addresses of {name}"
        )
    })
}

/// Whether a frontend stands for all addresses of the node.
fn is_node_port(key: &ServiceKey) -> bool {
    [Addr::ANY_V4, Addr::ANY_V6].contains(&key.addr)
}

/// Brings frontends and backends of a port together, as far as they fit.
fn build(
    row: &ServiceRow,
    (index, port): (usize, &ServicePort),
    mut frontends: Vec<Frontend>,
    mut backends: Backends,
) -> Desired {
    let mut problems = Vec::new();
    if backends.has_no_port {
        let name = &port.name;
        problems.push(format!(
            "spec.ports[{index}]: no EndpointSlice has port {name:?} of its protocol"
        ));
    }
    if backends.limit() {
        problems.push(format!("it has more than {BACKENDS} endpoints: the others are left out"));
    }
    if backends.at_socket {
        frontends.iter_mut().for_each(|frontend| frontend.flags |= AT_SOCKET);
    }
    if backends.are_elsewhere() {
        let outside = frontends.iter_mut().filter(|one| one.key.scope == SCOPE_EXTERNAL);
        outside.for_each(|frontend| frontend.flags |= ELSEWHERE);
    }
    if port.protocol == Protocol::Sctp {
        let all = frontends.len();
        // Without its row for clients outside, an address would give them the other one's backends.
        let unfit = frontends.iter().filter(|one| !backends.all_have(one.which, one.key.port));
        let unfit: Vec<ServiceKey> = unfit.map(|one| claim(&one.key)).collect();
        frontends.retain(|one| !unfit.contains(&claim(&one.key)));
        if frontends.len() < all {
            problems.push(format!(
                "spec.ports[{index}]: SCTP keeps its port; port, targetPort and nodePort must be \
                 the same"
            ));
        }
    }
    let family = backends.family;
    let port = Port {
        id: PortId { name: Arc::clone(&port.name), protocol: port.protocol, family },
        backends: backends.sets,
        ranges: ranges(row, &frontends, family),
        frontends,
        affinity_s: row.affinity_s,
    };
    let is_empty = port.frontends.is_empty();
    Desired { ports: if is_empty { Vec::new() } else { vec![port] }, problems }
}

/// The frontends that a service claims, whoever has them; internal rows stand for both scopes.
#[must_use]
pub fn claims(row: &ServiceRow) -> Vec<ServiceKey> {
    if !is_programmed(row) {
        return Vec::new();
    }
    let families = families(row);
    let ports = row.ports.iter().flat_map(|port| families.iter().map(move |family| (port, family)));
    let mut claims: Vec<ServiceKey> = ports
        .flat_map(|(port, family)| frontends(row, port, *family))
        .map(|frontend| claim(&frontend.key))
        .collect();
    claims.sort_unstable();
    claims.dedup();
    claims
}

/// The map key of a frontend.
#[must_use]
pub const fn key(addr: Addr, port: u16, protocol: Protocol) -> ServiceKey {
    let proto = match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    };
    ServiceKey { addr, port: port.to_be_bytes(), proto, scope: SCOPE_INTERNAL }
}

/// The claim that a row rests on.
const fn claim(key: &ServiceKey) -> ServiceKey {
    ServiceKey { scope: SCOPE_INTERNAL, ..*key }
}

/// Whether the service has anything that is programmed.
#[must_use]
pub fn is_programmed(row: &ServiceRow) -> bool {
    let has_address = match row.kind {
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => true,
        ServiceKind::Headless | ServiceKind::ExternalName => false,
    };
    has_address && row.unsupported.is_empty()
}

/// A service is of the families of its cluster IPs.
fn families(row: &ServiceRow) -> Vec<Family> {
    let has = |family: &Family| row.cluster_ips.iter().any(|ip| Family::of(ip) == *family);
    [Family::V4, Family::V6].into_iter().filter(has).collect()
}

fn has_ranges(row: &ServiceRow, family: Family) -> bool {
    row.source_ranges.iter().any(|range| Family::of(&range.network()) == family)
}

/// The rows of one port in one family. Where an address stands in several fields, the first one holds.
fn frontends(row: &ServiceRow, port: &ServicePort, family: Family) -> Vec<Frontend> {
    let internal = match row.internal_policy {
        TrafficPolicy::Cluster => Which::Cluster,
        TrafficPolicy::Local => Which::Local,
    };
    let mut found: Vec<Frontend> = Vec::with_capacity(1);
    for ip in row.cluster_ips.iter().filter(|ip| Family::of(ip) == family) {
        let mut key = key(Addr::from(*ip), port.port, port.protocol);
        if ip.is_loopback() {
            // Of a pod's port only: the API gives no service such an address.
            key.scope = SCOPE_LOOPBACK;
        }
        found.push(Frontend { key, which: internal, flags: 0, is_consistent: false });
    }
    let limit = if row.is_closed || has_ranges(row, family) { SOURCE_RANGES } else { 0 };
    let ingress = row.ingress_ips.iter().map(|ip| (ip, limit));
    let external = row.external_ips.iter().map(|ip| (ip, 0));
    let addresses = ingress.chain(external).filter(|(ip, _)| Family::of(ip) == family);
    let addresses = addresses.map(|(ip, flags)| (Addr::from(*ip), port.port, flags));
    let any = match family {
        Family::V4 => Addr::ANY_V4,
        Family::V6 => Addr::ANY_V6,
    };
    let node_port = (port.node_port != 0).then_some((any, port.node_port, 0));
    for (addr, number, flags) in addresses.chain(node_port) {
        let key = key(addr, number, port.protocol);
        if found.iter().any(|other| other.key == key) {
            continue;
        }
        let is_local = row.external_policy == TrafficPolicy::Local;
        found.push(Frontend { key, which: Which::Cluster, flags, is_consistent: !is_local });
        if is_local {
            let key = ServiceKey { scope: SCOPE_EXTERNAL, ..key };
            let flags = flags | KEEP_SOURCE;
            found.push(Frontend { key, which: Which::Local, flags, is_consistent: true });
        }
    }
    found
}

/// Both sets of a port, and what was noticed.
struct Backends {
    family: Family,
    sets: [Vec<Backend>; 2],
    has_any: bool,
    has_no_port: bool,
    at_socket: bool,
}

impl Backends {
    /// Cuts a set that is too long. Returns whether one was.
    fn limit(&mut self) -> bool {
        let is_over = self.sets.iter().any(|set| set.len() > BACKENDS);
        self.sets.iter_mut().for_each(|set| set.truncate(BACKENDS));
        is_over
    }

    /// Whether other nodes have some, and this one has none.
    const fn are_elsewhere(&self) -> bool {
        let [_, local] = &self.sets;
        self.has_any && local.is_empty()
    }

    fn all_have(&self, which: Which, port: [u8; 2]) -> bool {
        let [cluster, local] = &self.sets;
        let set = match which {
            Which::Cluster => cluster,
            Which::Local => local,
        };
        set.iter().all(|backend| backend.port == port)
    }
}

fn backends(
    row: &ServiceRow,
    port: &ServicePort,
    slices: &[impl AsRef<EndpointSliceRow>],
    (family, node): (Family, Node<'_>),
) -> Backends {
    if let Some(ip) = node.answers.filter(|ip| Family::of(ip) == family) {
        let own = vec![backend(&(ip, port.port))];
        let sets = [own.clone(), own];
        return Backends { family, sets, has_any: true, has_no_port: false, at_socket: true };
    }
    let choice = select::choose(row, port, slices, (family, node.place));
    let sorted = |targets: Vec<Target>| {
        let mut set: Vec<Backend> = targets.iter().map(backend).collect();
        set.sort_unstable();
        set
    };
    let of_family = || slices.iter().map(AsRef::as_ref).filter(|slice| slice.family == family);
    let has_port = |slice: &EndpointSliceRow| {
        slice.ports.iter().any(|one| one.name == port.name && one.protocol == port.protocol)
    };
    let has_endpoints = of_family().any(|slice| !slice.endpoints.is_empty());
    Backends {
        family,
        has_any: choice.has_any,
        has_no_port: has_endpoints && !of_family().any(has_port),
        sets: [sorted(choice.cluster), sorted(choice.local.unwrap_or_default())],
        at_socket: false,
    }
}

fn backend((ip, port): &Target) -> Backend {
    Backend { addr: Addr::from(*ip), port: port.to_be_bytes(), reserved: [0; 2] }
}

/// Ranges of the port's family, if a row of it asks for them.
fn ranges(row: &ServiceRow, frontends: &[Frontend], family: Family) -> Vec<(u32, Addr)> {
    if !frontends.iter().any(|frontend| frontend.flags & SOURCE_RANGES != 0) {
        return Vec::new();
    }
    let of_family = row.source_ranges.iter().filter(|range| Family::of(&range.network()) == family);
    let mut ranges: Vec<(u32, Addr)> = of_family.map(range).collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// IPv4 lies in the last 32 of 128 bits.
fn range(net: &IpNet) -> (u32, Addr) {
    let before = match net {
        IpNet::V4(_) => 96,
        IpNet::V6(_) => 0,
    };
    (u32::from(net.prefix_len()) + before, Addr::from(net.network()))
}

fn note(problems: &mut Vec<String>, words: String) {
    if !problems.contains(&words) {
        problems.push(words);
    }
}

#[cfg(test)]
#[path = "frontends_tests.rs"]
mod tests;
