//! The link between a pod and its node: made, verified and removed.
//!
//! Effects, blocking. The pod end is born inside the pod's namespace. The pod has each of its
//! addresses as a host address (/32, /128) and sends everything to a gateway that exists only as a
//! permanent neighbour entry with the host end's MAC, so that neither side ever asks by ARP or
//! neighbour discovery, and the first packet goes at once.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

use super::{
    host_end::{self, Observed},
    ipam::Attachment,
};
use crate::sys::{
    netlink::{Link, Netlink, Owner, Route, Scope, VethEnd},
    netns::NetNs,
    socket::netns_cookie,
    sysctl::{self, SettingError},
};

/// The gateways that every pod sees. Link-local, so they can be nobody's real addresses.
const POD_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const POD_GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// What all host ends are called, before eight hexadecimal digits.
const HOST_PREFIX: &str = "orl";

/// Everything that is decided about a link before the kernel is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethSpec {
    pub host_name: String,
    pub host_mac: [u8; 6],
    pub pod_name: String,
    pub pod_mac: [u8; 6],
    /// One, or two of different families.
    pub ips: Vec<IpAddr>,
    /// Bytes.
    pub mtu: u32,
    /// Source addresses of the node's own traffic to the pod, the first of each family; a family
    /// that has none is left to the kernel.
    pub node_ips: Vec<IpAddr>,
}

/// A link as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Interface index of the host end.
    pub host_ifindex: u32,
    /// Of the pod's network namespace.
    pub netns_cookie: u64,
}

impl VethSpec {
    /// Derives names and MAC addresses from the attachment, so that they are the same after a crash.
    /// The MACs are set rather than left to the kernel because udev replaces random ones.
    #[must_use]
    pub fn new(attachment: &Attachment, ips: &[IpAddr], mtu: u32, node_ips: &[IpAddr]) -> Self {
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
            ips: ips.to_vec(),
            mtu,
            node_ips: node_ips.to_vec(),
        }
    }

    fn has_ipv6(&self) -> bool {
        self.ips.iter().any(IpAddr::is_ipv6)
    }
}

/// The gateway that a pod sees for an address of its own.
#[must_use]
pub const fn pod_gateway(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => IpAddr::V4(POD_GATEWAY_V4),
        IpAddr::V6(_) => IpAddr::V6(POD_GATEWAY_V6),
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
    #[error("cannot set up {device}")]
    Setting { device: String, source: SettingError },
    #[error("{0}")]
    Differs(String),
}

