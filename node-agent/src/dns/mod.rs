//! DNS: the cluster's names on this node, answered by a process of its own.
//!
//! `zone`, `message`, `answer` and `snapshot` are pure. `process` with `serve`, `upstream` and
//! `instance` is what `node-agent dns` runs; it reads the zone from a file and goes on while the
//! agent is dead or being replaced. In the agent two tasks run: `publish` (reads services and
//! endpoint slices, writes the zone) and `supervise` (starts and replaces the process). They end
//! with the [`Handle`]; the process does not.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use tokio::task::JoinSet;

use crate::{
    model::{EndpointSliceRow, ObjectKey, ServiceRow},
    sys::{
        daemon,
        netlink::{Netlink, Scope},
    },
    table::Table,
};

pub mod answer;
mod instance;
pub mod message;
pub mod process;
mod publish;
mod serve;
pub mod snapshot;
mod supervise;
pub mod upstream;
pub mod zone;

pub use process::ProcessArgs;

/// The address on which every node answers its own pods.
pub const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 20, 10);

/// How this node's DNS runs.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// What the process is started with.
    pub args: ProcessArgs,
    /// The program whose `dns` command is the process; itself, unless a test says otherwise.
    pub executable: PathBuf,
    /// Control group that the process is moved to, so that stopping the agent's does not end it.
    pub cgroup: Option<PathBuf>,
}

impl DnsConfig {
    /// The usual places below a state folder (`/var/lib/orlop`) and a run folder (`/run/orlop`).
    ///
    /// # Errors
    /// When the running executable cannot be looked at.
    pub fn new(state_dir: &Path, run_dir: &Path) -> io::Result<Self> {
        let args = ProcessArgs {
            run_dir: run_dir.to_owned(),
            state_dir: state_dir.to_owned(),
            listen: SocketAddr::from((NODE_ADDRESS, 53)),
            domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            build_id: daemon::executable_id()?,
        };
        Ok(Self { args, executable: PathBuf::from("/proc/self/exe"), cgroup: None })
    }
}

/// Why DNS does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot make {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot give loopback the address {address}")]
    Address { address: IpAddr, source: io::Error },
}

/// The agent's side of DNS; dropping it leaves the process running.
#[derive(Debug)]
pub struct Handle {
    tasks: JoinSet<()>,
}

impl Handle {
    /// Stops following the tables and the process.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Puts the address on loopback, and starts to publish the zone and to supervise the process.
/// Call it in a tokio runtime; it blocks for a few file and netlink operations.
///
/// # Errors
/// When something on the node is in the way; a person must act.
pub fn start(
    config: DnsConfig,
    services: Table<ObjectKey, ServiceRow>,
    slices: Table<ObjectKey, EndpointSliceRow>,
) -> Result<Handle, StartError> {
    let DnsConfig { args, executable, cgroup } = config;
    let folder = args.run_dir.join("dns");
    std::fs::create_dir_all(&folder)
        .map_err(|source| StartError::Folder { path: folder.clone(), source })?;
    let address = args.listen.ip();
    add_to_loopback(address).map_err(|source| StartError::Address { address, source })?;
    let publisher = publish::Publisher {
        zone: folder.join("zone"),
        kept_zone: args.state_dir.join("dns/zone"),
        services,
        slices,
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(publish::publish(publisher));
    tasks.spawn(supervise::supervise(supervise::Supervisor { executable, args, cgroup }));
    Ok(Handle { tasks })
}

/// Gives loopback the address with host scope: the kernel then never takes it as the source of the
/// node's own traffic. Loopback addresses are there already.
fn add_to_loopback(address: IpAddr) -> io::Result<()> {
    if address.is_loopback() || address.is_unspecified() {
        return Ok(());
    }
    let mut netlink = Netlink::open()?;
    let lo = netlink.link("lo")?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    netlink.set_up(lo.index)?;
    let prefix_len = if address.is_ipv4() { 32 } else { 128 };
    netlink.add_address(lo.index, address, prefix_len, Scope::Host)
}
