//! The scheduler's one task: it owns the snapshot and the queue, decides, and has bindings written by
//! short-lived tasks.
//!
//! In: watch events of pods and nodes, outcomes of bindings. Out: bindings, conditions, Events. A pod
//! takes its room as soon as it is decided, and gives it back when the binding fails.

use std::{collections::HashMap, sync::Arc, time::Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::{Decision, Pod, Snapshot, message, queue::Queue, schedule, snapshot::Helps};
use crate::{
    client::{ApiError, Client, Event, Resource, Write},
    controllers::{
        conditions::{self, Said, find},
        json::{items, text},
        model::{Key, NODES, PODS},
        recorder::Recorder,
        sync::Note,
    },
};

const COMPONENT: &str = "default-scheduler";
/// Bindings under way at once; more wait and hold no lock.
const WRITERS: usize = 128;
const EVENTS: usize = 1024;
const EVENTS_PER_TURN: usize = 512;
/// Decisions before the watch gets its turn again.
const DECISIONS_PER_TURN: usize = 128;
/// When no timer is set the loop still wakes after this.
const IDLE: std::time::Duration = std::time::Duration::from_secs(60);

struct Waiting {
    pod: Pod,
    conditions: Vec<Value>,
}

struct Bound {
    key: Key,
    uid: String,
    result: Result<(), ApiError>,
}

struct Scheduler {
    client: Arc<dyn Client>,
    recorder: Recorder,
    snapshot: Snapshot,
    queue: Queue,
    waiting: HashMap<Key, Waiting>,
    /// What was told of each resource since its watch began anew: name to uid.
    known: HashMap<Resource, Known>,
    permits: Arc<Semaphore>,
    bound: mpsc::Sender<Bound>,
}

#[derive(Debug, Default)]
struct Known {
    objects: HashMap<Key, String>,
    stale: Option<HashMap<Key, String>>,
    synced: bool,
}

pub(super) async fn run(client: Arc<dyn Client>, stop: CancellationToken) {
    let (events, mut incoming) = mpsc::channel(EVENTS);
    for resource in [NODES, PODS] {
        let watch = crate::controllers::forward(
            Arc::clone(&client),
            resource,
            events.clone(),
            stop.clone(),
        );
        drop(tokio::spawn(watch));
    }
    drop(events);
    let (bound, mut finished) = mpsc::channel(WRITERS);
    let recorder = Recorder::start(Arc::clone(&client));
    let mut scheduler = Scheduler {
        client,
        recorder,
        snapshot: Snapshot::default(),
        queue: Queue::default(),
        waiting: HashMap::new(),
        known: HashMap::new(),
        permits: Arc::new(Semaphore::new(WRITERS)),
        bound,
    };
    let mut batch = Vec::with_capacity(EVENTS_PER_TURN);
    loop {
        let wake = scheduler.turn(Instant::now());
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(bound) = finished.recv() => scheduler.finish(bound),
            count = incoming.recv_many(&mut batch, EVENTS_PER_TURN) => {
                if count == 0 {
                    return;
                }
                for (resource, event) in batch.drain(..) {
                    scheduler.take_in(resource, event);
                }
            }
            () = tokio::time::sleep_until(wake.into()) => (),
        }
    }
}

impl Scheduler {
    fn is_synced(&self) -> bool {
        [NODES, PODS]
            .iter()
            .all(|resource| self.known.get(resource).is_some_and(|known| known.synced))
    }

    fn take_in(&mut self, resource: Resource, event: Event) {
        match event {
            Event::Restart => {
                let known = self.known.entry(resource).or_default();
                known.stale = Some(known.objects.clone());
            }
            Event::Applied(value) => {
                let key = place(&value);
                let uid = text(&value, "/metadata/uid").to_owned();
                let known = self.known.entry(resource).or_default();
                if let Some(stale) = &mut known.stale {
                    stale.remove(&key);
                }
                let old = known.objects.insert(key.clone(), uid.clone());
                if let Some(old) = old.filter(|old| *old != uid) {
                    self.remove(resource, &key, &old);
                }
                self.put(resource, &key, &value);
            }
            Event::Deleted(value) => {
                let key = place(&value);
                self.known.entry(resource).or_default().objects.remove(&key);
                self.remove(resource, &key, text(&value, "/metadata/uid"));
            }
            Event::Synced => {
                let known = self.known.entry(resource).or_default();
                known.synced = true;
                for (key, uid) in known.stale.take().unwrap_or_default() {
                    if let Some(known) = self.known.get_mut(&resource) {
                        known.objects.remove(&key);
                    }
                    self.remove(resource, &key, &uid);
                }
            }
        }
    }

    fn helped(&mut self, helps: Helps) {
        if helps == Helps::Maybe {
            self.queue.flush(Instant::now());
        }
    }

