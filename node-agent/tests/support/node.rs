//! One node with pods in network namespaces, and the agent's overlay and dataplane on it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use node_agent::{
    dataplane::{DataplaneConfig, Handle, TcPath},
    model::{EndpointSliceRow, Family, LocalEndpoint, NodeRow, ObjectKey, ServiceRow},
    overlay::{Mode, OverlayConfig},
    table::Table,
};

pub(crate) mod agent;
pub(crate) mod place;
pub(crate) mod space;

pub(crate) use self::agent::Agent;
use self::{agent::Followed, place::ip, space::Space};

pub(crate) const NAME: &str = "node-1";
pub(crate) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The node's addresses, in the order of [`FAMILIES`].
pub(crate) const NODE_IPS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 168, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

pub(crate) fn pod_ip(family: Family, last: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, 1, last).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x244, 0, 1, 0, 0, 0, last.into()).into(),
    }
}

/// A node of both families, its pods, and what its agent follows.
pub(crate) struct Node {
    pub(crate) space: Space,
    pub(crate) pods: BTreeMap<u8, Space>,
    pub(crate) services: Table<ObjectKey, ServiceRow>,
    pub(crate) slices: Table<ObjectKey, EndpointSliceRow>,
    pub(crate) endpoints: Table<IpAddr, LocalEndpoint>,
    pub(crate) nodes: Table<ObjectKey, NodeRow>,
    /// How the next agent attaches programs at tc; `None`: by what the kernel has.
    pub(crate) tc: Option<TcPath>,
    /// What it is to have else.
    pub(crate) configure: fn(&mut OverlayConfig, &mut DataplaneConfig),
}

impl Node {
    /// A node on a wire whose other end is in `client`.
    pub(crate) fn new(client: &Space) -> Self {
        let space = Space::new();
        let tid = space.tid;
        client.run(move || {
            ip(&format!(
                "link add wire0 type veth peer name eth0 netns {tid}
                 addr add 192.168.0.99/24 dev wire0
                 addr add 2001:db8::99/64 dev wire0 nodad
                 link set wire0 up"
            ));
        });
        space.run(|| {
            ip(&format!(
                "addr add {}/24 dev eth0
                 addr add {}/64 dev eth0 nodad
                 link set eth0 up",
                NODE_IPS[0], NODE_IPS[1]
            ));
        });
        let node = Self {
            space,
            pods: BTreeMap::new(),
            services: Table::new(),
            slices: Table::new(),
            endpoints: Table::new(),
            nodes: Table::new(),
            tc: None,
            configure: |_overlay, _dataplane| (),
        };
        node.add_node(1);
        node.services.mark_synced();
        node.slices.mark_synced();
        node.endpoints.mark_synced();
        node.nodes.mark_synced();
        node
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.space.bpf.join("orlop")
    }

    /// A node of the cluster; this one is number 1.
    pub(crate) fn add_node(&self, number: u8) {
        let six = format!("2001:db8::{number}").parse().unwrap();
        agent::add_node(&self.nodes, number, vec![Ipv4Addr::new(192, 168, 0, number).into(), six]);
    }

    pub(crate) fn add_pod(&mut self, last: u8) {
        let ips = FAMILIES.map(|family| pod_ip(family, last));
        let pod = (last, &ips[..], 1430);
        let space = agent::add_pod((&self.space, &NODE_IPS), pod, &self.endpoints);
        self.pods.insert(last, space);
    }

    /// Starts the agent and waits until it has programmed what there is. Without a cgroup every service is
    /// asked in the packets' path.
    pub(crate) fn start(&self, cgroup: Option<PathBuf>) -> Agent {
        let mut overlay =
            OverlayConfig { mode: Mode::Vxlan, ..OverlayConfig::new(NAME, NODE_IPS.to_vec()) };
        let mut dataplane = DataplaneConfig {
            cgroup,
            pins: Some(self.pins()),
            node_name: NAME.into(),
            tc: self.tc,
            ..DataplaneConfig::new(NODE_IPS[0])
        };
        (self.configure)(&mut overlay, &mut dataplane);
        let followed = Followed {
            services: self.services.clone(),
            slices: self.slices.clone(),
            nodes: self.nodes.clone(),
            endpoints: self.endpoints.clone(),
            cni: None,
        };
        let is_up = async |handle: &Handle| Some(agent::followed(handle));
        let (stop, up) = agent::start(&self.space, (overlay, dataplane), followed, is_up);
        let agent = Agent::new(stop, up);
        self.settle(&agent);
        agent
    }

    /// Waits until the agent has programmed what the tables say now.
    pub(crate) fn settle(&self, agent: &Agent) {
        let pods = self.endpoints.changes_since(0).revision;
        agent.settle(&self.services, &self.slices, pods);
    }
}
