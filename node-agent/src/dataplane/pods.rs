//! Pods of this node into maps: how packets reach them, and which network namespaces they are.
//!
//! Effects, but for [`namespaces`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use ebpf_common::{addr::Addr, endpoint::Endpoint, netns::Netns};

use super::{
    apply::{Failures, Runner},
    load::TcHook,
};
use crate::{model::LocalEndpoint, overlay::chain, sys::socket::netns_cookie};

/// Where a pod's veth pair has programs: what it sends, and what the stack sends to it.
const POD_HOOKS: [TcHook; 2] = [TcHook::FromPod, TcHook::ToPod];

impl Runner {
    pub(super) fn follow_endpoints(&mut self) -> Result<(), String> {
        let delta = self.tables.endpoints.changes_since(self.seen.endpoints);
        let mut failed = Failures::default();
        let old = if delta.full {
            self.maps.endpoints().map_err(|e| chain(&e))?
        } else {
            BTreeMap::new()
        };
        let mut gone = delta.deletes.clone();
        if delta.full && delta.synced {
            let live: BTreeSet<IpAddr> = delta.upserts.iter().map(|(ip, _)| *ip).collect();
            gone.extend(old.keys().filter(|ip| !live.contains(*ip)));
        }
        for ip in gone {
            failed.note(ip, self.maps.delete_endpoint(ip));
            let from_map = old.get(&ip).map(|endpoint| endpoint.ifindex);
            if let Some(ifindex) = self.attached.pods.remove(&ip).or(from_map)
                && !self.attached.pods.values().any(|other| *other == ifindex)
            {
                for hook in POD_HOOKS {
                    self.programs.forget_tc(hook, ifindex);
                }
            }
        }
        for (ip, row) in &delta.upserts {
            let outcome = self.put_endpoint(*ip, row, old.get(ip));
            failed.note(ip, outcome);
        }
        failed.outcome()?;
        self.follow_namespaces()?;
        self.seen.endpoints = delta.revision;
        self.programmed.send_replace(delta.revision);
        Ok(())
    }

    /// The row first, then the program: a pod may be answered before it can ask.
    fn put_endpoint(
        &mut self,
        ip: IpAddr,
        row: &LocalEndpoint,
        old: Option<&Endpoint>,
    ) -> io::Result<()> {
        let endpoint = Endpoint {
            ifindex: row.host_ifindex,
            host_mac: row.host_mac,
            pod_mac: row.pod_mac,
            flags: 0,
        };
        if old.map(|old| Endpoint { flags: 0, ..*old }) != Some(endpoint) {
            self.maps.put_endpoint(ip, &endpoint)?;
        }
        if self.attached.pods.get(&ip) == Some(&row.host_ifindex) {
            return Ok(());
        }
        let mut attached =
            POD_HOOKS.into_iter().map(|hook| self.programs.attach_tc(hook, row.host_ifindex));
        match attached.try_for_each(|outcome| outcome) {
            Ok(()) => {
                self.attached.pods.insert(ip, row.host_ifindex);
                Ok(())
            }
            // The pod went while it was being programmed; its row is about to be deleted.
            Err(error) if error.is_missing_device() => Ok(()),
            Err(error) => Err(io::Error::other(chain(&error))),
        }
    }

    /// The namespaces whose packets pass our programs. The node's own is one of them once its packets
    /// to services have a device.
    pub(super) fn follow_namespaces(&mut self) -> Result<(), String> {
        let overlay = *self.tables.overlay.borrow();
        let own = match overlay {
            Some(device) if device.host_ifindex != 0 => {
                let cookie = netns_cookie().map_err(|error| chain(&error))?;
                Some((cookie, device.gateways))
            }
            _ => None,
        };
        let rows = self.tables.endpoints.changes_since(0).upserts;
        let pods: Vec<&LocalEndpoint> = rows.iter().map(|(_, row)| row.as_ref()).collect();
        let desired = namespaces(&pods, own);
        let surplus_may_go = self.tables.endpoints.is_synced();
        self.maps.set_namespaces(&desired, surplus_may_go).map_err(|error| chain(&error))
    }
}

/// The row of each namespace: the addresses under which its packets are seen. `own` is the node's
/// cookie and gateway addresses.
fn namespaces(
    pods: &[&LocalEndpoint],
    own: Option<(u64, [Option<IpAddr>; 2])>,
) -> BTreeMap<u64, Netns> {
    let mut rows: BTreeMap<u64, Netns> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.netns_cookie != 0) {
        let family = usize::from(pod.ip.is_ipv6());
        rows.entry(pod.netns_cookie).or_default().addr[family] = Addr::from(pod.ip);
    }
    if let Some((cookie, gateways)) = own {
        let addr = gateways.map(|ip| ip.map_or_else(Addr::default, Addr::from));
        rows.insert(cookie, Netns { addr });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectKey;

    fn pod(ip: &str, netns_cookie: u64) -> LocalEndpoint {
        LocalEndpoint {
            pod: ObjectKey::new("default", "web"),
            ip: ip.parse().unwrap(),
            netns_cookie,
            host_ifindex: 1,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            host_ports: [].into(),
        }
    }

    #[test]
    fn a_namespace_has_both_addresses_of_its_pod_and_the_node_its_gateways() {
        let pods =
            [pod("10.244.1.2", 7), pod("fd00::2", 7), pod("10.244.1.3", 8), pod("10.244.1.4", 0)];
        let gateway = "10.244.1.1".parse::<IpAddr>().unwrap();
        let rows = namespaces(&pods.iter().collect::<Vec<_>>(), Some((9, [Some(gateway), None])));
        let none = Addr::default();
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(
            rows.into_iter().map(|(cookie, row)| (cookie, row.addr)).collect::<Vec<_>>(),
            [
                (7, [addr("10.244.1.2"), addr("fd00::2")]),
                (8, [addr("10.244.1.3"), none]),
                (9, [addr("10.244.1.1"), none]),
            ]
        );
    }
}
