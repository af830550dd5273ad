//! From nodes to tunnels, routes and the addresses of this node.
//!
//! Pure. Routes of ours carry a protocol number of their own, by which they are told from the routes
//! of others, which are never touched.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ebpf_common::config::asker_for;
use ipnet::IpNet;

use crate::{
    cni::ipam::gateway,
    model::{FarEnd, FarPath, NodeRow, ObjectKey},
    sys::netlink::{Owner, Route, Scope},
};

/// How pods of other nodes are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Always through the tunnel.
    Vxlan,
    /// Always by a route over the node's address; the network must carry pod addresses.
    L3,
    /// By a route where the node is on the same network, through the tunnel elsewhere; decided for
    /// each node and family.
    Auto,
    /// Somebody else connects pods; only the host device is ours.
    Off,
}

/// Bytes that VXLAN adds: IPv4 20 or IPv6 40, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348 section 5).
const fn vxlan_overhead(outer: IpAddr) -> u32 {
    match outer {
        IpAddr::V4(_) => 50,
        IpAddr::V6(_) => 70,
    }
}

/// Smallest link that IPv6 runs over (RFC 8200 section 5).
const IPV6_MIN_MTU: u32 = 1280;

/// What does not change while the agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of this node.
    pub name: String,
    pub mode: Mode,
    /// The cluster's service ranges, at most one of a family.
    pub service_cidrs: Vec<IpNet>,
    /// Where the host device has its addresses from while no pod CIDR gives it one, at most one of a
    /// family. The first host is this node's own.
    pub link_cidrs: Vec<IpNet>,
}

/// An address of this node on the network that connects nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnderlayAddress {
    /// The address with the prefix of its network.
    pub net: IpNet,
    /// The device that has it.
    pub device: u32,
    /// Of that device, bytes.
    pub mtu: u32,
}

/// What this node's kernel has, as far as the overlay needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The main address first, at most one of a family.
    pub addresses: Vec<UnderlayAddress>,
    /// The VXLAN device, if there is one.
    pub vxlan: Option<u32>,
    /// The host device.
    pub host: u32,
    /// Its peer, where our program is.
    pub host_peer: u32,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// This node's pod CIDRs, at most one of a family, in the order of its Node object.
    pub pod_cidrs: Vec<IpNet>,
    /// Addresses of the host device by family (IPv4, IPv6): the first host of the pod CIDR, or of the
    /// link's range for a family without one.
    pub gateways: [Option<IpAddr>; 2],
    /// Pod CIDR to node, this one's own too; for peers through the tunnel also the node's own addresses.
    pub tunnels: BTreeMap<IpNet, FarEnd>,
    /// Routes by destination.
    pub routes: BTreeMap<IpNet, Route>,
    /// Largest packet of a pod that is sure to fit on every way to a peer.
    pub pod_mtu: u32,
    /// Largest packet that fits into the tunnel.
    pub vxlan_mtu: u32,
    /// What is wrong with the cluster, each about one object, in words. The rest works.
    pub conditions: Vec<String>,
}

/// Decides for every node. Nodes without an address or pod CIDR yet are not reachable yet.
#[must_use]
pub fn desired<'a>(
    nodes: impl Iterator<Item = (&'a ObjectKey, &'a NodeRow)>,
    place: &Place,
    underlay: &Underlay,
) -> Desired {
    let mut desired = Desired::default();
    let mut peers = BTreeMap::new();
    for (key, node) in nodes {
        if *key.name == *place.name {
            desired.pod_cidrs = one_of_each_family(&node.pod_cidrs);
        } else {
            peers.insert(&*key.name, node);
        }
    }
    if place.mode == Mode::Off {
        desired.pod_cidrs = Vec::new();
        peers.clear();
    }
    let from_pods = || desired.pod_cidrs.iter().chain(&place.link_cidrs);
    desired.gateways = [IpAddr::is_ipv4, IpAddr::is_ipv6]
        .map(|family| from_pods().find(|cidr| family(&cidr.addr())).map(|cidr| gateway(*cidr)));
    // Of two nodes with addresses in common the first by name has them.
    let mut taken: Vec<(IpNet, &str)> =
        desired.pod_cidrs.iter().map(|cidr| (*cidr, place.name.as_str())).collect();
    for (name, node) in peers {
        for cidr in one_of_each_family(&node.pod_cidrs) {
            let overlaps =
                |other: &IpNet| other.contains(&cidr.network()) || cidr.contains(&other.network());
            if let Some((other, owner)) = taken.iter().find(|(other, _)| overlaps(other)) {
                let text =
                    format!("pod CIDR {cidr} of node {name} overlaps {other} of node {owner}");
                desired.conditions.push(text);
            } else {
                taken.push((cidr, name));
                reach(&mut desired, (name, node, cidr), place.mode, underlay);
            }
        }
    }
    to_nobody(&mut desired);
    to_services(&mut desired, place, underlay);
    size(&mut desired, place.mode, underlay);
    desired
}

