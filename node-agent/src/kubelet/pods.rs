//! The set of pods of this node: one task for each, fed from the API's watch and the runtime's events.
//!
//! One task owns the set. Inputs: the watch (restarted with back-off), the runtime's events. A sandbox
//! whose pod is in no synced list is removed; nothing is removed before the first list is whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::{
    Api,
    api::{ApiResource, DynamicObject},
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tracing::{info, warn};

use super::{
    ImageSource, Kubelet,
    admit::fits,
    chain,
    node_fit::belongs,
    plan::is_over,
    runtime::{PodUid, Runtime, RuntimeError, RuntimeEvent, SandboxState},
    worker::{Birth, Message, PodObject, run as run_pod},
};

/// Messages that may wait for one pod's task; a full queue slows the set down.
const QUEUE: usize = 32;
/// How long a new pod waits for the node's labels and taints.
const NODE_TIMEOUT: Duration = Duration::from_secs(5);

struct Set<R, I> {
    kubelet: Arc<Kubelet<R, I>>,
    pods: BTreeMap<PodUid, Known>,
    /// Sandboxes of an earlier agent that no pod has claimed yet.
    unclaimed: BTreeMap<PodUid, SandboxState>,
    /// Those of them whose shim is gone.
    lost: BTreeSet<PodUid>,
    tasks: JoinSet<PodUid>,
    /// Uids of the list that is being received.
    listed: BTreeSet<PodUid>,
}

struct Known {
    sender: mpsc::Sender<Message>,
    pod: Arc<Pod>,
    /// It was turned away, or is not started: it takes no resources.
    idle: bool,
}

/// Runs the pods of this node until the runtime's channel closes.
///
/// # Errors
/// When the runtime cannot say what runs: starting anything then could run pods twice.
pub async fn run<R: Runtime, I: ImageSource>(
    kubelet: Arc<Kubelet<R, I>>,
    mut events: mpsc::Receiver<RuntimeEvent>,
) -> Result<(), RuntimeError> {
    let found = kubelet.runtime.sandboxes().await?;
    info!(sandboxes = found.len(), "pods of an earlier agent found");
    let mut set = Set {
        unclaimed: found.into_iter().map(|state| (state.uid.clone(), state)).collect(),
        pods: BTreeMap::new(),
        tasks: JoinSet::new(),
        listed: BTreeSet::new(),
        lost: BTreeSet::new(),
        kubelet,
    };
    let resource = ApiResource::erase::<Pod>(&());
    let api: Api<DynamicObject> = Api::all_with(set.kubelet.client.clone(), &resource);
    let field = format!("spec.nodeName={}", set.kubelet.config.node_name);
    let stream = watcher(api, watcher::Config::default().fields(&field)).default_backoff();
    let mut stream = pin!(stream);
    loop {
        tokio::select! {
            change = stream.next() => match change {
                Some(Ok(change)) => set.change(change).await,
                Some(Err(error)) => warn!(error = chain(&error), "watch of pods failed"),
                None => return Ok(()),
            },
            event = events.recv() => match event {
                Some(event) => set.runtime(event).await,
                None => return Ok(()),
            },
            Some(ended) = set.tasks.join_next() => match ended {
                Ok(uid) => {
                    set.pods.remove(&uid);
                }
                Err(error) => warn!(%error, "the task of a pod ended early"),
            },
        }
    }
}

impl<R: Runtime, I: ImageSource> Set<R, I> {
    async fn change(&mut self, change: watcher::Event<DynamicObject>) {
        match change {
            watcher::Event::Init => self.listed.clear(),
            watcher::Event::InitApply(object) => {
                self.listed.extend(uid(&object));
                self.apply(object).await;
            }
            watcher::Event::Apply(object) => self.apply(object).await,
            watcher::Event::Delete(object) => {
                if let Some(uid) = uid(&object) {
                    self.tell(&uid, Message::Deleted).await;
                }
            }
            watcher::Event::InitDone => {
                let gone: Vec<PodUid> =
                    self.pods.keys().filter(|uid| !self.listed.contains(*uid)).cloned().collect();
                for uid in gone {
                    self.tell(&uid, Message::Deleted).await;
                }
                self.remove_orphans();
            }
        }
    }

