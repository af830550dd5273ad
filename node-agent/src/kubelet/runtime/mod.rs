//! The container runtime as the kubelet's pod machines see it: sandboxes and containers.
//!
//! The embedded runtime implements it over per-pod shims; tests implement it in memory. Everything
//! here is a plain value, so that a request can be printed and replayed.

use std::{collections::BTreeMap, fmt, future::Future, net::IpAddr, path::PathBuf, time::Duration};

use jiff::Timestamp;
use tokio::sync::mpsc;

use crate::model::HostPort;

pub use self::{
    cni::CniError,
    embedded::{Embedded, RuntimeConfig},
    id::random_id,
    plan::PlanError,
};

pub mod binary;
mod client;
mod cni;
mod embedded;
mod id;
mod plan;
mod sandbox;
mod seccomp;
mod seccomp_calls;
mod session;
mod start;
mod state;

/// A runtime of pods. Every call is idempotent: asking again for what exists returns it.
pub trait Runtime: Send + Sync + 'static {
    /// Makes the pod's cgroup, network namespace and shim, and wires its network through CNI.
    ///
    /// # Errors
    /// Names the step that failed; what had been made is left for the next try or `remove_sandbox`.
    fn ensure_sandbox(
        &self,
        spec: &SandboxSpec,
    ) -> impl Future<Output = Result<Sandbox, RuntimeError>> + Send;

    /// Creates and starts one container in an existing sandbox. Returns when its process runs.
    ///
    /// # Errors
    /// Names the step that failed; nothing of the container is left behind but its log file.
    fn start_container(
        &self,
        spec: &ContainerSpec,
    ) -> impl Future<Output = Result<Started, RuntimeError>> + Send;

    /// Sends the stop signal and, after `grace`, SIGKILL to all of the container's cgroup. Returns at
    /// once; the exit arrives as a `RuntimeEvent`.
    ///
    /// # Errors
    /// When the shim cannot be asked; retry helps.
    fn stop_container(
        &self,
        id: &ContainerId,
        grace: Duration,
    ) -> impl Future<Output = Result<(), RuntimeError>> + Send;

    /// Removes an exited container's root file system and record; its log files stay.
    ///
    /// # Errors
    /// When something is still in use; retry helps.
    fn remove_container(
        &self,
        id: &ContainerId,
    ) -> impl Future<Output = Result<(), RuntimeError>> + Send;

    /// Kills what still runs, takes the network down, ends the shim and removes the pod's cgroup.
    ///
    /// # Errors
    /// When something is still in use; retry helps. A sandbox that is not there is a success.
    fn remove_sandbox(&self, uid: &PodUid)
    -> impl Future<Output = Result<(), RuntimeError>> + Send;

    /// Every sandbox on the node with its containers: what a restarted agent takes over.
    ///
    /// # Errors
    /// When the state folder cannot be read.
    fn sandboxes(&self) -> impl Future<Output = Result<Vec<SandboxState>, RuntimeError>> + Send;

    /// Starts a process in a running container.
    ///
    /// # Errors
    /// When the container does not run or the command cannot be started; the words are the kernel's.
    fn exec(
        &self,
        id: &ContainerId,
        spec: &ExecSpec,
    ) -> impl Future<Output = Result<ExecIo, RuntimeError>> + Send;

    /// The channel on which exits are told. Taken once; bounded, so a slow reader slows the runtime's
    /// reporting, never loses an exit.
    fn take_events(&self) -> Option<mpsc::Receiver<RuntimeEvent>>;
}

/// `metadata.uid` of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(pub Box<str>);

/// A container instance: unique for each start, 64 lower-case hex digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(pub Box<str>);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a sandbox is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxSpec {
    pub uid: PodUid,
    pub namespace: String,
    pub name: String,
    pub hostname: String,
    /// `spec.hostNetwork`: the sandbox shares the node's network namespace and CNI is not called.
    pub host_network: bool,
    /// Path under the kubelet's root cgroup, such as `burstable/pod<uid>`, and its values.
    pub cgroup: CgroupSpec,
    pub dns: DnsConfig,
    /// The pod's `hostAliases`, written into `/etc/hosts`: address, then names.
    pub host_aliases: Vec<(String, Vec<String>)>,
    /// `securityContext.sysctls` that are set in the pod's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Ports of the node that are to lead to the pod.
    pub host_ports: Vec<HostPort>,
}

/// What goes into a pod's `resolv.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConfig {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// Values of one cgroup; `None` leaves the kernel's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupSpec {
    /// Path below the kubelet's root cgroup, without a leading slash.
    pub path: String,
    /// `cpu.weight`, 1 to 10000.
    pub cpu_weight: Option<u64>,
    /// `cpu.max` quota in microseconds per `CPU_PERIOD_US`.
    pub cpu_quota_us: Option<u64>,
    pub memory_max_bytes: Option<u64>,
    /// `memory.oom.group`: one process out of memory ends the whole container.
    pub oom_group: bool,
    pub pids_max: Option<u64>,
}

