//! Desired-state tables: rows by key with a revision, changes since a revision, and a `synced` mark.
//!
//! One writer fills a table from a source; any number of readers ask for what changed since the
//! revision they have seen. Reading costs in proportion to the change, not to the table. Deleted
//! keys are remembered until every live reader may have seen them (`TOMBSTONES` at most; a reader
//! that fell behind further is told to read everything).

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

/// Deleted keys kept for slow readers; a reader further behind gets a full delta.
const TOMBSTONES: usize = 65_536;

/// A shared table. Cloning it clones the handle.
#[derive(Debug)]
pub struct Table<K, V> {
    inner: Arc<Mutex<Inner<K, V>>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner<K, V> {
    rows: BTreeMap<K, (u64, Arc<V>)>,
    by_revision: BTreeMap<u64, (K, bool)>,
    deleted: BTreeMap<K, u64>,
    /// Deletions at or before this revision are forgotten.
    forgotten: u64,
    revision: u64,
    synced: bool,
}

/// What changed since a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta<K, V> {
    /// Ask for changes since this next time.
    pub revision: u64,
    /// The source has delivered its whole first list. Nothing may be deleted on absence before.
    pub synced: bool,
    /// The delta is the whole table: whatever is not in `upserts` does not exist.
    pub full: bool,
    pub upserts: Vec<(K, Arc<V>)>,
    pub deletes: Vec<K>,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner), changed: self.changed.clone() }
    }
}

impl<K: Ord + Clone, V: PartialEq> Default for Table<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Ord + Clone, V: PartialEq> Table<K, V> {
    /// An empty table that is not synced.
    #[must_use]
    pub fn new() -> Self {
        let inner = Inner {
            rows: BTreeMap::new(),
            by_revision: BTreeMap::new(),
            deleted: BTreeMap::new(),
            forgotten: 0,
            revision: 0,
            synced: false,
        };
        Self { inner: Arc::new(Mutex::new(inner)), changed: watch::Sender::new(0) }
    }

    /// Inserts or replaces a row; an equal row changes nothing. Returns whether it changed.
    pub fn upsert(&self, key: K, row: V) -> bool {
        let mut inner = self.lock();
        if inner.rows.get(&key).is_some_and(|(_, old)| **old == row) {
            return false;
        }
        let revision = inner.next_revision();
        if let Some((old, _)) = inner.rows.insert(key.clone(), (revision, Arc::new(row))) {
            inner.by_revision.remove(&old);
        }
        if let Some(old) = inner.deleted.remove(&key) {
            inner.by_revision.remove(&old);
        }
        inner.by_revision.insert(revision, (key, true));
        drop(inner);
        self.changed.send_replace(revision);
        true
    }

    /// Deletes a row; an absent key changes nothing. Returns whether it changed.
    pub fn delete(&self, key: &K) -> bool {
        let mut inner = self.lock();
        let Some((old, _)) = inner.rows.remove(key) else { return false };
        inner.by_revision.remove(&old);
        let revision = inner.next_revision();
        inner.deleted.insert(key.clone(), revision);
        inner.by_revision.insert(revision, (key.clone(), false));
        inner.forget_surplus();
        drop(inner);
        self.changed.send_replace(revision);
        true
    }

    /// Makes the table exactly `rows` and marks it synced: the end of a (re)list.
    pub fn replace(&self, rows: BTreeMap<K, V>) {
        let stale: Vec<K> =
            self.lock().rows.keys().filter(|key| !rows.contains_key(key)).cloned().collect();
        for key in &stale {
            self.delete(key);
        }
        for (key, row) in rows {
            self.upsert(key, row);
        }
        self.mark_synced();
    }

    /// Says that the source's whole first list has been written.
    pub fn mark_synced(&self) {
        let mut inner = self.lock();
        if inner.synced {
            return;
        }
        inner.synced = true;
        let revision = inner.next_revision();
        drop(inner);
        self.changed.send_replace(revision);
    }