/// Makes the link, complete or not at all; what an earlier try left behind is replaced.
///
/// # Errors
/// When the namespace cannot be entered or the kernel refuses a step.
pub fn attach(host: &NetNs, pod: &Path, spec: &VethSpec) -> Result<Attached, VethError> {
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

fn make(host: &NetNs, pod: &NetNs, spec: &VethSpec) -> Result<Attached, VethError> {
    let host_ifindex = within(host, |netlink| make_pair(netlink, pod, spec))?;
    let netns_cookie = within(pod, |netlink| {
        configure_pod_end(netlink, spec)?;
        read_cookie(spec)
    })?;
    // The routes come last, so that nothing is sent to a pod that cannot answer yet.
    within(host, |netlink| {
        let links = netlink.links().map_err(step("list links", "all"))?;
        let sources = host_end::sources(netlink, &links).map_err(step("list addresses", "all"))?;
        let ops = host_end::ops(spec, host_ifindex, &sources);
        host_end::apply(netlink, ops).map_err(step("lead to the pod", &spec.host_name))
    })?;
    Ok(Attached { host_ifindex, netns_cookie })
}

fn read_cookie(spec: &VethSpec) -> Result<u64, VethError> {
    netns_cookie().map_err(step("read the network namespace's cookie", &spec.pod_name))
}

/// The cookie of a pod's network namespace.
///
/// # Errors
/// When the namespace is gone.
pub fn cookie(host: &NetNs, pod: &Path, spec: &VethSpec) -> Result<u64, VethError> {
    within(&open_pod(host, pod)?, |_| read_cookie(spec))
}

/// Brings both ends of a link to another MTU. Smaller ones take effect first where packets are made.
///
/// # Errors
/// When an end is missing or the kernel refuses.
pub fn set_mtu(host: &NetNs, pod: &Path, spec: &VethSpec) -> Result<(), VethError> {
    let pod = open_pod(host, pod)?;
    for (namespace, name) in [(&pod, &spec.pod_name), (host, &spec.host_name)] {
        within(namespace, |netlink| {
            let link = device(netlink, name)?;
            netlink.set_mtu(link.index, spec.mtu).map_err(step("set the MTU", name))
        })?;
    }
    Ok(())
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

/// Verifies every piece that [`attach`] makes.
///
/// # Errors
/// [`VethError::Differs`] names the first piece that is not as it should be.
pub fn check(host: &NetNs, pod: &Path, spec: &VethSpec) -> Result<Attached, VethError> {
    let pod = open_pod(host, pod)?;
    let host_ifindex = within(host, |netlink| check_host_end(netlink, spec))?;
    let netns_cookie = within(&pod, |netlink| {
        check_pod_end(netlink, spec)?;
        read_cookie(spec)
    })?;
    Ok(Attached { host_ifindex, netns_cookie })
}

/// Puts back what host ends have lost to others: that they are up, their neighbour entries and routes. Gives
/// how many lacked something. Pods whose host end is gone, or is another device, are left out.
///
/// # Errors
/// The first one; the others are mended all the same.
pub fn repair(host: &NetNs, specs: &[VethSpec]) -> Result<usize, VethError> {
    within(host, |netlink| {
        let observed = Observed::read(netlink).map_err(step("look at host ends", "all"))?;
        let mut outcomes = Vec::new();
        for spec in specs {
            let name = &spec.host_name;
            let is_its = |link: &&Link| link.name == *name && link.mac == Some(spec.host_mac);
            let Some(link) = observed.links.iter().find(is_its) else { continue };
            let ops = host_end::plan(spec, link, &observed);
            if !ops.is_empty() {
                tracing::debug!(device = name, ?ops, "host end mended");
                outcomes.push(host_end::apply(netlink, ops).map_err(step("mend the link", name)));
            }
        }
        let count = outcomes.len();
        outcomes.into_iter().collect::<Result<Vec<()>, _>>().map(|_all| count)
    })
}

/// The host ends that exist, by name, with their interface indices.
///
/// # Errors
/// When the kernel refuses.
pub fn host_ends(host: &NetNs) -> Result<Vec<Link>, VethError> {
    let links = within(host, |netlink| netlink.links().map_err(step("list links", "all")))?;
    Ok(links.into_iter().filter(|link| is_host_name(&link.name)).collect())
}

/// Lets the node pass packets of these families between its devices.
///
/// # Errors
/// When a setting cannot be written.
pub fn enable_forwarding(host: &NetNs, cidrs: &[IpNet]) -> Result<(), VethError> {
    within(host, |_| {
        let failed = |source| VethError::Setting { device: "node".to_owned(), source };
        sysctl::forward_ipv4().map_err(failed)?;
        if cidrs.iter().any(|cidr| matches!(cidr, IpNet::V6(_))) {
            sysctl::forward_ipv6().map_err(failed)?;
        }
        Ok(())
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
    configure_host_end(spec)
        .map_err(|source| VethError::Setting { device: name.to_owned(), source })?;
    netlink.set_up(link.index).map_err(step("bring the host end up", name))?;
    Ok(link.index)
}

/// The kernel forwards what arrives by this device, and does not judge a pod's packet by the route
/// back to its source: the dataplane may answer by another device.
fn configure_host_end(spec: &VethSpec) -> Result<(), SettingError> {
    let name = &spec.host_name;
    sysctl::set(&format!("ipv4/conf/{name}/forwarding"), "1")?;
    sysctl::relax_reverse_path(name)?;
    if spec.has_ipv6() {
        sysctl::plain_ipv6(name)?;
        sysctl::set(&format!("ipv6/conf/{name}/forwarding"), "1")
    } else {
        sysctl::set_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1")
    }
}

fn configure_pod_end(netlink: &mut Netlink, spec: &VethSpec) -> Result<(), VethError> {
    let name = spec.pod_name.as_str();
    let lo = device(netlink, "lo")?;
    netlink.set_up(lo.index).map_err(step("bring up loopback", "lo"))?;
    let link = device(netlink, name)?;
    if spec.has_ipv6() {
        let failed = |source| VethError::Setting { device: name.to_owned(), source };
        sysctl::set("ipv6/conf/lo/disable_ipv6", "0").map_err(failed)?;
        sysctl::plain_ipv6(name).map_err(failed)?;
    }
    netlink.set_up(link.index).map_err(step("bring the pod end up", name))?;
    for ip in &spec.ips {
        netlink
            .add_address(link.index, *ip, host_prefix(*ip), Scope::Global)
            .map_err(step("add the pod's address", name))?;
        netlink
            .replace_permanent_neighbour(link.index, pod_gateway(*ip), spec.host_mac)
            .map_err(step("add the gateway's neighbour entry", name))?;
        for route in pod_routes(link.index, *ip) {
            netlink.replace_route(route).map_err(step("add the pod's routes", name))?;
        }
    }
    Ok(())
}

const fn host_prefix(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// First the way to the gateway, then the way to everything through it: the kernel wants that order.
fn pod_routes(device: u32, ip: IpAddr) -> [Route; 2] {
    let gateway = pod_gateway(ip);
    let everything = match ip {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let to_gateway = Route {
        destination: gateway.into(),
        gateway: None,
        device,
        preferred_source: None,
        scope: Scope::Link,
        owner: Owner::Other,
    };
    let default = Route {
        destination: IpNet::new_assert(everything, 0),
        gateway: Some(gateway),
        scope: Scope::Global,
        ..to_gateway
    };
    [to_gateway, default]
}

fn check_host_end(netlink: &mut Netlink, spec: &VethSpec) -> Result<u32, VethError> {
    let name = spec.host_name.as_str();
    let link = device(netlink, name)?;
    check_link(&link, spec.host_mac, spec.mtu)?;
    let observed = Observed::read(netlink).map_err(step("look at the host end", name))?;
    let missing = host_end::plan(spec, &link, &observed);
    missing.first().map_or(Ok(link.index), |op| {
        Err(VethError::Differs(format!("the node lacks {op} by {name}")))
    })
}

fn check_pod_end(netlink: &mut Netlink, spec: &VethSpec) -> Result<(), VethError> {
    let name = spec.pod_name.as_str();
    let lo = device(netlink, "lo")?;
    expect(lo.up, || "lo in the pod is down".to_owned())?;
    let link = device(netlink, name)?;
    check_link(&link, spec.pod_mac, spec.mtu)?;
    let addresses = netlink.addresses(link.index).map_err(step("list addresses", name))?;
    let routes = netlink.routes(link.index).map_err(step("list routes", name))?;
    for ip in &spec.ips {
        let address = (*ip, host_prefix(*ip));
        expect(addresses.contains(&address), || {
            format!("{name} lacks address {}/{}", address.0, address.1)
        })?;
        for route in pod_routes(link.index, *ip) {
            expect(routes.contains(&route), || {
                format!("the pod's route to {} is missing", route.destination)
            })?;
        }
        check_neighbour(netlink, &link, (pod_gateway(*ip), spec.host_mac))?;
    }
    Ok(())
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
    wanted: (IpAddr, [u8; 6]),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_macs_come_from_the_attachment_alone() {
        let spec = |id: &str, ifname: &str| {
            let ips = [IpAddr::from([10, 244, 1, 2]), "fd00::2".parse().unwrap()];
            VethSpec::new(&Attachment::new(id, ifname), &ips, 1450, &[])
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
