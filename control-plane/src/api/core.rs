//! Reading and writing objects: preparation, admission and the optimistic transaction around them (effects: the
//! store, the clock, randomness). Both the HTTP server and the in-process client come through here.

use std::sync::Arc;

use jiff::Timestamp;
use rand::{Rng as _, RngCore as _};
use serde_json::Value;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::{
    admission::{self, Allocated, Attempt, Networks, View, defaults},
    api::{
        allocation::Allocation,
        applying,
        attributes::attributes,
        authn::User,
        deletion::{self, Deletion},
        error::{self, About},
        prepare::{self, Birth, Part, text},
        query::WriteOptions,
        route::Verb,
        service_account::Keys,
    },
    client::ApiError,
    schema::{FieldError, Served, decode::print_time},
    store::{CommitError, Draft, Entry, Expect, Key, Store, Txn},
};

/// How often a write is tried anew when somebody else was faster.
const RETRIES: usize = 16;
/// How often a generated name is drawn anew; upstream does so 8 times.
const NAME_TRIES: usize = 8;

/// The API: everything but transport and rendering.
pub struct Api {
    pub store: Arc<dyn Store>,
    pub networks: Arc<Networks>,
    /// Held by who takes an address or a port for a Service, until it is stored.
    allocation: Arc<Mutex<Allocation>>,
    /// Signs and checks service account tokens; `None` refuses them.
    pub service_accounts: Option<Keys>,
}

/// The resource and object that a call is about, and who calls.
#[derive(Clone, Debug)]
pub struct Call {
    pub served: &'static Served,
    /// Empty for cluster-scoped resources, and for all namespaces.
    pub namespace: String,
    /// Empty for collections.
    pub name: String,
    pub user: Arc<User>,
    pub options: WriteOptions,
}

impl Call {
    #[must_use]
    pub fn about(&self) -> About<'_> {
        About { group: self.served.group, plural: self.served.plural, name: &self.name }
    }

    /// `group/plural` as the store has it.
    #[must_use]
    pub fn resource(&self) -> Arc<str> {
        resource_key(self.served)
    }

    #[must_use]
    pub fn key(&self) -> Key {
        Key::new(&self.resource(), &self.namespace, &self.name)
    }
}

/// `group/plural` under which the store keeps a resource's objects.
#[must_use]
pub fn resource_key(served: &Served) -> Arc<str> {
    let group = served.storage.map_or(served.group, |(group, _)| group);
    let group = if group.is_empty() { "core" } else { group };
    format!("{group}/{}", served.plural).into()
}

/// The outcome of a write: an entry, or for a dry run what it would be.
#[derive(Clone, Debug)]
pub enum Written {
    Stored(Arc<Entry>),
    Dry(Arc<Value>),
}

impl Written {
    #[must_use]
    pub fn value(&self) -> Arc<Value> {
        match self {
            Self::Stored(entry) => entry.value(),
            Self::Dry(value) => Arc::clone(value),
        }
    }
}

/// Makes a new object of the stored one.
pub type Change<'a> = dyn Fn(&Value) -> Result<Value, ApiError> + Send + Sync + 'a;

/// Where the record of field owners comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// An ordinary write: made here.
    Write,
    /// The object brings it.
    Given,
}

/// What became of a deletion.
#[derive(Clone, Debug)]
pub enum Deleted {
    /// Gone; the last state.
    Removed(Written),
    /// Marked, or was marked already.
    Waiting(Written),
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Api")
    }
}

impl Api {
    #[must_use]
    pub fn new(store: Arc<dyn Store>, networks: Networks, service_accounts: Option<Keys>) -> Self {
        let networks = Arc::new(networks);
        Self { store, networks, allocation: Arc::default(), service_accounts }
    }

    /// # Errors
    /// 404 when there is no such object.
    pub async fn get(&self, call: &Call) -> Result<Arc<Entry>, ApiError> {
        let found = self.store.get(&call.key()).await.map_err(|error| failed(&error))?;
        found.ok_or_else(|| call.about().not_found())
    }

    /// Stores a new object; its name may be generated.
    ///
    /// # Errors
    /// As upstream: 400, 403, 404 for the namespace, 409, 422.
    pub async fn create(&self, call: &Call, object: Value) -> Result<Written, ApiError> {
        self.create_as(call, Track::Write, object).await
    }

    pub(super) async fn create_as(
        &self,
        call: &Call,
        track: Track,
        object: Value,
    ) -> Result<Written, ApiError> {
        let named = !text(&object, "/metadata/name").is_empty();
        let mut tries = 0;
        loop {
            let outcome = self.create_once(call, track, object.clone()).await;
            tries += 1;
            match outcome {
                Err(error) if error.reason == "AlreadyExists" && !named && tries < NAME_TRIES => {}
                outcome => return outcome,
            }
        }
    }

