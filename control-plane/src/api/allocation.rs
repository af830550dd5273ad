//! Which addresses and node ports Services hold, followed through the store's history: a write looks at what changed
//! since the last one, not at all Services (effects: the store).

use std::fmt;

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

impl fmt::Debug for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Allocation").field("allocated", &self.allocated).finish_non_exhaustive()
    }
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
