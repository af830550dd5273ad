//! A node's surroundings and a cluster's services as their users would describe them. Plain values.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use node_agent::model::{
    EndpointPort, EndpointRow, EndpointSliceRow, Family, Hints, HostPort as HostPortRow,
    LocalEndpoint, ObjectKey, Protocol, ServiceKind, ServicePort, ServiceRow, TrafficPolicy,
};

use super::frame::{SCTP, TCP};

/// An address by family.
pub(crate) type Pair = [IpAddr; 2];
/// An address and a port.
pub(crate) type End = (IpAddr, u16);

/// This node's addresses; the first one is that of its uplink.
pub(crate) const NODE: [Pair; 2] = [
    pair([192, 168, 0, 1], [0xfd00, 0xa, 0, 0, 0, 0, 0, 1]),
    pair([192, 168, 0, 11], [0xfd00, 0xa, 0, 0, 0, 0, 0, 0x11]),
];
/// As whom the node asks its own processes.
pub(crate) const ASKER: Pair = pair([169, 254, 21, 2], [0xfd6f, 0x726c, 0x6f70, 0, 0, 0, 0, 2]);
pub(crate) const GATEWAY: Pair = pair([10, 244, 1, 1], [0xfd00, 0x244, 1, 0, 0, 0, 0, 1]);
pub(crate) const PODS: [Pair; 3] = [
    pair([10, 244, 1, 7], [0xfd00, 0x244, 1, 0, 0, 0, 0, 7]),
    pair([10, 244, 1, 8], [0xfd00, 0x244, 1, 0, 0, 0, 0, 8]),
    pair([10, 244, 1, 9], [0xfd00, 0x244, 1, 0, 0, 0, 0, 9]),
];
/// Pods of two other nodes.
pub(crate) const FAR_PODS: [Pair; 3] = [
    pair([10, 244, 2, 7], [0xfd00, 0x244, 2, 0, 0, 0, 0, 7]),
    pair([10, 244, 2, 8], [0xfd00, 0x244, 2, 0, 0, 0, 0, 8]),
    pair([10, 244, 3, 7], [0xfd00, 0x244, 3, 0, 0, 0, 0, 7]),
];
pub(crate) const FAR_NETS: [[IpNet; 2]; 2] = [
    nets(([10, 244, 2, 0], 24), ([0xfd00, 0x244, 2, 0, 0, 0, 0, 0], 48)),
    nets(([10, 244, 3, 0], 24), ([0xfd00, 0x244, 3, 0, 0, 0, 0, 0], 48)),
];
/// This node's pods' range, and an address of it that no pod has.
pub(crate) const OWN_NETS: [IpNet; 2] =
    nets(([10, 244, 1, 0], 24), ([0xfd00, 0x244, 1, 0, 0, 0, 0, 0], 48));
pub(crate) const NOBODY: Pair = pair([10, 244, 1, 99], [0xfd00, 0x244, 1, 0, 0, 0, 0, 0x99]);
pub(crate) const FAR_NODES: [Pair; 2] = [
    pair([192, 168, 0, 2], [0xfd00, 0xa, 0, 0, 0, 0, 0, 2]),
    pair([192, 168, 0, 3], [0xfd00, 0xa, 0, 0, 0, 0, 0, 3]),
];
/// Hosts outside, and one to which no route leads.
pub(crate) const OUTSIDE: [Pair; 3] = [
    pair([198, 51, 100, 9], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]),
    pair([198, 51, 100, 10], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10]),
    pair([203, 0, 113, 77], [0x2001, 0xdb8, 7, 0, 0, 0, 0, 0x77]),
];
/// The next hop to all that is not on the uplink.
pub(crate) const GATE: Pair = pair([192, 168, 0, 254], [0xfd00, 0xa, 0, 0, 0, 0, 0, 0xfe]);
pub(crate) const ROUTER: Pair = pair([198, 51, 100, 1], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]);
pub(crate) const UNROUTABLE: Pair = pair([198, 18, 0, 9], [0x2001, 0xdb8, 0xdead, 0, 0, 0, 0, 9]);
/// An endpoint that is no pod.
pub(crate) const HOST: Pair = pair([198, 51, 100, 50], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x50]);
pub(crate) const LOOPBACK: Pair = pair([127, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]);
/// Where cluster DNS answers on the node itself.
pub(crate) const DNS: Pair = pair([169, 254, 20, 10], [0xfd00, 0xa9, 0, 0, 0, 0, 0, 0x10]);
pub(crate) const SERVICE_NETS: [IpNet; 2] =
    nets(([10, 96, 0, 0], 16), ([0xfd00, 0x96, 0, 0, 0, 0, 0, 0], 112));
