//! Events about pods and the node, written by one task.
//!
//! Input: a bounded channel; when it is full an Event is dropped, as upstream does. Repeats of one Event
//! within the memory of the last `REMEMBERED` raise its count instead of making a new one.

use std::{collections::VecDeque, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference, Pod},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::debug;

use super::pod::Note;

/// Events that may wait to be written.
const QUEUE: usize = 256;
/// Events whose repeats are counted.
const REMEMBERED: usize = 256;

/// The way to write Events. Cloning it clones the handle.
#[derive(Clone, Debug)]
pub struct Recorder {
    sender: mpsc::Sender<(ObjectReference, Note)>,
}

impl Recorder {
    /// A recorder and its task, which ends when the last handle is dropped.
    pub fn new(client: Client, node: Arc<str>) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (Self { sender }, write_all(client, node, receiver))
    }

    /// Writes an Event about an object; never waits.
    pub fn record(&self, object: ObjectReference, note: Note) {
        if self.sender.try_send((object, note)).is_err() {
            debug!("event dropped: the queue is full");
        }
    }
}

/// A reference to a pod, or to one of its containers.
#[must_use]
pub fn pod_reference(pod: &Pod, container: Option<(&str, bool)>) -> ObjectReference {
    let path = container.map(|(name, init)| {
        let list = if init { "initContainers" } else { "containers" };
        format!("spec.{list}{{{name}}}")
    });
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: pod.metadata.name.clone(),
        namespace: pod.metadata.namespace.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path: path,
    }
}

struct Known {
    object: ObjectReference,
    note: Note,
    name: String,
    count: i32,
}

async fn write_all(
    client: Client,
    node: Arc<str>,
    mut receiver: mpsc::Receiver<(ObjectReference, Note)>,
) {
    let mut known: VecDeque<Known> = VecDeque::new();
    let mut serial = 0_u64;
    while let Some((mut object, note)) = receiver.recv().await {
        object.resource_version = None;
        let namespace = object.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let seen = known.iter_mut().find(|known| known.object == object && known.note == note);
        if let Some(seen) = seen {
            seen.count = seen.count.saturating_add(1);
            let now = second(Timestamp::now());
            let patch = json!({"count": seen.count, "lastTimestamp": Time(now)});
            let params = PatchParams::default();
            if api.patch(&seen.name, &params, &Patch::Merge(patch)).await.is_ok() {
                continue;
            }
        }
        known.retain(|known| known.object != object || known.note != note);
        serial += 1;
        let event = new_event(&object, &note, &node, (Timestamp::now(), serial));
        let name = event.metadata.name.clone().unwrap_or_default();
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => {
                known.push_back(Known { object, note, name, count: 1 });
                if known.len() > REMEMBERED {
                    known.pop_front();
                }
            }
            Err(error) => debug!(%error, reason = note.reason, "event not written"),
        }
    }
}

fn new_event(
    object: &ObjectReference,
    note: &Note,
    node: &str,
    (now, serial): (Timestamp, u64),
) -> Event {
    let unique = now.as_nanosecond().unsigned_abs().wrapping_add(u128::from(serial));
    let stem = object.name.clone().unwrap_or_default();
    let time = Time(second(now));
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{stem}.{unique:x}")),
            namespace: Some(object.namespace.clone().unwrap_or_else(|| "default".to_owned())),
            ..ObjectMeta::default()
        },
        involved_object: object.clone(),
        reason: Some(note.reason.to_owned()),
        message: Some(note.message.clone()),
        type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
        source: Some(EventSource {
            component: Some("kubelet".to_owned()),
            host: Some(node.to_owned()),
        }),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node.to_owned()),
        count: Some(1),
        first_timestamp: Some(time.clone()),
        last_timestamp: Some(time),
        ..Event::default()
    }
}

/// A time without its fraction, as the API keeps `Time`.
#[must_use]
pub fn second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}