    async fn apply(&mut self, object: DynamicObject) {
        let name = object.metadata.name.clone().unwrap_or_default();
        let object = match PodObject::parse(object) {
            Ok(object) => object,
            Err(error) => {
                warn!(pod = name, %error, "pod not understood");
                return;
            }
        };
        let Some(uid) = object.pod.metadata.uid.as_deref().map(|uid| PodUid(uid.into())) else {
            return;
        };
        if let Some(known) = self.pods.get_mut(&uid) {
            known.pod = Arc::clone(&object.pod);
            self.tell(&uid, Message::Changed(object)).await;
            return;
        }
        let sandbox = self.unclaimed.remove(&uid);
        // A pod that runs already was let in before; one that is over takes nothing.
        let asks = sandbox.is_none() && !is_over(&object.pod) && object.unsupported.is_empty();
        let rejection = if asks { self.admit(&object.pod).await } else { None };
        let idle = sandbox.is_none() && (rejection.is_some() || !object.unsupported.is_empty());
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.pods.insert(uid.clone(), Known { sender, pod: Arc::clone(&object.pod), idle });
        if self.lost.remove(&uid) {
            let event = RuntimeEvent::SandboxLost { pod: uid.clone() };
            self.tell(&uid, Message::Runtime(event)).await;
        }
        let (kubelet, birth) = (Arc::clone(&self.kubelet), Birth { object, sandbox, rejection });
        self.tasks.spawn(async move {
            run_pod(kubelet, birth, receiver).await;
            uid
        });
    }

    async fn admit(&self, pod: &Pod) -> Option<super::admit::Rejection> {
        let live = self.pods.values().filter(|known| !known.idle && !is_over(&known.pod));
        let others: Vec<&PodSpec> = live.filter_map(|known| known.pod.spec.as_ref()).collect();
        let spec = pod.spec.as_ref()?;
        if let Some(rejection) = fits(spec, &others, self.kubelet.allocatable) {
            return Some(rejection);
        }
        // Labels and taints may have changed since a pod was let in: that does not end it after a boot.
        let begun = pod.status.as_ref().is_some_and(|status| status.start_time.is_some());
        if begun { None } else { belongs(spec, &self.node().await?) }
    }

    /// This node as the API has it; a pod is let in where that cannot be had.
    async fn node(&self) -> Option<Node> {
        let api: Api<Node> = Api::all(self.kubelet.client.clone());
        match timeout(NODE_TIMEOUT, api.get(&self.kubelet.config.node_name)).await {
            Ok(Ok(node)) => return Some(node),
            Ok(Err(error)) => warn!(error = chain(&error), "node not read"),
            Err(_elapsed) => warn!("node not read in time"),
        }
        None
    }

    async fn runtime(&mut self, event: RuntimeEvent) {
        let uid = match &event {
            RuntimeEvent::ContainerExited { pod, .. } | RuntimeEvent::SandboxLost { pod } => {
                pod.clone()
            }
        };
        if self.unclaimed.contains_key(&uid) && matches!(event, RuntimeEvent::SandboxLost { .. }) {
            self.lost.insert(uid);
            return;
        }
        // An exit in a sandbox that is not claimed yet changes what its pod will find.
        if let (Some(state), RuntimeEvent::ContainerExited { id, exit, .. }) =
            (self.unclaimed.get_mut(&uid), &event)
        {
            for container in state.containers.iter_mut().filter(|container| container.id == *id) {
                container.exit = Some(exit.clone());
            }
            return;
        }
        self.tell(&uid, Message::Runtime(event)).await;
    }

    async fn tell(&mut self, uid: &PodUid, message: Message) {
        if let Some(known) = self.pods.get(uid)
            && known.sender.send(message).await.is_err()
        {
            self.pods.remove(uid);
        }
    }

    fn remove_orphans(&mut self) {
        for (uid, state) in std::mem::take(&mut self.unclaimed) {
            info!(pod = %uid, name = state.name, "removing a sandbox that has no pod");
            let runtime = Arc::clone(&self.kubelet.runtime);
            let dir = super::volumes::pod_dir(&self.kubelet.config.state_dir, &uid.0);
            self.tasks.spawn(async move {
                if let Err(error) = runtime.remove_sandbox(&uid).await {
                    warn!(pod = %uid, error = chain(&error), "orphaned sandbox not removed");
                }
                let removed =
                    tokio::task::spawn_blocking(move || super::volumes::remove(&dir)).await;
                if let Ok(Err(error)) = removed {
                    warn!(pod = %uid, %error, "volumes of an orphaned pod not removed");
                }
                uid
            });
        }
    }
}

fn uid(object: &DynamicObject) -> Option<PodUid> {
    object.metadata.uid.as_deref().map(|uid| PodUid(uid.into()))
}
