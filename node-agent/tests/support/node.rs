//! One node with pods in network namespaces, and the agent's overlay and dataplane on it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::{Duration, Instant},
};

use node_agent::{
    cni::{
        ipam::Attachment,
        veth::{self, VethSpec},
    },
    dataplane::{self, DataplaneConfig, Settled, Tables},
    model::{EndpointSliceRow, LocalEndpoint, NodeRow, ObjectKey, ServiceRow},
    overlay::{self, Mode, OverlayConfig},
    sys::netns::NetNs,
    table::Table,
};
use tokio::sync::{oneshot, watch};

use super::{
    place::ip,
    space::{Space, pause},
};

/// An agent that does not come up at all fails; an emulated processor takes ten times as long.
const START: Duration = Duration::from_secs(60);
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
            ip(&format!("addr add {CLIENT_IP}/24 dev wire0"));
            ip("link set wire0 up");
        });
        space.run(|| {
            ip(&format!("addr add {NODE_IP}/24 dev eth0"));
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

    /// A pod as the CNI server makes it.
    pub(crate) fn add_pod(&mut self, last: u8) {
        let pod = Space::new();
        let attachment = Attachment::new(&format!("pod-{last}"), "eth0");
        let spec = VethSpec::new(&attachment, &[pod_ip(last).into()], 1450, &[NODE_IP.into()]);
        let netns = |space: &Space| PathBuf::from(format!("/proc/self/task/{}/ns/net", space.tid));
        let host = NetNs::open(&netns(&self.space)).unwrap();
        let link = veth::attach(&host, &netns(&pod), &spec).unwrap();
        let endpoint = LocalEndpoint {
            pod: ObjectKey::new("default", &format!("pod-{last}")),
            ip: pod_ip(last).into(),
            netns_cookie: link.netns_cookie,
            host_ifindex: link.host_ifindex,
            host_mac: spec.host_mac,
            pod_mac: spec.pod_mac,
            host_ports: [].into(),
        };
        self.endpoints.upsert(endpoint.ip, endpoint);
        self.pods.insert(last, pod);
    }

    /// Starts the agent and waits until it has programmed what there is. Without a cgroup every service is
    /// asked in the packets' path.
    pub(crate) fn start(&self, cgroup: Option<PathBuf>) -> Agent {
        let (stop, stopped) = oneshot::channel::<()>();
        let (services, slices, endpoints) =
            (self.services.clone(), self.slices.clone(), self.endpoints.clone());
        let revision = endpoints.changes_since(0).revision;
        let (ready, is_ready) = std::sync::mpsc::channel();
        let pins = self.pins();
        self.space.spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let overlay = OverlayConfig {
                    mode: Mode::Vxlan,
                    ..OverlayConfig::new(NAME, vec![NODE_IP.into()])
                };
                let overlay = overlay::start(overlay, nodes()).unwrap();
                let tables = Tables {
                    services,
                    slices,
                    endpoints,
                    tunnels: overlay.tunnels.clone(),
                    overlay: overlay.device.clone(),
                };
                let config = DataplaneConfig {
                    cgroup,
                    pins: Some(pins),
                    node_name: NAME.into(),
                    ..DataplaneConfig::new(NODE_IP.into())
                };
                let mut handle = dataplane::start(config, tables).unwrap();
                handle.programmed.wait_for(|seen| *seen >= revision).await.unwrap();
                let mut device = overlay.device.clone();
                device.wait_for(Option::is_some).await.unwrap();
                ready.send(handle.settled.clone()).unwrap();
                // Dropped sender or message: both mean stop.
                let _stop: Result<(), _> = stopped.await;
            });
        });
        let settled = is_ready.recv_timeout(START).expect("the agent comes up");
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
        internal_ips: vec![NODE_IP.into()],
        pod_cidrs: vec!["10.244.1.0/24".parse().unwrap()],
        ready: true,
        leaving: false,
        labels: BTreeMap::new(),
    };
    nodes.upsert(ObjectKey::new("", NAME), row);
    nodes.mark_synced();
    nodes
}
