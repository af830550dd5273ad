//! Makes the VXLAN device and keeps addresses, routes and kernel settings as planned.
//!
//! Effects only.

use std::{fs, io, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{
    OverlayConfig, OverlayDevice, OverlayError,
    plan::{Desired, RouteOp, Underlay, routes},
};
use crate::sys::netlink::{Netlink, Scope};

/// Bytes that VXLAN over IPv4 adds: outer Ethernet 14, IPv4 20, UDP 8, VXLAN 8 (RFC 7348 section 5).
const VXLAN_OVERHEAD: u32 = 50;

/// Finds the underlay, and makes the VXLAN device if it is not there. Both are looked up anew in
/// every round, since an administrator may take either away.
///
/// # Errors
///
/// [`OverlayError`].
pub(super) fn prepare(
    netlink: &mut Netlink,
    config: &OverlayConfig,
) -> Result<Underlay, OverlayError> {
    let (device, address, mtu) = find_underlay(netlink, config.node_ip)?;
    let failed = |source| OverlayError::Device { name: config.device.clone(), source };
    let mtu = mtu.saturating_sub(VXLAN_OVERHEAD);
    let vxlan = match netlink.link(&config.device).map_err(failed)? {
        Some(link) => link,
        None => {
            netlink.add_vxlan(&config.device, config.port, mtu).map_err(failed)?;
            let made = netlink.link(&config.device).map_err(failed)?;
            made.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?
        }
    };
    if vxlan.mtu != mtu {
        netlink.set_mtu(vxlan.index, mtu).map_err(failed)?;
    }
    if !vxlan.up {
        netlink.set_up(vxlan.index).map_err(failed)?;
    }
    // What comes out of the tunnel has a source that is routed into it only if its node is known.
    set(&format!("/proc/sys/net/ipv4/conf/{}/rp_filter", config.device), "0")?;
    set("/proc/sys/net/ipv4/ip_forward", "1")?;
    // The tunnel carries IPv4; without this the kernel would send router solicitations into it.
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", config.device);
    if fs::exists(&ipv6).unwrap_or(false) {
        set(&ipv6, "1")?;
    }
    Ok(Underlay { address, device, vxlan: vxlan.index })
}

/// Brings address and routes to what is planned. The device's value is returned once its gateway
/// address is there.
///
/// # Errors
///
/// The first [`OverlayError`]; the others are logged, all are tried.
pub(super) fn apply(
    netlink: &mut Netlink,
    config: &OverlayConfig,
    underlay: Underlay,
    desired: &Desired,
) -> Result<Option<OverlayDevice>, OverlayError> {
    let Some(gateway) = desired.gateway else { return Ok(None) };
    set_gateway(netlink, underlay.vxlan, gateway)
        .map_err(|source| OverlayError::Gateway { gateway, source })?;
    let mut observed = netlink.routes(underlay.vxlan).map_err(OverlayError::Routes)?;
    observed.extend(netlink.routes(underlay.device).map_err(OverlayError::Routes)?);
    let mut first = None;
    for op in routes(desired, &observed, underlay.vxlan) {
        let (result, route) = match op {
            RouteOp::Replace(route) => (netlink.replace_route(route), route),
            RouteOp::Delete(route) => (netlink.delete_route(route), route),
        };
        if let Err(source) = result {
            tracing::warn!(?op, error = %source, "cannot change a route");
            let destination = Ipv4Net::new_assert(route.destination, route.prefix_len);
            first.get_or_insert(OverlayError::Route { destination, source });
        }
    }
    match first {
        Some(error) => Err(error),
        None => Ok(Some(OverlayDevice { ifindex: underlay.vxlan, gateway, vni: config.vni })),
    }
}

fn set_gateway(netlink: &mut Netlink, device: u32, gateway: Ipv4Addr) -> io::Result<()> {
    let addresses = netlink.addresses(device)?;
    if !addresses.contains(&(gateway, 32)) {
        netlink.add_address(device, gateway, 32, Scope::Global)?;
    }
    for (old, prefix_len) in addresses.into_iter().filter(|(old, _)| *old != gateway) {
        netlink.delete_address(device, old, prefix_len)?;
    }
    Ok(())
}

fn find_underlay(
    netlink: &mut Netlink,
    node_ip: Ipv4Addr,
) -> Result<(u32, Ipv4Net, u32), OverlayError> {
    for link in netlink.links().map_err(OverlayError::Links)? {
        let addresses = netlink.addresses(link.index).map_err(OverlayError::Links)?;
        for (ip, prefix_len) in addresses {
            if ip == node_ip {
                return Ok((link.index, Ipv4Net::new_assert(ip, prefix_len), link.mtu));
            }
        }
    }
    Err(OverlayError::NoUnderlay { node_ip })
}

fn set(path: &str, value: &str) -> Result<(), OverlayError> {
    let failed = |source| OverlayError::Setting { path: path.to_owned(), source };
    if fs::read_to_string(path).map_err(failed)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value).map_err(failed)
}