/// How pods of a CIDR of a peer are reached, if they can be.
fn reach(
    desired: &mut Desired,
    (name, node, cidr): (&str, &NodeRow, IpNet),
    mode: Mode,
    underlay: &Underlay,
) {
    let Some(gateway) = gateway_for(desired, cidr) else { return };
    if !desired.pod_cidrs.iter().any(|own| same_family(own.addr(), cidr.addr())) {
        // No pod here has that family.
        return;
    }
    let next_hop = node.internal_ips.iter().find(|ip| same_family(**ip, cidr.addr()));
    let own = underlay.addresses.iter().find(|own| same_family(own.net.addr(), cidr.addr()));
    let on_link =
        next_hop.zip(own).filter(|(ip, own)| own.net.contains(*ip) && own.net.addr() != **ip);
    let outer = underlay.addresses.iter().find_map(|own| {
        node.internal_ips.iter().find(|ip| same_family(**ip, own.net.addr())).copied()
    });
    let tunnel = match mode {
        Mode::Vxlan => true,
        Mode::L3 | Mode::Off => false,
        Mode::Auto => on_link.is_none(),
    };
    // Under the address by which peers' pods reach this node: an answer of a socket of all addresses has no other.
    let source = own.map_or(gateway, |own| own.net.addr());
    let route = Route {
        destination: cidr,
        gateway: None,
        device: 0,
        preferred_source: Some(source),
        scope: Scope::Link,
        owner: Owner::Orlop,
    };
    match (tunnel, on_link, outer, underlay.vxlan) {
        (true, _, Some(outer), Some(vxlan)) => {
            let far = FarEnd { node: outer, path: FarPath::Tunnel };
            desired.tunnels.insert(cidr, far);
            // Pods speak to the node itself through the tunnel too: an underlay that filters by
            // source, or a strict rp_filter, would drop their addresses.
            for own in node.internal_ips.iter().filter(|ip| same_family(**ip, cidr.addr())) {
                desired.tunnels.insert(IpNet::from(*own), far);
            }
            desired.routes.insert(cidr, Route { device: vxlan, ..route });
        }
        (false, Some((ip, own)), ..) => {
            let far = FarEnd { node: *ip, path: FarPath::Routes };
            desired.tunnels.insert(cidr, far);
            let (gateway, device) = (Some(*ip), own.device);
            let route = Route { gateway, device, scope: Scope::Global, ..route };
            desired.routes.insert(cidr, route);
        }
        (true, _, None, _) if !node.internal_ips.is_empty() => desired.conditions.push(format!(
            "node {name} has no InternalIP of a family of this node's addresses, so pods of {cidr} \
             are not reached"
        )),
        (false, None, ..) if !node.internal_ips.is_empty() => desired.conditions.push(format!(
            "node {name} is not on this node's network for {cidr}, which overlay mode l3 needs; auto \
             and vxlan do not"
        )),
        // A node that has not said its address yet.
        _ => {}
    }
}

/// Says of addresses of this node's own that no pod has, or has any more, that nobody is there. The default
/// route would lead them out of the node, under its address, and whoever asks would wait for an answer.
fn to_nobody(desired: &mut Desired) {
    for cidr in desired.pod_cidrs.clone() {
        let Some(node) = gateway_for(desired, cidr) else { continue };
        desired.tunnels.insert(cidr, FarEnd { node, path: FarPath::Here });
        desired.routes.insert(cidr, Route::to_nobody(cidr));
    }
}

