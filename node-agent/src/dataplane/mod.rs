//! The dataplane: services and backends into eBPF maps; programs loaded, attached and pinned.
//!
//! Task: `Runner::run` (`apply.rs`) owns programs and maps. It reads the tables and the overlay's
//! device, and answers questions for reports. `health::checks` answers load balancers for Services of
//! policy `Local`, `events::run` hands events of connections on. All end with the [`Handle`]; what is pinned stays.

mod apply;
mod asked;
mod batch;
pub mod collect;
mod devices;
mod driver;
pub mod events;
pub mod flow_log;
pub mod flows;
pub mod frontends;
pub mod gc;
pub mod grow;
pub mod health;
mod hook;
pub mod host_ports;
#[cfg(feature = "kernel-log")]
mod kernel_log;
pub mod listing;
pub mod load;
pub mod look;
pub mod maps;
pub mod metrics;
pub mod model;
mod object;
pub mod paths;
pub mod plan;
mod pods;
mod room;
pub mod seek;
pub mod select;
pub mod service_maps;
mod services;
pub mod size;
pub mod status;
pub mod trace;
pub mod tracer;
mod versions;
pub mod xdp;

use std::{
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net};
use tokio::{sync::watch, task::JoinSet};

pub use asked::{Ends, Reporter};
pub use load::{LoadError, TcPath};
pub use model::{NodeLocalService, Problems};
pub use object::object;
pub use services::Settled;
pub use status::Report;
pub use xdp::XdpMode;

use crate::{
    model::{EndpointSliceRow, FarEnd, LocalEndpoint, NodeRow, ObjectKey, Programmed, ServiceRow},
    overlay::OverlayDevice,
    table::Table,
};

/// What this node's dataplane is like.
#[derive(Clone, Debug)]
pub struct DataplaneConfig {
    /// Cgroup (version 2) below which connections are translated, usually its root; `None` leaves
    /// services of this node's own processes to the packet path.
    pub cgroup: Option<PathBuf>,
    /// Folder in a BPF file system below which maps and links are pinned; `None` pins nothing, and
    /// everything ends with the process.
    pub pins: Option<PathBuf>,
    /// This node's name: whose endpoints are local.
    pub node_name: Box<str>,
    /// Where this node's labels are looked up; without it, hints by zone do not apply.
    pub nodes: Option<Table<ObjectKey, NodeRow>>,
    /// Addresses of the node beside those found on its devices.
    pub node_ips: Vec<IpAddr>,
    /// Network devices of the node on which node ports answer; empty means every device that has an
    /// IPv4 address, loopback and Orlop's own apart.
    pub devices: Vec<String>,
    /// The cluster's service CIDRs, at most one of a family: their addresses that no service has are
    /// refused. Empty if unknown.
    pub service_cidrs: Vec<IpNet>,
    /// First and last node port.
    pub node_ports: (u16, u16),
    /// Node ports answer the node itself at 127.0.0.1 and ::1 too, TCP and UDP that a program at the socket sees.
    pub localhost_node_ports: bool,
    /// The service that answers on every node itself, that is cluster DNS.
    pub node_local: Option<NodeLocalService>,
    /// Pods' traffic to the outside gets the node's address.
    pub masquerade: bool,
    /// Nothing of a pod's host ports is taken away before the table of pods is synced. To be set where a
    /// CNI server fills that table.
    pub waits_for_pods: bool,
    /// How tc programs are attached; `None` takes the best that the kernel has.
    pub tc: Option<TcPath>,
    /// On which devices service traffic is carried before the kernel's stack.
    pub xdp: XdpMode,
    /// How often what is in the kernel is compared and repaired although nothing changed.
    pub refresh: Duration,
}

/// [`DataplaneConfig::refresh`] as usual: what others break is whole again after some minutes, and reading tens of
/// thousands of rows back that often takes no time to speak of.
const REFRESH: Duration = Duration::from_secs(300);

