//! rtnetlink requests, one at a time on a blocking socket, and links; addresses, routes and neighbours
//! are in [`super::route`].
//!
//! Effects. A handle belongs to the namespace in which it was opened ([`super::netns::NetNs::run`]).
//! Everything here is idempotent where the kernel lets it be: adding what is there and deleting
//! what is gone succeed.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel sends attributes and messages that we do not ask about"
)]

use std::{io, os::fd::AsRawFd as _};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
        LinkMessage,
    },
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::netns::NetNs;
pub use super::route::{Owner, Route, Scope};

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
    pub kind: LinkKind,
    /// Its frames have an Ethernet header; those of tun, WireGuard, ppp and such begin with the IP header.
    pub is_ethernet: bool,
    /// Interface index of a veth's other end when that is in the same namespace.
    pub peer: Option<u32>,
}

/// What made a device, as far as we make some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    Veth,
    Vxlan,
    Other,
}

/// One end of a veth pair to be made.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    pub name: &'a str,
    pub mac: [u8; 6],
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
        self.set_flags(index, LinkFlags::Up)
    }

    /// Brings a device up on which no neighbour is ever asked for: whatever is sent has the device's
    /// own address as its destination.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn set_up_without_arp(&mut self, index: u32) -> io::Result<()> {
        self.set_flags(index, LinkFlags::Up | LinkFlags::Noarp)
    }

    fn set_flags(&mut self, index: u32, flags: LinkFlags) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = flags;
        message.header.change_mask = flags;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Gives a device another MAC address.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Address(mac.to_vec()));
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
    }

    pub(super) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.ask(message, NLM_F_REQUEST | NLM_F_DUMP)
    }

    /// Sends one request and collects its answers up to the kernel's end mark: the acknowledgement,
    /// the end of the dump, or the one answer of a plain request.
    pub(super) fn ask(
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
        kind: LinkKind::Other,
        is_ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        peer: None,
    };
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(peer) => link.peer = Some(*peer),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(info) if info.contains(&LinkInfo::Kind(InfoKind::Veth)) => {
                link.kind = LinkKind::Veth;
            }
            LinkAttribute::LinkInfo(info) if info.contains(&LinkInfo::Kind(InfoKind::Vxlan)) => {
                link.kind = LinkKind::Vxlan;
            }
            _ => {}
        }
    }
    if elsewhere || link.kind != LinkKind::Veth {
        link.peer = None;
    }
    link
}
