//! Pods in network namespaces as the CNI server makes them, and a node's agent as far as packets need it: its
//! overlay and its dataplane.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use node_agent::{
    cni::{
        self, CniConfig, CniInputs,
        ipam::Attachment,
        veth::{self, VethSpec},
    },
    dataplane::{self, DataplaneConfig, Handle, Report, Reporter, Settled, Tables},
    kubelet::runtime::binary::SHIM,
    model::{EndpointSliceRow, LocalEndpoint, NodeRow, ObjectKey, Programmed, ServiceRow},
    overlay::{self, OverlayConfig},
    sys::netns::NetNs,
    table::Table,
};
use tokio::sync::{oneshot, watch};

use super::space::{Space, pause};

/// An agent that does not come up at all fails. The verifier's work takes half a second on a machine and ten
/// times that where the processor is emulated, for two agents at once.
pub(crate) const START: Duration = Duration::from_secs(60);

/// Puts a node of the cluster into a table: its name and the ranges of its pods follow from its number.
pub(crate) fn add_node(nodes: &Table<ObjectKey, NodeRow>, number: u8, internal_ips: Vec<IpAddr>) {
    let row = NodeRow {
        internal_ips,
        pod_cidrs: vec![
            format!("10.244.{number}.0/24").parse().unwrap(),
            format!("fd00:244:0:{number}::/64").parse().unwrap(),
        ],
        ready: true,
        leaving: false,
        labels: BTreeMap::new(),
    };
    nodes.upsert(ObjectKey::new("", &format!("node-{number}")), row);
}

/// A pod of this last byte on a node of these addresses; its rows are in the table when it is there.
pub(crate) fn add_pod(
    node: (&Space, &[IpAddr]),
    (last, ips, mtu): (u8, &[IpAddr], u32),
    endpoints: &Table<IpAddr, LocalEndpoint>,
) -> Space {
    let (node, node_ips) = node;
    let pod = Space::new();
    let name = format!("pod-{last}");
    let spec = VethSpec::new(&Attachment::new(&name, "eth0"), ips, mtu, node_ips);
    let netns = |space: &Space| PathBuf::from(format!("/proc/self/task/{}/ns/net", space.tid));
    let host = NetNs::open(&netns(node)).unwrap();
    let link = veth::attach(&host, &netns(&pod), &spec).unwrap();
    for ip in ips {
        let endpoint = LocalEndpoint {
            pod: ObjectKey::new("default", &name),
            ip: *ip,
            netns_cookie: link.netns_cookie,
            host_ifindex: link.host_ifindex,
            host_mac: spec.host_mac,
            pod_mac: spec.pod_mac,
            host_ports: [].into(),
        };
        endpoints.upsert(*ip, endpoint);
    }
    pod
}

/// What tells how far an agent is, and whom to ask for its report.
pub(crate) type Followers = (watch::Receiver<Settled>, watch::Receiver<Programmed>, Reporter);

/// That of a dataplane.
pub(crate) fn followed(handle: &Handle) -> Followers {
    (handle.settled.clone(), handle.programmed.clone(), handle.reporter())
}

/// A running agent; it stops as if killed when this is dropped.
pub(crate) struct Agent {
    pub(crate) settled: watch::Receiver<Settled>,
    pub(crate) programmed: watch::Receiver<Programmed>,
    pub(crate) reporter: Reporter,
    _stop: oneshot::Sender<()>,
}

impl Agent {
    /// As `start` gives it, when `is_up` has given what to follow.
    pub(crate) fn new(
        stop: oneshot::Sender<()>,
        (settled, programmed, reporter): Followers,
    ) -> Self {
        Self { settled, programmed, reporter, _stop: stop }
    }

    pub(crate) fn report(&self) -> Report {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.reporter.report()).expect("the agent runs")
    }

    /// Waits until it has programmed what these tables say now, and pods up to a revision of theirs.
    pub(crate) fn settle(
        &self,
        services: &Table<ObjectKey, ServiceRow>,
        slices: &Table<ObjectKey, EndpointSliceRow>,
        pods: u64,
    ) {
        let wanted = (services.changes_since(0).revision, slices.changes_since(0).revision);
        let start = Instant::now();
        loop {
            let Settled { services, slices, is_whole, .. } = *self.settled.borrow();
            let has_pods = self.programmed.borrow().revision >= pods;
            if is_whole && has_pods && services >= wanted.0 && slices >= wanted.1 {
                return;
            }
            assert!(
                start.elapsed() < START,
                "{wanted:?} {services} {slices} {is_whole}\n{}",
                self.report().status_text()
            );
            pause(Duration::from_millis(10));
        }
    }
}

/// What an agent follows, and whether it serves the CNI plugin.
#[derive(Clone)]
pub(crate) struct Followed {
    pub(crate) services: Table<ObjectKey, ServiceRow>,
    pub(crate) slices: Table<ObjectKey, EndpointSliceRow>,
    pub(crate) nodes: Table<ObjectKey, NodeRow>,
    pub(crate) endpoints: Table<IpAddr, LocalEndpoint>,
    pub(crate) cni: Option<CniConfig>,
}

/// Starts an agent in a node's namespace and waits until pods and overlay are programmed and `is_up` gives
/// something. The agent stops as if killed when the sender is dropped.
pub(crate) fn start<T: Send + 'static>(
    space: &Space,
    (overlay, dataplane): (OverlayConfig, DataplaneConfig),
    followed: Followed,
    is_up: impl AsyncFn(&Handle) -> Option<T> + Send + 'static,
) -> (oneshot::Sender<()>, T) {
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let pods = followed.endpoints.changes_since(0).revision;
    space.spawn_agent(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let overlay = overlay::start(overlay, followed.nodes).unwrap();
            let Followed { services, slices, endpoints, .. } = followed;
            let tables = Tables {
                services: services.clone(),
                slices,
                endpoints: endpoints.clone(),
                tunnels: overlay.tunnels.clone(),
                overlay: overlay.device.clone(),
            };
            let handle = dataplane::start(dataplane, tables).unwrap();
            let _cni = followed.cni.map(|config| {
                let inputs = CniInputs {
                    network: overlay.network.clone(),
                    endpoints,
                    services,
                    programmed: Some(handle.programmed.clone()),
                };
                cni::start(config, inputs, SHIM).unwrap()
            });
            let start = Instant::now();
            let up = loop {
                let is_whole = handle.programmed.borrow().revision >= pods
                    && overlay.device.borrow().is_some();
                if is_whole && let Some(up) = is_up(&handle).await {
                    break up;
                }
                let report = handle.report().await.unwrap();
                assert!(start.elapsed() < START, "{}", report.status_text());
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            ready.send(up).unwrap();
            // Dropped sender or message: both mean stop.
            let _stop: Result<(), _> = stopped.await;
        });
    });
    let up = is_ready.recv_timeout(START).expect("the agent comes up");
    (stop, up)
}