/// First and last node port.
pub(crate) const NODE_PORTS: (u16, u16) = (30_000, 32_767);
pub(crate) const VXLAN_PORT: u16 = 8_472;
/// This node's name and zone; the other node is in the other zone.
pub(crate) const NAMES: [&str; 3] = ["node-1", "node-2", "node-3"];
pub(crate) const ZONES: [&str; 2] = ["a", "b"];

const fn pair(v4: [u8; 4], v6: [u16; 8]) -> Pair {
    let [a, b, c, d, e, f, g, h] = v6;
    let v6 = Ipv6Addr::new(a, b, c, d, e, f, g, h);
    [IpAddr::V4(Ipv4Addr::from_octets(v4)), IpAddr::V6(v6)]
}

const fn nets((v4, bits4): ([u8; 4], u8), (v6, bits6): ([u16; 8], u8)) -> [IpNet; 2] {
    let [a, b, c, d, e, f, g, h] = v6;
    let v6 = Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), bits6);
    [IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from_octets(v4), bits4)), IpNet::V6(v6)]
}

pub(crate) const fn ip(pair: Pair, v6: bool) -> IpAddr {
    pair[if v6 { 1 } else { 0 }]
}

/// Where an endpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Pod(usize),
    FarPod(usize),
    /// A process of this node, of another one, of a host outside.
    Node,
    FarNode(usize),
    Host,
}

impl Place {
    pub(crate) const ALL: [Self; 9] = [
        Self::Pod(0),
        Self::Pod(1),
        Self::Pod(2),
        Self::FarPod(0),
        Self::FarPod(1),
        Self::FarPod(2),
        Self::Node,
        Self::FarNode(0),
        Self::Host,
    ];

    pub(crate) fn ip(self, v6: bool) -> IpAddr {
        ip(
            match self {
                Self::Pod(index) => PODS[index],
                Self::FarPod(index) => FAR_PODS[index],
                Self::Node => NODE[0],
                Self::FarNode(index) => FAR_NODES[index],
                Self::Host => HOST,
            },
            v6,
        )
    }

    pub(crate) const fn node(self) -> &'static str {
        match self {
            Self::Pod(_) | Self::Node => NAMES[0],
            Self::FarPod(2) | Self::FarNode(1) => NAMES[2],
            Self::FarPod(_) | Self::FarNode(_) => NAMES[1],
            Self::Host => "",
        }
    }
}

/// What an endpoint's conditions say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    NotReady,
    /// Terminating and still serving.
    Draining,
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) place: Place,
    pub(crate) state: State,
    /// Which of the port's two target ports it has: a named port may differ between pods.
    pub(crate) second_target: bool,
    pub(crate) zone: Option<&'static str>,
    pub(crate) hinted_node: Option<&'static str>,
}

#[derive(Clone, Debug)]
pub(crate) struct Port {
    pub(crate) proto: u8,
    pub(crate) port: u16,
    /// 0: none.
    pub(crate) node_port: u16,
    pub(crate) targets: [u16; 2],
}

#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// Names it and its addresses in its world.
    pub(crate) number: u8,
    /// Has it an address of IPv4, of IPv6?
    pub(crate) families: [bool; 2],
    pub(crate) external: bool,
    /// Its external address is one of the node's.
    pub(crate) external_is_node: bool,
    pub(crate) ingress: bool,
    pub(crate) internal_local: bool,
    pub(crate) external_local: bool,
    /// 0: no affinity.
    pub(crate) affinity_s: u32,
    pub(crate) ranges: Vec<IpNet>,
    pub(crate) ports: Vec<Port>,
    pub(crate) endpoints: Vec<Endpoint>,
    /// It answers on every node itself.
    pub(crate) node_local: bool,
}

