//! The task of one pod: feeds its machine, carries out effects, reports its status.
//!
//! Input: a bounded channel of [`Message`]s from `pods`. Output: calls of the runtime and the API, the
//! pod's row in the directory. Ends when the machine says `Finish`.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::{Api, api::DynamicObject};
use serde_json::Value;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};
use tracing::{debug, warn};

use super::{
    ContainerView, ImageSource, Kubelet, PodView,
    admit::{Rejection, unsupported_fields},
    chain,
    events::second,
    jobs::{Jobs, is_gone, patch_status},
    last_words,
    plan::{history, pod_plan},
    pod::{History, Note, Phase, PodEffect, PodEvent, PodMachine},
    runtime::{ContainerId, Exit, Runtime, RuntimeEvent, SandboxState, UnpackedImage},
    spec::{identity, pod_log_dir},
    status::{StatusContext, pod_status, unsupported_message},
    volumes,
};

/// How often volumes are brought up to date with their config maps, secrets and tokens (kubelet's
/// sync period).
const REFRESH: Duration = Duration::from_secs(60);
/// First and longest pause between tries to write a status.
const REPORT_BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// A pod as the API has it.
#[derive(Clone, Debug)]
pub struct PodObject {
    pub pod: Arc<Pod>,
    /// Field paths of its spec that are not implemented.
    pub unsupported: Vec<String>,
}

impl PodObject {
    /// Reads a pod; the raw JSON is looked at too, as it may have fields that the types lack.
    ///
    /// # Errors
    /// When it is no pod.
    pub fn parse(object: DynamicObject) -> Result<Self, serde_json::Error> {
        let unsupported = object.data.get("spec").map(unsupported_fields).unwrap_or_default();
        let pod: Pod = serde_json::from_value(serde_json::to_value(object)?)?;
        Ok(Self { pod: Arc::new(pod), unsupported })
    }
}

/// What a pod's task is told.
#[derive(Debug)]
pub enum Message {
    /// The object as it is now.
    Changed(PodObject),
    /// The object is gone.
    Deleted,
    Runtime(RuntimeEvent),
}

/// What a pod's task begins with.
#[derive(Debug)]
pub struct Birth {
    pub object: PodObject,
    pub sandbox: Option<SandboxState>,
    pub rejection: Option<Rejection>,
}

type Done = (Option<PodEvent>, Option<(usize, UnpackedImage)>);

struct Worker<R, I> {
    jobs: Jobs<R, I>,
    machine: PodMachine,
    running: JoinSet<Done>,
    images: BTreeMap<usize, UnpackedImage>,
    rejection: Option<Rejection>,
    unsupported: Vec<String>,
    /// The pod was let in: fields that its spec got later do not end it.
    let_in: bool,
    status: watch::Sender<Option<Value>>,
    last: Option<PodStatus>,
    /// The API has another readiness than was written last.
    restates: bool,
    deleting: Option<i64>,
}

