//! From nodes to tunnels and routes.
//!
//! Pure. Every route of ours has the node's gateway address as preferred source; by that it is told
//! from the routes of others, which are never touched.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};

use crate::{
    model::{NodeRow, ObjectKey},
    sys::netlink::{Owner, Route, Scope},
};

/// How pods of other nodes are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Always through the tunnel.
    Vxlan,
    /// Always by a route over the node's address; the network must carry pod addresses.
    L3,
    /// By a route where the node is on the same network, through the tunnel elsewhere.
    Auto,
}

/// What this node is, as far as the overlay needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The node's address with the prefix of its network.
    pub address: Ipv4Net,
    /// The device that has it.
    pub device: u32,
    /// The VXLAN device.
    pub vxlan: u32,
    /// Of the device that has the address, bytes.
    pub mtu: u32,
}

/// Bytes that VXLAN over IPv4 adds: IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348 section 5).
pub const VXLAN_OVERHEAD: u32 = 50;

impl Underlay {
    /// The largest packet of a pod that is sure to fit. With [`Mode::Auto`] a peer may come that is
    /// reached through the tunnel.
    #[must_use]
    pub const fn pod_mtu(&self, mode: Mode) -> u32 {
        match mode {
            Mode::Vxlan | Mode::Auto => self.mtu.saturating_sub(VXLAN_OVERHEAD),
            Mode::L3 => self.mtu,
        }
    }
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// This node's pod CIDR.
    pub pod_cidr: Option<Ipv4Net>,
    /// The first host of the pod CIDR.
    pub gateway: Option<Ipv4Addr>,
    /// Pod CIDR, and the node's own address, to node, for peers through the tunnel.
    pub tunnels: BTreeMap<Ipv4Net, Ipv4Addr>,
    /// Routes by destination.
    pub routes: BTreeMap<Ipv4Net, Route>,
}

/// Decides for every node. Nodes without an IPv4 address or pod CIDR yet are not reachable yet; of
/// two nodes with the same pod CIDR the first by name has it.
#[must_use]
pub fn desired<'a>(
    nodes: impl Iterator<Item = (&'a ObjectKey, &'a NodeRow)>,
    me: &str,
    mode: Mode,
    underlay: Underlay,
) -> Desired {
    let mut desired = Desired::default();
    let mut peers = BTreeMap::new();
    for (key, node) in nodes {
        let Some(cidr) = node.pod_cidrs.iter().find_map(ipv4_net) else { continue };
        if *key.name == *me {
            desired.pod_cidr = Some(cidr);
            desired.gateway = cidr.hosts().next();
        } else if let Some(ip) = node.internal_ips.iter().find_map(ipv4) {
            peers.entry(cidr).or_insert(ip);
        }
    }
    let Some(gateway) = desired.gateway else { return desired };
    for (cidr, node) in peers {
        if Some(cidr) == desired.pod_cidr {
            continue;
        }
        let on_link = underlay.address.contains(&node);
        let tunnel = match mode {
            Mode::Vxlan => true,
            Mode::L3 => false,
            Mode::Auto => !on_link,
        };
        if tunnel {
            desired.tunnels.insert(cidr, node);
            // Pods speak to the node itself through the tunnel too: an underlay that filters by
            // source, or a strict rp_filter, would drop their addresses.
            desired.tunnels.insert(Ipv4Net::from(node), node);
        }
        desired.routes.insert(cidr, route(cidr, node, gateway, underlay, tunnel));
    }
    desired
}

/// One write to the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteOp {
    Replace(Route),
    Delete(Route),
}

/// Which routes to write. New ones come first: a destination that only moves is never without one.
#[must_use]
pub fn routes(desired: &Desired, observed: &[Route], vxlan: u32) -> Vec<RouteOp> {
    let gateway = desired.gateway.map(IpAddr::V4);
    let desired = &desired.routes;
    let missing = desired.values().filter(|route| !observed.contains(route));
    let surplus = observed.iter().filter(|route| {
        let ours = route.device == vxlan
            || route.owner == Owner::Orlop
            || (route.preferred_source.is_some() && route.preferred_source == gateway);
        ours && !desired.values().any(|wanted| same_place(wanted, route))
    });
    missing
        .map(|route| RouteOp::Replace(*route))
        .chain(surplus.map(|route| RouteOp::Delete(*route)))
        .collect()
}

/// Replacing the one replaces the other: same destination in the same table.
fn same_place(one: &Route, other: &Route) -> bool {
    one.destination == other.destination
}

