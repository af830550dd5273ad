//! Addresses, routes and neighbours of both families over rtnetlink.
//!
//! Effects. IPv6 addresses are usable at once: no duplicate address detection, no prefix route.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel sends attributes and messages that we do not ask about"
)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};

use super::netlink::Netlink;

/// `rtm_protocol` of the overlay's routes, by which they are known again after their node's gateway
/// changed; `ip route` shows the number. 111 is nobody's in `rtnetlink.h` or `rt_protos`; it is "o".
const PROTOCOL: u8 = 111;

/// The last of all routes to a destination (`fib_priority`, `fib6_metric`): whoever has another one goes first.
const LAST: u32 = u32::MAX;

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: IpNet,
    pub gateway: Option<IpAddr>,
    /// 0: none. The destination is unreachable, unless there is any other route to it.
    pub device: u32,
    pub preferred_source: Option<IpAddr>,
    /// How far the destination is. IPv6 routes have none of their own: `Link` without a gateway,
    /// `Global` with one.
    pub scope: Scope,
    pub owner: Owner,
}

/// How far an address or a route reaches (`RT_SCOPE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    Link,
    Host,
}

/// Whose a route is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The overlay's, marked in the kernel.
    Orlop,
    /// Anybody else's, also the static ones that lead to pods of this node.
    Other,
}

impl Route {
    /// Says that nobody is where no other route leads (`RTN_UNREACHABLE`).
    #[must_use]
    pub const fn to_nobody(destination: IpNet) -> Self {
        let scope = match destination {
            IpNet::V4(_) => Scope::Global,
            IpNet::V6(_) => Scope::Link,
        };
        let (gateway, preferred_source) = (None, None);
        Self { destination, gateway, device: 0, preferred_source, scope, owner: Owner::Orlop }
    }
}

impl Netlink {
    /// Gives a device an address; one that it has already is a success.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn add_address(
        &mut self,
        index: u32,
        ip: IpAddr,
        prefix_len: u8,
        scope: Scope,
    ) -> io::Result<()> {
        let mut message = address_message(index, ip, prefix_len);
        message.header.scope = match scope {
            Scope::Global => AddressScope::Universe,
            Scope::Link => AddressScope::Link,
            Scope::Host => AddressScope::Host,
        };
        message.attributes.push(AddressAttribute::Address(ip));
        if ip.is_ipv6() {
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            message.attributes.push(AddressAttribute::Flags(flags));
        }
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes an address off a device; one that is gone already is a success.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_address(&mut self, index: u32, ip: IpAddr, prefix_len: u8) -> io::Result<()> {
        let message = address_message(index, ip, prefix_len);
        match self.change(RouteNetlinkMessage::DelAddress(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    /// The addresses of a device with their prefix lengths, IPv4 first. IPv6 link-local addresses,
    /// which the kernel gives by itself, are left out.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn addresses(&mut self, index: u32) -> io::Result<Vec<(IpAddr, u8)>> {
        let mut all = self.all_addresses()?;
        all.retain(|(device, ..)| *device == index);
        Ok(all.into_iter().map(|(_, ip, prefix_len)| (ip, prefix_len)).collect())
    }

    /// The addresses of all devices: interface index, address, prefix length.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn all_addresses(&mut self) -> io::Result<Vec<(u32, IpAddr, u8)>> {
        let all = self.dump_addresses()?;
        let one = |message: &AddressMessage| {
            Some((message.header.index, address_from(message)?, message.header.prefix_len))
        };
        Ok(all.iter().filter_map(one).collect())
    }

    /// The addresses that routes may name as source, with their devices' indices: not those that others are
    /// still asked about (duplicate address detection).
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn sources(&mut self) -> io::Result<Vec<(u32, IpAddr)>> {
        let mut all = self.dump_addresses()?;
        all.retain(|message| !is_tentative(message));
        let one = |message: &AddressMessage| Some((message.header.index, address_from(message)?));
        Ok(all.iter().filter_map(one).collect())
    }

    /// IPv4 first.
    fn dump_addresses(&mut self) -> io::Result<Vec<AddressMessage>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = AddressMessage::default();
            message.header.family = family;
            let answers = self.dump(RouteNetlinkMessage::GetAddress(message))?;
            found.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message) => Some(message),
                _ => None,
            }));
        }
        Ok(found)
    }

    /// Adds a route to the main table, or replaces the one of the same destination and priority.
    ///
    /// # Errors
    /// When the gateway cannot be reached, the device is down, or the kernel refuses.
    pub fn replace_route(&mut self, route: Route) -> io::Result<()> {
        let message = route_message(route);
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes a route; one that is gone already is a success.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_route(&mut self, route: Route) -> io::Result<()> {
        match self.change(RouteNetlinkMessage::DelRoute(route_message(route)), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// The unicast routes of the main table that leave by a device, IPv4 first.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn routes(&mut self, device: u32) -> io::Result<Vec<Route>> {
        let mut all = self.all_routes()?;
        all.retain(|route| route.device == device);
        Ok(all)
    }

    /// All unicast routes of the main table and those of ours that lead nowhere, IPv4 first.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn all_routes(&mut self) -> io::Result<Vec<Route>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self.dump(RouteNetlinkMessage::GetRoute(message))?;
            found.extend(answers.iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => route_from(message),
                _ => None,
            }));
        }
        Ok(found)
    }

    /// Writes a neighbour entry that never expires and is never asked for, replacing any other.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn replace_permanent_neighbour(
        &mut self,
        index: u32,
        ip: IpAddr,
        mac: [u8; 6],
    ) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        let address = match ip {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        };
        message.attributes.push(NeighbourAttribute::Destination(address));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The permanent neighbour entries of a device.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn permanent_neighbours(&mut self, index: u32) -> io::Result<Vec<(IpAddr, [u8; 6])>> {
        let mut all = self.all_permanent_neighbours()?;
        all.retain(|(device, ..)| *device == index);
        Ok(all.into_iter().map(|(_, ip, mac)| (ip, mac)).collect())
    }

    /// The permanent neighbour entries of all devices: interface index, address, MAC.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn all_permanent_neighbours(&mut self) -> io::Result<Vec<(u32, IpAddr, [u8; 6])>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = NeighbourMessage::default();
            message.header.family = family;
            for answer in self.dump(RouteNetlinkMessage::GetNeighbour(message))? {
                match answer {
                    RouteNetlinkMessage::NewNeighbour(message)
                        if message.header.state == NeighbourState::Permanent =>
                    {
                        let entry = neighbour_from(&message);
                        found.extend(entry.map(|(ip, mac)| (message.header.ifindex, ip, mac)));
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }
}

const fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn address_message(index: u32, ip: IpAddr, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = prefix_len;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(ip));
    message
}

