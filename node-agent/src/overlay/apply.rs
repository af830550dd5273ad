//! Makes the devices and keeps addresses, routes and kernel settings as planned.
//!
//! Effects only.

use std::{io, net::IpAddr};

use ipnet::IpNet;

use super::{
    OverlayConfig, OverlayDevice, OverlayError, host,
    plan::{Desired, Mode, RouteOp, Underlay, UnderlayAddress, routes},
};
use crate::sys::{
    netlink::{Netlink, Scope},
    sysctl::{self, SettingError},
    vxlan::Vxlan,
};

/// MTU of new devices until the first plan sets it: Ethernet's less the larger tunnel header.
const FIRST_MTU: u32 = 1430;

/// Finds the underlay, and makes the devices that are not there. All are looked up anew in every
/// round, since an administrator may take any of them away.
///
/// # Errors
///
/// [`OverlayError`].
pub(super) fn prepare(
    netlink: &mut Netlink,
    config: &OverlayConfig,
) -> Result<Underlay, OverlayError> {
    let addresses = find_underlay(netlink, config)?;
    sysctl::forward_ipv4().map_err(OverlayError::Setting)?;
    let (host, host_peer) = host::prepare(netlink, FIRST_MTU)?;
    let vxlan = match config.mode {
        Mode::Vxlan | Mode::Auto => Some(prepare_vxlan(netlink, config)?),
        // Peers may still send through one that an agent of another mode made.
        Mode::L3 | Mode::Off => {
            let failed = |source| OverlayError::Device { name: config.device.clone(), source };
            netlink.link(&config.device).map_err(failed)?.map(|link| link.index)
        }
    };
    Ok(Underlay { addresses, vxlan, host, host_peer })
}

/// The VXLAN device, made anew when it is not as it must be: what matters of it cannot be changed.
fn prepare_vxlan(netlink: &mut Netlink, config: &OverlayConfig) -> Result<u32, OverlayError> {
    let name = &config.device;
    let failed = |source| OverlayError::Device { name: name.clone(), source };
    let mut present = netlink.link(name).map_err(failed)?;
    if let Some(link) = &present {
        let Some(settings) = netlink.vxlan(name).map_err(failed)? else {
            return Err(OverlayError::Foreign { name: name.clone(), wanted: "vxlan" });
        };
        if settings != Vxlan::ours(config.port) {
            tracing::warn!(device = name, ?settings, "VXLAN device with other settings replaced");
            netlink.delete_link(link.index).map_err(failed)?;
            present = None;
        }
    }
    let link = match present {
        Some(link) => link,
        None => {
            netlink.add_vxlan(name, config.port, FIRST_MTU).map_err(|source| {
                OverlayError::Vxlan { name: name.clone(), port: config.port, source }
            })?;
            let made = netlink.link(name).map_err(failed)?;
            made.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?
        }
    };
    // What comes out of the tunnel has a source that is routed into it only if its node is known.
    sysctl::relax_reverse_path(name).map_err(OverlayError::Setting)?;
    if !link.up {
        netlink.set_up(link.index).map_err(|source| OverlayError::Vxlan {
            name: name.clone(),
            port: config.port,
            source,
        })?;
    }
    Ok(link.index)
}

/// What becomes of routes and addresses that are ours and not planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absent {
    Removed,
    /// The plan may not know of all nodes.
    Kept,
}

/// Brings addresses, routes and sizes to what is planned. The device's value is returned once its
/// gateway addresses are there.
///
/// # Errors
///
/// The first [`OverlayError`]; the others are logged, all are tried.
pub(super) fn apply(
    netlink: &mut Netlink,
    config: &OverlayConfig,
    underlay: &Underlay,
    desired: &Desired,
    absent: Absent,
) -> Result<OverlayDevice, OverlayError> {
    set_size(netlink, &config.device, desired.vxlan_mtu)?;
    // What leaves by the host device ends at a pod.
    set_size(netlink, host::HOST, desired.pod_mtu)?;
    set_families(config, underlay, desired).map_err(OverlayError::Setting)?;
    // New addresses before the routes that want them as a source, old ones after the routes that
    // wanted them.
    add_gateways(netlink, underlay.host, desired)?;
    let observed = netlink.all_routes().map_err(OverlayError::Routes)?;
    let mut first = None;
    for op in routes(desired, &observed, underlay) {
        let (result, route) = match op {
            RouteOp::Replace(route) => (netlink.replace_route(route), route),
            RouteOp::Delete(_) if absent == Absent::Kept => continue,
            RouteOp::Delete(route) => (netlink.delete_route(route), route),
        };
        if let Err(source) = result {
            tracing::warn!(?op, error = %source, "cannot change a route");
            first.get_or_insert(OverlayError::Route { destination: route.destination, source });
        }
    }
    if absent == Absent::Removed {
        delete_old_gateways(netlink, underlay, desired)?;
    }
    match first {
        Some(error) => Err(error),
        None => Ok(OverlayDevice {
            ifindex: underlay.vxlan.unwrap_or_default(),
            gateways: desired.gateways,
            vni: config.vni,
            port: config.port,
            host_ifindex: underlay.host,
            host_peer_ifindex: underlay.host_peer,
        }),
    }
}

