//! The node's network devices: its addresses, our programs on them, and what programs need to know of
//! them.
//!
//! Effects, but for [`device`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ebpf_common::{
    addr::Addr,
    device::{Device, XDP},
};

use super::{
    apply::{Failures, Runner},
    load::{LoadError, TcHook},
    paths::Untranslated,
};
use crate::{
    chain::chain,
    overlay::OverlayDevice,
    sys::netlink::{Link, Netlink},
};

/// Where a device of the underlay has programs.
const UNDERLAY_HOOKS: [TcHook; 2] = [TcHook::FromUnderlay, TcHook::ToUnderlay];

/// What a look at the node's devices showed.
#[derive(Default)]
struct Found {
    rows: BTreeMap<u32, Device>,
    addresses: BTreeSet<IpAddr>,
    macs: BTreeSet<[u8; 6]>,
    /// Devices that are to have our programs.
    underlay: BTreeSet<u32>,
    /// Devices that are to have none; names of those that get none although they connect the node.
    others: BTreeSet<u32>,
    untranslated: BTreeMap<String, Untranslated>,
}

impl Runner {
    /// Node addresses and MACs as they are now, and our programs on every device that has one. A device that
    /// fails is told; all others are served.
    pub(super) fn devices(&mut self) -> Result<(), String> {
        let mut failed = Failures::default();
        let found = self.look(&mut failed).map_err(|error| chain(&error))?;
        for lost in self.attached.underlay.difference(&found.underlay) {
            self.attached.sure.remove(lost);
            for hook in UNDERLAY_HOOKS {
                self.programs.forget_tc(hook, *lost);
            }
        }
        self.xdp.keep(|ifindex| found.underlay.contains(&ifindex));
        self.leave(&found.others, &mut failed);
        self.attached.underlay = found.underlay;
        self.attached.untranslated = found.untranslated;
        self.attached.addresses.clone_from(&found.addresses);
        failed.note("map DEVICES", self.maps.set_devices(&found.rows));
        let mut asked_by = found.addresses;
        if self.config.localhost_node_ports {
            // Only programs at sockets look there for them; a packet with such an address never leaves a host.
            asked_by.extend([IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]);
        }
        failed.note("map NODE_ADDRS", self.maps.set_node_addresses(&asked_by));
        failed.note("map LOCAL_MACS", self.maps.set_local_macs(&found.macs));
        failed.outcome()
    }

    /// Looks at each device, and attaches where programs are to be and are not.
    fn look(&mut self, failed: &mut Failures) -> io::Result<Found> {
        let mut found = Found::default();
        let mut netlink = Netlink::open()?;
        let overlay = *self.tables.overlay.borrow();
        let gateways = overlay.map_or([None; 2], |device| device.gateways);
        let host = overlay.map_or(0, |device| device.host_ifindex);
        let links = netlink.links()?;
        let mut addresses: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
        for (ifindex, ip, _prefix_len) in netlink.all_addresses()? {
            addresses.entry(ifindex).or_default().push(ip);
        }
        let mut chosen: BTreeSet<String> = self.config.devices.iter().cloned().collect();
        for link in links {
            if link.index == host {
                let gateways: Vec<IpAddr> = gateways.into_iter().flatten().collect();
                found.rows.insert(link.index, device(&link, &gateways));
                continue;
            }
            let ips = addresses.remove(&link.index).unwrap_or_default();
            let (is_chosen, connects) = (self.is_chosen(&link.name), self.connects(&link, &ips));
            if connects && is_chosen {
                // Also of one without programs: pods and the node itself ask by them.
                found.addresses.extend(&ips);
            }
            if !connects || !is_chosen || !link.is_ethernet {
                if !self.is_ours(&link) {
                    found.others.insert(link.index);
                }
                let why =
                    if is_chosen { Untranslated::NoEthernet } else { Untranslated::NotChosen };
                if connects {
                    found.untranslated.insert(link.name, why);
                }
                continue;
            }
            let flags = if self.xdp.attach(&mut netlink, link.index, &link.name) { XDP } else { 0 };
            found.rows.insert(link.index, Device { flags, ..device(&link, &ips) });
            found.macs.extend(link.mac.filter(|mac| *mac != [0; 6]));
            found.underlay.insert(link.index);
            chosen.remove(&link.name);
            match self.serve(&UNDERLAY_HOOKS, link.index) {
                Ok(()) => {}
                // It went meanwhile.
                Err(error) if error.is_missing_device() => {}
                Err(error) => failed.note(&link.name, Err(io::Error::other(chain(&error)))),
            }
        }
        for name in chosen {
            found.untranslated.entry(name).or_insert(Untranslated::NotThere);
        }
        found.addresses.extend(&self.config.node_ips);
        found.addresses.retain(|ip| !is_link_only(ip) && !gateways.contains(&Some(*ip)));
        Ok(found)
    }

