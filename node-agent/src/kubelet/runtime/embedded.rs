//! The embedded runtime: cgroups, namespaces and CNI by the agent, processes by one shim per pod.
//!
//! Nothing of a pod is kept only here: a new agent finds all in `<run-dir>/shim/<pod-uid>` and connects to
//! the shims again. Blocking steps run on blocking threads. `sandbox`, `start` and `session` hold the steps.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use shim::wire::Call;
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    ContainerId, ContainerSpec, ExecIo, ExecSpec, PodUid, Runtime, RuntimeError, RuntimeEvent,
    Sandbox, SandboxSpec, SandboxState, Started, binary,
    client::{ShimClient, ShimError},
    state::{self, SandboxRecord},
};
use crate::sys::{cgroup, rootdir::remove_tree};

/// Exits that wait for the kubelet; more wait in the shims.
const EVENTS: usize = 256;

/// Where the runtime works, and what it enforces.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Container layers and the installed binary: `/var/lib/orlop`.
    pub state_dir: PathBuf,
    /// Sockets, records and namespaces, on a tmpfs: `/run/orlop`.
    pub run_dir: PathBuf,
    /// Cgroup of all pods: `/sys/fs/cgroup/kubepods`.
    pub cgroup_root: PathBuf,
    /// Controllers whose values are written. Without one of them the runtime does not start.
    pub controllers: Vec<&'static str>,
    /// `/etc/cni/net.d`.
    pub cni_conf_dir: PathBuf,
    /// `/opt/cni/bin`.
    pub cni_bin_dir: PathBuf,
    /// Addresses of pods on the node's network.
    pub node_ips: Vec<IpAddr>,
}

impl RuntimeConfig {
    /// The places that a node has them.
    #[must_use]
    pub fn standard(state_dir: PathBuf, run_dir: PathBuf, node_ips: Vec<IpAddr>) -> Self {
        Self {
            state_dir,
            run_dir,
            cgroup_root: "/sys/fs/cgroup/kubepods".into(),
            controllers: cgroup::REQUIRED.map(|(name, _)| name).into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dir: "/opt/cni/bin".into(),
            node_ips,
        }
    }
}

/// The runtime. Clones share it.
#[derive(Clone, Debug)]
pub struct Embedded {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) config: RuntimeConfig,
    /// The installed binary.
    pub(super) shim: PathBuf,
    pub(super) clients: Mutex<BTreeMap<PodUid, ShimClient>>,
    pub(super) events: mpsc::Sender<RuntimeEvent>,
    receiver: Mutex<Option<mpsc::Receiver<RuntimeEvent>>>,
}

/// Names a failed step.
pub(super) fn failed<E>(
    step: &'static str,
    object: &(impl ToString + ?Sized),
) -> impl FnOnce(E) -> RuntimeError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let object = object.to_string();
    move |source| RuntimeError { step, object, source: source.into() }
}

/// Runs blocking work on a blocking thread.
pub(super) async fn blocking<T: Send + 'static, E: From<io::Error> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::from(error).into()))
}

impl Embedded {
    /// Makes the root cgroup and the QoS cgroups, installs the binary, and connects to the shims of an
    /// earlier agent. What a reboot or crash left of containers that nobody has any more is removed.
    ///
    /// # Errors
    /// A `cgroup::CgroupError` as source means that this machine cannot enforce limits: exit code 3.
    pub async fn new(config: RuntimeConfig) -> Result<Self, RuntimeError> {
        let prepared = config.clone();
        let shim = spawn_blocking(move || prepare(&prepared))
            .await
            .map_err(failed("prepare", "runtime"))??;
        let (events, receiver) = mpsc::channel(EVENTS);
        let inner = Inner {
            config,
            shim,
            clients: Mutex::default(),
            events,
            receiver: Mutex::new(Some(receiver)),
        };
        let this = Self { inner: Arc::new(inner) };
        for record in this.records().map_err(failed("read the state", "runtime"))? {
            let uid = PodUid(record.uid.into());
            if let Err(error) = this.inner.connect(&uid).await {
                tracing::warn!(pod = %uid, %error, "pod's shim is gone");
                state::kill_orphans(&this.inner.pod_dir(&uid));
                let lost = RuntimeEvent::SandboxLost { pod: uid };
                this.inner.events.try_send(lost).map_err(failed("tell lost pods", "runtime"))?;
            }
        }
        Ok(this)
    }

    /// Makes the container's log go on in a new file under its name, after a rotation renamed the old one.
    ///
    /// # Errors
    /// When the file cannot be made; the old one stays in use. A container that is gone is a success.
    pub async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let Some((_, Some(client))) = self.inner.locate(id)? else { return Ok(()) };
        match client.call(Call::ReopenLog { id: id.to_string() }).await {
            Ok(_) | Err(ShimError::Gone) => Ok(()),
            Err(error) => Err(failed("reopen the log", id)(error)),
        }
    }

    fn records(&self) -> io::Result<Vec<SandboxRecord>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(self.inner.pods_dir())? {
            records.extend(SandboxRecord::load(&entry?.path())?);
        }
        Ok(records)
    }
}

