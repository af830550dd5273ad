//! Which backends stand behind an address and a port, by the rules of Services as kube-proxy has them:
//! `pkg/proxy/topology.go` (conditions, hints, policies) and `pkg/proxy/iptables/proxier.go` (which
//! addresses are bound by which policy and by source ranges); and which pod behind a port of the node, as the
//! `portmap` plugin of CNI has it (`hostPort`, `hostIP`).

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    frame::SCTP,
    world::{
        DNS, End, Endpoint, HostPort, LOOPBACK, NAMES, NODE, NODE_PORTS, PODS, Pair, Port, Service,
        State, World, ZONES, ip, is,
    },
};

/// Whose port it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Owner {
    /// That of a service, by its place.
    Service(u8, usize),
    /// A pod's at an address of the node or at all of them, by protocol and number.
    Pod(usize, Option<IpAddr>, u8, u16),
}

impl Owner {
    pub(crate) const fn of(port: &HostPort) -> Self {
        Self::Pod(port.pod, port.at, port.proto, port.port)
    }

    pub(crate) fn is_services(&self, number: u8) -> bool {
        matches!(self, Self::Service(service, _) if *service == number)
    }
}

/// What shares a client's affinity: a port in one family, as long as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PortId {
    pub(crate) owner: Owner,
    pub(crate) v6: bool,
}

/// What shares backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SetId {
    pub(crate) port: PortId,
    /// Only those on this node.
    pub(crate) local: bool,
}

/// What answers at an address and a port.
#[derive(Clone, Debug)]
pub(crate) struct Frontend {
    pub(crate) set: SetId,
    pub(crate) backends: BTreeSet<End>,
    pub(crate) affinity_s: u32,
    /// Only clients that are in one of them; `None` lets everybody in.
    pub(crate) ranges: Option<Vec<ipnet::IpNet>>,
    /// The backend is this node itself and never goes.
    pub(crate) node_local: bool,
    /// It leads to nobody here, and whoever balances the load by nodes is to find another one.
    pub(crate) is_elsewhere: bool,
}

/// What a destination is.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    Frontend(Frontend),
    /// In the range of service addresses, and no service has it.
    Nobody,
    /// No service.
    Nothing,
}

/// Looks a destination up; `outside` says that the client is not in the cluster.
pub(crate) fn find(world: &World, to: End, proto: u8, outside: bool) -> Found {
    // Services go before pods' ports at the same addresses.
    let services = world.services.iter().find_map(|service| at(service, to, proto, outside));
    let pods = || host_port(world, to, proto, &NODE).filter(|_| !is_claimed(world, to, proto));
    match services.or_else(pods) {
        Some(frontend) => Found::Frontend(frontend),
        None if World::is_service_address(&to.0) => Found::Nobody,
        None => Found::Nothing,
    }
}

/// Whether a service has an address and a port, served or not.
fn is_claimed(world: &World, to: End, proto: u8) -> bool {
    let mut services = world.services.iter().filter(|service| service.has(to.0.is_ipv6()));
    services.any(|service| {
        let mut ports = service.ports.iter().filter(|port| port.proto == proto);
        ports.any(|port| reach(service, port, to).is_some())
    })
}

/// The pod behind a port at one of these addresses.
fn host_port(world: &World, to: End, proto: u8, at: &[Pair]) -> Option<Frontend> {
    let is_ours = at.iter().any(|pair| is(*pair, &to.0));
    let answers = |one: &&HostPort| {
        one.at.is_none_or(|at| at == to.0) && (one.proto, one.port) == (proto, to.1)
    };
    let port = world.host_ports.iter().filter(|_| is_ours).find(answers)?;
    let v6 = to.0.is_ipv6();
    let set = SetId { port: PortId { owner: Owner::of(port), v6 }, local: false };
    Some(Frontend {
        set,
        backends: members(world, set),
        affinity_s: 0,
        ranges: None,
        node_local: false,
        is_elsewhere: false,
    })
}

fn at(service: &Service, to: End, proto: u8, outside: bool) -> Option<Frontend> {
    let v6 = to.0.is_ipv6();
    if !service.has(v6) {
        return None;
    }
    let (index, port, reach) = service
        .ports
        .iter()
        .enumerate()
        .filter(|(_, port)| port.proto == proto)
        .find_map(|(index, port)| Some((index, port, reach(service, port, to)?)))?;
    let is_cluster_ip = matches!(reach, Reach::ClusterIp);
    // What starts in the cluster may use every backend, as if it had asked the cluster IP.
    let local =
        if is_cluster_ip { service.internal_local } else { service.external_local && outside };
    let of_family = |net: &&ipnet::IpNet| net.addr().is_ipv6() == v6;
    let ranges: Vec<_> = service.ranges.iter().filter(of_family).copied().collect();
    let is_limited = matches!(reach, Reach::Ingress) && !ranges.is_empty();
    let owner = Owner::Service(service.number, index);
    let set = SetId { port: PortId { owner, v6 }, local };
    let all = |local| backends(service, port, v6, local);
    let frontend = Frontend {
        set,
        backends: all(local),
        affinity_s: service.affinity_s,
        ranges: is_limited.then_some(ranges),
        node_local: service.node_local && !v6,
        is_elsewhere: local && !is_cluster_ip && all(true).is_empty() && !all(false).is_empty(),
    };
    is_served(service, port, (to.1, v6, is_cluster_ip)).then_some(frontend)
}