    fn put(&mut self, resource: Resource, key: &Key, value: &Value) {
        if resource == NODES {
            let helps = self.snapshot.put_node(value);
            return self.helped(helps);
        }
        let ended = matches!(text(value, "/status/phase"), "Succeeded" | "Failed");
        let pod = Pod::decode(value);
        if !pod.node.is_empty() || ended {
            self.queue.remove(key);
            self.waiting.remove(key);
        }
        if ended {
            let helps = self.snapshot.remove_pod(&pod.uid);
            return self.helped(helps);
        }
        if !pod.node.is_empty() {
            return self.snapshot.put_pod(&pod, &pod.node);
        }
        let ours = matches!(text(value, "/spec/schedulerName"), "" | "default-scheduler");
        let going = !text(value, "/metadata/deletionTimestamp").is_empty();
        if !ours || going {
            self.queue.remove(key);
            self.waiting.remove(key);
            return;
        }
        let conditions = items(value, "/status/conditions").to_vec();
        let changed = self.waiting.get(key).is_none_or(|old| old.pod != pod);
        let (gated, priority) = (pod.gated, pod.priority);
        self.waiting.insert(key.clone(), Waiting { pod, conditions });
        if gated {
            self.queue.remove(key);
            let message = "Scheduling is blocked due to non-empty scheduling gates";
            self.tell_condition(key, "SchedulingGated", message);
        } else if changed {
            self.queue.add(key, priority);
        }
    }

    fn remove(&mut self, resource: Resource, key: &Key, uid: &str) {
        if resource == NODES {
            return self.snapshot.remove_node(&key.name);
        }
        self.queue.remove(key);
        self.waiting.remove(key);
        let helps = self.snapshot.remove_pod(uid);
        self.helped(helps);
    }

    /// Decides about some pods; tells when to come again.
    fn turn(&mut self, now: Instant) -> Instant {
        if !self.is_synced() {
            return now + IDLE;
        }
        let next = self.queue.handle_timeout(now);
        for _ in 0..DECISIONS_PER_TURN {
            if self.permits.available_permits() == 0 {
                return now + IDLE;
            }
            let Some((key, mark)) = self.queue.pop() else {
                return next.unwrap_or(now + IDLE);
            };
            self.decide(&key, mark, now);
        }
        now
    }

    fn decide(&mut self, key: &Key, mark: u64, now: Instant) {
        let Some(waiting) = self.waiting.get(key) else {
            return self.queue.remove(key);
        };
        let decision = schedule(&self.snapshot, &waiting.pod, rand::random());
        if let Decision::Bind(node) = &decision {
            self.snapshot.put_pod(&waiting.pod, node);
            return self.bind(key, node);
        }
        self.queue.park(key, mark, now);
        let Some(message) = message(&decision, self.snapshot.count()) else { return };
        let note = Note::warning(reference(&waiting.pod), "FailedScheduling", message.clone());
        self.recorder.record(COMPONENT, note);
        self.tell_condition(key, "Unschedulable", &message);
    }

    fn bind(&mut self, key: &Key, node: &str) {
        let Some(waiting) = self.waiting.get(key) else { return };
        let (key, uid, node) = (key.clone(), waiting.pod.uid.clone(), node.to_owned());
        let message = format!("Successfully assigned {}/{} to {node}", key.namespace, key.name);
        let note = Note::normal(reference(&waiting.pod), "Scheduled", message);
        let (client, recorder) = (Arc::clone(&self.client), self.recorder.clone());
        let (permits, bound) = (Arc::clone(&self.permits), self.bound.clone());
        drop(tokio::spawn(async move {
            let Ok(_permit) = permits.acquire().await else { return };
            let value = json!({
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": key.name, "namespace": key.namespace, "uid": uid},
                "target": {"apiVersion": "v1", "kind": "Node", "name": node},
            });
            let write = Write::UpdateSub { object: key.at(PODS), subresource: "binding", value };
            let result = client.write(write).await.map(drop);
            if result.is_ok() {
                recorder.record(COMPONENT, note);
            }
            if bound.send(Bound { key, uid, result }).await.is_err() {
                tracing::debug!("scheduler stopped before a binding's outcome was known");
            }
        }));
    }

    fn finish(&mut self, bound: Bound) {
        let Bound { key, uid, result } = bound;
        let Err(error) = result else { return };
        // Its own watch event says where it is, if it was bound after all.
        self.snapshot.remove_pod(&uid);
        if error.code == 404 {
            self.queue.remove(&key);
            return;
        }
        tracing::warn!(pod = ?key, %error, "binding failed");
        self.queue.retry(&key, Instant::now());
    }

    /// Writes the condition PodScheduled=False, unless it says so already.
    fn tell_condition(&mut self, key: &Key, reason: &'static str, message: &str) {
        let Some(waiting) = self.waiting.get_mut(key) else { return };
        let said = Said::new("PodScheduled", "False", reason, message);
        let told = find(&waiting.conditions, said.kind);
        if conditions::says(&waiting.conditions, &said)
            && told.is_some_and(|told| text(told, "/message") == message)
        {
            return;
        }
        conditions::put(&mut waiting.conditions, &said, Timestamp::now());
        let patch = json!({
            "metadata": {"uid": waiting.pod.uid},
            "status": {"conditions": waiting.conditions},
        });
        let write = Write::Patch { object: key.at(PODS), subresource: "status", patch };
        let (client, permits) = (Arc::clone(&self.client), Arc::clone(&self.permits));
        drop(tokio::spawn(async move {
            let Ok(_permit) = permits.acquire().await else { return };
            if let Err(error) = client.write(write).await {
                tracing::debug!(%error, "condition PodScheduled not written");
            }
        }));
    }
}

fn place(value: &Value) -> Key {
    Key::new(text(value, "/metadata/namespace"), text(value, "/metadata/name"))
}

fn reference(pod: &Pod) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "name": pod.key.name,
        "namespace": pod.key.namespace, "uid": pod.uid,
    })
}
