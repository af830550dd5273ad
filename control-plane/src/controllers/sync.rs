//! What a controller's pure `sync` returns: steps to carry out. Pure.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    model::{Key, Object, SERVICES},
    world::{Change, World},
};
use crate::{
    client::{ApiError, DeleteOptions, ObjectRef, Resource, Write},
    pki::Usage,
};

/// A controller: which keys a change concerns, and what to do about one key.
pub(crate) struct Controller {
    /// As in `--controllers`.
    pub(crate) name: &'static str,
    /// `source.component` of its events.
    pub(crate) component: &'static str,
    pub(crate) keys: fn(&World, &Change, &mut Vec<Key>),
    pub(crate) sync: fn(&World, &Key, &Context) -> Sync,
    /// A key that is synced once at start, whatever exists.
    pub(crate) first: Option<fn() -> Key>,
}

/// What a sync is told beside the world.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) now: Timestamp,
    /// Why the last sync of this key failed, when it did.
    pub(crate) failure: Option<ApiError>,
}

/// The answer of a sync.
#[derive(Debug, Default)]
pub(crate) struct Sync {
    pub(crate) steps: Vec<Step>,
    pub(crate) order: Order,
    /// When to look again although nothing changes.
    pub(crate) requeue: Option<Duration>,
}

/// How steps are carried out; a failure ends the others but those marked `always`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Order {
    /// One after the other.
    #[default]
    InOrder,
    /// In batches of 1, 2, 4, … at once, so that a namespace that refuses everything is asked once
    /// and not five hundred times.
    SlowStart,
}

/// One thing to do.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) act: Act,
    pub(crate) note: Option<Note>,
    /// Done last, and also when an earlier step failed.
    pub(crate) always: bool,
}

/// The kinds of doing.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Write(Write),
    /// Writes only if the store has no object of that uid (empty: of any) at any of these places: the
    /// watch of one resource may be behind another's.
    IfAbsent {
        owners: Vec<(ObjectRef, String)>,
        write: Write,
    },
    /// Writes only if the store has no object that names `uid` as an owner, and fails with 409
    /// otherwise: the watches of its dependents may be behind its own. Asks for all objects of
    /// `resources` in `namespace` (`""` is all), which costs as much as they are many.
    IfChildless {
        uid: String,
        namespace: String,
        resources: Vec<Resource>,
        write: Write,
    },
    /// Reads the object, lets `edit` make a write of it, and writes that.
    Edit {
        object: ObjectRef,
        edit: Edit,
        argument: String,
    },
    /// Signs a request and puts the certificate into its status.
    Sign {
        object: ObjectRef,
        value: Value,
        request_pem: String,
        usage: Usage,
        life: Duration,
    },
    /// Only the note.
    Tell,
}

/// A read-modify-write's pure middle; `None` when nothing is to be done.
pub(crate) type Edit = fn(&Value, &str, Timestamp) -> Option<Write>;

/// An Event (the Kubernetes object) about the outcome of a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Note {
    /// `involvedObject`.
    pub(crate) regarding: Value,
    pub(crate) kind: NoteKind,
    pub(crate) reason: &'static str,
    /// `{name}` stands for the written object's name. Empty: success is not told.
    pub(crate) message: String,
    /// Reason and beginning of the message (the error follows) when the step fails.
    pub(crate) failed: Option<(&'static str, String)>,
}

/// `Event.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoteKind {
    Normal,
    Warning,
}

impl Sync {
    pub(crate) fn done() -> Self {
        Self::default()
    }

    pub(crate) fn one(step: Step) -> Self {
        Self { steps: vec![step], ..Self::default() }
    }

    pub(crate) fn after(requeue: Duration) -> Self {
        Self { requeue: Some(requeue), ..Self::default() }
    }

    /// Looks again after the shorter of the two times.
    pub(crate) fn requeue_in(&mut self, wait: Duration) {
        self.requeue = Some(self.requeue.map_or(wait, |other| other.min(wait)));
    }

