//! Writes the zone for the DNS process whenever services or endpoints have changed.
//!
//! Effects. One task; it reads both tables' changes, keeps the rows' handles, and owns the files.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep_until},
};

use super::{snapshot, zone::Zone};
use crate::{
    cni::install::{replace, write_durably},
    model::{EndpointSliceRow, ObjectKey, ServiceRow},
    sys::memory,
    table::Table,
};

/// Changes within this time are written together: a rollout touches many slices at once.
const GATHER: Duration = Duration::from_millis(50);
/// A round that took long is not followed by the next one before this many times as long: changes that go on
/// and on cost an eleventh of a core, however many services there are.
const REST: u32 = 10;
/// What a round allocates for a moment is given back to the kernel when its zone is larger than this.
const GIVE_BACK_BYTES: usize = 256 << 10;
/// How often the copy that outlives a boot is written at most, as it lies on flash: 10,000 services
/// are some 600 KB. A change after a quiet time is written at once.
const KEEP: Duration = Duration::from_secs(300);

/// Where the zone is written, and what was written last.
#[derive(Debug)]
pub(super) struct Publisher {
    pub(super) zone: PathBuf,
    pub(super) kept_zone: PathBuf,
    pub(super) services: Table<ObjectKey, ServiceRow>,
    pub(super) slices: Table<ObjectKey, EndpointSliceRow>,
}

/// The rows of a table as of a revision.
#[derive(Debug)]
struct Mirror<V> {
    rows: BTreeMap<ObjectKey, Arc<V>>,
    revision: u64,
}

impl<V: PartialEq> Mirror<V> {
    const fn new() -> Self {
        Self { rows: BTreeMap::new(), revision: 0 }
    }

    /// Catches up with the table; says whether it is synced.
    fn follow(&mut self, table: &Table<ObjectKey, V>) -> bool {
        let delta = table.changes_since(self.revision);
        if delta.full {
            self.rows.clear();
        }
        for key in &delta.deletes {
            self.rows.remove(key);
        }
        self.rows.extend(delta.upserts);
        self.revision = delta.revision;
        delta.synced
    }
}

/// Follows the tables until the task is aborted or the tables are gone.
pub(super) async fn publish(publisher: Publisher) {
    let mut service_changes = publisher.services.subscribe();
    let mut slice_changes = publisher.slices.subscribe();
    let (mut services, mut slices) = (Mirror::new(), Mirror::new());
    let mut written: Arc<[u8]> = Arc::new([]);
    let mut keep_at: Option<Instant> = None;
    let mut kept_last = None::<Instant>;
    loop {
        let began = Instant::now();
        let synced = services.follow(&publisher.services) & slices.follow(&publisher.slices);
        // Before the first list is complete the zone of the last run knows more.
        if synced {
            let rows = services.rows.iter().map(|(key, row)| (key, &**row));
            let zone = Zone::new(rows, slices.rows.values().map(|row| &**row));
            let bytes: Arc<[u8]> = snapshot::encode(&zone).into();
            drop(zone);
            if bytes != written {
                match write(&publisher.zone, &bytes, Durability::UntilBoot).await {
                    Ok(()) => {
                        tracing::debug!(services = services.rows.len(), "zone written");
                        written = bytes;
                        let earliest = kept_last.map_or_else(Instant::now, |last| last + KEEP);
                        keep_at = keep_at.or(Some(earliest));
                    }
                    Err(error) => tracing::error!(%error, "zone not written"),
                }
            }
        }
        if written.len() > GIVE_BACK_BYTES {
            memory::give_back();
        }
        let rested = Instant::now() + began.elapsed() * REST;
        let changed = tokio::select! {
            changed = service_changes.changed() => changed.is_ok(),
            changed = slice_changes.changed() => changed.is_ok(),
            () = wait_until(keep_at) => {
                match write(&publisher.kept_zone, &written, Durability::OverBoots).await {
                    Ok(()) => {}
                    Err(error) => tracing::error!(%error, "zone for the next boot not written"),
                }
                (keep_at, kept_last) = (None, Some(Instant::now()));
                continue;
            }
        };
        if !changed {
            return;
        }
        sleep_until(rested.max(Instant::now() + GATHER)).await;
        service_changes.mark_unchanged();
        slice_changes.mark_unchanged();
    }
}

#[derive(Clone, Copy, Debug)]
enum Durability {
    UntilBoot,
    OverBoots,
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn write(path: &Path, bytes: &Arc<[u8]>, durability: Durability) -> io::Result<()> {
    let (path, bytes) = (path.to_owned(), Arc::clone(bytes));
    let written = spawn_blocking(move || match durability {
        Durability::UntilBoot => replace(&path, &bytes, 0o644),
        Durability::OverBoots if fs::read(&path).is_ok_and(|kept| *kept == *bytes) => Ok(()),
        Durability::OverBoots => write_durably(&path, &bytes, 0o644),
    });
    written.await.map_err(io::Error::other)?
}
