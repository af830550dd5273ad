//! The kubelet: pods of this node, from spec to processes and back to status.
//!
//! Pure: `pod` (the machine of one pod), `probe`, `status`, `admit`, `node_fit`, `cgroup`, `plan`, `env`, `spec`,
//! `quantity`. Effects: `runtime`, `images`, `volumes`, `worker` (one task a pod) with its `jobs`, `pods` (the
//! set of them), `prober`, `events`, `node`, `lease`, `server`.

pub mod admit;
pub mod cgroup;
pub mod env;
pub mod events;
pub mod images;
pub mod jobs;
mod last_words;
pub mod lease;
pub mod node;
pub mod node_fit;
pub mod plan;
pub mod pod;
pub mod pods;
mod ports;
pub mod probe;
pub mod prober;
mod pull;
pub mod quantity;
pub mod runtime;
pub mod server;
pub mod spec;
pub mod status;
pub mod tree;
pub mod volumes;
pub mod worker;

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::api::core::v1::Pod;
use kube::Client;

use self::{
    admit::Allocatable,
    events::Recorder,
    images::{Auth, ImageError, ImageSummary, PullPolicy},
    runtime::{ContainerId, UnpackedImage, User},
    spec::NodeContext,
};
use crate::{
    chain::chain,
    model::{ObjectKey, ServiceRow},
    table::Table,
};

/// Where images come from: the store of this node, or a test's.
pub trait ImageSource: Send + Sync + 'static {
    /// Has the image unpacked on this node.
    ///
    /// # Errors
    /// `ImageError::reason` is the container's waiting reason.
    fn ensure(
        &self,
        reference: &str,
        policy: PullPolicy,
        auth: &Auth,
    ) -> impl Future<Output = Result<UnpackedImage, ImageError>> + Send;

    /// The numeric identity of a user that an image names (`name`, `uid`, `uid:gid`, …).
    ///
    /// # Errors
    /// Names the user that the image does not know.
    fn user(&self, image: &UnpackedImage, user: &str) -> Result<User, String>;

    /// The images on this node. Blocks.
    fn list(&self) -> Vec<ImageSummary>;
}

/// What all parts of the kubelet share.
pub struct Kubelet<R, I> {
    pub runtime: Arc<R>,
    pub images: Arc<I>,
    pub client: Client,
    pub recorder: Recorder,
    pub config: KubeletConfig,
    pub node: NodeContext,
    pub allocatable: Allocatable,
    /// Services for `enableServiceLinks`; `None` when no component fills the table.
    pub services: Option<Table<ObjectKey, ServiceRow>>,
    pub directory: Directory,
}

impl<R, I> fmt::Debug for Kubelet<R, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubelet").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The kubelet's part of the agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeletConfig {
    pub node_name: Arc<str>,
    pub node_ip: IpAddr,
    pub state_dir: PathBuf,
}

/// The pods of this node as the HTTPS server sees them. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    pods: Arc<Mutex<BTreeMap<(String, String), PodView>>>,
}

/// One pod as logs, exec and port-forward need it.
#[derive(Clone, Debug)]
pub struct PodView {
    pub pod: Arc<Pod>,
    pub ips: Vec<IpAddr>,
    pub containers: Vec<ContainerView>,
    pub log_dir: PathBuf,
}

/// One container as logs, exec and attach need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerView {
    pub name: String,
    /// The instance that runs.
    pub running: Option<ContainerId>,
    /// Restart count of the newest instance that was started; `None` before the first.
    pub newest: Option<u32>,
    /// Why there is no instance yet, as `logs` says it.
    pub waiting: Option<String>,
}

impl Directory {
    /// Inserts or replaces a pod.
    pub fn put(&self, view: PodView) {
        let key = key_of(&view.pod);
        self.lock().insert(key, view);
    }

    /// Removes a pod, unless another one took its name.
    pub fn remove(&self, pod: &Pod) {
        let mut pods = self.lock();
        let key = key_of(pod);
        if pods.get(&key).is_some_and(|view| view.pod.metadata.uid == pod.metadata.uid) {
            pods.remove(&key);
        }
    }

    /// A pod by namespace and name.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<PodView> {
        self.lock().get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All pods in the order of their names.
    #[must_use]
    pub fn list(&self) -> Vec<PodView> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, String), PodView>> {
        // Every update is one insert or remove: a panic elsewhere leaves whole rows behind.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key_of(pod: &Pod) -> (String, String) {
    let (namespace, name, _) = spec::identity(pod);
    (namespace.to_owned(), name.to_owned())
}

impl ImageSource for images::Images {
    async fn ensure(
        &self,
        reference: &str,
        policy: PullPolicy,
        auth: &Auth,
    ) -> Result<UnpackedImage, ImageError> {
        Self::ensure(self, reference, policy, auth).await
    }

    fn user(&self, image: &UnpackedImage, user: &str) -> Result<User, String> {
        images::resolve_user(image, user).map_err(|error| chain(&error))
    }

    fn list(&self) -> Vec<ImageSummary> {
        Self::list(self).unwrap_or_else(|error| {
            tracing::warn!(%error, "images not listed");
            Vec::new()
        })
    }
}
