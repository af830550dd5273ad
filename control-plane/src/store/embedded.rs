//! The durable single-file store: SQLite in WAL mode behind one writer thread (effects).
//!
//! Tasks: one thread owns the database. It takes commits from a bounded queue, as many as have gathered while
//! the last fsync ran (group commit), orders them in `mvcc`, writes them with one fsync, and only then shows and
//! acknowledges them. Reads come from memory and never wait for the disk.
//!
//! Volatile resources (`Class::Volatile`) skip the fsync: they are written with the next snapshot
//! (`SNAPSHOT_EVERY`, and at `close`). After a crash they are as old as that snapshot, but
//! revisions never run backwards: a reserve of them is noted on disk ahead of use.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    thread,
    time::{Duration, Instant},
};

use futures::{FutureExt as _, future::BoxFuture};
use rusqlite::{Connection, OptionalExtension as _};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Class, CommitError, Committed, Entry, Expired, Key, ListRequest, Listing, Options, Progress,
    Scope, Store, Txn, Watcher,
    mvcc::{Batch, Mvcc},
};

/// Commits that may wait for the writer; more wait at the sender.
const QUEUE: usize = 1024;
/// Most commits that share an fsync.
const GROUP: usize = 512;
/// How often volatile rows are written out. At 40 s of Lease duration and 10 s between renewals a Lease
/// from a snapshot is older than it was, never newer.
pub const SNAPSHOT_EVERY: Duration = Duration::from_secs(30);
/// Revisions reserved on disk at once, so that volatile writes need no disk to be numbered.
const RESERVE: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open the store {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: rusqlite::Error,
    },
    #[error("the store {path} is in use by another process")]
    InUse { path: PathBuf },
    #[error("the store {path} holds a row that is not an object: {key}")]
    Corrupt { path: PathBuf, key: String },
    #[error("cannot start the store's thread")]
    Thread(#[source] std::io::Error),
}

enum Command {
    Commit(Txn, oneshot::Sender<Result<Committed, CommitError>>),
    Snapshot,
    Close(oneshot::Sender<Result<(), CommitError>>),
}

#[derive(Debug)]
struct Shared {
    mvcc: RwLock<Mvcc>,
    /// Told the newest revision of each resource that has been watched.
    signals: RwLock<HashMap<Arc<str>, watch::Sender<u64>>>,
    started: Instant,
}

/// The store. Dropping it writes out what is volatile, without waiting; `close` waits.
#[derive(Debug)]
pub struct Embedded {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

impl Embedded {
    /// Opens or creates the file and reads it into memory. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the file cannot be opened, is held by another process, or holds what was not written here.
    pub fn open(path: &Path, options: Options) -> Result<Self, OpenError> {
        let mut disk = Disk::open(path)?;
        let mvcc = disk.load(options)?;
        let shared = Arc::new(Shared {
            mvcc: RwLock::new(mvcc),
            signals: RwLock::default(),
            started: Instant::now(),
        });
        let (commands, queue) = mpsc::channel(QUEUE);
        let writer = Writer { shared: Arc::clone(&shared), disk };
        thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(queue))
            .map_err(OpenError::Thread)?;
        let ticker = commands.downgrade();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SNAPSHOT_EVERY).await;
                let Some(commands) = ticker.upgrade() else { return };
                if commands.send(Command::Snapshot).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { shared, commands })
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Mvcc> {
        self.mvcc.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn subscribe(&self, resource: &Arc<str>) -> watch::Receiver<u64> {
        let mut signals = self.signals.write().unwrap_or_else(PoisonError::into_inner);
        signals.entry(Arc::clone(resource)).or_insert_with(|| watch::Sender::new(0)).subscribe()
    }

    fn publish(&self, batch: Batch) {
        let resources: Vec<Arc<str>> =
            batch.rows().map(|(key, _)| Arc::clone(&key.resource)).collect();
        let revision = {
            let mut mvcc = self.mvcc.write().unwrap_or_else(PoisonError::into_inner);
            mvcc.publish(batch, self.started.elapsed());
            mvcc.revision()
        };
        let signals = self.signals.read().unwrap_or_else(PoisonError::into_inner);
        for resource in resources {
            if let Some(signal) = signals.get(&resource) {
                signal.send_replace(revision);
            }
        }
    }
}

