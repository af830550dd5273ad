//! One node with pods in network namespaces, and the agent's overlay and dataplane on it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::{Duration, Instant},
};

use node_agent::{
    dataplane::{DataplaneConfig, Handle, Settled},
    model::{EndpointSliceRow, Family, LocalEndpoint, NodeRow, ObjectKey, ServiceRow},
    overlay::{Mode, OverlayConfig},
    table::Table,
};
use tokio::sync::{oneshot, watch};

pub(crate) mod agent;
pub(crate) mod place;
pub(crate) mod space;

use self::{
    agent::{Followed, START},
    place::ip,
    space::{Space, pause},
};

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
    endpoints: Table<IpAddr, LocalEndpoint>,
}

/// A running agent; it stops as if killed when this is dropped.
pub(crate) struct Agent {
    pub(crate) settled: watch::Receiver<Settled>,
    _stop: oneshot::Sender<()>,
}

impl Node {
    /// A node on a wire whose other end is in `client`.
    pub(crate) fn new(client: &Space) -> Self {
        let space = Space::new();
        let tid = space.tid;
        client.run(move || {
            ip(&format!("link add wire0 type veth peer name eth0 netns {tid}"));
            ip("addr add 192.168.0.99/24 dev wire0");
            ip("addr add 2001:db8::99/64 dev wire0 nodad");
            ip("link set wire0 up");
        });
        space.run(|| {
            ip(&format!("addr add {}/24 dev eth0", NODE_IPS[0]));
            ip(&format!("addr add {}/64 dev eth0 nodad", NODE_IPS[1]));
            ip("link set eth0 up");
        });
        let node = Self {
            space,
            pods: BTreeMap::new(),
            services: Table::new(),
            slices: Table::new(),
            endpoints: Table::new(),
        };
        node.services.mark_synced();
        node.slices.mark_synced();
        node.endpoints.mark_synced();
        node
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.space.bpf.join("orlop")
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
        let overlay =
            OverlayConfig { mode: Mode::Vxlan, ..OverlayConfig::new(NAME, NODE_IPS.to_vec()) };
        let dataplane = DataplaneConfig {
            cgroup,
            pins: Some(self.pins()),
            node_name: NAME.into(),
            ..DataplaneConfig::new(NODE_IPS[0])
        };
        let followed = Followed {
            services: self.services.clone(),
            slices: self.slices.clone(),
            nodes: nodes(),
            endpoints: self.endpoints.clone(),
            cni: None,
        };
        let is_up = async |handle: &Handle| Some(handle.settled.clone());
        let (stop, settled) = agent::start(&self.space, (overlay, dataplane), followed, is_up);
        let agent = Agent { settled, _stop: stop };
        self.settle(&agent);
        agent
    }

    /// Waits until the agent has programmed what the tables say now.
    pub(crate) fn settle(&self, agent: &Agent) {
        let wanted =
            (self.services.changes_since(0).revision, self.slices.changes_since(0).revision);
        let start = Instant::now();
        loop {
            let Settled { services, slices, is_whole, .. } = *agent.settled.borrow();
            if is_whole && services >= wanted.0 && slices >= wanted.1 {
                return;
            }
            assert!(start.elapsed() < START, "{wanted:?} {services} {slices} {is_whole}");
            pause(Duration::from_millis(10));
        }
    }
}

fn nodes() -> Table<ObjectKey, NodeRow> {
    let nodes = Table::new();
    let row = NodeRow {
        internal_ips: NODE_IPS.to_vec(),
        pod_cidrs: ["10.244.1.0/24", "fd00:244:0:1::/64"].map(|cidr| cidr.parse().unwrap()).into(),
        ready: true,
        leaving: false,
        labels: BTreeMap::new(),
    };
    nodes.upsert(ObjectKey::new("", NAME), row);
    nodes.mark_synced();
    nodes
}