fn route(
    cidr: Ipv4Net,
    node: Ipv4Addr,
    gateway: Ipv4Addr,
    underlay: Underlay,
    tunnel: IsTunnel,
) -> Route {
    let route = Route {
        destination: IpNet::V4(cidr),
        gateway: None,
        device: underlay.vxlan,
        preferred_source: Some(gateway.into()),
        scope: Scope::Link,
        owner: Owner::Orlop,
    };
    if tunnel {
        return route;
    }
    Route { gateway: Some(node.into()), device: underlay.device, scope: Scope::Global, ..route }
}

type IsTunnel = bool;

const fn ipv4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    }
}

const fn ipv4_net(net: &IpNet) -> Option<Ipv4Net> {
    match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNDERLAY: fn() -> Underlay =
        || Underlay { address: "192.168.0.1/24".parse().unwrap(), device: 2, vxlan: 9, mtu: 1500 };

    fn node(ip: &str, cidr: &str) -> NodeRow {
        NodeRow {
            internal_ips: vec![ip.parse().unwrap()],
            pod_cidrs: cidr.parse().ok().into_iter().collect(),
            ready: true,
            labels: BTreeMap::new(),
        }
    }

    fn decide(mode: Mode, nodes: &[(&str, &str, &str)]) -> Desired {
        let rows: BTreeMap<ObjectKey, NodeRow> = nodes
            .iter()
            .map(|(name, ip, cidr)| (ObjectKey::new("", name), node(ip, cidr)))
            .collect();
        desired(rows.iter(), "a", mode, UNDERLAY())
    }

    const NODES: &[(&str, &str, &str)] = &[
        ("a", "192.168.0.1", "10.244.0.0/24"),
        ("b", "192.168.0.2", "10.244.1.0/24"),
        ("c", "192.168.9.3", "10.244.2.0/24"),
        ("new", "192.168.0.4", "none yet"),
    ];

    #[test]
    fn each_mode_reaches_every_peer_that_has_a_range() {
        for (mode, tunnels) in [(Mode::Vxlan, 4), (Mode::L3, 0), (Mode::Auto, 2)] {
            let desired = decide(mode, NODES);
            assert_eq!(desired.gateway, Some(Ipv4Addr::new(10, 244, 0, 1)));
            assert_eq!((desired.routes.len(), desired.tunnels.len()), (2, tunnels), "{mode:?}");
            for (cidr, route) in &desired.routes {
                let through = desired.tunnels.contains_key(cidr);
                assert_eq!(route.device, if through { 9 } else { 2 });
                assert_eq!(route.gateway.is_none(), through);
                assert_eq!(route.preferred_source, desired.gateway.map(IpAddr::V4));
            }
        }
        let auto = decide(Mode::Auto, NODES);
        assert!(auto.tunnels.contains_key(&"10.244.2.0/24".parse().unwrap()), "c is not on-link");
    }

    #[test]
    fn without_a_range_of_its_own_a_node_reaches_nobody() {
        let desired = decide(Mode::Vxlan, &[("a", "192.168.0.1", ""), NODES[1]]);
        assert_eq!(desired, Desired::default());
    }

    /// Carries a plan out on a list as the kernel would.
    fn apply(table: &mut Vec<Route>, ops: &[RouteOp]) {
        for op in ops {
            match op {
                RouteOp::Replace(route) => {
                    table.retain(|old| !same_place(old, route));
                    table.push(*route);
                }
                RouteOp::Delete(route) => table.retain(|old| old != route),
            }
        }
    }

    #[test]
    fn the_plan_is_complete_idempotent_minimal_and_leaves_others_alone() {
        let foreign = Route {
            destination: "172.16.0.0/16".parse().unwrap(),
            gateway: Some("192.168.0.254".parse().unwrap()),
            device: 2,
            preferred_source: None,
            scope: Scope::Global,
            owner: Owner::Other,
        };
        let mut table = vec![foreign];
        let moved: Vec<_> =
            [NODES[0], ("b", "192.168.0.2", "10.244.7.0/24"), NODES[2]].into_iter().collect();
        for mode in [Mode::Vxlan, Mode::Auto, Mode::L3, Mode::Vxlan] {
            for nodes in [NODES, &moved, &NODES[..1], &NODES[..2]] {
                let desired = decide(mode, nodes);
                let wanted = &desired.routes;
                let unchanged = table.iter().filter(|route| wanted.values().any(|w| w == *route));
                let unchanged: Vec<Route> = unchanged.copied().collect();
                let ops = routes(&desired, &table, 9);
                for kept in unchanged {
                    assert!(!ops.contains(&RouteOp::Replace(kept)));
                }
                apply(&mut table, &ops);
                assert!(table.contains(&foreign));
                assert_eq!(table.len(), wanted.len() + 1, "{mode:?}");
                assert_eq!(routes(&desired, &table, 9), vec![]);
            }
        }
    }
}