/// Period of `cpu.max` quotas (kubelet's `cpuCFSQuotaPeriod` default).
pub const CPU_PERIOD_US: u64 = 100_000;

/// A made sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// The pod's addresses, primary family first; the node's when `host_network`.
    pub ips: Vec<IpAddr>,
}

/// What a container is made from. The image is already unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerSpec {
    pub id: ContainerId,
    pub pod: PodUid,
    pub name: String,
    /// Times this container was restarted before; part of the log file's name.
    pub restart_count: u32,
    /// The unpacked image (`images`).
    pub image: UnpackedImage,
    /// The whole argument vector (image entrypoint and command merged with the pod's).
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub working_dir: String,
    pub user: User,
    pub mounts: Vec<Mount>,
    pub cgroup: CgroupSpec,
    /// `/proc/self/oom_score_adj`, -1000 to 1000.
    pub oom_score_adj: i32,
    pub capabilities: Capabilities,
    pub privileged: bool,
    pub read_only_root: bool,
    pub no_new_privileges: bool,
    pub seccomp: Seccomp,
    pub stdin: bool,
    pub tty: bool,
    /// File in the container whose content becomes the exit message.
    pub termination_message_path: String,
    /// Signal that asks the container to end (image `StopSignal`, else SIGTERM).
    pub stop_signal: i32,
    /// Absolute path of the CRI-format log file (`/var/log/pods/…/<restart_count>.log`).
    pub log_path: PathBuf,
}

/// `securityContext.seccompProfile.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seccomp {
    Unconfined,
    RuntimeDefault,
}

/// Layers of an image on disk, lowest first, ready to be overlayfs `lowerdir`s, and its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpackedImage {
    /// As written in the pod.
    pub reference: String,
    /// `repository@sha256:…`, or `sha256:…` of the configuration for images without a registry.
    pub digest: String,
    pub layers: Vec<PathBuf>,
    pub config: ImageConfig,
}

/// The parts of the OCI image configuration that the kubelet merges with the pod's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub working_dir: String,
    pub user: String,
    pub stop_signal: String,
}

/// Numeric identity of a container's first process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub additional_gids: Vec<u32>,
}

/// A bind mount from the node into the container, or a tmpfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Path on the node; `None` for a fresh tmpfs.
    pub source: Option<PathBuf>,
    pub destination: PathBuf,
    pub read_only: bool,
}

/// `securityContext.capabilities`: names without `CAP_`, or `ALL`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    pub add: Vec<String>,
    pub drop: Vec<String>,
}

/// A started container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Process id as the node sees it.
    pub pid: i32,
    pub at: Timestamp,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + signal for a process killed by a signal.
    pub code: i32,
    /// 0 when no signal ended it.
    pub signal: i32,
    /// The kernel killed it, or one of its children, for want of memory.
    pub oom_killed: bool,
    /// Its process never came to be; upstream's `StartError`, code 128.
    pub unstarted: bool,
    pub at: Timestamp,
    /// Content of the termination message file, at most 4096 bytes.
    pub message: String,
}

/// A container as the runtime knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerState {
    pub id: ContainerId,
    pub name: String,
    pub restart_count: u32,
    pub image_reference: String,
    pub image_digest: String,
    pub pid: i32,
    pub started_at: Timestamp,
    pub exit: Option<Exit>,
}

/// A sandbox as the runtime knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxState {
    pub uid: PodUid,
    pub namespace: String,
    pub name: String,
    pub ips: Vec<IpAddr>,
    pub containers: Vec<ContainerState>,
}

/// What the runtime tells on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeEvent {
    ContainerExited {
        pod: PodUid,
        id: ContainerId,
        exit: Exit,
    },
    /// The pod's shim is gone without having said why; its containers are dead.
    SandboxLost {
        pod: PodUid,
    },
}

/// A process to run beside a container's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecSpec {
    pub args: Vec<String>,
    pub stdin: bool,
    pub tty: bool,
}

/// The ends of a running exec. Dropping it kills the process.
#[derive(Debug)]
pub struct ExecIo {
    pub stdin: Option<tokio::fs::File>,
    /// With a terminal, everything comes here and `stderr` is `None`.
    pub stdout: Option<tokio::fs::File>,
    pub stderr: Option<tokio::fs::File>,
    /// The terminal's master side, for window size changes.
    pub terminal: Option<std::os::fd::OwnedFd>,
    /// Resolves to the exit code, as in `Exit::code`.
    pub exit: tokio::sync::oneshot::Receiver<i32>,
}

/// A step of the runtime that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step} of {object}")]
pub struct RuntimeError {
    /// The operation, such as `create network namespace`.
    pub step: &'static str,
    /// Which pod or container.
    pub object: String,
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl RuntimeError {
    /// Whether the container was made and its process could not be started, as with a command that its image
    /// does not have; else the runtime itself could not do its part.
    #[must_use]
    pub fn is_start_refused(&self) -> bool {
        self.step == START
            && matches!(self.source.downcast_ref(), Some(client::ShimError::Failed(_)))
    }
}

/// The step that asks a pod's shim for a process.
const START: &str = "start container";
