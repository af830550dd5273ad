//! CNI: pod addresses and the links between pods and this node.
//!
//! `wire` and `ipam` are pure, `veth` and `engine` act, `server` listens. The plugin that runtimes
//! execute is a few lines in the shim binary; it forwards to the socket here.
//!
//! Tasks: `serve` (socket; reads the endpoint table's programmed revision, writes the endpoint
//! table), `follow_network` (reads the pod CIDRs, writes the network configuration once they are
//! known) and `keep_links` (hears of changes, mends pods' links). All end with the [`Handle`].

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time,
};

use crate::{
    chain::chain,
    changes::Changes,
    model::{LocalEndpoint, ObjectKey, PodNetwork, Programmed, ServiceRow},
    sys::netns::NetNs,
    table::Table,
};

mod engine;
mod host_end;
pub(crate) mod install;
pub mod ipam;
mod server;
pub mod veth;
pub mod wire;
mod wishes;

pub(crate) use wishes::mappings;

pub use engine::StateError;
use engine::{Engine, StateFile};
use server::Shared;

/// Name of the plugin, its binary and its network.
const PLUGIN: &str = "orlop";

/// [`CniConfig::refresh`] as usual.
const REFRESH: Duration = Duration::from_secs(30);

/// Where things are and how links are made.
#[derive(Clone, Debug)]
pub struct CniConfig {
    pub socket: PathBuf,
    /// The table of addresses, `<state-dir>/cni/ipam.json`.
    pub state_file: PathBuf,
    /// Where runtimes look for network configurations.
    pub conf_dir: PathBuf,
    /// Where runtimes look for plugins.
    pub bin_dir: PathBuf,
    /// Source addresses of the node's own traffic to its pods. A family that is missing, or whose address
    /// the node has not got, is left to the kernel.
    pub node_ips: Vec<IpAddr>,
    /// Where host ends live; `None` is the agent's own namespace.
    pub host_netns: Option<PathBuf>,
    /// How long an `ADD` waits for the dataplane before it fails with "try again later".
    pub program_timeout: Duration,
    /// How often the links of pods are looked at although nothing is heard; `None` leaves what others take
    /// from them to the runtime's `CHECK`.
    pub refresh: Option<Duration>,
}

impl CniConfig {
    /// The usual places below a state folder (`/var/lib/orlop`) and a run folder (`/run/orlop`).
    #[must_use]
    pub fn new(state_dir: &Path, run_dir: &Path) -> Self {
        Self {
            socket: run_dir.join("cni.sock"),
            state_file: state_dir.join("cni/ipam.json"),
            conf_dir: PathBuf::from("/etc/cni/net.d"),
            bin_dir: PathBuf::from("/opt/cni/bin"),
            node_ips: Vec::new(),
            host_netns: None,
            // Programming a pod takes milliseconds; two seconds are a dataplane in trouble.
            program_timeout: Duration::from_secs(2),
            refresh: Some(REFRESH),
        }
    }
}

/// What the server is fed with.
#[derive(Debug)]
pub struct CniInputs {
    /// The node's pod CIDRs and MTU; `None` while the API server has given no CIDR.
    pub network: watch::Receiver<Option<PodNetwork>>,
    /// Written here, read by the dataplane.
    pub endpoints: Table<IpAddr, LocalEndpoint>,
    /// Their node ports, which no pod may have.
    pub services: Table<ObjectKey, ServiceRow>,
    /// Up to where the dataplane has programmed `endpoints`; `None` when there is no dataplane to wait for.
    pub programmed: Option<watch::Receiver<Programmed>>,
}

