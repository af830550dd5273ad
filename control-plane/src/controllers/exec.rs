//! Carries out the steps of one sync against the API. Effects only; decides nothing.

use std::sync::Arc;

use futures::future::join_all;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    json::{rfc3339, text},
    model::revision,
    recorder::Recorder,
    sync::{Act, Note, NoteKind, Order, Step},
};
use crate::{
    client::{ApiError, Client, ObjectRef, Resource, Write},
    pki::Usage,
};

/// Makes certificates; implemented by the cluster's CA.
pub trait Signer: Send + Sync + 'static {
    /// Signs a PEM request for `life` from now and returns PEM.
    ///
    /// # Errors
    /// In words that can stand in the request's `Failed` condition.
    fn sign(
        &self,
        request_pem: &str,
        usage: Usage,
        life: std::time::Duration,
    ) -> Result<String, String>;
}

impl Signer for crate::pki::Pki {
    fn sign(
        &self,
        request_pem: &str,
        usage: Usage,
        life: std::time::Duration,
    ) -> Result<String, String> {
        Self::sign(self, request_pem, usage, Timestamp::now(), life).map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            format!("{error}{}", cause.unwrap_or_default())
        })
    }
}

/// What the caches must have seen before the key is looked at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expect {
    pub(crate) resource: Resource,
    pub(crate) revision: u64,
    /// The uid of a deleted object, which must be gone or going.
    pub(crate) deleted: Option<String>,
}

/// What came of a sync's steps.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) expects: Vec<Expect>,
    pub(crate) failure: Option<ApiError>,
}

/// The doors that steps need.
#[derive(Clone)]
pub(crate) struct Doors {
    pub(crate) client: Arc<dyn Client>,
    pub(crate) signer: Arc<dyn Signer>,
    pub(crate) recorder: Recorder,
}

/// Does the steps in their order.
pub(crate) async fn execute(
    doors: &Doors,
    component: &'static str,
    steps: Vec<Step>,
    order: Order,
) -> Outcome {
    let (last, mut first): (Vec<_>, Vec<_>) = steps.into_iter().partition(|step| step.always);
    let mut outcome = Outcome::default();
    let mut batch = 1;
    while !first.is_empty() && outcome.failure.is_none() {
        let rest = first.split_off(batch.min(first.len()));
        let done = join_all(first.iter().map(|step| perform(doors, component, step))).await;
        done.into_iter().for_each(|result| outcome.add(result));
        first = rest;
        if order == Order::SlowStart {
            batch = batch.saturating_mul(2);
        }
    }
    for step in &last {
        outcome.add(perform(doors, component, step).await);
    }
    outcome
}

impl Outcome {
    fn add(&mut self, result: Result<Option<Expect>, ApiError>) {
        match result {
            Ok(expect) => self.expects.extend(expect),
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }
}

async fn perform(
    doors: &Doors,
    component: &'static str,
    step: &Step,
) -> Result<Option<Expect>, ApiError> {
    let result = act(doors, &step.act).await;
    if let Some(note) = step.note.as_ref().and_then(|note| outcome(note, &result)) {
        doors.recorder.record(component, note);
    }
    result.map(|written| written.map(|(_, expect)| expect))
}

/// What a note says of a step that worked or failed; `None` when it has nothing to say of it.
fn outcome(note: &Note, result: &Result<Written, ApiError>) -> Option<Note> {
    let mut note = note.clone();
    match (result, &note.failed) {
        (Ok(_), _) if note.message.is_empty() => None,
        (Ok(written), _) => {
            let name = written.as_ref().map_or("", |(value, _)| text(value, "/metadata/name"));
            note.message = note.message.replace("{name}", name);
            Some(note)
        }
        (Err(error), Some((reason, prefix))) => {
            note.message = format!("{prefix}{}", error.message);
            note.kind = NoteKind::Warning;
            note.reason = reason;
            Some(note)
        }
        (Err(_), None) => None,
    }
}

type Written = Option<(Value, Expect)>;

async fn act(doors: &Doors, act: &Act) -> Result<Written, ApiError> {
    match act {
        Act::Write(write) => submit(doors, write.clone()).await,
        Act::IfAbsent { owners, write } => {
            for (owner, uid) in owners {
                match doors.client.read(owner).await {
                    Ok(found) if uid.is_empty() || text(&found, "/metadata/uid") == uid => {
                        return Ok(None);
                    }
                    Ok(_) => (),
                    Err(error) if error.code == 404 => (),
                    Err(error) => return Err(error),
                }
            }
            submit(doors, write.clone()).await
        }
        Act::IfChildless { uid, namespace, resources, write } => {
            for resource in resources {
                if let Some(child) = doors.client.find_child(uid, *resource, namespace).await? {
                    return Err(unseen(*resource, &child));
                }
            }
            submit(doors, write.clone()).await
        }
        Act::Edit { object, edit, argument } => {
            let value = match doors.client.read(object).await {
                Ok(value) => value,
                Err(error) if error.code == 404 => return Ok(None),
                Err(error) => return Err(error),
            };
            match edit(&value, argument, Timestamp::now()) {
                Some(write) => submit(doors, write).await,
                None => Ok(None),
            }
        }
        Act::Sign { object, value, request_pem, usage, life } => {
            let signed = doors.signer.sign(request_pem, *usage, *life);
            submit(doors, certificate_write(object, value, signed)).await
        }
        Act::Tell => Ok(None),
    }
}

fn unseen(resource: Resource, name: &str) -> ApiError {
    let message = format!("{} {name:?} has not been seen by the watch yet", resource.plural);
    ApiError { code: 409, reason: "Conflict", message, details: Value::Null }
}

fn certificate_write(object: &ObjectRef, value: &Value, signed: Result<String, String>) -> Write {
    let mut value = value.clone();
    match signed {
        Ok(pem) => {
            use base64::Engine as _;
            let pem = base64::engine::general_purpose::STANDARD.encode(pem);
            value["status"]["certificate"] = json!(pem);
        }
        Err(message) => {
            let now = rfc3339(Timestamp::now());
            let condition = json!({
                "type": "Failed", "status": "True", "reason": "SignerValidationFailure",
                "message": message, "lastUpdateTime": now, "lastTransitionTime": now,
            });
            if let Some(list) = value["status"]["conditions"].as_array_mut() {
                list.push(condition);
            }
        }
    }
    Write::UpdateSub { object: object.clone(), subresource: "status", value }
}

async fn submit(doors: &Doors, write: Write) -> Result<Written, ApiError> {
    let (resource, is_delete) = match &write {
        Write::Create { resource, .. } => (*resource, false),
        Write::Update { object, .. }
        | Write::UpdateSub { object, .. }
        | Write::Patch { object, .. } => (object.resource, false),
        Write::Delete { object, .. } => (object.resource, true),
    };
    match doors.client.write(write).await {
        Ok(value) => {
            let deleted = is_delete.then(|| text(&value, "/metadata/uid").to_owned());
            let expect = Expect { resource, revision: revision(&value), deleted };
            Ok(Some((value, expect)))
        }
        // Gone already, or another object by now: what was wanted.
        Err(error) if is_delete && matches!(error.code, 404 | 409) => Ok(None),
        Err(error) => Err(error),
    }
}
