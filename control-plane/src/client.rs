//! The API as seen from inside the process: what scheduler and controllers read and write.
//!
//! A call goes through the same parsing, admission and storage as one over HTTPS; only the transport
//! and the authentication are left out. Objects are JSON values in the version of their resource.

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use serde_json::Value;
use tokio::sync::mpsc;

/// A served resource, such as `apps/v1` `deployments`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Resource {
    /// Empty for the core group.
    pub group: &'static str,
    pub version: &'static str,
    /// Lower-case plural.
    pub plural: &'static str,
}

/// One object's place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    pub resource: Resource,
    /// Empty for cluster-scoped resources.
    pub namespace: String,
    pub name: String,
}

/// A change that a controller asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Write {
    /// `metadata.name` or `metadata.generateName` is in the object.
    Create {
        resource: Resource,
        namespace: String,
        object: Value,
    },
    /// Fails with `Conflict` when `metadata.resourceVersion` is given and not the stored one.
    Update {
        object: ObjectRef,
        value: Value,
    },
    /// As `Update`, for a subresource such as `status`, `binding`, `scale`, `approval` or `finalize`.
    UpdateSub {
        object: ObjectRef,
        subresource: &'static str,
        value: Value,
    },
    /// A JSON merge patch (RFC 7386), without or with a subresource (`""` for none).
    Patch {
        object: ObjectRef,
        subresource: &'static str,
        patch: Value,
    },
    Delete {
        object: ObjectRef,
        options: DeleteOptions,
    },
}

/// `meta/v1` `DeleteOptions`, as far as controllers use them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    pub grace_period_seconds: Option<i64>,
    /// `preconditions.uid`.
    pub uid: Option<String>,
    /// `preconditions.resourceVersion`.
    pub resource_version: Option<String>,
    /// `Background`, `Foreground` or `Orphan`; `None` is the resource's default.
    pub propagation: Option<&'static str>,
}

/// Why a call failed, as the HTTP API would say it in a `Status` object.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// `Status.reason`, such as `NotFound`, `AlreadyExists`, `Conflict`, `Invalid`.
    pub reason: &'static str,
    pub message: String,
    /// The whole `Status.details`, or null.
    pub details: Value,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.reason, self.code, self.message)
    }
}

impl std::error::Error for ApiError {}

/// An entry of a watch over one resource in all namespaces.
#[derive(Clone, Debug)]
pub enum Event {
    /// Forget everything: the objects follow anew, then `Synced`. Sent first, and again whenever the
    /// reader fell too far behind.
    Restart,
    /// Created or changed; the value is the object as it is now.
    Applied(Arc<Value>),
    /// Deleted; the value is the last state.
    Deleted(Arc<Value>),
    /// All objects that exist have been told.
    Synced,
}

/// Whether an object's `metadata.ownerReferences` name `uid`.
#[must_use]
pub fn is_owned_by(object: &Value, uid: &str) -> bool {
    let owners = object.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    owners.is_some_and(|owners| owners.iter().any(|owner| owner["uid"] == uid))
}

/// The in-process API. Implemented by the API server; by an in-memory one in controller tests.
pub trait Client: Send + Sync + 'static {
    /// Carries out one write and returns the object as stored (for a delete: its last state).
    fn write(&self, write: Write) -> BoxFuture<'_, Result<Value, ApiError>>;

    /// Reads one object from the store.
    fn read(&self, object: &ObjectRef) -> BoxFuture<'_, Result<Value, ApiError>>;

    /// The name of an object of the resource that names `uid` as an owner, looked for in the store, in
    /// one namespace or, if that is `""`, in all. Takes as long as there are objects.
    fn find_child(
        &self,
        uid: &str,
        resource: Resource,
        namespace: &str,
    ) -> BoxFuture<'_, Result<Option<String>, ApiError>>;

    /// Watches a resource. The channel is bounded; a reader that does not keep up gets `Restart`.
    fn watch(&self, resource: Resource) -> mpsc::Receiver<Event>;
}
