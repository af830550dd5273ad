//! Desired-state tables: rows by key with a revision, changes since a revision, and a `synced` mark.
//!
//! One writer fills a table from a source; any number of readers ask for what changed since the
//! revision they have seen. Reading costs in proportion to the change, not to the table, unless more
//! than `RECENT` changes have come since: then the rows are gone through. Deleted keys are remembered
//! until every live reader may have seen them (`TOMBSTONES` at most; a reader that fell behind further
//! is told to read everything).

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

/// Deleted keys kept for slow readers; a reader further behind gets a full delta.
const TOMBSTONES: usize = 65_536;
/// Changes that are found without going through all rows. A node must afford tens of thousands of rows,
/// so that not every one can have a second key.
const RECENT: usize = 1_024;

/// A shared table. Cloning it clones the handle.
#[derive(Debug)]
pub struct Table<K, V> {
    inner: Arc<Mutex<Inner<K, V>>>,
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner<K, V> {
    rows: BTreeMap<K, (u64, Arc<V>)>,
    /// The last changes, oldest first; those of a row that has changed again are void.
    recent: VecDeque<(u64, K)>,
    /// Every change after this revision is in `recent`.
    before_recent: u64,
    deleted: BTreeMap<K, u64>,
    /// The same by revision, oldest first; those of a key that is back are void.
    graves: VecDeque<(u64, K)>,
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
            recent: VecDeque::new(),
            before_recent: 0,
            deleted: BTreeMap::new(),
            graves: VecDeque::new(),
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
        inner.rows.insert(key.clone(), (revision, Arc::new(row)));
        inner.deleted.remove(&key);
        inner.note(revision, key);
        drop(inner);
        self.changed.send_replace(revision);
        true
    }

    /// Deletes a row; an absent key changes nothing. Returns whether it changed.
    pub fn delete(&self, key: &K) -> bool {
        let mut inner = self.lock();
        if inner.rows.remove(key).is_none() {
            return false;
        }
        let revision = inner.next_revision();
        inner.deleted.insert(key.clone(), revision);
        inner.graves.push_back((revision, key.clone()));
        inner.note(revision, key.clone());
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
        compact(&mut inner.rows);
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
        if since < inner.before_recent {
            let newer = inner.rows.iter().filter(|(_, (revision, _))| *revision > since);
            delta.upserts = newer.map(|(key, (_, row))| (key.clone(), Arc::clone(row))).collect();
            let newer = inner.deleted.iter().filter(|(_, revision)| **revision > since);
            delta.deletes = newer.map(|(key, _)| key.clone()).collect();
            return delta;
        }
        let start = inner.recent.partition_point(|(revision, _)| *revision <= since);
        for (revision, key) in inner.recent.range(start..) {
            match inner.rows.get(key) {
                Some((last, row)) if last == revision => {
                    delta.upserts.push((key.clone(), Arc::clone(row)));
                }
                None if inner.deleted.get(key) == Some(revision) => delta.deletes.push(key.clone()),
                // It has changed again since.
                Some(_) | None => {}
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

/// Up to where somebody follows a table whose rows are written to a place that may hold more: what an earlier
/// agent left there.
#[derive(Debug, Default)]
pub struct Followed {
    revision: u64,
    /// The place was compared with the whole table when that was synced.
    is_swept: bool,
}

impl Followed {
    /// What is to be written now. As soon as the table is synced that is all of it, once, whatever was read
    /// before: only then may what it lacks go.
    #[must_use]
    pub fn changes<K: Ord + Clone, V: PartialEq>(&self, table: &Table<K, V>) -> Delta<K, V> {
        let is_due = table.is_synced() && !self.is_swept;
        table.changes_since(if is_due { 0 } else { self.revision })
    }

    /// All of it is written.
    pub const fn record<K, V>(&mut self, delta: &Delta<K, V>) {
        self.revision = delta.revision;
        self.is_swept |= delta.full && delta.synced;
    }

    /// It is not known any more what is written.
    pub const fn forget(&mut self) {
        *self = Self { revision: 0, is_swept: false };
    }
}

impl<K: Ord + Clone, V> Inner<K, V> {
    const fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    fn note(&mut self, revision: u64, key: K) {
        self.recent.push_back((revision, key));
        if self.recent.len() > RECENT
            && let Some((oldest, _)) = self.recent.pop_front()
        {
            self.before_recent = oldest;
        }
    }

    fn forget_surplus(&mut self) {
        while self.graves.len() > TOMBSTONES {
            let Some((revision, key)) = self.graves.pop_front() else { return };
            if self.deleted.get(&key) == Some(&revision) {
                self.deleted.remove(&key);
                self.forgotten = revision;
            }
        }
    }
}

/// Packs a tree that grew row by row, whose nodes are then half to three quarters full, into full nodes.
pub fn compact<K: Ord, V>(rows: &mut BTreeMap<K, V>) {
    *rows = std::mem::take(rows).into_iter().collect();
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
    fn a_follower_gets_all_rows_once_the_table_is_synced_also_those_that_it_had() {
        let (table, mut followed) = (Table::new(), Followed::default());
        assert!(table.upsert(1, "a"));
        followed.record(&followed.changes(&table));
        assert!(table.upsert(2, "b"));
        let early = followed.changes(&table);
        assert_eq!((early.full, early.synced, keys(&early)), (false, false, (vec![2], vec![])));
        followed.record(&early);
        table.mark_synced();
        for _attempt in 0..2 {
            let whole = followed.changes(&table);
            assert_eq!(
                (whole.full, whole.synced, keys(&whole)),
                (true, true, (vec![1, 2], vec![]))
            );
        }
        followed.record(&followed.changes(&table));
        assert!(table.delete(&1));
        let late = followed.changes(&table);
        assert_eq!((late.full, keys(&late)), (false, (vec![], vec![1])));
        followed.record(&late);
        followed.forget();
        assert_eq!(keys(&followed.changes(&table)), (vec![2], vec![]));
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

    #[test]
    fn a_reader_that_is_far_behind_sees_the_same_as_one_that_is_near() {
        let table = Table::new();
        let count = u16::try_from(RECENT).unwrap() * 3;
        for key in 0..count {
            assert!(table.upsert(key, 0));
        }
        let far = table.changes_since(0).revision;
        assert!(table.upsert(1, 1));
        assert!(table.upsert(2, 1));
        assert!(table.delete(&3));
        assert!(table.delete(&2));
        assert!(table.upsert(2, 2));
        let seen = |delta: &Delta<u16, u32>| {
            let mut upserts: Vec<_> =
                delta.upserts.iter().map(|(key, row)| (*key, **row)).collect();
            upserts.sort_unstable();
            (delta.full, upserts, delta.deletes.clone())
        };
        let near = seen(&table.changes_since(far));
        assert_eq!(near, (false, vec![(1, 1), (2, 2)], vec![3]));
        // As many changes again that leave nothing behind.
        for _ in 0..RECENT {
            assert!(table.upsert(9_999, 0));
            assert!(table.delete(&9_999));
        }
        let (full, upserts, deletes) = seen(&table.changes_since(far));
        assert_eq!((full, upserts, deletes), (false, near.1, vec![3, 9_999]));
    }
}
