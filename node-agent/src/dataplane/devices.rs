//! The node's network devices: its addresses, our programs on them, and what programs need to know of
//! them.
//!
//! Effects, but for [`device`].

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ebpf_common::{
    addr::Addr,
    device::{Device, XDP},
};

use super::{
    apply::Runner,
    load::{LoadError, TcHook},
};
use crate::{
    overlay::chain,
    sys::netlink::{Link, Netlink},
};

/// Where a device of the underlay has programs.
const UNDERLAY_HOOKS: [TcHook; 2] = [TcHook::FromUnderlay, TcHook::ToUnderlay];

impl Runner {
    /// Node addresses and MACs as they are now, and our programs on every device that has one.
    pub(super) fn devices(&mut self) -> Result<(), String> {
        let (mut addresses, mut macs) = (BTreeSet::new(), BTreeSet::new());
        let mut rows = BTreeMap::new();
        let mut netlink = Netlink::open().map_err(|error| chain(&error))?;
        let overlay = *self.tables.overlay.borrow();
        let gateways = overlay.map_or([None; 2], |device| device.gateways);
        let host = overlay.map_or(0, |device| device.host_ifindex);
        let mut present = BTreeSet::new();
        let (mut others, mut headless) = (BTreeSet::new(), BTreeSet::new());
        for link in netlink.links().map_err(|error| chain(&error))? {
            if link.index == host {
                let gateways: Vec<IpAddr> = gateways.into_iter().flatten().collect();
                rows.insert(link.index, device(&link, &gateways));
                continue;
            }
            let found = netlink.addresses(link.index).map_err(|error| chain(&error))?;
            let found: Vec<IpAddr> = found.into_iter().map(|(ip, _)| ip).collect();
            if !self.is_underlay(&link, &found) {
                others.insert(link.index);
                continue;
            }
            if !link.is_ethernet {
                // The node's addresses nevertheless: pods and the node itself ask it by them.
                addresses.extend(found);
                headless.insert(link.name);
                others.insert(link.index);
                continue;
            }
            let flags = if self.xdp.attach(&mut netlink, link.index, &link.name) { XDP } else { 0 };
            rows.insert(link.index, Device { flags, ..device(&link, &found) });
            addresses.extend(found);
            macs.extend(link.mac.filter(|mac| *mac != [0; 6]));
            present.insert(link.index);
            if !self.attached.underlay.contains(&link.index) {
                for hook in UNDERLAY_HOOKS {
                    self.programs.attach_tc(hook, link.index).map_err(|error| chain(&error))?;
                }
            }
        }
        addresses.extend(&self.config.node_ips);
        addresses.retain(|ip| !is_link_only(ip) && !gateways.contains(&Some(*ip)));
        for lost in self.attached.underlay.difference(&present) {
            for hook in UNDERLAY_HOOKS {
                self.programs.forget_tc(hook, *lost);
            }
        }
        self.xdp.keep(|ifindex| present.contains(&ifindex));
        self.leave(others).map_err(|error| chain(&error))?;
        self.attached.underlay = present;
        self.attached.headless = headless;
        self.attached.addresses.clone_from(&addresses);
        self.maps.set_devices(&rows).map_err(|error| chain(&error))?;
        self.maps.set_node_addresses(&addresses).map_err(|error| chain(&error))?;
        self.maps.set_local_macs(&macs).map_err(|error| chain(&error))
    }

    /// Takes off what an earlier agent, whose choice was another, left on devices; once for each.
    fn leave(&mut self, others: BTreeSet<u32>) -> Result<(), LoadError> {
        for ifindex in others.difference(&self.attached.left) {
            for hook in UNDERLAY_HOOKS {
                self.programs.leave_tc(hook, *ifindex)?;
            }
            self.xdp.leave(*ifindex);
        }
        // Before the first program is attached it is not known where filters would be.
        if self.programs.tc_path().is_some() {
            self.attached.left = others;
        }
        Ok(())
    }

    /// Whether it connects the node to others. Only what has Ethernet's header there gets programs: they look
    /// for the IP header behind it.
    fn is_underlay(&self, link: &Link, addresses: &[IpAddr]) -> bool {
        let ours = Some(link.index) == self.attached.overlay || link.name.starts_with("orl");
        let chosen = self.config.devices.is_empty() || self.config.devices.contains(&link.name);
        !ours && chosen && link.name != "lo" && addresses.iter().any(|ip| !is_link_only(ip))
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
