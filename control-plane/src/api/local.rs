//! The API inside the process: `control_plane::client::Client` over the same admission and storage.

use std::sync::Arc;

use futures::{FutureExt as _, future::BoxFuture};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::{
    api::{
        authn::{AUTHENTICATED, MASTERS, User},
        core::{Api, Call, Deleted, resource_key},
        deletion::{self, Propagation},
        error,
        patch::merge,
        prepare::{Part, text},
        query::WriteOptions,
    },
    client::{ApiError, Client, DeleteOptions, Event, ObjectRef, Resource, Write, is_owned_by},
    schema::{
        self,
        decode::{self, Strictness},
    },
    store::{Change, ListRequest, Scope},
};

/// Events that may wait for a reader; the store's history holds more.
const QUEUE: usize = 256;

/// The in-process client of an API.
#[derive(Debug)]
pub struct Local {
    api: Arc<Api>,
    user: Arc<User>,
    component: &'static str,
}

impl Local {
    /// Acts as `system:` and the component's name, in `system:masters`. By this name `managedFields` know it.
    #[must_use]
    pub fn new(api: Arc<Api>, component: &'static str) -> Self {
        let user = User::new(&format!("system:{component}"), &[MASTERS, AUTHENTICATED]);
        Self { api, user: Arc::new(user), component }
    }

    fn call(&self, resource: Resource, namespace: &str, name: &str) -> Result<Call, ApiError> {
        let served = schema::resource(resource.group, resource.version, resource.plural);
        let options = WriteOptions {
            validation: Strictness::Strict,
            agent: self.component.to_owned(),
            ..WriteOptions::default()
        };
        Ok(Call {
            served: served.ok_or_else(error::no_resource)?,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            user: Arc::clone(&self.user),
            options,
        })
    }

    fn call_of(&self, object: &ObjectRef) -> Result<Call, ApiError> {
        self.call(object.resource, &object.namespace, &object.name)
    }

    async fn carry_out(&self, write: Write) -> Result<Value, ApiError> {
        match write {
            Write::Create { resource, namespace, object } => {
                let call = self.call(resource, &namespace, "")?;
                let object = checked(&call, object)?;
                Ok((*self.api.create(&call, object).await?.value()).clone())
            }
            Write::Update { object, value } => self.update(&object, "", &value).await,
            Write::UpdateSub { object, subresource: "binding", value } => {
                let call = self.call_of(&object)?;
                Ok((*self.api.bind(&call, &value).await?.value()).clone())
            }
            Write::UpdateSub { object, subresource, value } => {
                self.update(&object, subresource, &value).await
            }
            Write::Patch { object, subresource, patch } => {
                let call = self.call_of(&object)?;
                let change = |current: &Value| {
                    if subresource == "scale" {
                        let wanted = merge::patch(super::scale::of(current), &patch);
                        return super::scale::onto(&call, current, &wanted);
                    }
                    checked(&call, merge::patch(current.clone(), &patch))
                };
                let written = self.api.update(&call, part(subresource)?, &change).await?;
                Ok((*written.value()).clone())
            }
            Write::Delete { object, options } => {
                let call = self.call_of(&object)?;
                let (Deleted::Removed(written) | Deleted::Waiting(written)) =
                    self.api.delete(&call, &delete_options(&options)).await?;
                Ok((*written.value()).clone())
            }
        }
    }

    async fn update(
        &self,
        object: &ObjectRef,
        subresource: &str,
        value: &Value,
    ) -> Result<Value, ApiError> {
        let call = self.call_of(object)?;
        let change = |current: &Value| {
            if subresource == "scale" {
                return super::scale::onto(&call, current, value);
            }
            checked(&call, value.clone())
        };
        let written = self.api.update(&call, part(subresource)?, &change).await?;
        Ok((*written.value()).clone())
    }
}

fn part(subresource: &str) -> Result<Part, ApiError> {
    match subresource {
        "" | "scale" => Ok(Part::Main),
        "status" => Ok(Part::Status),
        "approval" => Ok(Part::Approval),
        "finalize" => Ok(Part::Finalize),
        _ => Err(error::no_resource()),
    }
}

