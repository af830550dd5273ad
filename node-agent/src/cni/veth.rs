//! The link between a pod and its node: made, verified and removed.
//!
//! Effects, blocking. The pod end is born inside the pod's namespace. The pod has its address as
//! /32 and sends everything to a gateway that exists only as a permanent neighbour entry with the
//! host end's MAC, so that neither side ever asks by ARP.

use std::{
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::ipam::Attachment;
use crate::sys::{
    netlink::{Link, Netlink, Route, Scope, VethEnd},
    netns::NetNs,
};

/// The gateway that every pod sees. Link-local, so it can be nobody's real address.
pub const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// What all host ends are called, before eight hexadecimal digits.
const HOST_PREFIX: &str = "orl";

/// Everything that is decided about a link before the kernel is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethSpec {
    pub host_name: String,
    pub host_mac: [u8; 6],
    pub pod_name: String,
    pub pod_mac: [u8; 6],
    pub ip: Ipv4Addr,
    /// Bytes.
    pub mtu: u32,
    /// Source address of the node's own traffic to the pod; `None` leaves it to the kernel.
    pub node_ip: Option<Ipv4Addr>,
}

impl VethSpec {
    /// Derives names and MAC addresses from the attachment, so that they are the same after a crash.
    /// The MACs are set rather than left to the kernel because udev replaces random ones.
    #[must_use]
    pub fn new(attachment: &Attachment, ip: Ipv4Addr, mtu: u32, node_ip: Option<Ipv4Addr>) -> Self {
        let digest = Sha256::new()
            .chain_update(attachment.container_id.as_bytes())
            .chain_update(b"/")
            .chain_update(attachment.ifname.as_bytes())
            .finalize();
        let byte = |index: usize| digest.get(index).copied().unwrap_or_default();
        // 0x02 marks a locally administered unicast address (IEEE 802).
        let mac = |at: usize| [2, byte(at), byte(at + 1), byte(at + 2), byte(at + 3), byte(at + 4)];
        Self {
            host_name: format!(
                "{HOST_PREFIX}{:02x}{:02x}{:02x}{:02x}",
                byte(0),
                byte(1),
                byte(2),
                byte(3)
            ),
            host_mac: mac(4),
            pod_name: attachment.ifname.to_string(),
            pod_mac: mac(9),
            ip,
            mtu,
            node_ip,
        }
    }
}

