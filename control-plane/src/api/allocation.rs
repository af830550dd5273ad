//! Which addresses and node ports Services hold, followed through the store's history: a write looks at what changed
//! since the last one, not at all Services (effects: the store).

use super::{attributes::TAKEN, error};
use crate::{
    admission::Allocated,
    client::ApiError,
    store::{Change, ListRequest, Scope, Store, Watcher},
};

/// Kept behind a lock that a writer holds until its Service is stored.
#[derive(Default)]
pub(super) struct Allocation {
    allocated: Allocated,
    /// Behind what `allocated` knows; `None` until Services were listed, and when history left it behind.
    history: Option<Box<dyn Watcher>>,
}

impl Allocation {
    /// What is known.
    pub(super) const fn allocated(&self) -> &Allocated {
        &self.allocated
    }

    /// Catches up with the store.
    ///
    /// # Errors
    /// 500 when Services cannot be listed.
    pub(super) async fn follow(&mut self, store: &dyn Store) -> Result<(), ApiError> {
        loop {
            let Some(history) = &mut self.history else {
                return self.list(store).await;
            };
            let Ok(progress) = history.progress().await else {
                self.history = None;
                continue;
            };
            if progress.events.is_empty() {
                return Ok(());
            }
            for event in progress.events {
                let held = match &event.change {
                    Change::Put { after, .. } => after.attributes.field(TAKEN),
                    Change::Delete { .. } => "",
                };
                self.allocated.set(&event.path, held);
            }
        }
    }

    async fn list(&mut self, store: &dyn Store) -> Result<(), ApiError> {
        let scope = Scope { resource: "core/services".into(), namespace: None, name: None };
        let request = ListRequest { scope: scope.clone(), at: None, after: None };
        let listing = store.list(request).await.map_err(error::internal)?;
        self.allocated = Allocated::default();
        for (path, entry) in &listing.rows {
            self.allocated.set(path, entry.attributes.field(TAKEN));
        }
        self.history = Some(store.watch(scope, listing.revision));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::Arc};

    use futures::FutureExt as _;
    use serde_json::{Value, json};

    use crate::{
        api::{
            applying::tests::api,
            authn::{MASTERS, User},
            core::{Api, Call},
            deletion,
            query::WriteOptions,
        },
        schema,
    };

    fn call(name: &str) -> Call {
        Call {
            served: schema::resource("", "v1", "services").unwrap(),
            namespace: "default".to_owned(),
            name: name.to_owned(),
            user: Arc::new(User::new("admin", &[MASTERS])),
            options: WriteOptions::default(),
        }
    }

    fn service(name: &str, spec: &Value) -> Value {
        let mut spec = spec.clone();
        spec["ports"] = json!([{"port": 80}]);
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
    }

    async fn make(api: &Api, name: &str, spec: &Value) -> Result<String, String> {
        let made = api.create(&call(""), service(name, spec)).await;
        let made = made.map_err(|error| error.message)?;
        Ok(made.value()["spec"]["clusterIP"].as_str().unwrap().to_owned())
    }

    #[tokio::test]
    async fn what_others_do_meanwhile_is_followed() {
        let (_dir, api) = api().await;
        let first = make(&api, "a", &json!({})).await.unwrap();
        let asked = json!({"clusterIP": first});
        let refused = make(&api, "b", &asked).await.unwrap_err();
        assert!(refused.contains("provided IP is already allocated"), "{refused}");
        // Deleting takes no lock.
        api.delete(&call("a"), &deletion::Options::default()).await.unwrap();
        assert_eq!(make(&api, "b", &asked).await.unwrap(), first);
        // A change keeps its own, and what it lets go is free.
        let external = json!({"type": "ExternalName", "externalName": "a.example"});
        let change = |old: &Value| {
            let mut new = old.clone();
            new["spec"] = service("b", &external)["spec"].clone();
            Ok(new)
        };
        api.update(&call("b"), crate::api::prepare::Part::Main, &change).await.unwrap();
        assert_eq!(make(&api, "c", &asked).await.unwrap(), first);
    }

    /// Deletions take no lock, and are more than are told at once.
    #[tokio::test]
    async fn many_changes_are_caught_up_with() {
        let (_dir, api) = api().await;
        let all = futures::future::join_all((0..1200).map(|number| {
            let api = &api;
            async move { make(api, &format!("s{number}"), &json!({})).await.unwrap() }
        }))
        .await;
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 1200);
        let options = deletion::Options::default();
        for number in 0..1200 {
            api.delete(&call(&format!("s{number}")), &options).await.unwrap();
        }
        // The one that was given back last.
        let asked = json!({"clusterIP": all[1199]});
        assert_eq!(make(&api, "again", &asked).await.unwrap(), all[1199]);
    }

    /// A client that goes away while its Service is being written.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nobody_gets_what_is_being_written_for_somebody_who_has_gone() {
        let (_dir, api) = api().await;
        let mut written = 0;
        for round in 0..50 {
            let (left, kept) = (format!("left{round}"), format!("kept{round}"));
            let _gone = make(&api, &left, &json!({})).now_or_never();
            let address = make(&api, &kept, &json!({})).await.unwrap();
            let stored = api.get(&call(&left)).await.map(|entry| entry.value()).ok();
            let other = stored.map(|service| service["spec"]["clusterIP"].clone());
            written += u32::from(other.is_some());
            assert_ne!(other, Some(json!(address)), "round {round}");
        }
        assert!(written > 0, "nothing was on its way");
    }
}
