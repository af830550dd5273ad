//! A node-local copy of the tables of services, slices and nodes, for a start without a server.
//!
//! Task [`keep`]: writes the file when changes have settled, at most every [`PAUSE`]. [`restore`] puts
//! it into the tables at the start, where it counts as a source that is not synced: it only adds, and
//! the server's own list takes its place. `encode` and `decode` are pure. Layout, numbers big-endian:
//! the magic `ORLOPNET`, version `u32`, payload length `u64`, SHA-256 of the payload, payload: three
//! lists, each a `u32` count and rows. A text is a `u32` length and UTF-8; a list likewise.

mod wire;

use std::{fs, io, path::Path, time::Duration};

use tokio::time;

pub use wire::{SnapshotError, decode, encode};

use crate::{
    model::{EndpointSliceRow, NodeRow, ObjectKey, ServiceRow},
    sys::memory,
    table::Table,
    watch::Sources,
};

/// Changes are written when none came for this long, so that a burst is one write.
const SETTLE: Duration = Duration::from_secs(2);
/// Between two writes: a flash card must bear it for years.
const PAUSE: Duration = Duration::from_secs(10);
/// A larger file is neither written nor read: 50,000 services of 10 endpoints are a fifth of it.
const FILE_BYTES: usize = 256 << 20;
/// Name in the state folder.
pub const FILE: &str = "network.snapshot";

/// Rows by key, as they stand in a file.
pub type Rows<V> = Vec<(ObjectKey, V)>;

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub services: Rows<ServiceRow>,
    pub slices: Rows<EndpointSliceRow>,
    pub nodes: Rows<NodeRow>,
}

/// Why there is nothing to start with.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("cannot read it")]
    Read(#[source] io::Error),
    #[error("it has {0} bytes, more than a snapshot ever has")]
    TooLarge(u64),
    #[error("it is no snapshot that this agent can read")]
    Decode(#[source] SnapshotError),
}

/// Fills tables that are still empty. Returns how many services there were.
///
/// # Errors
///
/// [`RestoreError`]; the agent goes on without and waits for its server.
pub fn restore(path: &Path, sources: &Sources) -> Result<usize, RestoreError> {
    let length = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        metadata => metadata.map_err(RestoreError::Read)?.len(),
    };
    if usize::try_from(length).map_or(true, |length| length > FILE_BYTES) {
        return Err(RestoreError::TooLarge(length));
    }
    let file = fs::read(path).map_err(RestoreError::Read)?;
    let snapshot = decode(&file).map_err(RestoreError::Decode)?;
    let count = snapshot.services.len();
    fill(&sources.services, snapshot.services);
    fill(&sources.slices, snapshot.slices);
    fill(&sources.nodes, snapshot.nodes);
    Ok(count)
}

/// The server may have been quicker: its rows stay.
fn fill<V: PartialEq>(table: &Table<ObjectKey, V>, rows: Rows<V>) {
    if table.is_synced() {
        return;
    }
    for (key, row) in rows {
        table.upsert(key, row);
    }
}

/// Keeps the file up to date with tables that are synced. Never ends by itself.
pub async fn keep(path: &Path, sources: &Sources) {
    let mut services = sources.services.subscribe();
    let mut slices = sources.slices.subscribe();
    let mut nodes = sources.nodes.subscribe();
    let mut written = None;
    loop {
        let seen = (
            *services.borrow_and_update(),
            *slices.borrow_and_update(),
            *nodes.borrow_and_update(),
        );
        let is_synced =
            sources.services.is_synced() && sources.slices.is_synced() && sources.nodes.is_synced();
        if is_synced && written != Some(seen) {
            let (target, tables) = (path.to_owned(), sources.clone());
            let write = tokio::task::spawn_blocking(move || write(&target, &tables));
            match write.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "network snapshot not written"),
                Err(error) => tracing::warn!(%error, "network snapshot not written"),
            }
            // A failed write is tried again with the next change: the old file stays.
            written = Some(seen);
            time::sleep(PAUSE).await;
        }
        let changed = tokio::select! {
            changed = services.changed() => changed,
            changed = slices.changed() => changed,
            changed = nodes.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        time::sleep(SETTLE).await;
    }
}

/// Writes the tables as they are, whole or not at all.
///
/// # Errors
///
/// What the file system says; the former file is then still there.
pub fn write(path: &Path, sources: &Sources) -> io::Result<()> {
    let file = encode(&sources.services, &sources.slices, &sources.nodes);
    if file.len() > FILE_BYTES {
        return Err(io::Error::other(format!("{} bytes are more than is kept", file.len())));
    }
    let fresh = path.with_extension("new");
    fs::write(&fresh, &file)?;
    drop(file);
    // The file was made twice over in memory.
    memory::give_back();
    fs::File::open(&fresh)?.sync_all()?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests;