/// Brings an object into stored form, as decoding a body would.
fn checked(call: &Call, object: Value) -> Result<Value, ApiError> {
    let kind = super::verbs::kind_of(call.served)?;
    let decoded = decode::value(&kind, object, Strictness::Strict);
    decoded.map(|(object, _)| object).map_err(|why| error::bad_request(why.message(&kind)))
}

fn delete_options(options: &DeleteOptions) -> deletion::Options {
    let propagation = match options.propagation {
        Some("Foreground") => Some(Propagation::Foreground),
        Some("Orphan") => Some(Propagation::Orphan),
        Some("Background") => Some(Propagation::Background),
        _ => None,
    };
    deletion::Options {
        grace: options.grace_period_seconds,
        uid: options.uid.clone(),
        resource_version: options.resource_version.clone(),
        propagation,
        ..deletion::Options::default()
    }
}

impl Client for Local {
    fn write(&self, write: Write) -> BoxFuture<'_, Result<Value, ApiError>> {
        self.carry_out(write).boxed()
    }

    fn read(&self, object: &ObjectRef) -> BoxFuture<'_, Result<Value, ApiError>> {
        let call = self.call_of(object);
        async move {
            let entry = self.api.get(&call?).await?;
            Ok((*entry.value()).clone())
        }
        .boxed()
    }

    fn find_child(
        &self,
        uid: &str,
        resource: Resource,
        namespace: &str,
    ) -> BoxFuture<'_, Result<Option<String>, ApiError>> {
        let (call, uid) = (self.call(resource, namespace, ""), uid.to_owned());
        async move {
            let call = call?;
            let namespace = Some(call.namespace).filter(|namespace| !namespace.is_empty());
            let scope = Scope { resource: resource_key(call.served), namespace, name: None };
            let request = ListRequest { scope, at: None, after: None };
            let listing = self.api.store.list(request).await.map_err(error::internal)?;
            let mut values = listing.rows.iter().map(|(_, entry)| entry.value());
            let child = values.find(|value| is_owned_by(value, &uid));
            Ok(child.map(|value| text(&value, "/metadata/name").to_owned()))
        }
        .boxed()
    }

    fn watch(&self, resource: Resource) -> mpsc::Receiver<Event> {
        let (events, receiver) = mpsc::channel(QUEUE);
        let api = Arc::clone(&self.api);
        tokio::spawn(async move {
            let Some(served) = schema::resource(resource.group, resource.version, resource.plural)
            else {
                tracing::error!(?resource, "a watch of what is not served");
                return;
            };
            let scope = Scope { resource: resource_key(served), namespace: None, name: None };
            while follow(&api, &scope, &events).await.is_some() {
                tracing::info!(resource = resource.plural, "a reader fell behind and starts anew");
            }
        });
        receiver
    }
}

/// Lists and follows until the history is lost (`Some`) or the reader is gone (`None`).
async fn follow(api: &Api, scope: &Scope, events: &mpsc::Sender<Event>) -> Option<()> {
    events.send(Event::Restart).await.ok()?;
    let request = ListRequest { scope: scope.clone(), at: None, after: None };
    let listing = api.store.list(request).await.ok()?;
    for (_, entry) in &listing.rows {
        events.send(Event::Applied(entry.value())).await.ok()?;
    }
    events.send(Event::Synced).await.ok()?;
    let mut watcher = api.store.watch(scope.clone(), listing.revision);
    loop {
        let progress = tokio::select! {
            progress = watcher.next() => progress,
            () = events.closed() => return None,
        };
        let Ok(progress) = progress else { return Some(()) };
        for event in progress.events {
            let event = match event.change {
                Change::Put { after, .. } => Event::Applied(after.value()),
                Change::Delete { last, .. } => Event::Deleted(last.value()),
            };
            events.send(event).await.ok()?;
        }
    }
}
