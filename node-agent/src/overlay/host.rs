//! Orlop's host device: the way of the node's own packets to services, where no socket hook has
//! translated them (SCTP, connected UDP, ICMP, raw sockets).
//!
//! Effects only. A veth pair, both ends in the node's namespace. Routes of the service ranges lead
//! into `orlop.host`, which carries the node's gateway addresses; the dataplane's program takes every
//! packet there. One that it does not take comes out of `orlop.net`, addressed to another MAC, and is
//! dropped: nothing of a service range reaches the default route. Answers are redirected into
//! `orlop.host` and must carry its MAC as their destination. Neither end asks for neighbours.

use std::io;

use super::OverlayError;
use crate::sys::{
    netlink::{Link, LinkKind, Netlink, VethEnd},
    netns::NetNs,
    sysctl::{self, SettingError},
};

/// The end with the addresses.
pub const HOST: &str = "orlop.host";
/// The end that nobody listens at.
const NET: &str = "orlop.net";

/// MAC addresses of the two: locally administered, "orlop" and a number. They are seen by no other
/// machine, and set since udev replaces those that the kernel makes up.
pub const HOST_MAC: [u8; 6] = [0x02, b'o', b'r', b'l', b'o', 1];
const NET_MAC: [u8; 6] = [0x02, b'o', b'r', b'l', b'o', 2];

/// A veth takes nothing larger than its own MTU, whatever its peer may send (`is_skb_forwardable`, include/linux/netdevice.h):
/// what may be sent is for the end with the addresses to say. The largest there is (`ETH_MAX_MTU`).
const NET_MTU: u32 = 65_535;

/// Makes the pair if it is not there, or not whole, and returns the interface indices of its end with
/// the addresses and of the other. `mtu` is that of a new pair.
///
/// # Errors
///
/// [`OverlayError`], naming the device when it is somebody else's.
pub(super) fn prepare(netlink: &mut Netlink, mtu: u32) -> Result<(u32, u32), OverlayError> {
    let failed = |source| OverlayError::Device { name: HOST.to_owned(), source };
    let present = find(netlink).map_err(failed)?;
    if let [Some(link), _] | [None, Some(link)] = &present
        && link.kind != LinkKind::Veth
    {
        return Err(OverlayError::Foreign { name: link.name.clone(), wanted: "veth" });
    }
    let whole = match &present {
        [Some(host), Some(net)] => host.peer == Some(net.index),
        _ => false,
    };
    if !whole {
        // One end alone, or ends of two pairs: neither is of use. The first takes its peer along.
        for link in present.iter().flatten() {
            netlink.delete_link(link.index).map_err(failed)?;
        }
        let (here, there) =
            (VethEnd { name: HOST, mac: HOST_MAC }, VethEnd { name: NET, mac: NET_MAC });
        netlink.add_veth(here, there, &NetNs::own(), mtu).map_err(failed)?;
    }
    let [Some(host), Some(net)] = find(netlink).map_err(failed)? else {
        return Err(failed(io::ErrorKind::NotFound.into()));
    };
    for (link, mac) in [(&host, HOST_MAC), (&net, NET_MAC)] {
        if link.mac != Some(mac) {
            netlink.set_mac(link.index, mac).map_err(failed)?;
        }
    }
    if net.mtu != NET_MTU {
        netlink.set_mtu(net.index, NET_MTU).map_err(failed)?;
    }
    settings().map_err(OverlayError::Setting)?;
    for index in [net.index, host.index] {
        netlink.set_up_without_arp(index).map_err(failed)?;
    }
    Ok((host.index, net.index))
}

fn find(netlink: &mut Netlink) -> io::Result<[Option<Link>; 2]> {
    Ok([netlink.link(HOST)?, netlink.link(NET)?])
}

fn settings() -> Result<(), SettingError> {
    sysctl::relax_reverse_path(HOST)?;
    // An answer may come from an address of the node itself, when that is the backend.
    sysctl::set(&format!("ipv4/conf/{HOST}/accept_local"), "1")?;
    sysctl::set_if_there(&format!("ipv6/conf/{NET}/disable_ipv6"), "1")?;
    if sysctl::has_ipv6() { sysctl::plain_ipv6(HOST) } else { Ok(()) }
}