/// Leads the node's own packets to services into the host device, also those to no service.
fn to_services(desired: &mut Desired, place: &Place, underlay: &Underlay) {
    for cidr in place.service_cidrs.iter().chain(&place.link_cidrs) {
        let Some(gateway) = gateway_for(desired, *cidr) else { continue };
        let inside = underlay.addresses.iter().find(|own| cidr.contains(&own.net.addr()));
        if let Some(own) = inside {
            let text = format!("range {cidr} contains the node's own address {}", own.net.addr());
            desired.conditions.push(text);
            continue;
        }
        let route = Route {
            destination: *cidr,
            gateway: None,
            device: underlay.host,
            preferred_source: Some(gateway),
            scope: Scope::Link,
            owner: Owner::Orlop,
        };
        desired.routes.insert(*cidr, route);
    }
    // To the one that asks the node's own processes they answer under the node's main address.
    for own in &underlay.addresses {
        let asker = IpNet::from(asker_for(&own.net.addr().into()).ip());
        let Some(range) = place.link_cidrs.iter().find(|cidr| cidr.contains(&asker)) else {
            continue;
        };
        if let Some(route) = desired.routes.get(range).copied() {
            let route =
                Route { destination: asker, preferred_source: Some(own.net.addr()), ..route };
            desired.routes.insert(asker, route);
        }
    }
}

/// Sizes: what the smallest device between nodes leaves, less the tunnel where one may be needed.
fn size(desired: &mut Desired, mode: Mode, underlay: &Underlay) {
    let mtu = underlay.addresses.iter().map(|own| own.mtu).min().unwrap_or_default();
    let main = underlay.addresses.first().map(|own| own.net.addr());
    let tunnelled =
        desired.tunnels.values().filter(|far| far.path == FarPath::Tunnel).map(|far| far.node);
    let overhead = tunnelled.chain(main).map(vxlan_overhead).max().unwrap_or_default();
    desired.vxlan_mtu = mtu.saturating_sub(overhead);
    desired.pod_mtu = match mode {
        // A peer may come that needs the tunnel.
        Mode::Vxlan | Mode::Auto => desired.vxlan_mtu,
        Mode::L3 | Mode::Off => mtu,
    };
    let ipv6 = desired.pod_cidrs.iter().any(|cidr| cidr.addr().is_ipv6());
    if ipv6 && desired.pod_mtu < IPV6_MIN_MTU {
        desired.conditions.push(format!(
            "the node's network has MTU {mtu}, which leaves pods {} bytes; IPv6 needs {IPV6_MIN_MTU}",
            desired.pod_mtu
        ));
    }
}

/// The node's addresses by which pods and peers know it.
fn gateway_for(desired: &Desired, cidr: IpNet) -> Option<IpAddr> {
    desired.gateways.into_iter().flatten().find(|gateway| same_family(*gateway, cidr.addr()))
}

fn one_of_each_family(cidrs: &[IpNet]) -> Vec<IpNet> {
    let mut kept: Vec<IpNet> = Vec::new();
    for cidr in cidrs {
        if !kept.iter().any(|other| same_family(other.addr(), cidr.addr())) {
            kept.push(cidr.trunc());
        }
    }
    kept
}

const fn same_family(one: IpAddr, other: IpAddr) -> bool {
    one.is_ipv4() == other.is_ipv4()
}

/// One write to the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteOp {
    Replace(Route),
    Delete(Route),
}

/// Which routes to write. New ones come first: a destination that only moves is never without one.
#[must_use]
pub fn routes(desired: &Desired, observed: &[Route], underlay: &Underlay) -> Vec<RouteOp> {
    let wanted = &desired.routes;
    let missing = wanted.values().filter(|route| !observed.contains(route));
    let surplus = observed.iter().filter(|route| {
        // Before routes were marked, ours were those into the tunnel and those from the gateway.
        let unmarked = route.destination.addr().is_ipv4()
            && (Some(route.device) == underlay.vxlan
                || (route.preferred_source.is_some()
                    && route.preferred_source == desired.gateways[0]));
        (route.owner == Owner::Orlop || unmarked) && !wanted.contains_key(&route.destination)
    });
    missing
        .map(|route| RouteOp::Replace(*route))
        .chain(surplus.map(|route| RouteOp::Delete(*route)))
        .collect()
}

/// The usual range of the host device's addresses where no pod CIDR gives one: the end of what
/// link-local addresses leave free beside the pods' gateway and cluster DNS, and a local range.
#[must_use]
pub fn usual_link_cidrs() -> Vec<IpNet> {
    vec![
        IpNet::new_assert(Ipv4Addr::new(169, 254, 21, 0).into(), 29),
        IpNet::new_assert(Ipv6Addr::new(0xfd6f, 0x726c, 0x6f70, 0, 0, 0, 0, 0).into(), 125),
    ]
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