/// IPv4 tells its own address as `IFA_LOCAL`; IPv6 has only `IFA_ADDRESS` unless there is a peer.
fn address_from(message: &AddressMessage) -> Option<IpAddr> {
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(wanted)
    };
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    match ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => None,
        ip => Some(ip),
    }
}

fn is_tentative(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Flags(flags) => flags.contains(AddressFlags::Tentative),
        _ => false,
    })
}

fn neighbour_from(message: &NeighbourMessage) -> Option<(IpAddr, [u8; 6])> {
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    })?;
    Some((ip, mac))
}

fn route_message(route: Route) -> RouteMessage {
    let destination = route.destination;
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = match route.owner {
        Owner::Orlop => RouteProtocol::Other(PROTOCOL),
        Owner::Other => RouteProtocol::Static,
    };
    message.header.kind =
        if route.device == 0 { RouteType::Unreachable } else { RouteType::Unicast };
    message.header.scope = match (destination, route.scope) {
        (IpNet::V6(_), _) | (_, Scope::Global) => RouteScope::Universe,
        (_, Scope::Link) => RouteScope::Link,
        (_, Scope::Host) => RouteScope::Host,
    };
    if destination.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(destination.network().into()));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(source) = route.preferred_source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    message.attributes.push(match route.device {
        0 => RouteAttribute::Priority(LAST),
        device => RouteAttribute::Oif(device),
    });
    message
}

fn route_from(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let ours = header.protocol == RouteProtocol::Other(PROTOCOL);
    let leads = header.kind == RouteType::Unicast;
    let is_followed = leads || (ours && header.kind == RouteType::Unreachable);
    if header.table != RouteHeader::RT_TABLE_MAIN || !is_followed {
        return None;
    }
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let (mut gateway, mut preferred_source, mut device) = (None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_from(address)?,
            RouteAttribute::Gateway(address) => gateway = ip_from(address),
            RouteAttribute::PrefSource(address) => preferred_source = ip_from(address),
            // Where an IPv6 route leads nowhere the kernel names its loopback device.
            RouteAttribute::Oif(index) if leads => device = *index,
            _ => {}
        }
    }
    let scope = match (destination, header.scope) {
        (IpAddr::V6(_), _) if gateway.is_none() => Scope::Link,
        (IpAddr::V4(_), RouteScope::Link) => Scope::Link,
        (IpAddr::V4(_), RouteScope::Host) => Scope::Host,
        _ => Scope::Global,
    };
    let owner = if ours { Owner::Orlop } else { Owner::Other };
    let destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(Route { destination, gateway, device, preferred_source, scope, owner })
}

const fn ip_from(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
