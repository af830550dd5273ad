//! Writes Events (the Kubernetes objects). One task owns the memory of what was told already;
//! `correlate.rs` decides from it.

use std::{sync::Arc, time::Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    correlate::{Correlator, Verdict},
    json::{rfc3339, text},
    model::EVENTS,
    sync::{Note, NoteKind},
};
use crate::client::{Client, ObjectRef, Write};

/// Events that wait to be written; more are dropped, as events inform and decide nothing.
const QUEUE: usize = 1024;
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
    let mut memory = Correlator::default();
    while let Some(told) = queue.recv().await {
        let uid = text(&told.regarding, "/uid").to_owned();
        let subject = (told.component, uid, told.reason);
        let mut verdict = memory.judge(&subject, &told.message, Instant::now());
        if let Verdict::Count { name, count, message } = &verdict {
            if count_up(&*client, &told, (name, *count, message)).await {
                continue;
            }
            // It has outlived its hour: told anew.
            memory.forget(name);
            verdict = Verdict::Create { message: message.clone() };
        }
        let Verdict::Create { message } = verdict else { continue };
        if let Some(name) = create(&*client, &told, &message).await {
            memory.written(&subject, &told.message, name, Instant::now());
        }
    }
}

async fn count_up(
    client: &dyn Client,
    told: &Told,
    (name, count, message): (&str, u64, &str),
) -> bool {
    let now = rfc3339(Timestamp::now());
    let patch = json!({"count": count, "message": message, "lastTimestamp": now});
    let object = ObjectRef {
        resource: EVENTS,
        namespace: namespace(&told.regarding).to_owned(),
        name: name.to_owned(),
    };
    client.write(Write::Patch { object, subresource: "", patch }).await.is_ok()
}

async fn create(client: &dyn Client, told: &Told, message: &str) -> Option<String> {
    let now = Timestamp::now();
    let nanos = u64::try_from(now.as_nanosecond()).unwrap_or(0);
    let name = format!("{}.{nanos:x}", text(&told.regarding, "/name"));
    let namespace = namespace(&told.regarding).to_owned();
    let mut object = event(told, &name, &namespace, now);
    object["message"] = json!(message);
    match client.write(Write::Create { resource: EVENTS, namespace, object }).await {
        Ok(_) => Some(name),
        Err(error) => {
            // A namespace that is going takes no more events: nothing is lost.
            tracing::debug!(reason = told.reason, %error, "event not written");
            None
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