/// Why the CNI server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot use the table of addresses")]
    State(#[source] StateError),
    #[error("cannot open network namespace {}", path.display())]
    Namespace { path: PathBuf, source: io::Error },
    #[error("cannot take stock of pod links")]
    Links(#[source] veth::VethError),
    #[error("cannot read the boot id")]
    Boot(#[source] io::Error),
    #[error("cannot install the CNI plugin in {}", path.display())]
    Plugin { path: PathBuf, source: io::Error },
    #[error("cannot listen on {}", path.display())]
    Listen { path: PathBuf, source: io::Error },
}

/// The running server; dropping it stops it. Pods keep their links.
#[derive(Debug)]
pub struct Handle {
    tasks: JoinSet<()>,
}

impl Handle {
    /// Stops listening and waits until no request is being worked on.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Restores the endpoint table, installs the plugin and starts to listen. Call it in a tokio
/// runtime; it blocks for a few file and netlink operations.
///
/// # Errors
/// When something on the node is in the way; a person must act.
pub fn start(config: CniConfig, inputs: CniInputs, plugin: &[u8]) -> Result<Handle, StartError> {
    let host = match &config.host_netns {
        None => NetNs::own(),
        Some(path) => NetNs::open(path)
            .map_err(|source| StartError::Namespace { path: path.clone(), source })?,
    };
    let boot =
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(StartError::Boot)?;
    let state = StateFile { path: config.state_file, boot: boot.trim().to_owned() };
    let ipam = state.load().map_err(StartError::State)?;
    let CniInputs { mut network, endpoints, services, programmed } = inputs;
    // From before the first look, so that nothing is missed.
    let changes = Changes::of(&host);
    let node_ips = config.node_ips;
    let mut engine = Engine { host, node_ips, state, ipam, endpoints, services };
    veth::enable_forwarding(&engine.host, &[]).map_err(StartError::Links)?;
    let restored = engine.restore().map_err(StartError::Links)?;
    engine.set_network(network.borrow_and_update().clone());
    install::install_plugin(&config.bin_dir, plugin)
        .map_err(|source| StartError::Plugin { path: config.bin_dir.clone(), source })?;
    let listener = server::bind(&config.socket)
        .map_err(|source| StartError::Listen { path: config.socket.clone(), source })?;
    tracing::info!(endpoints = restored, socket = %config.socket.display(), "CNI server ready");
    let shared = Shared::new(engine, programmed, config.program_timeout);
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_network(network, shared.clone(), config.conf_dir, config.socket));
    if let Some(period) = config.refresh {
        tasks.spawn(keep_links(changes, shared.clone(), period));
    }
    tasks.spawn(server::serve(listener, shared));
    Ok(Handle { tasks })
}

/// Hands the pod CIDRs on, and tells runtimes that the network is ready once there is one.
async fn follow_network(
    mut network: watch::Receiver<Option<PodNetwork>>,
    shared: Shared,
    conf_dir: PathBuf,
    socket: PathBuf,
) {
    loop {
        let current = network.borrow_and_update().clone();
        let told = current.clone();
        let (shared, conf_dir, socket) = (shared.clone(), conf_dir.clone(), socket.clone());
        let applied = spawn_blocking(move || {
            let ready = current.is_some();
            shared.engine().set_network(current);
            if ready { install::install_configuration(&conf_dir, &socket) } else { Ok(()) }
        });
        match applied.await {
            Ok(Ok(())) => tracing::info!(network = ?told, "pod network set"),
            Ok(Err(error)) => tracing::error!(%error, "CNI configuration not written"),
            Err(error) => tracing::error!(%error, "pod network not set"),
        }
        if network.changed().await.is_err() {
            return;
        }
    }
}

/// Mends pods' links when a device or an address has changed, and from time to time.
async fn keep_links(mut changes: Changes, shared: Shared, period: Duration) {
    let mut told = None;
    loop {
        // Elapsed or not, it is looked again.
        let _late: Result<(), time::error::Elapsed> =
            time::timeout(period, changes.settled()).await;
        let engine = shared.clone();
        let words = match spawn_blocking(move || engine.engine().repair()).await {
            Ok(outcome) => outcome.err().map(|error| chain(&error)),
            Err(error) if error.is_panic() => Some(error.to_string()),
            // The runtime ends.
            Err(_) => return,
        };
        if words != told {
            if let Some(words) = &words {
                tracing::warn!(trouble = words, "not all links of pods mended");
            }
            told = words;
        }
    }
}