/// By which of a service's addresses it was reached.
enum Reach {
    ClusterIp,
    Ingress,
    External,
    NodePort,
}

fn reach(service: &Service, port: &Port, (addr, number): End) -> Option<Reach> {
    let v6 = addr.is_ipv6();
    if number == port.port {
        if addr == service.cluster_ip(v6) {
            return Some(Reach::ClusterIp);
        }
        if service.ingress && addr == service.ingress_ip(v6) {
            return Some(Reach::Ingress);
        }
        if service.external && addr == service.external_ip(v6) {
            return Some(Reach::External);
        }
    }
    let is_node_port = number == port.node_port && (NODE_PORTS.0..=NODE_PORTS.1).contains(&number);
    (is_node_port && World::is_node(&addr)).then_some(Reach::NodePort)
}

/// A pod's port or a node port asked for at a loopback address.
pub(crate) fn at_loopback(world: &World, to: End, proto: u8) -> Option<Frontend> {
    let node = (ip(NODE[0], to.0.is_ipv6()), to.1);
    let is_node_port = (NODE_PORTS.0..=NODE_PORTS.1).contains(&to.1);
    let service = world.services.iter().find_map(|service| at(service, node, proto, false));
    match service.filter(|_| is_node_port) {
        Some(frontend) => (world.loopback_ports && is(LOOPBACK, &to.0)).then_some(frontend),
        None => host_port(world, to, proto, &[LOOPBACK]),
    }
}

/// The backends of a set while its port is there.
pub(crate) fn members(world: &World, set: SetId) -> BTreeSet<End> {
    let (number, index) = match set.port.owner {
        Owner::Service(number, index) => (number, index),
        Owner::Pod(pod, ..) => {
            let port = world.host_ports.iter().find(|one| Owner::of(one) == set.port.owner);
            return port
                .map(|port| (ip(PODS[pod], set.port.v6), port.target))
                .into_iter()
                .collect();
        }
    };
    let service = world.services.iter().find(|service| service.number == number);
    let port = service.and_then(|service| Some((service, service.ports.get(index)?)));
    port.map(|(service, port)| backends(service, port, set.port.v6, set.local)).unwrap_or_default()
}

/// Whether an address serves a port. SCTP's port cannot be changed, so what leads to another one for clients
/// inside or outside is not served.
fn is_served(service: &Service, port: &Port, (to, v6, cluster_ip): (u16, bool, bool)) -> bool {
    let fits = |local| backends(service, port, v6, local).iter().all(|backend| backend.1 == to);
    match (port.proto, cluster_ip) {
        (SCTP, true) => fits(service.internal_local),
        (SCTP, false) => fits(false) && (!service.external_local || fits(true)),
        _ => true,
    }
}

/// Whether anything leads to a port at all; SCTP's may lose all that do.
pub(crate) fn is_reachable(service: &Service, index: usize, v6: bool) -> bool {
    let port = &service.ports[index];
    let is_served = |to, cluster_ip| is_served(service, port, (to, v6, cluster_ip));
    is_served(port.port, true)
        || ((service.external || service.ingress) && is_served(port.port, false))
        || (port.node_port != 0 && is_served(port.node_port, false))
}

fn backends(service: &Service, port: &Port, v6: bool, local: bool) -> BTreeSet<End> {
    if service.node_local && !v6 {
        return BTreeSet::from([(ip(DNS, false), port.port)]);
    }
    let here = |endpoint: &Endpoint| endpoint.place.node() == NAMES[0];
    let hinted = hinted(&service.endpoints);
    let ready = |endpoint: &Endpoint| {
        endpoint.state == State::Ready && if local { here(endpoint) } else { hinted(endpoint) }
    };
    let draining =
        |endpoint: &Endpoint| endpoint.state == State::Draining && (!local || here(endpoint));
    let target = |endpoint: &Endpoint| -> (IpAddr, u16) {
        (endpoint.place.ip(v6), port.targets[usize::from(endpoint.second_target)])
    };
    let all = service.endpoints.iter();
    let chosen: BTreeSet<End> = all.clone().filter(|one| ready(one)).map(target).collect();
    if !chosen.is_empty() {
        return chosen;
    }
    all.filter(|one| draining(one)).map(target).collect()
}

/// What hints leave of the ready endpoints. They count only if every ready endpoint has one of the kind
/// and one of them is for us; those that name a node go before those that name a zone.
fn hinted(endpoints: &[Endpoint]) -> Box<dyn Fn(&Endpoint) -> bool> {
    let ready = || endpoints.iter().filter(|endpoint| endpoint.state == State::Ready);
    if ready().all(|one| one.hinted_node.is_some())
        && ready().any(|one| one.hinted_node == Some(NAMES[0]))
    {
        return Box::new(|one| one.hinted_node == Some(NAMES[0]));
    }
    if ready().all(|one| one.zone.is_some()) && ready().any(|one| one.zone == Some(ZONES[0])) {
        return Box::new(|one| one.zone == Some(ZONES[0]));
    }
    Box::new(|_| true)
}
