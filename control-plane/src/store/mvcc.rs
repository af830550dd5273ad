//! Rows, revisions, preconditions and history (pure; time is passed in).
//!
//! A write goes `prepare` → (made durable by the caller) → `publish`. Readers see only what is published.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    sync::Arc,
    time::Duration,
};

use super::{
    Change, Class, CommitError, Committed, Entry, Event, Expect, Expired, Key, Listing, Op,
    Options, Progress, Scope, Txn, draft::reseal,
};

/// Most events kept a resource. Upstream's watch cache holds 100 to 102,400.
pub const RING_EVENTS: usize = 10_000;
/// Most bytes of events kept a resource, counted as if nothing were shared with the current rows.
pub const RING_BYTES: usize = 32 << 20;
/// Events younger than this are kept as far as the two bounds above allow (upstream keeps 75 s).
pub const RING_AGE: Duration = Duration::from_secs(75);
/// Events kept at least, however old.
pub const RING_LEAST: usize = 256;
/// Most events handed to a watcher at once.
pub const BATCH_EVENTS: usize = 512;

#[derive(Debug)]
struct Table {
    rows: BTreeMap<Arc<str>, Arc<Entry>>,
    ring: VecDeque<(Duration, Event)>,
    ring_bytes: usize,
    /// History is complete for revisions after this one.
    floor: u64,
}

/// All objects, and what happened lately.
#[derive(Debug)]
pub struct Mvcc {
    options: Options,
    revision: u64,
    /// The revision when the process started: there is no history before it.
    start: u64,
    tables: BTreeMap<Arc<str>, Table>,
    /// Volatile rows changed since the last snapshot.
    dirty: BTreeSet<Key>,
}

/// Changes that are ordered but not visible yet.
#[derive(Debug, Default)]
pub struct Batch {
    changes: Vec<(Key, Event)>,
    /// What the rows will be, for preconditions of later transactions of the batch.
    pending: BTreeMap<Key, Option<Arc<Entry>>>,
}

impl Batch {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    #[must_use]
    pub fn last_revision(&self) -> Option<u64> {
        self.changes.last().map(|(_, event)| event.revision)
    }

    /// The rows as they will be (`None`: deleted), each once.
    pub fn rows(&self) -> impl Iterator<Item = (&Key, Option<&Arc<Entry>>)> {
        self.pending.iter().map(|(key, entry)| (key, entry.as_ref()))
    }
}

impl Mvcc {
    /// An empty store whose next revision is `revision + 1`.
    #[must_use]
    pub fn new(options: Options, revision: u64) -> Self {
        Self { options, revision, start: revision, tables: BTreeMap::new(), dirty: BTreeSet::new() }
    }

    /// Puts in a row read from disk.
    pub fn load(&mut self, key: &Key, entry: Entry) {
        self.table(&key.resource).rows.insert(Arc::clone(&key.path), Arc::new(entry));
    }

    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    #[must_use]
    pub fn class(&self, resource: &str) -> Class {
        (self.options.class)(resource)
    }

    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Arc<Entry>> {
        self.tables.get(&key.resource)?.rows.get(&key.path)
    }

    /// Checks a transaction against the rows and what is already in the batch, and adds it.
    ///
    /// # Errors
    /// `Precondition` for the first operation that does not find what it expects; the batch is as before.
    pub fn prepare(&self, batch: &mut Batch, txn: &Txn) -> Result<Committed, CommitError> {
        let mut revision = batch.changes.last().map_or(self.revision, |(_, event)| event.revision);
        for op in &txn.ops {
            let (key, expect) = match op {
                Op::Put { key, expect, .. } | Op::Delete { key, expect } => (key, *expect),
            };
            let current = self.pending(batch, key);
            let deletes_nothing = matches!(op, Op::Delete { .. }) && current.is_none();
            if deletes_nothing || !holds(expect, current) {
                return Err(CommitError::Precondition {
                    key: key.clone(),
                    current: current.cloned(),
                });
            }
        }
        let mut committed = Vec::with_capacity(txn.ops.len());
        for op in &txn.ops {
            revision += 1;
            committed.push(self.step(batch, op, revision));
        }
        Ok(committed)
    }

    /// Makes a batch visible. `now` is any monotonic clock.
    pub fn publish(&mut self, batch: Batch, now: Duration) {
        for (key, event) in batch.changes {
            self.revision = event.revision;
            if (self.options.class)(&key.resource) == Class::Volatile {
                self.dirty.insert(key.clone());
            }
            let table = self.table(&key.resource);
            match &event.change {
                Change::Put { after, .. } => {
                    table.rows.insert(Arc::clone(&key.path), Arc::clone(after));
                }
                Change::Delete { .. } => {
                    table.rows.remove(&key.path);
                }
            }
            table.ring_bytes += weight(&event);
            table.ring.push_back((now, event));
            table.trim(now);
        }
    }

    /// Takes the volatile rows that a snapshot has to write (`None`: deleted).
    pub fn take_dirty(&mut self) -> Vec<(Key, Option<Arc<Entry>>)> {
        std::mem::take(&mut self.dirty)
            .into_iter()
            .map(|key| {
                let entry = self.get(&key).cloned();
                (key, entry)
            })
            .collect()
    }

    /// Gives back what a failed snapshot took.
    pub fn restore_dirty(&mut self, keys: impl IntoIterator<Item = Key>) {
        self.dirty.extend(keys);
    }

