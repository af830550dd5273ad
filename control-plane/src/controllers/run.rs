//! The controllers' one task: it owns the caches and the queues, asks the pure syncs, and has their
//! steps carried out by short-lived tasks.
//!
//! In: watch events of all kinds (one bounded channel), outcomes of steps. Out: writes. A key is
//! worked on by one task at a time, and is not looked at again before the caches have seen what was
//! written for it. Nothing is decided before all caches are complete.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    exec::{Doors, Expect, Outcome, execute},
    model::Key,
    queue::KeyQueue,
    sync::{Context, Controller},
    world::{Change, World},
};
use crate::client::{ApiError, Client, Event, Resource};

/// Keys of one controller that are worked on at once.
const KEYS_AT_ONCE: usize = 32;
/// Syncs of all controllers whose writes are under way at once.
const WRITERS: usize = 64;
/// Watch events that wait; a full channel holds the watch back, which then restarts.
const EVENTS: usize = 1024;
/// Events taken in before the queues get their turn.
const EVENTS_PER_TURN: usize = 512;
/// How long a write is waited for in the watch (upstream's `ExpectationsTimeout`).
const EXPECT_TIMEOUT: Duration = Duration::from_secs(300);
/// Pause before a watch that ended is begun again.
const REWATCH: Duration = Duration::from_secs(1);

struct Worker {
    controller: Controller,
    queue: KeyQueue,
    failures: BTreeMap<Key, ApiError>,
    /// Keys whose writes are done but not seen yet, and until when they are waited for.
    held: BTreeMap<Key, (Vec<Expect>, Instant)>,
}

struct Done {
    worker: usize,
    key: Key,
    outcome: Outcome,
}

pub(super) struct Loop {
    world: World,
    workers: Vec<Worker>,
    doors: Doors,
    permits: Arc<Semaphore>,
    done: mpsc::Sender<Done>,
}

/// Runs until `stop`.
pub(super) async fn run(
    world: World,
    controllers: Vec<Controller>,
    doors: Doors,
    stop: CancellationToken,
) {
    let (events, mut incoming) = mpsc::channel(EVENTS);
    for kind in &world.settings.kinds {
        let client = Arc::clone(&doors.client);
        drop(tokio::spawn(forward(client, kind.resource, events.clone(), stop.clone())));
    }
    drop(events);
    let (done, mut finished) = mpsc::channel(WRITERS);
    let workers = controllers.into_iter().map(Worker::new).collect();
    let permits = Arc::new(Semaphore::new(WRITERS));
    let mut state = Loop { world, workers, doors, permits, done };
    let mut batch = Vec::with_capacity(EVENTS_PER_TURN);
    loop {
        let next = state.turn(Instant::now());
        let sleep = tokio::time::sleep_until(
            next.unwrap_or_else(|| Instant::now() + EXPECT_TIMEOUT).into(),
        );
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(done) = finished.recv() => state.finish(done),
            count = incoming.recv_many(&mut batch, EVENTS_PER_TURN) => {
                if count == 0 {
                    return;
                }
                for (resource, event) in batch.drain(..) {
                    state.take_in(resource, event);
                }
            }
            () = sleep => (),
        }
    }
}

/// Passes a watch on, beginning it anew when it ends.
pub(crate) async fn forward(
    client: Arc<dyn Client>,
    resource: Resource,
    events: mpsc::Sender<(Resource, Event)>,
    stop: CancellationToken,
) {
    loop {
        let mut watch = client.watch(resource);
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = watch.recv() => event,
            };
            let Some(event) = event else { break };
            if events.send((resource, event)).await.is_err() {
                return;
            }
        }
        tracing::warn!(resource = resource.plural, "watch ended, beginning again");
        tokio::time::sleep(REWATCH).await;
    }
}

impl Worker {
    fn new(controller: Controller) -> Self {
        let mut queue = KeyQueue::default();
        if let Some(first) = controller.first {
            queue.touch(first());
        }
        Self { controller, queue, failures: BTreeMap::new(), held: BTreeMap::new() }
    }