/// The node's part of the work, before any pod.
fn prepare(config: &RuntimeConfig) -> Result<PathBuf, RuntimeError> {
    let root = &config.cgroup_root;
    cgroup::check(root).map_err(failed("find cgroup v2", "runtime"))?;
    for tier in ["burstable", "besteffort"] {
        cgroup::ensure(&root.join(tier), &config.controllers)
            .map_err(failed("make the pods' cgroups", "runtime"))?;
    }
    let folders = [config.run_dir.join("shim"), config.state_dir.join("containers")];
    for folder in &folders {
        fs::create_dir_all(folder).map_err(failed("make folders", "runtime"))?;
    }
    sweep(config).map_err(failed("remove what is left of old containers", "runtime"))?;
    binary::install(&config.state_dir.join("bin"), "shim")
        .map_err(failed("install the shim", "runtime"))
}

/// Removes the layers of containers that no pod's folder knows.
fn sweep(config: &RuntimeConfig) -> io::Result<()> {
    let mut known = Vec::new();
    for entry in fs::read_dir(config.run_dir.join("shim"))? {
        known.extend(state::configs(&entry?.path())?.into_iter().map(|config| config.id));
    }
    for entry in fs::read_dir(config.state_dir.join("containers"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !known.iter().any(|id| id == name) {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

impl Inner {
    pub(super) fn pods_dir(&self) -> PathBuf {
        self.config.run_dir.join("shim")
    }

    pub(super) fn pod_dir(&self, uid: &PodUid) -> PathBuf {
        self.pods_dir().join(&*uid.0)
    }

    pub(super) fn container_dir(&self, id: &str) -> PathBuf {
        self.config.state_dir.join("containers").join(id)
    }

    pub(super) fn client(&self, uid: &PodUid) -> Option<ShimClient> {
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.get(uid).filter(|client| !client.is_gone()).cloned()
    }

    /// Connects to the pod's shim and keeps the connection.
    pub(super) async fn connect(&self, uid: &PodUid) -> io::Result<ShimClient> {
        let events = self.events.clone();
        let client = ShimClient::connect(uid.clone(), &self.pod_dir(uid), events).await?;
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.insert(uid.clone(), client.clone());
        Ok(client)
    }

    /// The folder of the pod that has the container.
    pub(super) fn find(&self, id: &ContainerId) -> io::Result<Option<PathBuf>> {
        for entry in fs::read_dir(self.pods_dir())? {
            let dir = entry?.path();
            if dir.join(format!("{id}.json")).exists() {
                return Ok(Some(dir));
            }
        }
        Ok(None)
    }

    /// Where a container lives, and its pod's shim.
    pub(super) fn locate(
        &self,
        id: &ContainerId,
    ) -> Result<Option<(PathBuf, Option<ShimClient>)>, RuntimeError> {
        let found = self.find(id).map_err(failed("look for the container", id))?;
        Ok(found.map(|dir| {
            let client = self.client(&uid_of(&dir));
            (dir, client)
        }))
    }
}

fn uid_of(pod_dir: &Path) -> PodUid {
    let name = pod_dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    PodUid(name.into())
}

impl Runtime for Embedded {
    async fn ensure_sandbox(&self, spec: &SandboxSpec) -> Result<Sandbox, RuntimeError> {
        self.inner.ensure_sandbox(spec).await
    }

    async fn start_container(&self, spec: &ContainerSpec) -> Result<Started, RuntimeError> {
        self.inner.start_container(spec).await
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        // A container or shim that is gone has nothing left to stop.
        let Some((_, Some(client))) = self.inner.locate(id)? else { return Ok(()) };
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let call = Call::Stop { id: id.to_string(), grace_ms };
        match client.call(call).await {
            Ok(_) | Err(ShimError::Gone) => Ok(()),
            Err(error) => Err(failed("stop container", id)(error)),
        }
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.inner.remove_container(id).await
    }

    async fn remove_sandbox(&self, uid: &PodUid) -> Result<(), RuntimeError> {
        self.inner.remove_sandbox(uid).await
    }

    async fn sandboxes(&self) -> Result<Vec<SandboxState>, RuntimeError> {
        let mut sandboxes = Vec::new();
        for record in self.records().map_err(failed("read the state", "runtime"))? {
            let ips = record.addresses(&self.inner.config.node_ips);
            let uid = PodUid(record.uid.into());
            let dir = self.inner.pod_dir(&uid);
            let running = match self.inner.client(&uid) {
                Some(client) => client.list().await.ok(),
                None => None,
            };
            let configs = state::configs(&dir).map_err(failed("read the containers", &uid))?;
            let containers = configs.into_iter().filter_map(|config| {
                let id = config.id.clone();
                let Some(reports) = &running else {
                    let known = state::report(&dir, &id)?;
                    let mut known = state::container(config, known);
                    known.exit.get_or_insert_with(|| state::lost(Timestamp::now()));
                    return Some(known);
                };
                let report = reports.iter().find(|report| report.id == id)?;
                (report.started_ns != 0).then(|| state::container(config, report.clone()))
            });
            sandboxes.push(SandboxState {
                containers: containers.collect(),
                uid,
                namespace: record.namespace,
                name: record.name,
                ips,
            });
        }
        Ok(sandboxes)
    }

    async fn exec(&self, id: &ContainerId, spec: &ExecSpec) -> Result<ExecIo, RuntimeError> {
        self.inner.exec(id, spec).await
    }

    fn take_events(&self) -> Option<mpsc::Receiver<RuntimeEvent>> {
        self.inner.receiver.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