fn set_size(netlink: &mut Netlink, device: &str, mtu: u32) -> Result<(), OverlayError> {
    let failed = |source| OverlayError::Device { name: device.to_owned(), source };
    match netlink.link(device).map_err(failed)? {
        Some(link) if link.mtu != mtu => netlink.set_mtu(link.index, mtu).map_err(failed),
        _ => Ok(()),
    }
}

/// Lets the tunnel carry IPv6 when pods have it; else the kernel would send what nobody asked for.
fn set_families(
    config: &OverlayConfig,
    underlay: &Underlay,
    desired: &Desired,
) -> Result<(), SettingError> {
    let ipv6 = desired.pod_cidrs.iter().any(|cidr| cidr.addr().is_ipv6());
    if ipv6 {
        sysctl::forward_ipv6()?;
    }
    match underlay.vxlan {
        Some(_) if ipv6 => sysctl::plain_ipv6(&config.device),
        Some(_) => sysctl::set_if_there(&format!("ipv6/conf/{}/disable_ipv6", config.device), "1"),
        None => Ok(()),
    }
}

fn add_gateways(netlink: &mut Netlink, device: u32, desired: &Desired) -> Result<(), OverlayError> {
    let present = netlink.addresses(device).map_err(OverlayError::Links)?;
    for gateway in desired.gateways.into_iter().flatten() {
        // On a kernel without IPv6 the range for IPv6 is nobody's.
        if gateway.is_ipv6() && !sysctl::has_ipv6() {
            continue;
        }
        let prefix_len = IpNet::from(gateway).prefix_len();
        if !present.contains(&(gateway, prefix_len)) {
            netlink
                .add_address(device, gateway, prefix_len, Scope::Global)
                .map_err(|source| OverlayError::Gateway { gateway, source })?;
        }
    }
    Ok(())
}

/// Takes addresses off the host device that are no gateways any more, and off the VXLAN device, which
/// had them before there was a host device.
fn delete_old_gateways(
    netlink: &mut Netlink,
    underlay: &Underlay,
    desired: &Desired,
) -> Result<(), OverlayError> {
    let mut surplus = Vec::new();
    for device in underlay.vxlan.into_iter().chain([underlay.host]) {
        for (ip, prefix_len) in netlink.addresses(device).map_err(OverlayError::Links)? {
            if device != underlay.host || !desired.gateways.contains(&Some(ip)) {
                surplus.push((device, ip, prefix_len));
            }
        }
    }
    for (device, ip, prefix_len) in surplus {
        netlink
            .delete_address(device, ip, prefix_len)
            .map_err(|source| OverlayError::Gateway { gateway: ip, source })?;
    }
    Ok(())
}

/// The devices that have the node's addresses, the main address first.
fn find_underlay(
    netlink: &mut Netlink,
    config: &OverlayConfig,
) -> Result<Vec<UnderlayAddress>, OverlayError> {
    let remedy = if config.node_ips_are_given {
        "put it back, or start the agent with another --node-ip"
    } else {
        "the agent starts anew with another once the way to the server has one"
    };
    let links = netlink.links().map_err(OverlayError::Links)?;
    let addresses = netlink.all_addresses().map_err(OverlayError::Links)?;
    let find = |node_ip: &IpAddr| {
        let (device, ip, prefix_len) = addresses.iter().find(|(_, ip, _)| ip == node_ip)?;
        let link = links.iter().find(|link| link.index == *device)?;
        let net = IpNet::new(*ip, *prefix_len).ok()?;
        Some(UnderlayAddress { net, device: link.index, mtu: link.mtu })
    };
    let missing = |node_ip| OverlayError::NoUnderlay { node_ip, remedy };
    config.node_ips.iter().map(|ip| find(ip).ok_or_else(|| missing(*ip))).collect()
}