    fn touch_for(&mut self, world: &World, change: &Change, keys: &mut Vec<Key>) {
        keys.clear();
        (self.controller.keys)(world, change, keys);
        keys.drain(..).for_each(|key| self.queue.touch(key));
    }

    fn release_seen(&mut self, world: &World, now: Instant) {
        let seen: Vec<Key> = self
            .held
            .iter()
            .filter(|(_, (expects, until))| {
                *until <= now || expects.iter().all(|expect| is_seen(world, expect))
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in seen {
            self.held.remove(&key);
            // The watch event of a write has touched the key if it concerns it.
            self.queue.finish(&key);
        }
    }
}

fn is_seen(world: &World, expect: &Expect) -> bool {
    world.revision(expect.resource) >= expect.revision
        && expect
            .deleted
            .as_ref()
            .is_none_or(|uid| world.by_uid(uid).is_none_or(|object| object.meta.deleted.is_some()))
}

impl Loop {
    fn take_in(&mut self, resource: Resource, event: Event) {
        let changes = self.world.apply(resource, event, Timestamp::now());
        let mut keys = Vec::new();
        for change in changes {
            for worker in &mut self.workers {
                worker.touch_for(&self.world, &change, &mut keys);
            }
        }
    }

    /// Starts all syncs that can start; tells when the next timer is due.
    fn turn(&mut self, now: Instant) -> Option<Instant> {
        if !self.world.is_synced() {
            return None;
        }
        let mut next: Option<Instant> = None;
        for index in 0..self.workers.len() {
            let worker = &mut self.workers[index];
            worker.release_seen(&self.world, now);
            let due = worker.queue.handle_timeout(now);
            next = [next, due].into_iter().flatten().min();
            while self.workers[index].queue.busy() < KEYS_AT_ONCE {
                let Some(key) = self.workers[index].queue.pop() else { break };
                self.sync(index, key, now);
            }
        }
        next
    }

    fn sync(&mut self, index: usize, key: Key, now: Instant) {
        let worker = &mut self.workers[index];
        let failure = worker.failures.get(&key).cloned();
        let context = Context { now: Timestamp::now(), failure };
        let sync = (worker.controller.sync)(&self.world, &key, &context);
        if let Some(wait) = sync.requeue {
            worker.queue.touch_at(key.clone(), now + wait);
        }
        if sync.steps.is_empty() {
            worker.failures.remove(&key);
            worker.queue.finish(&key);
            return;
        }
        tracing::debug!(
            controller = worker.controller.name,
            ?key,
            steps = sync.steps.len(),
            "synced"
        );
        let (doors, component) = (self.doors.clone(), worker.controller.component);
        let (permits, done) = (Arc::clone(&self.permits), self.done.clone());
        drop(tokio::spawn(async move {
            let Ok(_permit) = permits.acquire().await else { return };
            let outcome = execute(&doors, component, sync.steps, sync.order).await;
            if done.send(Done { worker: index, key, outcome }).await.is_err() {
                tracing::debug!("controllers stopped before a sync's outcome was known");
            }
        }));
    }

    fn finish(&mut self, done: Done) {
        let Done { worker, key, outcome } = done;
        let worker = &mut self.workers[worker];
        let now = Instant::now();
        if let Some(error) = outcome.failure {
            // A conflict is the ordinary way to learn that the cache was behind.
            if error.code == 409 {
                tracing::debug!(controller = worker.controller.name, ?key, %error, "sync lost a race");
            } else {
                tracing::warn!(controller = worker.controller.name, ?key, %error, "sync failed");
            }
            worker.failures.insert(key.clone(), error);
            worker.queue.fail(&key, now, rand::random());
            return;
        }
        worker.failures.remove(&key);
        if outcome.expects.is_empty() {
            worker.queue.finish(&key);
        } else {
            worker.held.insert(key, (outcome.expects, now + EXPECT_TIMEOUT));
        }
    }
}