    async fn create_once(
        &self,
        call: &Call,
        track: Track,
        mut object: Value,
    ) -> Result<Written, ApiError> {
        let served = call.served;
        prepare::identify(served, &call.namespace, &mut object)?;
        complete(served, Part::Main, &mut object);
        if track == Track::Write {
            object = applying::record(call, Part::Main, None, object);
        }
        let (uid, suffix) = (uid(), suffix());
        let now = print_time(Timestamp::now(), false);
        prepare::create(served, &mut object, Birth { uid: &uid, now: &now, suffix: &suffix })?;
        let name = text(&object, "/metadata/name").to_owned();
        let call = &Call { name, ..call.clone() };
        let allocating = self.allocation(served).await?;
        let allocated = allocating.as_deref().map(Allocation::allocated);
        let write = (Verb::Create, Part::Main, allocated);
        self.admit(call, write, (&mut object, None)).await?;
        if call.options.dry_run {
            if self.get(call).await.is_ok() {
                return Err(call.about().already_exists());
            }
            return Ok(Written::Dry(Arc::new(object)));
        }
        let written = self.put(call, &object, Expect::Absent, allocating).await;
        match written {
            Ok(entry) => Ok(Written::Stored(entry)),
            Err(CommitError::Precondition { .. }) => Err(call.about().already_exists()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Replaces an object (or a part of it) by what `change` makes of the stored one.
    ///
    /// # Errors
    /// What `change` says; 404, 409, 422 as upstream.
    pub async fn update(
        &self,
        call: &Call,
        part: Part,
        change: &Change<'_>,
    ) -> Result<Written, ApiError> {
        self.update_as(call, part, Track::Write, change).await
    }

    pub(super) async fn update_as(
        &self,
        call: &Call,
        part: Part,
        track: Track,
        change: &Change<'_>,
    ) -> Result<Written, ApiError> {
        for _ in 0..RETRIES {
            let stored = self.get(call).await?;
            let old = stored.value();
            let mut object = change(&old)?;
            prepare::identify(call.served, &call.namespace, &mut object)?;
            prepare::same(call.about(), &object, &old)?;
            prepare::undeleted(call.served, &object, &old)?;
            let pinned = pins(&object, &old);
            complete(call.served, part, &mut object);
            prepare::update(call.served, part, &mut object, &old);
            if track == Track::Write {
                object = applying::record(call, part, Some(&old), object);
            }
            let allocating = self.allocation(call.served).await?;
            let allocated = allocating.as_deref().map(Allocation::allocated);
            let write = (Verb::Update, part, allocated);
            self.admit(call, write, (&mut object, Some(&old))).await?;
            prepare::count(call.served, part, &mut object, &old);
            object["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
            if applying::is_idle(&object, &old) {
                return Ok(Written::Stored(stored));
            }
            if call.options.dry_run {
                return Ok(Written::Dry(Arc::new(object)));
            }
            let expect = Expect::Revision(stored.revision);
            let written = if deletion::is_finished(&object) {
                self.remove(call, expect).await
            } else {
                self.put(call, &object, expect, allocating).await
            };
            match written {
                Ok(entry) => return Ok(Written::Stored(entry)),
                Err(CommitError::Precondition { current: None, .. }) => {
                    return Err(call.about().not_found());
                }
                Err(CommitError::Precondition { .. }) if pinned => {
                    return Err(call.about().modified());
                }
                Err(CommitError::Precondition { .. }) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Err(call.about().modified())
    }

    /// # Errors
    /// 404, 409 for preconditions.
    pub async fn delete(
        &self,
        call: &Call,
        options: &deletion::Options,
    ) -> Result<Deleted, ApiError> {
        if call.served.plural == "namespaces" && admission::is_immortal(&call.name) {
            return Err(call.about().forbidden("this namespace may not be deleted"));
        }
        for _ in 0..RETRIES {
            let stored = self.get(call).await?;
            let old = stored.value();
            options.check(call.about(), &old)?;
            let expect = Expect::Revision(stored.revision);
            let dry = options.dry_run || call.options.dry_run;
            let decision = deletion::decide(&old, options, Timestamp::now());
            let written = match &decision {
                Deletion::Unchanged => return Ok(Deleted::Waiting(Written::Stored(stored))),
                Deletion::Remove if dry => return Ok(Deleted::Removed(Written::Dry(old))),
                Deletion::Mark(marked) if dry => {
                    return Ok(Deleted::Waiting(Written::Dry(Arc::new(marked.clone()))));
                }
                Deletion::Remove => self.remove(call, expect).await,
                Deletion::Mark(marked) => self.put(call, marked, expect, None).await,
            };
            match (written, decision) {
                (Ok(entry), Deletion::Remove) => {
                    return Ok(Deleted::Removed(Written::Stored(entry)));
                }
                (Ok(entry), Deletion::Mark(_) | Deletion::Unchanged) => {
                    return Ok(Deleted::Waiting(Written::Stored(entry)));
                }
                (Err(CommitError::Precondition { current: None, .. }), _) => {
                    return Err(call.about().not_found());
                }
                (Err(CommitError::Precondition { .. }), _) => {}
                (Err(error), _) => return Err(failed(&error)),
            }
        }
        Err(call.about().modified())
    }

    /// Defaults, admission, validation, allocation.
    async fn admit(
        &self,
        call: &Call,
        (verb, part, allocated): (Verb, Part, Option<&Allocated>),
        (object, old): (&mut Value, Option<&Value>),
    ) -> Result<(), ApiError> {
        let mut view = self.view(call, object).await?;
        if let Some(allocated) = allocated {
            // Of a stored Service that is being changed, not its own.
            let own = old.map(|_| call.key().path);
            view.services = Some((Arc::clone(&self.networks), allocated.others(own.as_deref())));
        }
        let attempt = Attempt { served: call.served, verb, part, user: &call.user, old };
        let errors = admission::admit(&attempt, &view, object)?;
        if errors.is_empty() { Ok(()) } else { Err(invalid(call, &errors)) }
    }

    /// What admission has to know of other objects.
    async fn view<'a>(&self, call: &Call, object: &Value) -> Result<View<'a>, ApiError> {
        let mut view = View::default();
        if call.served.namespaced {
            view.namespace = self.peek("core/namespaces", "", &call.namespace).await?;
        }
        if call.served.plural == "pods" && call.served.group.is_empty() {
            let account = Some(text(object, "/spec/serviceAccountName")).filter(|n| !n.is_empty());
            let account = account.unwrap_or("default");
            view.service_account =
                self.peek("core/serviceaccounts", &call.namespace, account).await?;
            view.suffix = suffix();
        }
        Ok(view)
    }

    /// The object there, if any.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn peek(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<Value>>, ApiError> {
        let key = Key::new(&resource.into(), namespace, name);
        let found = self.store.get(&key).await.map_err(|error| failed(&error))?;
        Ok(found.map(|entry| entry.value()))
    }

    /// For a Service, what all of them hold now.
    async fn allocation(
        &self,
        served: &Served,
    ) -> Result<Option<OwnedMutexGuard<Allocation>>, ApiError> {
        if served.plural != "services" {
            return Ok(None);
        }
        let mut allocation = Arc::clone(&self.allocation).lock_owned().await;
        allocation.follow(&*self.store).await?;
        Ok(Some(allocation))
    }

    async fn put(
        &self,
        call: &Call,
        object: &Value,
        expect: Expect,
        allocating: Option<OwnedMutexGuard<Allocation>>,
    ) -> Result<Arc<Entry>, CommitError> {
        let key = call.key();
        let draft = Draft::new(object, attributes(&key.resource, object));
        let txn = Txn::put(key, draft, expect);
        let Some(allocating) = allocating else { return commit(&*self.store, txn).await };
        // A client that goes away ends this call, and the write may happen all the same: until it is seen, nobody
        // else is to take what it takes.
        let store = Arc::clone(&self.store);
        let stored = tokio::spawn(async move {
            let stored = commit(&*store, txn).await;
            drop(allocating);
            stored
        });
        stored.await.map_err(|_ended| CommitError::Closed)?
    }

    async fn remove(&self, call: &Call, expect: Expect) -> Result<Arc<Entry>, CommitError> {
        commit(&*self.store, Txn::delete(call.key(), expect)).await
    }
}

/// A transaction of one operation, and what came of it.
async fn commit(store: &dyn Store, txn: Txn) -> Result<Arc<Entry>, CommitError> {
    store.commit(txn).await?.into_iter().next().ok_or(CommitError::Closed)
}

/// Defaults, as decoding sets them upstream: before anything compares the object with the stored one, or says whose
/// its fields are.
fn complete(served: &Served, part: Part, object: &mut Value) {
    match part {
        Part::Main => defaults::apply(served, object),
        Part::Status | Part::Approval | Part::Finalize | Part::Binding => {
            defaults::status(served, object);
        }
    }
}

/// Whether the writer named the revision that it read.
fn pins(object: &Value, old: &Value) -> bool {
    let given = text(object, "/metadata/resourceVersion");
    !given.is_empty() && given == text(old, "/metadata/resourceVersion")
}

/// The 422 of refused fields.
#[must_use]
pub fn invalid(call: &Call, errors: &[FieldError]) -> ApiError {
    // By the group in which it is kept.
    let group = call.served.storage.map_or(call.served.group, |(group, _)| group);
    error::invalid((group, call.served.kind), &call.name, errors)
}

/// A failure of the store itself.
#[must_use]
pub fn failed(error: &CommitError) -> ApiError {
    match error {
        CommitError::Closed => error::unavailable("the server is shutting down"),
        CommitError::Storage(_) | CommitError::Precondition { .. } => error::internal(error),
    }
}

/// A random UUID (RFC 9562, version 4).
fn uid() -> String {
    let mut b = [0_u8; 16];
    rand::rng().fill_bytes(&mut b);
    let number = u128::from_be_bytes(b) & !(0xf000 << 64) & !(0xc000 << 48);
    let hex = format!("{:032x}", number | 0x4000 << 64 | 0x8000 << 48);
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
}

/// Five characters of the alphabet that upstream's generated names use: no vowels, nothing mistakable.
fn suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    (0..5).map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())])).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn uids_are_version_4() {
        let uid = super::uid();
        assert_eq!(uid.len(), 36);
        assert_eq!(uid.as_bytes()[14], b'4');
        assert!(matches!(uid.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{uid}");
    }
}