impl Service {
    pub(crate) fn cluster_ip(&self, v6: bool) -> IpAddr {
        pair(
            [10, 96, 3, self.number],
            [0xfd00, 0x96, 0, 0, 0, 0, 0, 0x300 + u16::from(self.number)],
        )[usize::from(v6)]
    }

    pub(crate) fn external_ip(&self, v6: bool) -> IpAddr {
        if self.external_is_node {
            return ip(NODE[1], v6);
        }
        let six = [0x2001, 0xdb8, 0xe, 0, 0, 0, 0, u16::from(self.number)];
        pair([203, 0, 113, 100 + self.number], six)[usize::from(v6)]
    }

    pub(crate) fn ingress_ip(&self, v6: bool) -> IpAddr {
        let six = [0x2001, 0xdb8, 0xf, 0, 0, 0, 0, u16::from(self.number)];
        pair([203, 0, 113, 150 + self.number], six)[usize::from(v6)]
    }

    pub(crate) fn key(&self) -> ObjectKey {
        ObjectKey::new("default", &format!("service-{}", self.number))
    }

    /// What a watch of the API would bring.
    pub(crate) fn row(&self) -> ServiceRow {
        let each = |of: &dyn Fn(bool) -> IpAddr| -> Vec<IpAddr> {
            [false, true].into_iter().filter(|v6| self.has(*v6)).map(of).collect()
        };
        let policy = |local| if local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        let ports = self.ports.iter().enumerate().map(|(index, port)| ServicePort {
            name: format!("p{index}").into(),
            protocol: protocol(port.proto),
            port: port.port,
            node_port: port.node_port,
        });
        let has_node_port = self.ports.iter().any(|port| port.node_port != 0);
        ServiceRow {
            kind: match (self.ingress, has_node_port) {
                (true, _) => ServiceKind::LoadBalancer,
                (false, true) => ServiceKind::NodePort,
                (false, false) => ServiceKind::ClusterIp,
            },
            cluster_ips: each(&|v6| self.cluster_ip(v6)),
            external_ips: if self.external { each(&|v6| self.external_ip(v6)) } else { Vec::new() }
                .into(),
            ingress_ips: if self.ingress { each(&|v6| self.ingress_ip(v6)) } else { Vec::new() }
                .into(),
            ports: ports.collect(),
            affinity_s: self.affinity_s,
            internal_policy: policy(self.internal_local),
            external_policy: policy(self.external_local),
            source_ranges: self.ranges.clone().into(),
            ..ServiceRow::default()
        }
    }

    /// A slice for each family and kind of target port, always the same ones.
    pub(crate) fn slices(&self) -> Vec<(ObjectKey, EndpointSliceRow)> {
        let mut slices = Vec::new();
        for v6 in [false, true] {
            for second in [false, true] {
                let ports = self.ports.iter().enumerate().map(|(index, port)| EndpointPort {
                    name: format!("p{index}").into(),
                    protocol: protocol(port.proto),
                    port: port.targets[usize::from(second)],
                });
                let here = self.endpoints.iter().filter(|one| one.second_target == second);
                let row = EndpointSliceRow {
                    service: self.key(),
                    family: if v6 { Family::V6 } else { Family::V4 },
                    ports: ports.collect(),
                    endpoints: here.map(|endpoint| endpoint.row(v6)).collect(),
                    rejected: Vec::new().into(),
                };
                let name = format!("service-{}-{v6}-{second}", self.number);
                slices.push((ObjectKey::new("default", &name), row));
            }
        }
        slices
    }

    pub(crate) fn has(&self, v6: bool) -> bool {
        self.families[usize::from(v6)]
    }
}