impl Store for Embedded {
    fn get(&self, key: &Key) -> BoxFuture<'_, Result<Option<Arc<Entry>>, CommitError>> {
        let entry = self.shared.read().get(key).cloned();
        futures::future::ready(Ok(entry)).boxed()
    }

    fn list(&self, request: ListRequest) -> BoxFuture<'_, Result<Listing, Expired>> {
        let listing = self.shared.read().list(&request.scope, request.at, request.after.as_deref());
        futures::future::ready(listing).boxed()
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Committed, CommitError>> {
        async move {
            let (reply, answer) = oneshot::channel();
            let sent = self.commands.send(Command::Commit(txn, reply)).await;
            sent.ok().ok_or(CommitError::Closed)?;
            answer.await.unwrap_or(Err(CommitError::Closed))
        }
        .boxed()
    }

    fn watch(&self, scope: Scope, from: u64) -> Box<dyn Watcher> {
        let signal = self.shared.subscribe(&scope.resource);
        Box::new(Reader { shared: Arc::clone(&self.shared), scope, cursor: from, signal })
    }

    fn revision(&self) -> u64 {
        self.shared.read().revision()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), CommitError>> {
        async move {
            let (reply, answer) = oneshot::channel();
            let sent = self.commands.send(Command::Close(reply)).await;
            sent.ok().ok_or(CommitError::Closed)?;
            answer.await.unwrap_or(Err(CommitError::Closed))
        }
        .boxed()
    }
}

struct Reader {
    shared: Arc<Shared>,
    scope: Scope,
    cursor: u64,
    signal: watch::Receiver<u64>,
}

impl Reader {
    fn read(&mut self) -> Result<Progress, Expired> {
        self.signal.mark_unchanged();
        self.shared.read().events(&self.scope, &mut self.cursor)
    }
}

impl Watcher for Reader {
    fn next(&mut self) -> BoxFuture<'_, Result<Progress, Expired>> {
        async move {
            loop {
                let progress = self.read()?;
                if !progress.events.is_empty() {
                    return Ok(progress);
                }
                // The sender lives in `shared`, which this reader holds.
                self.signal.changed().await.expect("the signal outlives its reader");
            }
        }
        .boxed()
    }

    fn progress(&mut self) -> BoxFuture<'_, Result<Progress, Expired>> {
        futures::future::ready(self.read()).boxed()
    }
}

struct Writer {
    shared: Arc<Shared>,
    disk: Disk,
}

type Waiting = Vec<(oneshot::Sender<Result<Committed, CommitError>>, Committed)>;

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        while let Some(first) = queue.blocking_recv() {
            let mut next = Some(first);
            let mut batch = Batch::default();
            let mut waiting: Waiting = Vec::new();
            while let Some(command) = next.take() {
                match command {
                    Command::Commit(txn, reply) => {
                        let prepared = self.shared.read().prepare(&mut batch, &txn);
                        match prepared {
                            Ok(committed) => waiting.push((reply, committed)),
                            Err(error) => drop(reply.send(Err(error))),
                        }
                    }
                    Command::Snapshot => self.snapshot_logged(),
                    Command::Close(reply) => {
                        self.finish(batch, waiting);
                        let result = self.snapshot(true).map_err(|e| storage(&e));
                        drop(reply.send(result));
                        return;
                    }
                }
                if waiting.len() < GROUP {
                    next = queue.try_recv().ok();
                }
            }
            self.finish(batch, waiting);
        }
        if let Err(error) = self.snapshot(true) {
            tracing::error!(%error, "the last snapshot of volatile objects failed");
        }
    }

    fn finish(&mut self, batch: Batch, waiting: Waiting) {
        if batch.is_empty() {
            return;
        }
        let written = self.write(&batch);
        if let Err(error) = &written {
            tracing::error!(%error, path = %self.disk.path.display(), "the store cannot write");
            for (reply, _) in waiting {
                drop(reply.send(Err(storage(error))));
            }
            return;
        }
        self.shared.publish(batch);
        for (reply, committed) in waiting {
            drop(reply.send(Ok(committed)));
        }
    }

    /// Makes the durable part of a batch survive, and reserves the revisions of the rest.
    fn write(&mut self, batch: &Batch) -> Result<(), rusqlite::Error> {
        let (rows, last) = {
            let mvcc = self.shared.read();
            let rows: Vec<_> = batch
                .rows()
                .filter(|(key, _)| mvcc.class(&key.resource) == Class::Durable)
                .map(|(key, entry)| (key.clone(), entry.cloned()))
                .collect();
            (rows, batch.last_revision().unwrap_or_else(|| mvcc.revision()))
        };
        let reserve = (last > self.disk.reserved).then_some(last + RESERVE);
        if rows.is_empty() && reserve.is_none() {
            return Ok(());
        }
        self.disk.write(&rows, reserve)
    }

    fn snapshot_logged(&mut self) {
        if let Err(error) = self.snapshot(false) {
            tracing::error!(%error, "a snapshot of volatile objects failed");
        }
    }

    /// Writes the volatile rows; at the end also the exact revision, so that nobody needs to list anew.
    fn snapshot(&mut self, last: bool) -> Result<(), rusqlite::Error> {
        let (rows, revision) = {
            let mut mvcc = self.shared.mvcc.write().unwrap_or_else(PoisonError::into_inner);
            (mvcc.take_dirty(), mvcc.revision())
        };
        if rows.is_empty() && !last {
            return Ok(());
        }
        let written = self.disk.write(&rows, last.then_some(revision));
        if written.is_err() {
            let mut mvcc = self.shared.mvcc.write().unwrap_or_else(PoisonError::into_inner);
            mvcc.restore_dirty(rows.into_iter().map(|(key, _)| key));
        }
        written
    }
}

