//! Which endpoints stand behind a service port, as seen from this node.
//!
//! Pure. The rules are kube-proxy's (`pkg/proxy/topology.go`): ready endpoints, and only if there is
//! none those that still serve while they terminate (KEP-1669), for each scope by itself; hints
//! narrow the cluster's scope if every ready endpoint has some and one is for us.

use std::{collections::BTreeSet, net::IpAddr};

use crate::model::{EndpointRow, EndpointSliceRow, Family, ServicePort, ServiceRow, TrafficPolicy};

/// Where this node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub node: Box<str>,
    /// Its label `topology.kubernetes.io/zone`; may be empty.
    pub zone: Box<str>,
}

/// An address to which packets of a service port go.
pub type Target = (IpAddr, u16);

/// The endpoints of one service port in one family, sorted and each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// For traffic with the policy `Cluster`.
    pub cluster: Vec<Target>,
    /// For traffic with the policy `Local`; `None` when no traffic of this port has it.
    pub local: Option<Vec<Target>>,
    /// There are endpoints that could serve, here or elsewhere.
    pub has_any: bool,
}

/// Chooses the endpoints of a port.
#[must_use]
pub fn choose(
    row: &ServiceRow,
    port: &ServicePort,
    slices: &[impl AsRef<EndpointSliceRow>],
    (family, place): (Family, &Place),
) -> Choice {
    let all = candidates(row, port, slices, family);
    let outside = is_reachable_from_outside(row, port, family);
    let wants_cluster = row.internal_policy == TrafficPolicy::Cluster || outside;
    let wants_local = row.internal_policy == TrafficPolicy::Local
        || (row.external_policy == TrafficPolicy::Local && outside);
    let is_here = |one: &Candidate<'_>| is_here(one, place);
    let hints = narrowing(&all, place);
    let cluster = match wants_cluster {
        true => preferred(&all, |one| hints.admits(one.endpoint, place), |_| true),
        false => Vec::new(),
    };
    let local = wants_local.then(|| preferred(&all, is_here, is_here));
    let has_any = all.iter().any(|one| one.is_ready || one.is_draining());
    Choice { cluster, local, has_any }
}

/// How many ready endpoints a service has on this node: what its health check tells, as kube-proxy
/// counts it. Those that only drain are no reason to send new clients here. A pod of both families is
/// one endpoint.
#[must_use]
pub fn ready_here(
    row: &ServiceRow,
    slices: &[impl AsRef<EndpointSliceRow>],
    place: &Place,
) -> usize {
    let count = |family| {
        let all = row.ports.iter().flat_map(|port| candidates(row, port, slices, family));
        let here = all.filter(|one| one.is_ready && is_here(one, place));
        here.map(|one| one.endpoint.ip).collect::<BTreeSet<_>>().len()
    };
    count(Family::V4).max(count(Family::V6))
}

fn is_here(one: &Candidate<'_>, place: &Place) -> bool {
    !place.node.is_empty() && one.endpoint.node == place.node
}

/// Whether the port can be reached by anything but a cluster IP.
#[must_use]
pub fn is_reachable_from_outside(row: &ServiceRow, port: &ServicePort, family: Family) -> bool {
    let mut addresses = row.external_ips.iter().chain(&row.ingress_ips);
    port.node_port != 0 || addresses.any(|ip| Family::of(ip) == family)
}

/// An endpoint with the port that the slice gives it.
struct Candidate<'a> {
    endpoint: &'a EndpointRow,
    port: u16,
    is_ready: bool,
}

impl Candidate<'_> {
    const fn is_draining(&self) -> bool {
        self.endpoint.serving && self.endpoint.terminating
    }
}

/// Ready ones that `ready` admits; if there is none, those draining that `draining` admits.
fn preferred(
    all: &[Candidate<'_>],
    ready: impl Fn(&Candidate<'_>) -> bool,
    draining: impl Fn(&Candidate<'_>) -> bool,
) -> Vec<Target> {
    let chosen = targets(all.iter().filter(|one| one.is_ready && ready(one)));
    if !chosen.is_empty() {
        return chosen;
    }
    targets(all.iter().filter(|one| !one.is_ready && one.is_draining() && draining(one)))
}

/// Slices of a moving endpoint may both have it for a while, hence each target once.
fn targets<'a>(chosen: impl Iterator<Item = &'a Candidate<'a>>) -> Vec<Target> {
    let mut targets: Vec<Target> = chosen.map(|one| (one.endpoint.ip, one.port)).collect();
    targets.sort_unstable();
    targets.dedup();
    targets
}

/// The slices' ports are matched by name and protocol: their numbers already stand for what a named
/// target port is in those pods.
fn candidates<'a>(
    row: &ServiceRow,
    port: &ServicePort,
    slices: &'a [impl AsRef<EndpointSliceRow>],
    family: Family,
) -> Vec<Candidate<'a>> {
    let mut found = Vec::new();
    for slice in slices.iter().map(AsRef::as_ref).filter(|slice| slice.family == family) {
        let named = slice.ports.iter();
        for same in named.filter(|one| one.name == port.name && one.protocol == port.protocol) {
            found.extend(slice.endpoints.iter().map(|endpoint| Candidate {
                endpoint,
                port: same.port,
                // Upstream's slices say ready of every endpoint of such a service.
                is_ready: endpoint.ready || row.publish_not_ready,
            }));
        }
    }
    found
}

/// How hints narrow the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Narrowing {
    Nothing,
    ThisNode,
    ThisZone,
}

impl Narrowing {
    fn admits(self, endpoint: &EndpointRow, place: &Place) -> bool {
        match self {
            Self::Nothing => true,
            Self::ThisNode => hinted(endpoint, |hints| &hints.nodes).contains(&place.node),
            Self::ThisZone => hinted(endpoint, |hints| &hints.zones).contains(&place.zone),
        }
    }
}

/// Hints hold only if every ready endpoint has some: one without means that whoever writes them is
/// not done, and traffic must not pile up on the others meanwhile.
fn narrowing(all: &[Candidate<'_>], place: &Place) -> Narrowing {
    let ready = || all.iter().filter(|one| one.is_ready).map(|one| one.endpoint);
    let is_for = |of: fn(&crate::model::Hints) -> &[Box<str>], name: &str| {
        ready().all(|one| !hinted(one, of).is_empty())
            && ready().any(|one| hinted(one, of).iter().any(|hint| **hint == *name))
    };
    if is_for(|hints| &hints.nodes, &place.node) {
        return Narrowing::ThisNode;
    }
    if is_for(|hints| &hints.zones, &place.zone) {
        return Narrowing::ThisZone;
    }
    Narrowing::Nothing
}

fn hinted(endpoint: &EndpointRow, of: fn(&crate::model::Hints) -> &[Box<str>]) -> &[Box<str>] {
    endpoint.hints.as_deref().map_or(&[], of)
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
