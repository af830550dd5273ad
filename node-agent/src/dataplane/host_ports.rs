//! Ports of the node that lead to its pods, as rows like those of services.
//!
//! Pure. A pod's ports at one host address are a service of their own: its cluster IPs are that address
//! or, where a pod names none, all of the node's and loopback's; its only endpoint is the pod. So sets,
//! order of writes and reports are those of services.
//!
//! A Service that has the same port, be it by an address of the node or as its node port, goes before a pod's: so it
//! is upstream, where the portmap plugin's rules come after kube-proxy's since one pod could take over a Service's
//! traffic (containernetworking/plugins pull request 269, CVE-2019-9946). The pod is told.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use crate::model::{
    EndpointPort, EndpointRow, EndpointSliceRow, Family, HostPort, LocalEndpoint, ObjectKey,
    ServiceKind, ServicePort, ServiceRow,
};

/// No service is called so: names of services have no colon.
const MARK: &str = "pod:";

/// What stands for a pod's ports at one host address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports {
    pub row: Arc<ServiceRow>,
    /// One of each family that the pod has.
    pub slices: Vec<Arc<EndpointSliceRow>>,
}

/// Whether a key is one of [`rows`].
#[must_use]
pub fn is_pods(key: &ObjectKey) -> bool {
    key.name.starts_with(MARK)
}

/// The pod that a key of [`rows`] stands for; `None` for a service's.
#[must_use]
pub fn pod(key: &ObjectKey) -> Option<ObjectKey> {
    let (name, _at) = key.name.strip_prefix(MARK)?.split_once('@')?;
    Some(ObjectKey::new(&key.namespace, name))
}

/// Whether a pod has a port at the node's loopback addresses.
#[must_use]
pub fn are_at_loopback(pods: impl IntoIterator<Item = impl AsRef<LocalEndpoint>>) -> bool {
    let at_loopback = |port: &HostPort| port.host_ip.is_none_or(|ip| ip.is_loopback());
    pods.into_iter().any(|pod| pod.as_ref().host_ports.iter().any(at_loopback))
}

/// The rows of all pods of this node, whose addresses are `node`.
#[must_use]
pub fn rows(
    pods: impl IntoIterator<Item = impl AsRef<LocalEndpoint>>,
    node: &BTreeSet<IpAddr>,
) -> BTreeMap<ObjectKey, Ports> {
    let mut asked: BTreeMap<ObjectKey, (BTreeSet<IpAddr>, BTreeSet<HostPort>)> = BTreeMap::new();
    for pod in pods {
        let pod = pod.as_ref();
        for port in pod.host_ports.iter() {
            let at = port.host_ip.map_or_else(|| "*".to_owned(), |ip| ip.to_string());
            let key = ObjectKey::new(&pod.pod.namespace, &format!("{MARK}{}@{at}", pod.pod.name));
            let (ips, ports) = asked.entry(key).or_default();
            ips.insert(pod.ip);
            ports.insert(*port);
        }
    }
    asked
        .into_iter()
        .map(|(key, (ips, ports))| {
            let ports: Vec<HostPort> = ports.into_iter().collect();
            let row = Arc::new(service(&ports, &ips, node));
            let slices = [Family::V4, Family::V6].map(|family| slice(&key, &ports, &ips, family));
            let slices = slices.into_iter().flatten().map(Arc::new).collect();
            (key, Ports { row, slices })
        })
        .collect()
}

fn service(ports: &[HostPort], pod: &BTreeSet<IpAddr>, node: &BTreeSet<IpAddr>) -> ServiceRow {
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let all = || node.iter().copied().chain(loopback);
    let at: BTreeSet<IpAddr> = ports
        .iter()
        .flat_map(|port| port.host_ip.map_or_else(|| all().collect(), |ip| vec![ip]))
        .filter(|ip| pod.iter().any(|pod| Family::of(pod) == Family::of(ip)))
        .collect();
    let port = |port: &HostPort| ServicePort {
        name: name(port),
        protocol: port.protocol,
        port: port.host_port,
        node_port: 0,
    };
    ServiceRow {
        kind: ServiceKind::ClusterIp,
        cluster_ips: at.into_iter().collect(),
        ports: ports.iter().map(port).collect(),
        // The youngest of all: every Service that claims the same has it.
        created_s: i64::MAX,
        ..ServiceRow::default()
    }
}

fn slice(
    service: &ObjectKey,
    ports: &[HostPort],
    pod: &BTreeSet<IpAddr>,
    family: Family,
) -> Option<EndpointSliceRow> {
    let ip = *pod.iter().find(|ip| Family::of(ip) == family)?;
    let port = |port: &HostPort| EndpointPort {
        name: name(port),
        protocol: port.protocol,
        port: port.container_port,
    };
    Some(EndpointSliceRow {
        service: service.clone(),
        family,
        ports: ports.iter().map(port).collect(),
        // The node's port leads to the pod as long as it is there, ready or not.
        endpoints: vec![EndpointRow { ip, ..EndpointRow::default() }],
        rejected: Vec::new().into(),
    })
}

