//! XDP links, and what the kernel says about XDP on a device.
//!
//! Effects only; takes and returns plain values.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel sends attributes that we do not ask about"
)]

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use netlink_packet_core::NLM_F_REQUEST;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage, LinkXdp},
};

use super::{bpf, netlink::Netlink};

/// Where on the way of a frame a program runs; values of `XDP_FLAGS_*_MODE` (linux/if_link.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Place {
    /// In the kernel's stack, after it has made a socket buffer.
    Generic = 1 << 1,
    /// In the device's driver.
    Native = 1 << 2,
}

/// What there is to know of a device before a program is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub mtu: u32,
    /// It is one end of a veth pair.
    pub is_veth: bool,
    /// Number of the XDP program that runs there.
    pub program: Option<u32>,
}

/// Attaches an XDP program to a device. It stays as long as the link's descriptor or a pin of it.
///
/// # Errors
///
/// `EBUSY` or `EEXIST` when another program is there, `EOPNOTSUPP` when the driver has no XDP; drivers
/// have errors of their own for settings that XDP does not go with.
pub fn attach(program: BorrowedFd<'_>, ifindex: u32, place: Place) -> io::Result<OwnedFd> {
    #[expect(clippy::as_conversions, reason = "the discriminants of a repr(u32) enum")]
    let flags = place as u32;
    bpf::xdp_link_create(program, ifindex, flags)
}

/// What the kernel says of a device.
///
/// # Errors
///
/// `ENODEV` when it is gone.
pub fn device(netlink: &mut Netlink, ifindex: u32) -> io::Result<Device> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    let answers = netlink.ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST)?;
    let mut device = Device::default();
    for answer in answers {
        let RouteNetlinkMessage::NewLink(message) = answer else { continue };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name = name,
                LinkAttribute::Mtu(mtu) => device.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => {
                    let veth = LinkInfo::Kind(InfoKind::Veth);
                    device.is_veth = infos.contains(&veth);
                }
                LinkAttribute::Xdp(parts) => {
                    device.program = parts.into_iter().find_map(|part| match part {
                        LinkXdp::ProgId(id) => Some(id).filter(|id| *id != 0),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
    }
    Ok(device)
}

/// The name of a loaded program; `None` when it is gone.
#[must_use]
pub fn program_name(id: u32) -> Option<String> {
    let found =
        aya::programs::loaded_programs().filter_map(Result::ok).find(|one| one.id() == id)?;
    found.name_as_str().map(str::to_owned)
}
