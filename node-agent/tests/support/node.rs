//! One node with pods in network namespaces, and the agent's overlay and dataplane on it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::{Duration, Instant},
};

use node_agent::{
    dataplane::{DataplaneConfig, Handle, Report, Settled, TcPath},
    model::{EndpointSliceRow, LocalEndpoint, NodeRow, ObjectKey, ServiceRow},
    overlay::{Mode, OverlayConfig},
    table::Table,
};
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) mod agent;
pub(crate) mod place;
pub(crate) mod space;

use self::{
    agent::{Followed, START},
    place::ip,
    space::{Space, pause},
};

pub(crate) const NAME: &str = "node-1";
pub(crate) const NODE_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
pub(crate) const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 99);

pub(crate) const fn pod_ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 1, last)
}

/// A node, its pods, and what its agent follows.
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

/// A running agent; it stops as if killed when this is dropped.
pub(crate) struct Agent {
    pub(crate) settled: watch::Receiver<Settled>,
    questions: mpsc::Sender<oneshot::Sender<Report>>,
    _stop: oneshot::Sender<()>,
}

impl Agent {
    pub(crate) fn report(&self) -> Report {
        let (reply, answer) = oneshot::channel();
        self.questions.blocking_send(reply).unwrap();
        answer.blocking_recv().expect("the agent runs")
    }
}

impl Node {
    /// A node on a wire whose other end is in `client`.
    pub(crate) fn new(client: &Space) -> Self {
        let space = Space::new();
        let tid = space.tid;
        client.run(move || {
            ip(&format!(
                "link add wire0 type veth peer name eth0 netns {tid}
                 addr add {CLIENT_IP}/24 dev wire0
                 link set wire0 up"
            ));
        });
        space.run(|| {
            ip(&format!(
                "addr add {NODE_IP}/24 dev eth0
                 link set eth0 up"
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
        let row = NodeRow {
            internal_ips: vec![Ipv4Addr::new(192, 168, 0, number).into()],
            pod_cidrs: vec![format!("10.244.{number}.0/24").parse().unwrap()],
            ready: true,
            leaving: false,
            labels: BTreeMap::new(),
        };
        self.nodes.upsert(ObjectKey::new("", &format!("node-{number}")), row);
    }

    pub(crate) fn add_pod(&mut self, last: u8) {
        let pod = (last, &[pod_ip(last).into()][..], 1450);
        let space = agent::add_pod((&self.space, &[NODE_IP.into()]), pod, &self.endpoints);
        self.pods.insert(last, space);
    }

    /// Starts the agent and waits until it has programmed what there is. Without a cgroup every service is
    /// asked in the packets' path.
    pub(crate) fn start(&self, cgroup: Option<PathBuf>) -> Agent {
        let mut overlay =
            OverlayConfig { mode: Mode::Vxlan, ..OverlayConfig::new(NAME, vec![NODE_IP.into()]) };
        let mut dataplane = DataplaneConfig {
            cgroup,
            pins: Some(self.pins()),
            node_name: NAME.into(),
            tc: self.tc,
            ..DataplaneConfig::new(NODE_IP.into())
        };
        (self.configure)(&mut overlay, &mut dataplane);
        let followed = Followed {
            services: self.services.clone(),
            slices: self.slices.clone(),
            nodes: self.nodes.clone(),
            endpoints: self.endpoints.clone(),
            cni: None,
        };
        let is_up = async |handle: &Handle| Some((handle.settled.clone(), handle.reporter()));
        let (stop, up) = agent::start(&self.space, (overlay, dataplane), followed, is_up);
        let agent = Agent { settled: up.0, questions: up.1, _stop: stop };
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
            assert!(
                start.elapsed() < START,
                "{wanted:?} {services} {slices} {is_whole}\n{}",
                agent.report().status_text()
            );
            pause(Duration::from_millis(10));
        }
    }
}