    /// What changed after `since`; 0 asks for everything.
    #[must_use]
    pub fn changes_since(&self, since: u64) -> Delta<K, V> {
        let inner = self.lock();
        let full = since == 0 || since < inner.forgotten;
        let mut delta = Delta {
            revision: inner.revision,
            synced: inner.synced,
            full,
            upserts: Vec::new(),
            deletes: Vec::new(),
        };
        if full {
            delta.upserts =
                inner.rows.iter().map(|(k, (_, row))| (k.clone(), Arc::clone(row))).collect();
            return delta;
        }
        for (key, live) in inner.by_revision.range(since + 1..).map(|(_, change)| change) {
            match inner.rows.get(key) {
                Some((_, row)) if *live => delta.upserts.push((key.clone(), Arc::clone(row))),
                _ => delta.deletes.push(key.clone()),
            }
        }
        delta
    }

    /// The row of a key.
    #[must_use]
    pub fn row(&self, key: &K) -> Option<Arc<V>> {
        self.lock().rows.get(key).map(|(_, row)| Arc::clone(row))
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().rows.len()
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the source's whole first list has been written.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.lock().synced
    }

    /// A channel that holds the newest revision; await its change, then ask for `changes_since`.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Inner<K, V>> {
        // A panic while the lock was held leaves plain data behind, every update of which is
        // completed by the next full delta.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Ord + Clone, V> Inner<K, V> {
    const fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn forget_surplus(&mut self) {
        while self.deleted.len() > TOMBSTONES {
            let oldest = self.by_revision.iter().find(|(_, (_, live))| !live);
            let Some((&revision, (key, _))) = oldest else { return };
            let key = key.clone();
            self.by_revision.remove(&revision);
            self.deleted.remove(&key);
            self.forgotten = revision;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(delta: &Delta<u8, &'static str>) -> (Vec<u8>, Vec<u8>) {
        (delta.upserts.iter().map(|(key, _)| *key).collect(), delta.deletes.clone())
    }

    #[test]
    fn a_reader_sees_each_change_once_and_only_the_last_state_of_a_row() {
        let table = Table::new();
        assert!(table.upsert(1, "a"));
        assert!(table.upsert(2, "b"));
        let first = table.changes_since(0);
        assert_eq!((first.full, keys(&first)), (true, (vec![1, 2], vec![])));

        assert!(table.upsert(1, "c"));
        assert!(table.upsert(1, "d"));
        assert!(table.delete(&2));
        let second = table.changes_since(first.revision);
        assert_eq!((second.full, keys(&second)), (false, (vec![1], vec![2])));
        assert_eq!(keys(&table.changes_since(second.revision)), (vec![], vec![]));
    }

    #[test]
    fn a_row_deleted_and_made_again_is_an_upsert() {
        let table = Table::new();
        assert!(table.upsert(1, "a"));
        let seen = table.changes_since(0).revision;
        assert!(table.delete(&1));
        assert!(table.upsert(1, "a"));
        assert_eq!(keys(&table.changes_since(seen)), (vec![1], vec![]));
    }

    #[test]
    fn an_equal_row_wakes_nobody() {
        let table = Table::new();
        assert!(table.upsert(1, "a"));
        let mut seen = table.subscribe();
        seen.mark_unchanged();
        assert!(!table.upsert(1, "a"));
        assert!(!seen.has_changed().expect("the table lives"));
    }

    #[test]
    fn replacing_deletes_what_the_list_lacks_and_marks_synced() {
        let table = Table::new();
        assert!(table.upsert(1, "a"));
        let seen = table.changes_since(0);
        assert!(!seen.synced);
        table.replace(BTreeMap::from([(2, "b")]));
        let delta = table.changes_since(seen.revision);
        assert_eq!((delta.synced, keys(&delta)), (true, (vec![2], vec![1])));
    }
}
