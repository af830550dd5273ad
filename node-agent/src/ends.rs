//! What `node-agent endpoints` shows: the pods of this node, and by which way packets to the others go.
//!
//! Pure: what is programmed and names in, rows out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use serde_json::{Value, json};

use crate::{
    dataplane::Ends,
    model::{FarEnd, FarPath, LocalEndpoint, ObjectKey},
};

/// What addresses and devices are called.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The pods that the CNI server knows.
    pub pods: BTreeMap<IpAddr, Arc<LocalEndpoint>>,
    /// Nodes by their addresses.
    pub nodes: BTreeMap<IpAddr, Arc<str>>,
    pub devices: BTreeMap<u32, String>,
    /// This node.
    pub here: Arc<str>,
}

/// An address of a pod here, or a range of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub address: String,
    /// `None` of a range, and of an address whose pod nobody knows.
    pub pod: Option<ObjectKey>,
    pub node: Option<Arc<str>>,
    /// By what packets get there, in words.
    pub way: String,
}

impl Row {
    /// The row for `-o json`.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "address": self.address,
            "pod": self.pod.as_ref().map(ToString::to_string),
            "node": self.node.as_deref(),
            "way": self.way,
        })
    }
}

/// Pods of this node, then ranges. A pod that is not programmed has a row that says so.
#[must_use]
pub fn rows(ends: &Ends, names: &Names) -> Vec<Row> {
    let ips: BTreeSet<&IpAddr> = ends.pods.keys().chain(names.pods.keys()).collect();
    let pod = |ip: &IpAddr| Row {
        address: ip.to_string(),
        pod: names.pods.get(ip).map(|row| row.pod.clone()),
        node: Some(Arc::clone(&names.here)),
        way: match ends.pods.get(ip) {
            Some(endpoint) => names.device(endpoint.ifindex),
            None => "not programmed yet".to_owned(),
        },
    };
    let range = |(net, far): (&ipnet::IpNet, &FarEnd)| Row {
        address: net.to_string(),
        pod: None,
        node: names.node(far),
        way: way(far),
    };
    ips.into_iter().map(pod).chain(ends.ranges.iter().map(range)).collect()
}

impl Names {
    fn device(&self, ifindex: u32) -> String {
        match self.devices.get(&ifindex) {
            Some(name) => format!("device {name}"),
            None => format!("device {ifindex}, which is gone"),
        }
    }

    fn node(&self, far: &FarEnd) -> Option<Arc<str>> {
        let here = (far.path == FarPath::Here).then(|| Arc::clone(&self.here));
        here.or_else(|| self.nodes.get(&far.node).cloned())
    }
}

fn way(far: &FarEnd) -> String {
    match far.path {
        FarPath::Tunnel => format!("tunnel to {}", far.node),
        FarPath::Routes => format!("routes to {}", far.node),
        FarPath::Here => "this node's pods, nobody else".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use ebpf_common::endpoint::Endpoint;

    use super::*;

    fn pod(name: &str, ip: &str) -> (IpAddr, Arc<LocalEndpoint>) {
        let ip = ip.parse().unwrap();
        let row = LocalEndpoint {
            pod: ObjectKey::new("shop", name),
            ip,
            netns_cookie: 1,
            host_ifindex: 7,
            host_mac: [2; 6],
            pod_mac: [3; 6],
            host_ports: [].into(),
        };
        (ip, Arc::new(row))
    }

    #[test]
    fn pods_and_ranges_say_where_packets_to_them_go_as_it_is_programmed() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let far = |node: &str, path| FarEnd { node: ip(node), path };
        let net = |text: &str| text.parse().unwrap();
        let endpoint = |ifindex| Endpoint { ifindex, ..Endpoint::default() };
        let ends = Ends {
            pods: [(ip("10.244.0.2"), endpoint(7)), (ip("10.244.0.9"), endpoint(9))].into(),
            ranges: [
                (net("10.244.0.0/24"), far("192.0.2.1", FarPath::Here)),
                (net("10.244.1.0/24"), far("192.0.2.2", FarPath::Tunnel)),
                (net("10.244.2.0/24"), far("192.0.2.3", FarPath::Routes)),
            ]
            .into(),
        };
        let names = Names {
            pods: [pod("web", "10.244.0.2"), pod("new", "10.244.0.3")].into(),
            nodes: [(ip("192.0.2.2"), "two".into())].into(),
            devices: [(7, "orl7".to_owned())].into(),
            here: "one".into(),
        };
        let line = |row: &Row| {
            let pod = row.pod.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
            format!("{} {pod} {} {}", row.address, row.node.as_deref().unwrap_or("-"), row.way)
        };
        assert_eq!(
            rows(&ends, &names).iter().map(line).collect::<Vec<_>>(),
            [
                "10.244.0.2 shop/web one device orl7",
                "10.244.0.3 shop/new one not programmed yet",
                "10.244.0.9 - one device 9, which is gone",
                "10.244.0.0/24 - one this node's pods, nobody else",
                "10.244.1.0/24 - two tunnel to 192.0.2.2",
                "10.244.2.0/24 - - routes to 192.0.2.3",
            ]
        );
    }
}