fn storage(error: &rusqlite::Error) -> CommitError {
    CommitError::Storage(error.to_string())
}

/// The database file.
struct Disk {
    path: PathBuf,
    database: Connection,
    /// No revision above this one has been given out.
    reserved: u64,
}

const SCHEMA: &str = "
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA cache_size = -2048;
CREATE TABLE IF NOT EXISTS objects (
  resource TEXT NOT NULL, path TEXT NOT NULL, revision INTEGER NOT NULL,
  hole INTEGER NOT NULL, json BLOB NOT NULL, PRIMARY KEY (resource, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('format', 1);
";

impl Disk {
    fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                OpenError::InUse { path: path.to_owned() }
            }
            _ => OpenError::Open { path: path.to_owned(), source },
        };
        let database = Connection::open(path).map_err(failed)?;
        database.busy_timeout(Duration::from_millis(500)).map_err(failed)?;
        database.execute_batch(SCHEMA).map_err(failed)?;
        Ok(Self { path: path.to_owned(), database, reserved: 0 })
    }

    fn load(&mut self, options: Options) -> Result<Mvcc, OpenError> {
        let path = self.path.clone();
        let failed = |source| OpenError::Open { path: path.clone(), source };
        let stored: Option<i64> = self
            .database
            .query_row("SELECT number FROM meta WHERE name = 'reserved'", [], |row| row.get(0))
            .optional()
            .map_err(failed)?;
        let mut revision = stored.map_or(0, i64::cast_unsigned);
        let mut rows = Vec::new();
        {
            let mut select = self
                .database
                .prepare("SELECT resource, path, revision, hole, json FROM objects")
                .map_err(failed)?;
            let mut found = select.query([]).map_err(failed)?;
            while let Some(row) = found.next().map_err(failed)? {
                let (key, entry) = self.row(row, options)?;
                revision = revision.max(entry.revision);
                rows.push((key, entry));
            }
        }
        self.reserved = revision;
        let mut mvcc = Mvcc::new(options, revision);
        for (key, entry) in rows {
            mvcc.load(&key, entry);
        }
        Ok(mvcc)
    }

    fn row(&self, row: &rusqlite::Row<'_>, options: Options) -> Result<(Key, Entry), OpenError> {
        let failed = |source| OpenError::Open { path: self.path.clone(), source };
        let resource: String = row.get(0).map_err(failed)?;
        let path: String = row.get(1).map_err(failed)?;
        let revision: i64 = row.get(2).map_err(failed)?;
        let hole: i64 = row.get(3).map_err(failed)?;
        let json: Vec<u8> = row.get(4).map_err(failed)?;
        let key = Key { resource: resource.into(), path: path.into() };
        let corrupt = || OpenError::Corrupt { path: self.path.clone(), key: key.to_string() };
        let value: Value = serde_json::from_slice(&json).ok().ok_or_else(corrupt)?;
        let hole = usize::try_from(hole).ok().filter(|hole| *hole < json.len());
        let attributes = (options.attributes)(&key.resource, &value);
        let entry = Entry::new(
            json.into(),
            hole.ok_or_else(corrupt)?,
            revision.cast_unsigned(),
            attributes,
        );
        Ok((key, entry))
    }

    /// One transaction, on disk when this returns.
    fn write(
        &mut self,
        rows: &[(Key, Option<Arc<Entry>>)],
        reserved: Option<u64>,
    ) -> Result<(), rusqlite::Error> {
        let transaction = self.database.transaction()?;
        for (key, entry) in rows {
            if let Some(entry) = entry {
                let hole = i64::try_from(entry.hole()).unwrap_or(i64::MAX);
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)")?
                    .execute((
                        &*key.resource,
                        &*key.path,
                        entry.revision.cast_signed(),
                        hole,
                        &entry.bytes[..],
                    ))?;
            } else {
                transaction
                    .prepare_cached("DELETE FROM objects WHERE resource = ? AND path = ?")?
                    .execute((&*key.resource, &*key.path))?;
            }
        }
        if let Some(reserved) = reserved {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO meta VALUES ('reserved', ?)")?
                .execute([reserved.cast_signed()])?;
        }
        transaction.commit()?;
        self.reserved = reserved.unwrap_or(self.reserved);
        Ok(())
    }
}
