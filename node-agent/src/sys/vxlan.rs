//! The VXLAN device, and what else the overlay asks of rtnetlink.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel sends attributes and messages that we do not ask about"
)]

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
};

use super::netlink::Netlink;

/// Settings of a VXLAN device, as far as packets depend on them. They cannot be changed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// UDP port that it listens on.
    pub port: u16,
    /// Far ends come with each packet.
    pub collect_metadata: bool,
    /// It notes who sent from where.
    pub learning: bool,
    /// Tunnel packets of IPv6 may come without a checksum, as our programs send them (RFC 6935).
    pub zero_checksum6: bool,
}

impl Vxlan {
    /// What [`Netlink::add_vxlan`] makes.
    #[must_use]
    pub const fn ours(port: u16) -> Self {
        Self { port, collect_metadata: true, learning: false, zero_checksum6: true }
    }
}

impl Netlink {
    /// Makes a VXLAN device whose far ends come with each packet, and brings it up. It learns
    /// nothing, floods nothing and asks for no neighbour.
    ///
    /// # Errors
    /// `EEXIST` when the name is taken; `EOPNOTSUPP` when the kernel has no VXLAN.
    pub fn add_vxlan(&mut self, name: &str, port: u16, mtu: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up | LinkFlags::Noarp;
        message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::Mtu(mtu));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Learning(false),
                InfoVxlan::UDPZeroCsumRX(true),
                InfoVxlan::Port(port),
            ])),
        ]));
        self.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// The settings of a VXLAN device; `None` when the name is no VXLAN device.
    ///
    /// # Errors
    /// When the kernel refuses or the socket fails.
    pub fn vxlan(&mut self, name: &str) -> io::Result<Option<Vxlan>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            other => other?,
        };
        Ok(answers.iter().find_map(vxlan_from))
    }

    /// Sets a device's MTU.
    ///
    /// # Errors
    /// When there is no such device or the kernel refuses the size.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }
}

fn vxlan_from(answer: &RouteNetlinkMessage) -> Option<Vxlan> {
    let RouteNetlinkMessage::NewLink(message) = answer else { return None };
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    let settings = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(settings)) => Some(settings),
        _ => None,
    })?;
    let mut vxlan =
        Vxlan { port: 0, collect_metadata: false, learning: false, zero_checksum6: false };
    for setting in settings {
        match setting {
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::CollectMetadata(on) => vxlan.collect_metadata = *on,
            InfoVxlan::Learning(on) => vxlan.learning = *on,
            InfoVxlan::UDPZeroCsumRX(on) => vxlan.zero_checksum6 = *on,
            _ => {}
        }
    }
    Some(vxlan)
}