/// Runs a pod from its first sight to its end.
pub async fn run<R: Runtime, I: ImageSource>(
    kubelet: Arc<Kubelet<R, I>>,
    birth: Birth,
    mut messages: mpsc::Receiver<Message>,
) {
    let mut worker = Worker::new(kubelet, birth);
    let mut refresh = tokio::time::interval(REFRESH);
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    refresh.reset();
    let mut effects = Vec::new();
    worker.machine.handle_timeout(Instant::now(), &mut effects);
    worker.note_deletion(&mut effects);
    while !worker.perform(&mut effects) {
        worker.publish();
        let timeout = worker.machine.poll_timeout();
        let timer = async {
            match timeout {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = messages.recv() => {
                // The set of pods is gone: the agent stops, the pod goes on.
                let Some(message) = message else { return };
                worker.take(message, &mut effects);
            }
            Some(done) = worker.running.join_next() => worker.done(done, &mut effects),
            () = timer => worker.machine.handle_timeout(Instant::now(), &mut effects),
            _ = refresh.tick() => worker.refresh(),
        }
    }
    worker.finish().await;
}

impl<R: Runtime, I: ImageSource> Worker<R, I> {
    fn new(kubelet: Arc<Kubelet<R, I>>, birth: Birth) -> Self {
        let Birth { object: PodObject { pod, unsupported }, sandbox, rejection } = birth;
        let let_in = sandbox.is_some() || (rejection.is_none() && unsupported.is_empty());
        let mut past = history(&pod, sandbox);
        if !let_in {
            past = History { over: true, ..past };
        }
        let machine = PodMachine::new(pod_plan(&pod), &past, Instant::now());
        let (status, reports) = watch::channel(None);
        let jobs = Jobs { kubelet, pod, ips: machine.ips().to_vec(), fetched: Arc::default() };
        tokio::spawn(report(jobs.clone(), reports));
        let worker = Self {
            jobs,
            machine,
            running: JoinSet::new(),
            images: BTreeMap::new(),
            rejection,
            unsupported,
            let_in,
            status,
            last: None,
            restates: false,
            deleting: None,
        };
        worker.say_why_not();
        worker
    }

    /// An Event for a pod that is not started, or not heeded in all that it asks for.
    fn say_why_not(&self) {
        let words = match &self.rejection {
            Some(rejection) => Some((rejection.reason, rejection.message.clone())),
            None if !self.unsupported.is_empty() => {
                Some(("UnsupportedField", unsupported_message(&self.unsupported)))
            }
            None => None,
        };
        if let Some((reason, message)) = words {
            self.jobs.record(Note { slot: None, warning: true, reason, message });
        }
    }

    fn take(&mut self, message: Message, effects: &mut Vec<PodEffect>) {
        let now = Instant::now();
        match message {
            Message::Changed(object) => {
                self.jobs.pod = object.pod;
                self.restates = self.is_overruled();
                self.note_spec(object.unsupported, effects);
                self.note_deletion(effects);
            }
            Message::Deleted => self.machine.handle_event(PodEvent::DeletedFromApi, now, effects),
            Message::Runtime(RuntimeEvent::ContainerExited { id, exit, .. }) => {
                let exit = self.complete(&id, exit);
                self.machine.handle_event(PodEvent::Exited { id, exit }, now, effects);
            }
            Message::Runtime(RuntimeEvent::SandboxLost { .. }) => {
                self.machine.handle_event(PodEvent::SandboxLost, now, effects);
            }
        }
    }

    /// Tells the machine what its containers are now, and the pod's author what is not heeded of it.
    fn note_spec(&mut self, unsupported: Vec<String>, effects: &mut Vec<PodEffect>) {
        if self.unsupported != unsupported && (self.let_in || !unsupported.is_empty()) {
            self.unsupported = unsupported;
            self.say_why_not();
        }
        let plan = pod_plan(&self.jobs.pod);
        if plan != *self.machine.plan() {
            let event = PodEvent::SpecChanged { plan };
            self.machine.handle_event(event, Instant::now(), effects);
        }
    }

    fn complete(&self, id: &ContainerId, exit: Exit) -> Exit {
        let mut slots = self.machine.slots().iter();
        let Some(slot) = slots.find(|slot| slot.running().is_some_and(|one| one.id == *id)) else {
            return exit;
        };
        let instance = (&*slot.plan.name, slot.restart_count);
        last_words::complete(exit, &self.jobs.pod, instance, &self.jobs.kubelet.node.log_dir)
    }

    /// Whether somebody else has written another readiness than this pod's own: the controller that takes
    /// the pods of a lost node out of service does, and does not put them back.
    fn is_overruled(&self) -> bool {
        let ready = |status: &PodStatus| {
            let mut conditions = status.conditions.iter().flatten();
            conditions.find(|c| c.type_ == "Ready").map(|c| c.status.clone())
        };
        let (Some(ours), Some(theirs)) = (&self.last, &self.jobs.pod.status) else { return false };
        ready(ours) != ready(theirs)
    }

    /// Tells the machine that the object is being deleted, each time the grace becomes another.
    fn note_deletion(&mut self, effects: &mut Vec<PodEffect>) {
        let meta = &self.jobs.pod.metadata;
        if meta.deletion_timestamp.is_none() {
            return;
        }
        let grace = meta.deletion_grace_period_seconds.unwrap_or(0);
        if self.deleting != Some(grace) {
            self.deleting = Some(grace);
            let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
            let event = PodEvent::DeleteRequested { grace };
            self.machine.handle_event(event, Instant::now(), effects);
        }
    }

    fn done(&mut self, done: Result<Done, tokio::task::JoinError>, effects: &mut Vec<PodEffect>) {
        let (event, image) = match done {
            Ok(done) => done,
            Err(error) => {
                warn!(%error, "a job of a pod ended without a result");
                return;
            }
        };
        if let Some((slot, image)) = image {
            self.images.insert(slot, image);
        }
        if let Some(event) = event {
            self.machine.handle_event(event, Instant::now(), effects);
        }
        self.jobs.ips = self.machine.ips().to_vec();
    }

    /// Starts each effect; true when the pod is over.
    fn perform(&mut self, effects: &mut Vec<PodEffect>) -> bool {
        let mut over = false;
        for effect in effects.drain(..) {
            debug!(pod = %self.machine.plan().display, ?effect, "pod effect");
            let jobs = self.jobs.clone();
            match effect {
                PodEffect::EnsureSandbox => self.spawn(async { Some(jobs.ensure_sandbox().await) }),
                PodEffect::PullImage { slot } => {
                    self.running.spawn(async move {
                        let (event, image) = jobs.pull(slot).await;
                        (Some(event), image.map(|image| (slot, image)))
                    });
                }
                PodEffect::StartContainer { slot, restart_count } => {
                    let image = self.images.get(&slot).cloned();
                    self.spawn(async move {
                        let Some(image) = image else {
                            let message = "the image was not kept".to_owned();
                            let reason = "CreateContainerError";
                            return Some(PodEvent::not_made(slot, reason, message));
                        };
                        Some(jobs.start(slot, restart_count, image).await)
                    });
                }
                PodEffect::StopContainer { slot, id, grace } => {
                    self.spawn(jobs.stop(slot, id, grace));
                }
                PodEffect::RemoveContainer { id } => self.spawn(async move {
                    if let Err(error) = jobs.kubelet.runtime.remove_container(&id).await {
                        warn!(container = %id, error = chain(&error), "container not removed");
                    }
                    None
                }),
                PodEffect::RemoveSandbox => self.spawn(async { Some(jobs.remove_sandbox().await) }),
                PodEffect::Probe { slot, id, kind, timeout } => {
                    self.spawn(jobs.probe(slot, id, (kind, timeout)));
                }
                PodEffect::DeleteFromApi => {
                    let status = self.compute_status();
                    self.spawn(jobs.delete(status));
                }
                PodEffect::Record(note) => jobs.record(note),
                PodEffect::Finish => over = true,
            }
        }
        over
    }

    fn spawn(&mut self, job: impl Future<Output = Option<PodEvent>> + Send + 'static) {
        self.running.spawn(async { (job.await, None) });
    }

    fn refresh(&mut self) {
        if !self.machine.sandbox_ready() || self.machine.is_ending() {
            return;
        }
        let jobs = self.jobs.clone();
        self.spawn(async move {
            if let Err(error) = jobs.ensure_volumes().await {
                let message = chain(&error);
                jobs.record(Note { slot: None, warning: true, reason: "FailedMount", message });
            }
            None
        });
    }

    /// The status as it is now, also remembered as the base of the next one.
    fn compute_status(&mut self) -> Value {
        let mut pod = (*self.jobs.pod).clone();
        if let Some(last) = &self.last {
            let theirs = pod.status.take().and_then(|status| status.conditions).unwrap_or_default();
            let mut base = last.clone();
            let ours = base.conditions.get_or_insert_default();
            const OWNED: [&str; 4] =
                ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady"];
            ours.retain(|condition| OWNED.contains(&condition.type_.as_str()));
            ours.extend(theirs.into_iter().filter(|c| !OWNED.contains(&c.type_.as_str())));
            pod.status = Some(base);
        }
        let fields: &[String] = &self.unsupported;
        let (unsupported, unheeded) =
            if self.let_in { (&[][..], fields) } else { (fields, &[][..]) };
        let ctx = StatusContext {
            host_ip: self.jobs.kubelet.config.node_ip,
            now: second(Timestamp::now()),
            rejection: self.rejection.as_ref(),
            unsupported,
            unheeded,
        };
        let status = pod_status(&pod, &self.machine, &ctx);
        let mut value = serde_json::to_value(&status).unwrap_or_default();
        if let Some(fields) = value.as_object_mut() {
            // A merge patch removes a field only when told to.
            for name in ["reason", "message"] {
                fields.entry(name).or_insert(Value::Null);
            }
        }
        self.last = Some(status);
        value
    }

    /// Shows the pod to the server and its status to the API, if it is another than before.
    fn publish(&mut self) {
        // A pod that ended before this process saw it keeps the status that it has.
        let untouched = super::plan::is_over(&self.jobs.pod) && self.last.is_none();
        if !untouched {
            let status = self.compute_status();
            let restates = std::mem::take(&mut self.restates);
            self.status.send_if_modified(|old| {
                let changed = old.as_ref() != Some(&status);
                *old = Some(status);
                changed || restates
            });
        }
        let containers = self.machine.slots().iter().map(|slot| {
            let running = slot.running().map(|running| running.id.clone());
            let begun = running.is_some() || matches!(slot.phase, Phase::Exited);
            let newest = if begun {
                Some(slot.restart_count)
            } else {
                slot.last.as_ref().map(|_| slot.restart_count.saturating_sub(1))
            };
            let waiting = match &slot.phase {
                Phase::Waiting { since, .. }
                | Phase::PullFailed { since, .. }
                | Phase::Pulling { again: Some(since) } => Some(since.reason.to_owned()),
                Phase::Pulling { again: None } | Phase::Starting => {
                    Some("ContainerCreating".to_owned())
                }
                Phase::Running(_) | Phase::Exited => None,
            };
            ContainerView { name: slot.plan.name.to_string(), running, newest, waiting }
        });
        let mut pod = (*self.jobs.pod).clone();
        pod.status = self.last.clone().or(pod.status);
        self.jobs.kubelet.directory.put(PodView {
            ips: self.machine.ips().to_vec(),
            containers: containers.collect(),
            log_dir: pod_log_dir(&self.jobs.kubelet.node.log_dir, &self.jobs.pod),
            pod: Arc::new(pod),
        });
    }

    /// Takes volumes and logs away.
    async fn finish(self) {
        let Self { jobs, running, .. } = self;
        drop(running);
        jobs.kubelet.directory.remove(&jobs.pod);
        let (_, _, uid) = identity(&jobs.pod);
        let dir = volumes::pod_dir(&jobs.kubelet.config.state_dir, uid);
        let logs = pod_log_dir(&jobs.kubelet.node.log_dir, &jobs.pod);
        let removed = tokio::task::spawn_blocking(move || {
            volumes::remove(&dir)?;
            match std::fs::remove_dir_all(&logs) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                Ok(()) | Err(_) => Ok(()),
            }
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "volumes or logs of a pod not removed"),
            Err(error) => warn!(%error, "removing a pod's volumes was cut off"),
        }
    }
}

/// Writes the newest status until it is written; an older one is not worth retrying.
async fn report<R: Runtime, I: ImageSource>(
    jobs: Jobs<R, I>,
    mut reports: watch::Receiver<Option<Value>>,
) {
    let (namespace, _, _) = identity(&jobs.pod);
    let api: Api<Pod> = Api::namespaced(jobs.kubelet.client.clone(), namespace);
    let mut pause = REPORT_BACKOFF.0;
    while reports.changed().await.is_ok() {
        loop {
            let status = reports.borrow_and_update().clone();
            let Some(status) = status else { break };
            match patch_status(&api, &jobs.pod, &status).await {
                Ok(()) => {
                    pause = REPORT_BACKOFF.0;
                    break;
                }
                Err(error) if is_gone(&error) => break,
                Err(error) => debug!(%error, "pod status not written"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REPORT_BACKOFF.1);
        }
    }
}
