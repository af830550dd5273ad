//! Writes Events (the Kubernetes objects). One task owns the memory of what was told already, and
//! counts repetitions instead of writing anew.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    json::{rfc3339, text},
    model::EVENTS,
    sync::{Note, NoteKind},
};
use crate::client::{Client, ObjectRef, Write};

/// Events that wait to be written; more are dropped, as events inform and decide nothing.
const QUEUE: usize = 1024;
/// Remembered events, as upstream's correlator (`maxLruCacheEntries`).
const MEMORY: usize = 4096;

/// A handle to the recording task.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    queue: mpsc::Sender<Told>,
}

#[derive(Clone, Debug)]
struct Told {
    component: &'static str,
    regarding: Value,
    kind: NoteKind,
    reason: &'static str,
    message: String,
}

#[derive(Debug)]
struct Known {
    name: String,
    count: u64,
    last: u64,
}

impl Recorder {
    /// Starts the task; it ends when the last handle is dropped.
    pub(crate) fn start(client: Arc<dyn Client>) -> Self {
        let (queue, told) = mpsc::channel(QUEUE);
        drop(tokio::spawn(record_all(client, told)));
        Self { queue }
    }

    /// Tells what happened; `note.failed` plays no part any more.
    pub(crate) fn record(&self, component: &'static str, note: Note) {
        let Note { regarding, kind, reason, message, failed: _ } = note;
        let told = Told { component, regarding, kind, reason, message };
        if self.queue.try_send(told).is_err() {
            tracing::warn!(reason, "event dropped, queue full");
        }
    }
}

async fn record_all(client: Arc<dyn Client>, mut queue: mpsc::Receiver<Told>) {
    let mut known: BTreeMap<(String, &'static str, String), Known> = BTreeMap::new();
    let mut tick = 0_u64;
    while let Some(told) = queue.recv().await {
        tick += 1;
        let id = (text(&told.regarding, "/uid").to_owned(), told.reason, told.message.clone());
        if let Some(entry) = known.get_mut(&id) {
            entry.count += 1;
            entry.last = tick;
            let patch = json!({"count": entry.count, "lastTimestamp": rfc3339(Timestamp::now())});
            let object = ObjectRef {
                resource: EVENTS,
                namespace: namespace(&told.regarding).to_owned(),
                name: entry.name.clone(),
            };
            if client.write(Write::Patch { object, subresource: "", patch }).await.is_ok() {
                continue;
            }
            // It has outlived its hour: told anew below.
            known.remove(&id);
        }
        if known.len() >= MEMORY
            && let Some(oldest) =
                known.iter().min_by_key(|(_, entry)| entry.last).map(|(id, _)| id.clone())
        {
            known.remove(&oldest);
        }
        let now = Timestamp::now();
        let name = format!(
            "{}.{:x}",
            text(&told.regarding, "/name"),
            u64::try_from(now.as_nanosecond()).unwrap_or(tick)
        );
        let namespace = namespace(&told.regarding).to_owned();
        let object = event(&told, &name, &namespace, now);
        match client.write(Write::Create { resource: EVENTS, namespace, object }).await {
            Ok(_) => drop(known.insert(id, Known { name, count: 1, last: tick })),
            // A namespace that is going takes no more events: nothing is lost.
            Err(error) => tracing::debug!(reason = told.reason, %error, "event not written"),
        }
    }
}

fn namespace(regarding: &Value) -> &str {
    match text(regarding, "/namespace") {
        "" => "default",
        namespace => namespace,
    }
}

fn event(told: &Told, name: &str, namespace: &str, now: Timestamp) -> Value {
    let now = rfc3339(now);
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": told.regarding,
        "reason": told.reason,
        "message": told.message,
        "source": {"component": told.component},
        "reportingComponent": told.component,
        "reportingInstance": "",
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "type": match told.kind {
            NoteKind::Normal => "Normal",
            NoteKind::Warning => "Warning",
        },
    })
}