    #[cfg(test)]
    pub(crate) fn writes(&self) -> Vec<Write> {
        self.steps
            .iter()
            .filter_map(|step| match &step.act {
                Act::Write(write)
                | Act::IfAbsent { write, .. }
                | Act::IfChildless { write, .. } => Some(write.clone()),
                Act::Edit { .. } | Act::Sign { .. } | Act::Tell => None,
            })
            .collect()
    }
}

impl Step {
    pub(crate) fn new(act: Act) -> Self {
        Self { act, note: None, always: false }
    }

    pub(crate) fn write(write: Write) -> Self {
        Self::new(Act::Write(write))
    }

    pub(crate) fn create(resource: Resource, namespace: &str, object: Value) -> Self {
        Self::write(Write::Create { resource, namespace: namespace.to_owned(), object })
    }

    pub(crate) fn patch(object: ObjectRef, patch: Value) -> Self {
        Self::write(Write::Patch { object, subresource: "", patch })
    }

    /// A status patch, done even when an earlier step failed.
    pub(crate) fn status(object: ObjectRef, patch: Value) -> Self {
        let write = Write::Patch { object, subresource: "status", patch };
        Self { act: Act::Write(write), note: None, always: true }
    }

    /// Deletes exactly this object, not a namesake made since.
    pub(crate) fn delete(object: &Object) -> Self {
        Self::delete_with(object, None)
    }

    pub(crate) fn delete_with(object: &Object, propagation: Option<&'static str>) -> Self {
        Self::write(delete_write(object, propagation, None))
    }

    pub(crate) fn tell(note: Note) -> Self {
        Self { act: Act::Tell, note: Some(note), always: true }
    }

    #[must_use]
    pub(crate) fn noted(mut self, note: Note) -> Self {
        self.note = Some(note);
        self
    }
}

pub(crate) fn delete_write(
    object: &Object,
    propagation: Option<&'static str>,
    grace_period_seconds: Option<i64>,
) -> Write {
    let uid = Some(object.meta.uid.clone());
    Write::Delete {
        object: object.place(),
        options: DeleteOptions {
            grace_period_seconds,
            uid,
            propagation,
            ..DeleteOptions::default()
        },
    }
}

impl Note {
    pub(crate) fn normal(
        regarding: Value,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self { regarding, kind: NoteKind::Normal, reason, message: message.into(), failed: None }
    }

    pub(crate) fn warning(
        regarding: Value,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self { regarding, kind: NoteKind::Warning, reason, message: message.into(), failed: None }
    }

    #[must_use]
    pub(crate) fn or(mut self, reason: &'static str, message: impl Into<String>) -> Self {
        self.failed = Some((reason, message.into()));
        self
    }
}

/// An `ObjectReference` for events.
pub(crate) fn reference(object: &Object, api_version: &str, kind: &str) -> Value {
    let mut value = json!({
        "apiVersion": api_version,
        "kind": kind,
        "name": object.meta.key.name,
        "uid": object.meta.uid,
        "resourceVersion": object.meta.revision.to_string(),
    });
    if !object.meta.key.namespace.is_empty() {
        value["namespace"] = json!(object.meta.key.namespace);
    }
    value
}

/// The common `keys` function: an object's own key when it is of this resource.
pub(crate) fn own_key(resource: Resource, change: &Change, out: &mut Vec<Key>) {
    if change.resource == resource
        && let Some(object) = change.object()
    {
        out.push(object.meta.key.clone());
    }
}

/// Keys of the Services in a pod's namespace whose selector matches one of its states.
pub(crate) fn services_of(world: &World, change: &Change, out: &mut Vec<Key>) {
    let Some(namespace) = change.object().map(|object| object.meta.key.namespace.clone()) else {
        return;
    };
    for service in world.in_namespace(SERVICES, &namespace) {
        let selector = super::json::labels_at(&service.value, "/spec/selector");
        if change.both().any(|pod| super::json::map_matches(&selector, &pod.meta.labels)) {
            out.push(service.meta.key.clone());
        }
    }
}
