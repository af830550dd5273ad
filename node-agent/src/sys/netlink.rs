//! rtnetlink requests, one at a time on a blocking socket: links, addresses, routes, neighbours.
//!
//! Effects. A handle belongs to the namespace in which it was opened ([`super::netns::NetNs::run`]).
//! Everything here is idempotent where the kernel lets it be: adding what is there and deleting
//! what is gone succeed.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel sends attributes and messages that we do not ask about"
)]

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage, AddressScope},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::netns::NetNs;

/// Room for one datagram of a dump; the kernel fills at most 32 KiB (`NLMSG_GOODSIZE`, and
/// `min_dump_alloc` up to that).
const RECEIVE_BYTES: usize = 65_536;

/// A network device as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub up: bool,
}

/// One end of a veth pair to be made.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
}

/// An IPv4 route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Option<Ipv4Addr>,
    pub device: u32,
    pub preferred_source: Option<Ipv4Addr>,
    /// Which addresses an interface address reaches; the kernel wants it for [`Netlink::add_address`]
    /// and routes alike.
    pub scope: Scope,
}

/// How far an address or a route reaches (`RT_SCOPE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    Link,
    Host,
}

/// An rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All devices of the namespace.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(link_from(&message)),
                _ => None,
            })
            .collect())
    }

    /// The device of a name; `None` when there is none.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            other => other?,
        };
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(link_from(&message)),
            _ => None,
        }))
    }

    /// Makes a veth pair with one end here and the other born in `peer_namespace`, both down.
    ///
    /// # Errors
    /// `EEXIST` when one of the names is taken.
    pub fn add_veth(
        &mut self,
        here: VethEnd<'_>,
        peer: VethEnd<'_>,
        peer_namespace: &NetNs,
        mtu: u32,
    ) -> io::Result<()> {
        let mut far = LinkMessage::default();
        far.attributes.push(LinkAttribute::IfName(peer.name.to_owned()));
        far.attributes.push(LinkAttribute::Mtu(mtu));
        far.attributes.push(LinkAttribute::Address(peer.mac.to_vec()));
        if let Some(file) = peer_namespace.file() {
            far.attributes.push(LinkAttribute::NetNsFd(file.as_raw_fd()));
        }
        let mut near = LinkMessage::default();
        near.attributes.push(LinkAttribute::IfName(here.name.to_owned()));
        near.attributes.push(LinkAttribute::Mtu(mtu));
        near.attributes.push(LinkAttribute::Address(here.mac.to_vec()));
        near.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(far))),
        ]));
        self.change(RouteNetlinkMessage::NewLink(near), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes a device (a veth takes its peer along); one that is gone already is a success.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match self.change(RouteNetlinkMessage::DelLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Brings a device up.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Gives a device an IPv4 address; one that it has already is a success.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn add_address(
        &mut self,
        index: u32,
        ip: Ipv4Addr,
        prefix_len: u8,
        scope: Scope,
    ) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = prefix_len;
        message.header.index = index;
        message.header.scope = match scope {
            Scope::Global => AddressScope::Universe,
            Scope::Link => AddressScope::Link,
            Scope::Host => AddressScope::Host,
        };
        message.attributes.push(AddressAttribute::Local(IpAddr::V4(ip)));
        message.attributes.push(AddressAttribute::Address(IpAddr::V4(ip)));
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The IPv4 addresses of a device with their prefix lengths.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn addresses(&mut self, index: u32) -> io::Result<Vec<(Ipv4Addr, u8)>> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        let answers = self.dump(RouteNetlinkMessage::GetAddress(message))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                    let ip = message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Local(IpAddr::V4(ip)) => Some(*ip),
                        _ => None,
                    })?;
                    Some((ip, message.header.prefix_len))
                }
                _ => None,
            })
            .collect())
    }

    /// Adds a unicast route to the main table, or replaces the one of the same destination.
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

    /// The unicast IPv4 routes of the main table that leave by a device.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn routes(&mut self, device: u32) -> io::Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        let answers = self.dump(RouteNetlinkMessage::GetRoute(message))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => route_from(&message),
                _ => None,
            })
            .filter(|route| route.device == device)
            .collect())
    }

    /// Writes a neighbour entry that never expires and is never asked for, replacing any other.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn replace_permanent_neighbour(
        &mut self,
        index: u32,
        ip: Ipv4Addr,
        mac: [u8; 6],
    ) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The permanent IPv4 neighbour entries of a device.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn permanent_neighbours(&mut self, index: u32) -> io::Result<Vec<(Ipv4Addr, [u8; 6])>> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        let answers = self.dump(RouteNetlinkMessage::GetNeighbour(message))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewNeighbour(message)
                    if message.header.ifindex == index
                        && message.header.state == NeighbourState::Permanent =>
                {
                    neighbour_from(&message)
                }
                _ => None,
            })
            .collect())
    }

    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
    }

    fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.ask(message, NLM_F_REQUEST | NLM_F_DUMP)
    }

    /// Sends one request and collects its answers up to the kernel's end mark: the acknowledgement,
    /// the end of the dump, or the one answer of a plain request.
    fn ask(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let single = flags & (NLM_F_ACK | NLM_F_DUMP) == 0;
        let mut answers = Vec::new();
        loop {
            let mut datagram = Vec::with_capacity(RECEIVE_BYTES);
            self.socket.recv(&mut datagram, 0)?;
            if self.read_datagram(&datagram, &mut answers)? || (single && !answers.is_empty()) {
                return Ok(answers);
            }
        }
    }

    /// Reads the messages of one datagram; `true` means that the kernel said all it has to say.
    fn read_datagram(
        &self,
        datagram: &[u8],
        answers: &mut Vec<RouteNetlinkMessage>,
    ) -> io::Result<bool> {
        let mut rest = datagram;
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
            // Messages start at multiples of four bytes (`NLMSG_ALIGN`).
            rest = rest.get(length.saturating_add(3) & !3..).unwrap_or_default();
            if message.header.sequence_number != self.sequence {
                continue;
            }
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(true),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                _ => {}
            }
        }
        Ok(false)
    }
}

fn link_from(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    link
}

fn neighbour_from(message: &NeighbourMessage) -> Option<(Ipv4Addr, [u8; 6])> {
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(*ip),
        _ => None,
    })?;
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    })?;
    Some((ip, mac))
}

fn route_message(route: Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = route.prefix_len;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.header.scope = match route.scope {
        Scope::Global => RouteScope::Universe,
        Scope::Link => RouteScope::Link,
        Scope::Host => RouteScope::Host,
    };
    if route.prefix_len > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(route.destination)));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(gateway)));
    }
    if let Some(source) = route.preferred_source {
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(source)));
    }
    message.attributes.push(RouteAttribute::Oif(route.device));
    message
}

fn route_from(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast {
        return None;
    }
    let mut route = Route {
        destination: Ipv4Addr::UNSPECIFIED,
        prefix_len: header.destination_prefix_length,
        gateway: None,
        device: 0,
        preferred_source: None,
        scope: match header.scope {
            RouteScope::Link => Scope::Link,
            RouteScope::Host => Scope::Host,
            _ => Scope::Global,
        },
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => route.destination = *ip,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => route.gateway = Some(*ip),
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => {
                route.preferred_source = Some(*ip);
            }
            RouteAttribute::Oif(device) => route.device = *device,
            _ => {}
        }
    }
    Some(route)
}
