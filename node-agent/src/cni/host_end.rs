//! What leads from the node into a pod's link: that its host end is up, the neighbour entry and the route
//! of each address.
//!
//! `plan` is pure; `Observed::read` and `apply` ask the kernel, which takes these away by itself when a
//! device goes down or the node loses the address that a route names as its source.

use std::{collections::BTreeSet, fmt, io, net::IpAddr};

use super::veth::{VethSpec, is_host_name};
use crate::sys::netlink::{Link, Netlink, Owner, Route, Scope};

/// What the node's kernel has for all pods, by one dump of each kind.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// Host ends.
    pub(super) links: Vec<Link>,
    sources: BTreeSet<IpAddr>,
    routes: Vec<Route>,
    neighbours: BTreeSet<(u32, IpAddr, [u8; 6])>,
}

/// A piece that a host end needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostOp {
    SetUp { device: u32 },
    Neighbour { device: u32, ip: IpAddr, mac: [u8; 6] },
    Route(Route),
}

impl fmt::Display for HostOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetUp { .. } => write!(f, "a way"),
            Self::Neighbour { ip, .. } => write!(f, "the permanent neighbour entry of {ip}"),
            Self::Route(route) => write!(f, "the route to {}", route.destination.addr()),
        }
    }
}

impl Observed {
    pub(super) fn read(netlink: &mut Netlink) -> io::Result<Self> {
        let mut links = netlink.links()?;
        let sources = sources(netlink, &links)?;
        links.retain(|link| is_host_name(&link.name));
        let ours: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        let mut routes = netlink.all_routes()?;
        routes.retain(|route| ours.contains(&route.device));
        let neighbours = netlink.all_permanent_neighbours()?.into_iter().collect();
        Ok(Self { links, sources, routes, neighbours })
    }

    fn has(&self, op: &HostOp) -> bool {
        match op {
            HostOp::SetUp { device } => {
                self.links.iter().any(|link| link.index == *device && link.up)
            }
            HostOp::Neighbour { device, ip, mac } => {
                self.neighbours.contains(&(*device, *ip, *mac))
            }
            HostOp::Route(route) => self.routes.contains(route),
        }
    }
}

/// The node's addresses of which a route can say that they are to be the source: the kernel refuses a
/// route with any other.
pub(super) fn sources(netlink: &mut Netlink, links: &[Link]) -> io::Result<BTreeSet<IpAddr>> {
    let up: BTreeSet<u32> = links.iter().filter(|link| link.up).map(|link| link.index).collect();
    let mut sources = netlink.sources()?;
    sources.retain(|(device, _)| up.contains(device));
    Ok(sources.into_iter().map(|(_, ip)| ip).collect())
}

/// All that a host end needs, in the order in which it must be made.
pub(super) fn ops(spec: &VethSpec, device: u32, sources: &BTreeSet<IpAddr>) -> Vec<HostOp> {
    let mac = spec.pod_mac;
    let mut ops = vec![HostOp::SetUp { device }];
    for ip in spec.ips.iter().copied() {
        ops.push(HostOp::Neighbour { device, ip, mac });
        ops.push(HostOp::Route(route(spec, device, ip, sources)));
    }
    ops
}

/// What a host end lacks, in the same order.
pub(super) fn plan(spec: &VethSpec, link: &Link, observed: &Observed) -> Vec<HostOp> {
    let mut ops = ops(spec, link.index, &observed.sources);
    ops.retain(|op| !observed.has(op));
    ops
}

/// The kernel chooses the source while the node has not the address that it should be.
fn route(spec: &VethSpec, device: u32, ip: IpAddr, sources: &BTreeSet<IpAddr>) -> Route {
    let own = spec.node_ips.iter().copied().find(|own| own.is_ipv4() == ip.is_ipv4());
    Route {
        destination: ip.into(),
        gateway: None,
        device,
        preferred_source: own.filter(|own| sources.contains(own)),
        scope: Scope::Link,
        owner: Owner::Other,
    }
}

/// Makes the pieces, up to the first that the kernel refuses.
pub(super) fn apply(netlink: &mut Netlink, ops: Vec<HostOp>) -> io::Result<()> {
    ops.into_iter().try_for_each(|op| {
        let made = match op {
            HostOp::SetUp { device } => netlink.set_up(device),
            HostOp::Neighbour { device, ip, mac } => {
                netlink.replace_permanent_neighbour(device, ip, mac)
            }
            HostOp::Route(route) => netlink.replace_route(route),
        };
        made.map_err(|error| io::Error::new(error.kind(), format!("{op}: {error}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cni::ipam::Attachment, sys::netlink::LinkKind};

    #[test]
    fn what_is_lacking_is_made_in_order_and_never_with_a_source_that_the_node_has_not_got() {
        let texts = ["10.244.1.2", "fd00::2", "192.0.2.1", "2001:db8::1"];
        let [four, six, own4, own6] = texts.map(|text| text.parse::<IpAddr>().unwrap());
        let spec = VethSpec::new(&Attachment::new("a", "eth0"), &[four, six], 1450, &[own4, own6]);
        let link = Link {
            index: 7,
            name: spec.host_name.clone(),
            mac: Some(spec.host_mac),
            mtu: 1450,
            up: false,
            kind: LinkKind::Veth,
            is_ethernet: true,
            peer: None,
        };
        let mut observed = Observed { links: vec![link.clone()], ..Observed::default() };
        observed.sources.insert(own6);
        let told = |observed: &Observed| {
            let ops = plan(&spec, &link, observed);
            ops.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let neighbour = |ip| format!("the permanent neighbour entry of {ip}");
        let route = |ip| format!("the route to {ip}");
        let all = ["a way".to_owned(), neighbour(four), route(four), neighbour(six), route(six)];
        assert_eq!(told(&observed), all);

        observed.links[0].up = true;
        for op in ops(&spec, link.index, &observed.sources) {
            match op {
                HostOp::SetUp { .. } => {}
                HostOp::Neighbour { device, ip, mac } => {
                    observed.neighbours.insert((device, ip, mac));
                }
                HostOp::Route(route) => observed.routes.push(route),
            }
        }
        let sources = observed.routes.iter().map(|route| route.preferred_source);
        assert_eq!(sources.collect::<Vec<_>>(), [None, Some(own6)]);
        assert!(told(&observed).is_empty(), "nothing is left to do");
        observed.sources.insert(own4);
        assert_eq!(told(&observed), [route(four)], "its source is back");
    }
}