impl DataplaneConfig {
    /// The usual places and ranges: cgroup root `/sys/fs/cgroup`, pins below `/sys/fs/bpf/orlop`,
    /// service CIDR 10.96.0.0/16, node ports 30000 to 32767 (upstream's defaults), cluster DNS
    /// `kube-system/kube-dns` at 169.254.20.10.
    #[must_use]
    pub fn new(node_ip: IpAddr) -> Self {
        Self {
            cgroup: Some(Path::new("/sys/fs/cgroup").to_owned()),
            pins: Some(Path::new("/sys/fs/bpf/orlop").to_owned()),
            node_name: "".into(),
            nodes: None,
            node_ips: vec![node_ip],
            devices: Vec::new(),
            service_cidrs: vec![Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16).into()],
            node_ports: (30_000, 32_767),
            localhost_node_ports: false,
            node_local: Some(NodeLocalService {
                service: ObjectKey::new("kube-system", "kube-dns"),
                address: Ipv4Addr::new(169, 254, 20, 10).into(),
            }),
            masquerade: true,
            waits_for_pods: false,
            tc: None,
            xdp: XdpMode::default(),
            refresh: REFRESH,
        }
    }
}

/// What the dataplane is fed with.
#[derive(Debug)]
pub struct Tables {
    pub services: Table<ObjectKey, ServiceRow>,
    pub slices: Table<ObjectKey, EndpointSliceRow>,
    /// Written by the CNI server.
    pub endpoints: Table<IpAddr, LocalEndpoint>,
    /// Written by the overlay.
    pub tunnels: Table<IpNet, FarEnd>,
    /// Written by the overlay; a closed channel means that there is none.
    pub overlay: watch::Receiver<Option<OverlayDevice>>,
}

/// The running dataplane. Dropping it stops the task; programs, maps and links that are pinned stay
/// and keep working.
#[derive(Debug)]
pub struct Handle {
    /// Up to where pods are programmed.
    pub programmed: watch::Receiver<Programmed>,
    /// Up to where services are programmed, told after the last write of a round.
    pub settled: watch::Receiver<Settled>,
    /// Services that contradict themselves or each other.
    pub problems: watch::Receiver<Arc<Problems>>,
    /// Services whose health check is not served.
    pub unserved: watch::Receiver<Arc<Problems>>,
    /// Whether the kernel's rows follow the tables.
    pub pulse: watch::Receiver<health::Pulse>,
    /// Where those come to who want to hear of connections.
    pub events: events::Events,
    reporter: Reporter,
    tasks: JoinSet<()>,
}

impl Handle {
    /// What is programmed, by which paths, and what was dropped; `None` when the task has ended.
    pub async fn report(&self) -> Option<Report> {
        self.reporter.report().await
    }

    /// For a task that asks [`Self::report`]'s question and its like.
    #[must_use]
    pub fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }

    /// Stops the task. Everything pinned stays.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Loads and attaches the programs, takes over what an earlier agent left, and starts to follow the
/// tables. Call it in a tokio runtime; it blocks for the verifier (some 100 ms).
///
/// # Errors
///
/// [`LoadError`]: something about this kernel that a person must see to.
pub fn start(config: DataplaneConfig, tables: Tables) -> Result<Handle, LoadError> {
    let (mut programs, maps) = load::Programs::load(config.pins.as_deref())?;
    let ring = programs.events()?;
    if let Some(path) = config.tc {
        programs.force_tc_path(path);
    }
    if let Some(cgroup) = &config.cgroup {
        programs.attach_cgroup(cgroup)?;
    }
    let (programmed_tx, programmed) = watch::channel(Programmed::default());
    let (reporter, asked) = Reporter::new();
    let mut tasks = JoinSet::new();
    let (settled_tx, settled) = watch::channel(Settled::default());
    let (problems_tx, problems) = watch::channel(Arc::default());
    let (checks_tx, checks) = watch::channel(Arc::default());
    let (unserved_tx, unserved) = watch::channel(Arc::default());
    #[cfg(feature = "kernel-log")]
    kernel_log::start(&mut programs.object, &mut tasks)?;
    let now = tokio::time::Instant::now();
    let (pulse_tx, pulse) = watch::channel(health::Pulse { at: now, behind_since: None });
    let outlets =
        services::Outlets { settled: settled_tx, problems: problems_tx, checks: checks_tx };
    tasks.spawn(health::checks(checks, pulse.clone(), unserved_tx));
    let kernel = (programs, maps);
    let (events, teller, hub) = events::parts();
    tasks.spawn(events::run(ring, hub));
    let inner = (pulse_tx, unserved.clone(), teller);
    let runner = apply::Runner::new(config, tables, kernel, (programmed_tx, outlets), inner);
    tasks.spawn(runner.run(asked));
    Ok(Handle { programmed, settled, problems, unserved, pulse, events, reporter, tasks })
}
