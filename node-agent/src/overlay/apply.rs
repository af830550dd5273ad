//! Makes the VXLAN device and keeps addresses, routes and kernel settings as planned.
//!
//! Effects only.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::Ipv4Net;

use super::{
    OverlayConfig, OverlayDevice, OverlayError,
    plan::{Desired, RouteOp, Underlay, VXLAN_OVERHEAD, routes},
};
use crate::sys::{
    netlink::{Netlink, Scope},
    sysctl::{self, SettingError},
};

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
    let (device, address, underlay_mtu) = find_underlay(netlink, config.node_ip)?;
    let failed = |source| OverlayError::Device { name: config.device.clone(), source };
    let mtu = underlay_mtu.saturating_sub(VXLAN_OVERHEAD);
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
    settings(&config.device).map_err(OverlayError::Setting)?;
    Ok(Underlay { address, device, vxlan: vxlan.index, mtu: underlay_mtu })
}

fn settings(device: &str) -> Result<(), SettingError> {
    // What comes out of the tunnel has a source that is routed into it only if its node is known.
    sysctl::relax_reverse_path(device)?;
    sysctl::forward_ipv4()?;
    // The tunnel carries IPv4; without this the kernel would send router solicitations into it.
    sysctl::set_if_there(&format!("ipv6/conf/{device}/disable_ipv6"), "1")
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
            first.get_or_insert(OverlayError::Route { destination: route.destination, source });
        }
    }
    match first {
        Some(error) => Err(error),
        None => Ok(Some(OverlayDevice {
            ifindex: underlay.vxlan,
            gateways: [Some(IpAddr::V4(gateway)), None],
            vni: config.vni,
            port: config.port,
            host_ifindex: 0,
        })),
    }
}

fn set_gateway(netlink: &mut Netlink, device: u32, gateway: Ipv4Addr) -> io::Result<()> {
    let gateway = IpAddr::V4(gateway);
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
            if let IpAddr::V4(ip) = ip
                && ip == node_ip
            {
                return Ok((link.index, Ipv4Net::new_assert(ip, prefix_len), link.mtu));
            }
        }
    }
    Err(OverlayError::NoUnderlay { node_ip })
}