    /// Puts programs on a device that has not got them, or may have lost them.
    pub(super) fn serve(&mut self, hooks: &[TcHook], ifindex: u32) -> Result<(), LoadError> {
        if self.attached.sure.contains(&ifindex) {
            return Ok(());
        }
        hooks.iter().try_for_each(|hook| self.programs.attach_tc(*hook, ifindex))?;
        self.attached.sure.insert(ifindex);
        Ok(())
    }

    /// Programs at the sockets.
    pub(super) fn sockets(&mut self) -> Result<(), String> {
        if let Some(cgroup) = &self.config.cgroup
            && !self.attached.sockets
        {
            self.programs.attach_cgroup(cgroup).map_err(|error| chain(&error))?;
            self.attached.sockets = true;
        }
        Ok(())
    }

    /// Programs on the overlay's device and on the host device's peer.
    pub(super) fn serve_overlay(&mut self, device: OverlayDevice) -> Result<(), LoadError> {
        if device.ifindex != 0 {
            self.serve(&[TcHook::ToOverlay, TcHook::FromOverlay], device.ifindex)?;
            self.attached.overlay = Some(device.ifindex);
        }
        if device.host_peer_ifindex != 0 {
            self.serve(&[TcHook::FromHost], device.host_peer_ifindex)?;
        }
        Ok(())
    }

    /// Takes off what an earlier agent, whose choice was another, left on devices; once for each.
    fn leave(&mut self, others: &BTreeSet<u32>, failed: &mut Failures) {
        let mut left: BTreeSet<u32> = self.attached.left.intersection(others).copied().collect();
        for ifindex in others.difference(&self.attached.left) {
            self.xdp.leave(*ifindex);
            let mut outcomes =
                UNDERLAY_HOOKS.into_iter().map(|hook| self.programs.leave_tc(hook, *ifindex));
            match outcomes.try_for_each(|outcome| outcome) {
                Ok(()) => drop(left.insert(*ifindex)),
                Err(error) => failed
                    .note(format_args!("device {ifindex}"), Err(io::Error::other(chain(&error)))),
            }
        }
        // Before the first program is attached it is not known where filters would be.
        if self.programs.tc_path().is_some() {
            self.attached.left = left;
        }
    }

    /// Whether it connects the node to others.
    fn connects(&self, link: &Link, addresses: &[IpAddr]) -> bool {
        !self.is_ours(link) && link.name != "lo" && addresses.iter().any(|ip| !is_link_only(ip))
    }

    /// Whether it is a pod's or the overlay's.
    fn is_ours(&self, link: &Link) -> bool {
        Some(link.index) == self.attached.overlay || link.name.starts_with("orl")
    }

    fn is_chosen(&self, name: &String) -> bool {
        self.config.devices.is_empty() || self.config.devices.contains(name)
    }
}

/// What programs need to know of a device; of several addresses of a family the first, which is the
/// one that the kernel prefers as source.
fn device(link: &Link, addresses: &[IpAddr]) -> Device {
    let first = |v6: bool| {
        let mut usable = addresses.iter().filter(|ip| !is_link_only(ip));
        usable.find(|ip| ip.is_ipv6() == v6).map_or_else(Addr::default, |ip| Addr::from(*ip))
    };
    Device {
        addr: [first(false), first(true)],
        mtu: link.mtu,
        mac: link.mac.unwrap_or_default(),
        flags: 0,
    }
}

/// Whether an address means something only on its own link or host.
const fn is_link_only(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netlink::LinkKind;

    #[test]
    fn a_device_has_the_first_usable_address_of_each_family() {
        let link = Link {
            index: 3,
            name: "eth0".to_owned(),
            mac: Some([2, 0, 0, 0, 0, 9]),
            mtu: 1500,
            up: true,
            kind: LinkKind::Veth,
            is_ethernet: true,
            peer: None,
        };
        let ips = ["fe80::1", "169.254.1.1", "192.0.2.1", "192.0.2.2", "2001:db8::1"];
        let row = device(&link, &ips.map(|ip| ip.parse().unwrap()));
        assert_eq!(row.addr.map(|addr| addr.to_string()), ["192.0.2.1", "2001:db8::1"]);
        assert_eq!((row.mtu, row.mac), (1500, [2, 0, 0, 0, 0, 9]));
        assert_eq!(device(&link, &[]).addr, [Addr::default(); 2], "no address is none");
    }
}