impl Endpoint {
    fn row(&self, v6: bool) -> EndpointRow {
        let names = |name: Option<&str>| name.map(Into::into).into_iter().collect();
        let has_hints = self.zone.is_some() || self.hinted_node.is_some();
        let hints = Hints { zones: names(self.zone), nodes: names(self.hinted_node) };
        EndpointRow {
            ip: self.place.ip(v6),
            ready: self.state == State::Ready,
            serving: matches!(self.state, State::Ready | State::Draining),
            terminating: matches!(self.state, State::Draining | State::Dead),
            hostname: "".into(),
            node: self.place.node().into(),
            hints: has_hints.then(|| Box::new(hints)),
        }
    }
}

pub(crate) const fn protocol(number: u8) -> Protocol {
    match number {
        TCP => Protocol::Tcp,
        SCTP => Protocol::Sctp,
        _ => Protocol::Udp,
    }
}

/// A port of the node that leads to one of its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    pub(crate) pod: usize,
    /// At which address; `None`: at all of the node's, its loopback addresses too.
    pub(crate) at: Option<IpAddr>,
    pub(crate) proto: u8,
    pub(crate) port: u16,
    /// The pod's port.
    pub(crate) target: u16,
}

/// All that a node's programs depend on.
#[derive(Clone, Debug)]
pub(crate) struct World {
    /// There is a tunnel device.
    pub(crate) vxlan: bool,
    /// Which other nodes are reached by routes instead.
    pub(crate) routed: [bool; 2],
    pub(crate) masquerade: bool,
    /// Node ports answer at the node's loopback address too.
    pub(crate) loopback_ports: bool,
    /// XDP's program runs in the uplink's driver.
    pub(crate) xdp: bool,
    pub(crate) services: Vec<Service>,
    /// No two of a protocol and port at a common address.
    pub(crate) host_ports: Vec<HostPort>,
}

impl World {
    /// What the CNI server's table would hold of the pods here.
    pub(crate) fn endpoints(&self) -> Vec<Arc<LocalEndpoint>> {
        let each = PODS.iter().enumerate();
        let each = each.flat_map(|(pod, pair)| pair.map(|ip| self.endpoint(pod, ip)));
        each.collect()
    }

    fn endpoint(&self, pod: usize, ip: IpAddr) -> Arc<LocalEndpoint> {
        let ports = self.host_ports.iter().filter(|one| one.pod == pod).map(|one| HostPortRow {
            host_ip: one.at,
            host_port: one.port,
            protocol: protocol(one.proto),
            container_port: one.target,
        });
        Arc::new(LocalEndpoint {
            pod: ObjectKey::new("default", &format!("pod-{pod}")),
            ip,
            netns_cookie: 0,
            host_ifindex: 0,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            host_ports: ports.collect(),
        })
    }

    pub(crate) fn is_service_address(addr: &IpAddr) -> bool {
        SERVICE_NETS[usize::from(addr.is_ipv6())].contains(addr)
    }

    /// Which pod of this node has an address.
    pub(crate) fn pod(addr: &IpAddr) -> Option<usize> {
        PODS.iter().position(|pod| is(*pod, addr))
    }

    pub(crate) fn is_node(addr: &IpAddr) -> bool {
        NODE.iter().chain([&DNS]).any(|node| is(*node, addr))
    }

    /// Which other node has an address in its pods' range.
    pub(crate) fn far_node_of_pod(addr: &IpAddr) -> Option<usize> {
        FAR_NETS.iter().position(|far| far[usize::from(addr.is_ipv6())].contains(addr))
    }

    pub(crate) fn far_node(addr: &IpAddr) -> Option<usize> {
        FAR_NODES.iter().position(|node| is(*node, addr))
    }

    /// Whether packets to pods of another node, or to that node itself, go by the tunnel.
    pub(crate) const fn is_tunnelled(&self, node: usize) -> bool {
        self.vxlan && !self.routed[node]
    }
}

pub(crate) fn is(pair: Pair, addr: &IpAddr) -> bool {
    pair[usize::from(addr.is_ipv6())] == *addr
}
