//! Where objects live: one monotonic revision for the whole store, which is every object's `resourceVersion`.
//!
//! - `draft.rs`, `mvcc.rs` (pure): objects as JSON bytes with a hole for the revision; rows, preconditions, history.
//! - `embedded.rs`: the durable single-file store, one writer thread.
//!
//! An object is encoded once; get, list and watch share its bytes. History is a bounded ring per resource:
//! who falls behind it is told so (`Expired`), memory never grows with a slow reader.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use serde_json::Value;

pub mod draft;
pub mod embedded;
pub mod mvcc;
#[cfg(test)]
mod tests;

pub use draft::Draft;

/// An object's place: `resource` is `group/plural` (`core/pods`), `path` is `namespace/name` (`/name` when
/// cluster-scoped).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub resource: Arc<str>,
    pub path: Arc<str>,
}

impl Key {
    #[must_use]
    pub fn new(resource: &Arc<str>, namespace: &str, name: &str) -> Self {
        Self { resource: Arc::clone(resource), path: format!("{namespace}/{name}").into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.resource, self.path)
    }
}

/// What selectors ask about an object, taken out of it once, when it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Sorted by key.
    pub labels: Box<[(Box<str>, Box<str>)]>,
    /// The resource's field-selector fields, such as `spec.nodeName`; absent means empty.
    pub fields: Box<[(&'static str, Box<str>)]>,
}

impl Attributes {
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        let found = self.labels.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        self.labels.get(found).map(|(_, value)| &**value)
    }

    /// Empty when the object lacks the field.
    #[must_use]
    pub fn field(&self, key: &str) -> &str {
        self.fields.iter().find(|(k, _)| *k == key).map_or("", |(_, value)| value)
    }
}

/// A stored object.
pub struct Entry {
    /// The object as JSON, its `metadata.resourceVersion` included.
    pub bytes: Bytes,
    pub revision: u64,
    /// Where in `bytes` the digits of the revision start.
    hole: usize,
    pub attributes: Attributes,
    parsed: Mutex<Weak<Value>>,
}

impl Entry {
    #[must_use]
    pub fn new(bytes: Bytes, hole: usize, revision: u64, attributes: Attributes) -> Self {
        Self { bytes, revision, hole, attributes, parsed: Mutex::new(Weak::new()) }
    }

    /// The object as a value; readers at the same time share it.
    #[must_use]
    pub fn value(&self) -> Arc<Value> {
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = parsed.upgrade() {
            return value;
        }
        let value: Arc<Value> = Arc::new(
            serde_json::from_slice(&self.bytes).expect("stored objects were encoded here"),
        );
        *parsed = Arc::downgrade(&value);
        value
    }

    #[must_use]
    pub fn hole(&self) -> usize {
        self.hole
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({}, {})", self.revision, String::from_utf8_lossy(&self.bytes))
    }
}

/// What must be so for an operation to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Absent,
    Revision(u64),
    Anything,
}

#[derive(Clone, Debug)]
pub enum Op {
    Put { key: Key, draft: Draft, expect: Expect },
    Delete { key: Key, expect: Expect },
}

/// Operations that happen all or not at all.
#[derive(Clone, Debug, Default)]
pub struct Txn {
    pub ops: Vec<Op>,
}

impl Txn {
    #[must_use]
    pub fn put(key: Key, draft: Draft, expect: Expect) -> Self {
        Self { ops: vec![Op::Put { key, draft, expect }] }
    }

    #[must_use]
    pub fn delete(key: Key, expect: Expect) -> Self {
        Self { ops: vec![Op::Delete { key, expect }] }
    }
}

/// The outcome of a transaction: one entry an operation, for a delete the last state at the revision of the deletion.
pub type Committed = Vec<Arc<Entry>>;

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// `current` is what is there instead of what was expected.
    #[error("{key} is not as expected")]
    Precondition { key: Key, current: Option<Arc<Entry>> },
    #[error("storage failed: {0}")]
    Storage(String),
    #[error("the store is closed")]
    Closed,
}

/// The revision asked for is no longer in the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too old resource version: {asked} ({oldest})")]
pub struct Expired {
    pub asked: u64,
    /// Where history starts now.
    pub oldest: u64,
}

/// A part of the store: a resource, of it a namespace, of it a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub resource: Arc<str>,
    pub namespace: Option<String>,
    pub name: Option<String>,
}

impl Scope {
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        let (namespace, name) = path.split_once('/').unwrap_or(("", path));
        self.namespace.as_deref().is_none_or(|n| n == namespace)
            && self.name.as_deref().is_none_or(|n| n == name)
    }
}

#[derive(Clone, Debug)]
pub struct ListRequest {
    pub scope: Scope,
    /// The state as of this revision; `None` is now.
    pub at: Option<u64>,
    /// Start behind this path.
    pub after: Option<String>,
}

/// Rows in the order of their paths, all of the scope: the caller cuts pages, as only it knows the selectors.
#[derive(Clone, Debug)]
pub struct Listing {
    pub revision: u64,
    pub rows: Vec<(Arc<str>, Arc<Entry>)>,
}

#[derive(Clone, Debug)]
pub enum Change {
    Put {
        before: Option<Arc<Entry>>,
        after: Arc<Entry>,
    },
    /// `last` is `before` at the revision of the deletion.
    Delete {
        before: Arc<Entry>,
        last: Arc<Entry>,
    },
}

#[derive(Clone, Debug)]
pub struct Event {
    pub revision: u64,
    pub path: Arc<str>,
    pub change: Change,
}

/// Events, and the revision up to which these are all.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub events: Vec<Event>,
    pub revision: u64,
}

/// A reader of the history. Both calls may be cancelled without losing events.
pub trait Watcher: Send {
    /// Waits for at least one event.
    fn next(&mut self) -> BoxFuture<'_, Result<Progress, Expired>>;
    /// What there is now, perhaps nothing.
    fn progress(&mut self) -> BoxFuture<'_, Result<Progress, Expired>>;
}

/// What the API server needs of a store.
pub trait Store: Send + Sync + 'static {
    fn get(&self, key: &Key) -> BoxFuture<'_, Result<Option<Arc<Entry>>, CommitError>>;

    /// Fails with `Expired` when `at` is older than the history.
    fn list(&self, request: ListRequest) -> BoxFuture<'_, Result<Listing, Expired>>;

    /// Applies a transaction; when it returns, the change survives a crash (except resources of the volatile class).
    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Committed, CommitError>>;

    /// Events after revision `from`. Expiry is told by the first read.
    fn watch(&self, scope: Scope, from: u64) -> Box<dyn Watcher>;

    /// The newest visible revision.
    fn revision(&self) -> u64;

    /// Writes out what is not durable yet and stops accepting writes.
    fn close(&self) -> BoxFuture<'_, Result<(), CommitError>>;
}

/// How much a resource's writes are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// On disk before it is acknowledged.
    Durable,
    /// In memory, on disk with the next snapshot: what is rewritten every few seconds (Leases) or is only told (Events).
    Volatile,
}

/// What a store must know about its contents.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// By resource (`group/plural`).
    pub class: fn(&str) -> Class,
    /// Recomputes the attributes of a stored object, when the file is opened.
    pub attributes: fn(&str, &Value) -> Attributes,
}