/// What a service's port and a slice's have in common.
fn name(port: &HostPort) -> Arc<str> {
    format!("{}-{}", port.host_port, port.protocol.name()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::{
            frontends::{Node, desired},
            select::Place,
            status::frontend,
        },
        model::Protocol,
    };

    fn port(host_ip: &str, host_port: u16, protocol: Protocol, container_port: u16) -> HostPort {
        HostPort { host_ip: host_ip.parse().ok(), host_port, protocol, container_port }
    }

    fn pod(name: &str, ip: &str, ports: &[HostPort]) -> Arc<LocalEndpoint> {
        Arc::new(LocalEndpoint {
            pod: ObjectKey::new("d", name),
            ip: ip.parse().unwrap(),
            netns_cookie: 0,
            host_ifindex: 1,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            host_ports: ports.into(),
        })
    }

    /// Every frontend with its backends.
    fn lines(pods: &[Arc<LocalEndpoint>], node: &[&str]) -> Vec<String> {
        let node = node.iter().map(|ip| ip.parse().unwrap()).collect();
        let place = Place::default();
        let mut lines = Vec::new();
        for (key, ports) in rows(pods, &node) {
            assert!(
                is_pods(&key) && pods.iter().any(|one| Some(&one.pod) == super::pod(&key).as_ref())
            );
            let here = Node { place: &place, answers: None, node_ports: (30_000, 32_767) };
            let desired = desired(&ports.row, &ports.slices, here, |_claim| true);
            assert_eq!(desired.problems, Vec::<String>::new());
            for one in &desired.ports {
                let to: Vec<_> = one.backends[0]
                    .iter()
                    .map(|to| format!("{}:{}", to.addr, u16::from_be_bytes(to.port)))
                    .collect();
                lines.extend(
                    one.frontends
                        .iter()
                        .map(|row| format!("{} -> {}", frontend(&row.key), to.join(","))),
                );
            }
        }
        lines.sort();
        lines
    }

    #[test]
    fn a_port_without_an_address_is_at_all_of_the_node_in_the_pods_families() {
        let web = [port("", 8080, Protocol::Tcp, 80)];
        let node = ["192.168.0.1", "fd00:a::1"];
        assert_eq!(
            lines(&[pod("web", "10.244.1.7", &web)], &node),
            [
                "127.0.0.1:8080/TCP at loopback -> 10.244.1.7:80",
                "192.168.0.1:8080/TCP -> 10.244.1.7:80",
            ]
        );
        let both = [pod("web", "10.244.1.7", &web), pod("web", "fd00:244::7", &web)];
        assert_eq!(
            lines(&both, &node),
            [
                "127.0.0.1:8080/TCP at loopback -> 10.244.1.7:80",
                "192.168.0.1:8080/TCP -> 10.244.1.7:80",
                "[::1]:8080/TCP at loopback -> fd00:244::7:80",
                "[fd00:a::1]:8080/TCP -> fd00:244::7:80",
            ]
        );
    }

    /// Upstream's conformance case "HostPort validates that there is no conflict between pods with same
    /// hostPort but different hostIP and protocol" (`test/e2e/network/hostport.go`).
    #[test]
    fn the_same_port_at_different_addresses_and_protocols_is_no_conflict() {
        let pods = [
            pod("pod1", "10.244.1.7", &[port("127.0.0.1", 54_323, Protocol::Tcp, 8080)]),
            pod("pod2", "10.244.1.8", &[port("192.168.0.1", 54_323, Protocol::Tcp, 8080)]),
            pod("pod3", "10.244.1.9", &[port("192.168.0.1", 54_323, Protocol::Udp, 8081)]),
        ];
        assert_eq!(
            lines(&pods, &["192.168.0.1"]),
            [
                "127.0.0.1:54323/TCP at loopback -> 10.244.1.7:8080",
                "192.168.0.1:54323/TCP -> 10.244.1.8:8080",
                "192.168.0.1:54323/UDP -> 10.244.1.9:8081",
            ]
        );
        assert!(are_at_loopback(&pods[..1]) && !are_at_loopback(&pods[1..]));
        let ports: Vec<HostPort> = pods.iter().map(|pod| pod.host_ports[0]).collect();
        assert!(!ports[0].meets(&ports[1]) && !ports[1].meets(&ports[2]));
        let everywhere = port("", 54_323, Protocol::Tcp, 1);
        assert!(everywhere.meets(&ports[0]) && everywhere.meets(&ports[1]));
        assert!(!everywhere.meets(&ports[2]) && everywhere.meets(&everywhere));
        assert_eq!(format!("{} {everywhere}", ports[0]), "127.0.0.1:54323/TCP 54323/TCP");
    }

    #[test]
    fn several_ports_of_a_pod_keep_apart_and_pods_without_have_no_rows() {
        let ports = [
            port("", 53, Protocol::Udp, 5353),
            port("", 53, Protocol::Tcp, 5354),
            port("192.168.0.1", 80, Protocol::Tcp, 8080),
        ];
        let pods = [pod("dns", "10.244.1.7", &ports), pod("plain", "10.244.1.8", &[])];
        assert_eq!(
            lines(&pods, &["192.168.0.1"]),
            [
                "127.0.0.1:53/TCP at loopback -> 10.244.1.7:5354",
                "127.0.0.1:53/UDP at loopback -> 10.244.1.7:5353",
                "192.168.0.1:53/TCP -> 10.244.1.7:5354",
                "192.168.0.1:53/UDP -> 10.244.1.7:5353",
                "192.168.0.1:80/TCP -> 10.244.1.7:8080",
            ]
        );
    }
}