/// Whether a device name is one that [`VethSpec::new`] gives.
#[must_use]
pub fn is_host_name(name: &str) -> bool {
    name.strip_prefix(HOST_PREFIX).is_some_and(|digits| {
        digits.len() == 8 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// What went wrong with a link.
#[derive(Debug, thiserror::Error)]
pub enum VethError {
    #[error("cannot open network namespace {}", path.display())]
    Namespace { path: PathBuf, source: io::Error },
    #[error("{} is the node's own network namespace", path.display())]
    OwnNamespace { path: PathBuf },
    #[error("cannot {step} ({device})")]
    Kernel { step: &'static str, device: String, source: io::Error },
    #[error("{0}")]
    Differs(String),
}

/// Makes the link, complete or not at all; what an earlier try left behind is replaced.
/// Returns the interface index of the host end.
///
/// # Errors
/// When the namespace cannot be entered or the kernel refuses a step.
pub fn attach(host: &NetNs, pod: &Path, spec: &VethSpec) -> Result<u32, VethError> {
    let pod = open_pod(host, pod)?;
    let result = make(host, &pod, spec);
    if result.is_err() {
        // The first error is the one to tell; a link that cannot be removed is replaced next time.
        if let Err(error) = detach(host, &spec.host_name) {
            tracing::warn!(device = spec.host_name, %error, "half-made link not removed");
        }
    }
    result
}

fn make(host: &NetNs, pod: &NetNs, spec: &VethSpec) -> Result<u32, VethError> {
    let index = within(host, |netlink| make_pair(netlink, pod, spec))?;
    within(pod, |netlink| configure_pod_end(netlink, spec))?;
    // The route comes last, so that nothing is sent to a pod that cannot answer yet.
    within(host, |netlink| {
        netlink
            .replace_permanent_neighbour(index, spec.ip, spec.pod_mac)
            .map_err(step("add the pod's neighbour entry", &spec.host_name))?;
        netlink
            .replace_route(host_route(index, spec))
            .map_err(step("add the route to the pod", &spec.host_name))
    })?;
    Ok(index)
}

/// Removes the link of a host end; one that is gone already is a success. The pod end, the routes
/// and the neighbour entries go with it.
///
/// # Errors
/// When the kernel refuses.
pub fn detach(host: &NetNs, host_name: &str) -> Result<(), VethError> {
    within(host, |netlink| {
        let found = netlink.link(host_name).map_err(step("look up the link", host_name))?;
        let Some(link) = found else { return Ok(()) };
        netlink.delete_link(link.index).map_err(step("delete the link", host_name))
    })
}

/// Verifies every piece that [`attach`] makes; returns the interface index of the host end.
///
/// # Errors
/// [`VethError::Differs`] names the first piece that is not as it should be.
pub fn check(host: &NetNs, pod: &Path, spec: &VethSpec) -> Result<u32, VethError> {
    let pod = open_pod(host, pod)?;
    let index = within(host, |netlink| check_host_end(netlink, spec))?;
    within(&pod, |netlink| check_pod_end(netlink, spec))?;
    Ok(index)
}

/// The host ends that exist, by name, with their interface indices.
///
/// # Errors
/// When the kernel refuses.
pub fn host_ends(host: &NetNs) -> Result<Vec<Link>, VethError> {
    let links = within(host, |netlink| netlink.links().map_err(step("list links", "all")))?;
    Ok(links.into_iter().filter(|link| is_host_name(&link.name)).collect())
}

/// Lets the node pass packets between its devices.
///
/// # Errors
/// When the setting cannot be written.
pub fn enable_forwarding(host: &NetNs) -> Result<(), VethError> {
    within(host, |_| {
        write_sysctl("net/ipv4/ip_forward", "1").map_err(step("enable IPv4 forwarding", "node"))
    })
}

fn open_pod(host: &NetNs, path: &Path) -> Result<NetNs, VethError> {
    let failed = |source| VethError::Namespace { path: path.to_owned(), source };
    let pod = NetNs::open(path).map_err(failed)?;
    if pod.is_same_as(host).map_err(failed)? {
        return Err(VethError::OwnNamespace { path: path.to_owned() });
    }
    Ok(pod)
}

fn within<T: Send>(
    namespace: &NetNs,
    work: impl FnOnce(&mut Netlink) -> Result<T, VethError> + Send,
) -> Result<T, VethError> {
    let device = || namespace.path().map_or_else(|| "node".to_owned(), |p| p.display().to_string());
    namespace.run(|| work(&mut Netlink::open().map_err(step("open netlink", "socket"))?)).map_err(
        |source| VethError::Kernel {
            step: "enter the network namespace",
            device: device(),
            source,
        },
    )?
}

fn step(step: &'static str, device: &str) -> impl FnOnce(io::Error) -> VethError {
    move |source| VethError::Kernel { step, device: device.to_owned(), source }
}

fn make_pair(netlink: &mut Netlink, pod: &NetNs, spec: &VethSpec) -> Result<u32, VethError> {
    let name = spec.host_name.as_str();
    if let Some(stale) = netlink.link(name).map_err(step("look up the link", name))? {
        netlink.delete_link(stale.index).map_err(step("delete the stale link", name))?;
    }
    let here = VethEnd { name, mac: spec.host_mac };
    let there = VethEnd { name: &spec.pod_name, mac: spec.pod_mac };
    netlink.add_veth(here, there, pod, spec.mtu).map_err(step("add the veth pair", name))?;
    let made = netlink.link(name).map_err(step("look up the link", name))?;
    let Some(link) = made else {
        return Err(VethError::Differs(format!("{name} is gone right after it was made")));
    };
    // The kernel forwards what arrives by this device, and does not judge a pod's packet by the
    // route back to its source: the dataplane may answer by another device.
    for (setting, value) in [("forwarding", "1"), ("rp_filter", "0")] {
        write_sysctl(&format!("net/ipv4/conf/{name}/{setting}"), value)
            .map_err(step("set the host end's IPv4 settings", name))?;
    }
    match write_sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1") {
        // A kernel without IPv6 has nothing to switch off.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(step("switch IPv6 off on the host end", name)(error));
        }
        _ => {}
    }
    netlink.set_up(link.index).map_err(step("bring the host end up", name))?;
    Ok(link.index)
}

fn configure_pod_end(netlink: &mut Netlink, spec: &VethSpec) -> Result<(), VethError> {
    let name = spec.pod_name.as_str();
    let lo = device(netlink, "lo")?;
    netlink.set_up(lo.index).map_err(step("bring up loopback", "lo"))?;
    let link = device(netlink, name)?;
    netlink.set_up(link.index).map_err(step("bring the pod end up", name))?;
    netlink
        .add_address(link.index, spec.ip, 32, Scope::Global)
        .map_err(step("add the pod's address", name))?;
    netlink
        .replace_permanent_neighbour(link.index, POD_GATEWAY, spec.host_mac)
        .map_err(step("add the gateway's neighbour entry", name))?;
    for route in pod_routes(link.index) {
        netlink.replace_route(route).map_err(step("add the pod's routes", name))?;
    }
    Ok(())
}

/// First the way to the gateway, then the way to everything through it: the kernel wants that order.
const fn pod_routes(device: u32) -> [Route; 2] {
    let to_gateway = Route {
        destination: POD_GATEWAY,
        prefix_len: 32,
        gateway: None,
        device,
        preferred_source: None,
        scope: Scope::Link,
    };
    let default = Route {
        destination: Ipv4Addr::UNSPECIFIED,
        prefix_len: 0,
        gateway: Some(POD_GATEWAY),
        device,
        preferred_source: None,
        scope: Scope::Global,
    };
    [to_gateway, default]
}

const fn host_route(device: u32, spec: &VethSpec) -> Route {
    Route {
        destination: spec.ip,
        prefix_len: 32,
        gateway: None,
        device,
        preferred_source: spec.node_ip,
        scope: Scope::Link,
    }
}

fn check_host_end(netlink: &mut Netlink, spec: &VethSpec) -> Result<u32, VethError> {
    let name = spec.host_name.as_str();
    let link = device(netlink, name)?;
    check_link(&link, spec.host_mac, spec.mtu)?;
    let routes = netlink.routes(link.index).map_err(step("list routes", name))?;
    expect(routes.contains(&host_route(link.index, spec)), || {
        format!("the route to {} by {name} is missing", spec.ip)
    })?;
    check_neighbour(netlink, &link, (spec.ip, spec.pod_mac))?;
    Ok(link.index)
}

fn check_pod_end(netlink: &mut Netlink, spec: &VethSpec) -> Result<(), VethError> {
    let name = spec.pod_name.as_str();
    let lo = device(netlink, "lo")?;
    expect(lo.up, || "lo in the pod is down".to_owned())?;
    let link = device(netlink, name)?;
    check_link(&link, spec.pod_mac, spec.mtu)?;
    let addresses = netlink.addresses(link.index).map_err(step("list addresses", name))?;
    expect(addresses.contains(&(spec.ip, 32)), || format!("{name} lacks address {}/32", spec.ip))?;
    let routes = netlink.routes(link.index).map_err(step("list routes", name))?;
    for route in pod_routes(link.index) {
        expect(routes.contains(&route), || {
            format!("the pod's route to {}/{} is missing", route.destination, route.prefix_len)
        })?;
    }
    check_neighbour(netlink, &link, (POD_GATEWAY, spec.host_mac))
}

fn device(netlink: &mut Netlink, name: &str) -> Result<Link, VethError> {
    let found = netlink.link(name).map_err(step("look up the link", name))?;
    found.ok_or_else(|| VethError::Differs(format!("interface {name} is missing")))
}

fn check_link(link: &Link, mac: [u8; 6], mtu: u32) -> Result<(), VethError> {
    expect(link.up, || format!("{} is down", link.name))?;
    expect(link.mac == Some(mac), || format!("{} has another MAC address", link.name))?;
    expect(link.mtu == mtu, || format!("{} has MTU {}, not {mtu}", link.name, link.mtu))
}

fn check_neighbour(
    netlink: &mut Netlink,
    link: &Link,
    wanted: (Ipv4Addr, [u8; 6]),
) -> Result<(), VethError> {
    let known =
        netlink.permanent_neighbours(link.index).map_err(step("list neighbours", &link.name))?;
    expect(known.contains(&wanted), || {
        format!("{} lacks the permanent neighbour entry of {}", link.name, wanted.0)
    })
}

fn expect(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), VethError> {
    if holds { Ok(()) } else { Err(VethError::Differs(otherwise())) }
}

fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    std::fs::write(Path::new("/proc/sys").join(name), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_macs_come_from_the_attachment_alone() {
        let spec = |id: &str, ifname: &str| {
            VethSpec::new(&Attachment::new(id, ifname), Ipv4Addr::new(10, 244, 1, 2), 1450, None)
        };
        let one = spec("0123456789abcdef", "eth0");
        assert_eq!(one, spec("0123456789abcdef", "eth0"));
        assert!(is_host_name(&one.host_name), "{}", one.host_name);
        assert_ne!(one.host_name, spec("0123456789abcdef", "eth1").host_name);
        assert_ne!(one.host_mac, one.pod_mac);
        assert_eq!((one.host_mac[0], one.pod_mac[0]), (2, 2));
    }

    #[test]
    fn only_our_names_are_ours() {
        assert!(is_host_name("orl0123abcd"));
        for name in ["orlop.vxlan", "orl0123abc", "orl0123abcde", "orl0123abcG", "eth0", "orl"] {
            assert!(!is_host_name(name), "{name}");
        }
    }
}