    /// The rows of a scope now, or as of an older revision.
    ///
    /// # Errors
    /// `Expired` when `at` is older than the resource's history.
    pub fn list(
        &self,
        scope: &Scope,
        at: Option<u64>,
        after: Option<&str>,
    ) -> Result<Listing, Expired> {
        let revision = at.unwrap_or(self.revision).min(self.revision);
        let Some(table) = self.tables.get(&scope.resource) else {
            return Ok(Listing { revision, rows: Vec::new() });
        };
        let mut rows: Vec<_> = table
            .range(scope, after)
            .map(|(path, entry)| (Arc::clone(path), Arc::clone(entry)))
            .collect();
        if revision < self.revision {
            let old = table.undo(revision)?;
            rows.retain(|(path, _)| !old.contains_key(path));
            rows.extend(old.into_iter().filter_map(|(path, entry)| {
                let wanted = scope.covers(&path) && after.is_none_or(|after| *path > *after);
                entry.filter(|_| wanted).map(|entry| (path, entry))
            }));
            rows.sort_by(|a, b| a.0.cmp(&b.0));
        }
        Ok(Listing { revision, rows })
    }

    /// Events of a scope after `cursor`, which is moved behind what was looked at.
    ///
    /// # Errors
    /// `Expired` when history no longer reaches back to the cursor.
    pub fn events(&self, scope: &Scope, cursor: &mut u64) -> Result<Progress, Expired> {
        let floor = self.tables.get(&scope.resource).map_or(self.start, |table| table.floor);
        if *cursor < floor {
            return Err(Expired { asked: *cursor, oldest: floor });
        }
        let mut events = Vec::new();
        if let Some(table) = self.tables.get(&scope.resource) {
            let first = table.ring.partition_point(|(_, event)| event.revision <= *cursor);
            for (_, event) in table.ring.range(first..) {
                if events.len() == BATCH_EVENTS {
                    return Ok(Progress { events, revision: *cursor });
                }
                *cursor = event.revision;
                if scope.covers(&event.path) {
                    events.push(event.clone());
                }
            }
        }
        *cursor = (*cursor).max(self.revision);
        Ok(Progress { events, revision: *cursor })
    }

    fn table(&mut self, resource: &Arc<str>) -> &mut Table {
        let start = self.start;
        self.tables.entry(Arc::clone(resource)).or_insert_with(|| Table {
            rows: BTreeMap::new(),
            ring: VecDeque::new(),
            ring_bytes: 0,
            floor: start,
        })
    }

    fn pending<'a>(&'a self, batch: &'a Batch, key: &Key) -> Option<&'a Arc<Entry>> {
        match batch.pending.get(key) {
            Some(entry) => entry.as_ref(),
            None => self.get(key),
        }
    }

    fn step(&self, batch: &mut Batch, op: &Op, revision: u64) -> Arc<Entry> {
        let (key, change, entry, row) = match op {
            Op::Put { key, draft, .. } => {
                let before = self.pending(batch, key).cloned();
                let after = Arc::new(draft.seal(revision));
                let change = Change::Put { before, after: Arc::clone(&after) };
                (key, change, Arc::clone(&after), Some(after))
            }
            Op::Delete { key, .. } => {
                let before = Arc::clone(self.pending(batch, key).expect("prepare looked"));
                let last = Arc::new(reseal(&before, revision));
                let change = Change::Delete { before, last: Arc::clone(&last) };
                (key, change, last, None)
            }
        };
        batch.pending.insert(key.clone(), row);
        let event = Event { revision, path: Arc::clone(&key.path), change };
        batch.changes.push((key.clone(), event));
        entry
    }
}

impl Table {
    fn range<'a>(
        &'a self,
        scope: &'a Scope,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Arc<Entry>)> {
        let first = match (&scope.namespace, &scope.name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            (Some(namespace), None) => format!("{namespace}/"),
            (None, _) => String::new(),
        };
        let start = match after {
            Some(after) if *after >= *first => Bound::Excluded(after),
            Some(_) | None => Bound::Included(first.as_str()),
        };
        let prefix = if scope.namespace.is_some() { first.clone() } else { String::new() };
        self.rows
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(move |(path, _)| path.starts_with(&prefix))
            .filter(|(path, _)| scope.covers(path))
    }

    /// What the rows changed since `revision` were then.
    fn undo(&self, revision: u64) -> Result<BTreeMap<Arc<str>, Option<Arc<Entry>>>, Expired> {
        if revision < self.floor {
            return Err(Expired { asked: revision, oldest: self.floor });
        }
        let first = self.ring.partition_point(|(_, event)| event.revision <= revision);
        let mut old = BTreeMap::new();
        for (_, event) in self.ring.range(first..) {
            let before = match &event.change {
                Change::Put { before, .. } => before.clone(),
                Change::Delete { before, .. } => Some(Arc::clone(before)),
            };
            old.entry(Arc::clone(&event.path)).or_insert(before);
        }
        Ok(old)
    }

    fn trim(&mut self, now: Duration) {
        while let Some((at, event)) = self.ring.front() {
            let old = now.saturating_sub(*at) > RING_AGE && self.ring.len() > RING_LEAST;
            let full = self.ring.len() > RING_EVENTS
                || (self.ring_bytes > RING_BYTES && self.ring.len() > 1);
            if !old && !full {
                return;
            }
            self.floor = event.revision;
            self.ring_bytes = self.ring_bytes.saturating_sub(weight(event));
            self.ring.pop_front();
        }
    }
}

fn holds(expect: Expect, current: Option<&Arc<Entry>>) -> bool {
    match expect {
        Expect::Absent => current.is_none(),
        Expect::Revision(revision) => current.is_some_and(|entry| entry.revision == revision),
        Expect::Anything => true,
    }
}

fn weight(event: &Event) -> usize {
    match &event.change {
        Change::Put { after, .. } => after.bytes.len(),
        Change::Delete { last, .. } => last.bytes.len(),
    }
}
