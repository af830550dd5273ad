//! Pods of this node into maps: how packets reach them, and which network namespaces they are.
//!
//! Effects, but for [`namespaces`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
};

use ebpf_common::{addr::Addr, endpoint::Endpoint, netns::Netns};

use super::{
    apply::{Failures, Runner, now_s},
    load::TcHook,
    seek::Sought,
};
use crate::{
    chain::chain,
    model::{LocalEndpoint, Programmed},
    sys::socket::netns_cookie,
    table::Delta,
};

/// Where a pod's veth pair has programs: what it sends, and what the stack sends to it.
const POD_HOOKS: [TcHook; 2] = [TcHook::FromPod, TcHook::ToPod];

impl Runner {
    pub(super) fn follow_endpoints(&mut self) -> Result<(), String> {
        let delta = self.seen.endpoints.changes(&self.tables.endpoints);
        let (mut stale, mut failed) = (Failures::default(), Failures::default());
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
            stale.note(ip, self.maps.delete_endpoint(ip));
            self.end(ip, old.get(&ip));
        }
        let mut refused = BTreeSet::new();
        for (ip, row) in self.due(&delta) {
            // A pod went and another one has its address, which the table tells as one change.
            if self.device(ip, old.get(&ip)).is_some_and(|device| device != row.host_ifindex) {
                self.end(ip, old.get(&ip));
            }
            let outcome = self.put_endpoint(ip, &row, old.get(&ip));
            if outcome.is_err() {
                refused.insert(ip);
            }
            failed.note(ip, outcome);
        }
        self.attached.refused.clone_from(&refused);
        stale.outcome()?;
        self.change_namespaces(&delta)?;
        self.seen.endpoints.record(&delta);
        // One pod that cannot be served keeps no other from being told of.
        self.programmed.send_replace(Programmed { revision: delta.revision, refused });
        failed.outcome()
    }

    /// Pods that have changed, and those that could not be served so far.
    fn due(&self, delta: &Delta<IpAddr, LocalEndpoint>) -> BTreeMap<IpAddr, Arc<LocalEndpoint>> {
        let row = |ip: &IpAddr| Some((*ip, self.tables.endpoints.row(ip)?));
        let refused = self.attached.refused.iter().filter_map(row);
        refused.chain(delta.upserts.iter().cloned()).collect()
    }

    /// The host's end of the link of the pod that had an address so far.
    fn device(&self, ip: IpAddr, old: Option<&Endpoint>) -> Option<u32> {
        self.attached.pods.get(&ip).copied().or_else(|| old.map(|endpoint| endpoint.ifindex))
    }

    /// What the pod had that had an address is over: its flows, and its links unless it has another address.
    fn end(&mut self, ip: IpAddr, old: Option<&Endpoint>) {
        self.collector.seek(Sought::pod(Addr::from(ip), now_s()));
        let device = self.device(ip, old);
        self.attached.pods.remove(&ip);
        if let Some(ifindex) = device
            && !self.attached.pods.values().any(|other| *other == ifindex)
        {
            self.attached.sure.remove(&ifindex);
            for hook in POD_HOOKS {
                self.programs.forget_tc(hook, ifindex);
            }
        }
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
        match self.serve(&POD_HOOKS, row.host_ifindex) {
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
        self.namespaces = Namespaces::of(&rows, own);
        let surplus_may_go = self.tables.endpoints.is_synced();
        let desired = &self.namespaces.rows;
        self.maps.set_namespaces(desired, surplus_may_go).map_err(|error| chain(&error))
    }

    /// Follows changes of pods; costs in proportion to the change.
    fn change_namespaces(&mut self, delta: &Delta<IpAddr, LocalEndpoint>) -> Result<(), String> {
        if delta.full {
            return self.follow_namespaces();
        }
        let mut touched = BTreeSet::new();
        for ip in &delta.deletes {
            self.namespaces.put(*ip, 0, &mut touched);
        }
        for (ip, row) in &delta.upserts {
            self.namespaces.put(*ip, row.netns_cookie, &mut touched);
        }
        let mut failed = Failures::default();
        for cookie in touched {
            let row = self.namespaces.rows.get(&cookie);
            failed.note("network namespace", self.maps.put_namespace(cookie, row));
        }
        let outcome = failed.outcome();
        if outcome.is_err() {
            // What is written is not known any more: the next round reads it.
            self.seen.endpoints.forget();
        }
        outcome
    }
}

/// The row of each namespace: the addresses under which its packets are seen.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    rows: BTreeMap<u64, Netns>,
    /// Whose address is whose.
    pods: BTreeMap<IpAddr, u64>,
    /// The node's own cookie.
    own: Option<u64>,
}

impl Namespaces {
    /// `own` is the node's cookie and gateway addresses.
    fn of(pods: &[(IpAddr, Arc<LocalEndpoint>)], own: Option<(u64, [Option<IpAddr>; 2])>) -> Self {
        let mut all = Self::default();
        for (ip, pod) in pods {
            all.put(*ip, pod.netns_cookie, &mut BTreeSet::new());
        }
        if let Some((cookie, gateways)) = own {
            let addr = gateways.map(|ip| ip.map_or_else(Addr::default, Addr::from));
            all.rows.insert(cookie, Netns { addr });
            all.own = Some(cookie);
        }
        all
    }

    /// Gives an address to a namespace, 0 to none; notes whose rows this touches.
    fn put(&mut self, ip: IpAddr, cookie: u64, touched: &mut BTreeSet<u64>) {
        let family = usize::from(ip.is_ipv6());
        let old = self.pods.remove(&ip).filter(|old| *old != cookie && Some(*old) != self.own);
        if let Some(old) = old
            && let Some(row) = self.rows.get_mut(&old)
            && row.addr[family] == Addr::from(ip)
        {
            row.addr[family] = Addr::default();
            if *row == Netns::default() {
                self.rows.remove(&old);
            }
            touched.insert(old);
        }
        if cookie == 0 {
            return;
        }
        self.pods.insert(ip, cookie);
        let place = &mut self.rows.entry(cookie).or_default().addr[family];
        if *place != Addr::from(ip) && Some(cookie) != self.own {
            *place = Addr::from(ip);
            touched.insert(cookie);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectKey;

    fn pod(ip: &str, netns_cookie: u64) -> (IpAddr, Arc<LocalEndpoint>) {
        let ip = ip.parse().unwrap();
        let row = LocalEndpoint {
            pod: ObjectKey::new("default", "web"),
            ip,
            netns_cookie,
            host_ifindex: 1,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            host_ports: [].into(),
        };
        (ip, Arc::new(row))
    }

    #[test]
    fn a_namespace_has_both_addresses_of_its_pod_and_the_node_its_gateways() {
        let pods =
            [pod("10.244.1.2", 7), pod("fd00::2", 7), pod("10.244.1.3", 8), pod("10.244.1.4", 0)];
        let gateway = "10.244.1.1".parse::<IpAddr>().unwrap();
        let rows = Namespaces::of(&pods, Some((9, [Some(gateway), None]))).rows;
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

    #[test]
    fn a_change_of_one_pod_touches_its_namespace_alone() {
        let pods = [pod("10.244.1.2", 7), pod("fd00::2", 7), pod("10.244.1.3", 8)];
        let mut all = Namespaces::of(&pods, Some((9, [None, None])));
        let mut put = |ip: &str, cookie| {
            let mut touched = BTreeSet::new();
            all.put(ip.parse().unwrap(), cookie, &mut touched);
            (touched.into_iter().collect::<Vec<_>>(), all.rows.keys().copied().collect::<Vec<_>>())
        };
        assert_eq!(put("10.244.1.2", 7), (vec![], vec![7, 8, 9]), "nothing new");
        assert_eq!(put("10.244.1.2", 0), (vec![7], vec![7, 8, 9]), "its other address stays");
        assert_eq!(put("fd00::2", 0), (vec![7], vec![8, 9]));
        assert_eq!(put("10.244.1.3", 10), (vec![8, 10], vec![9, 10]), "a new pod of that address");
        // An address may come to a new namespace before it is told that the old one has lost it.
        assert_eq!(put("10.244.1.4", 10), (vec![10], vec![9, 10]));
        assert_eq!(put("10.244.1.3", 0), (vec![], vec![9, 10]), "what is not there any more");
    }
}
