//! Pods that wait for a node: ready ones by priority and age, those that back off, and those that
//! nothing but a change of the cluster can help. Pure; time is passed in.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::controllers::model::Key;

/// Upstream `podInitialBackoffSeconds` and `podMaxBackoffSeconds`.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// After this a pod is tried again although nothing changed (`podMaxInUnschedulablePodsDuration`).
const UNSCHEDULABLE_MAX: Duration = Duration::from_secs(300);

type Rank = (Reverse<i64>, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Active,
    Backoff(Instant),
    Unschedulable(Instant),
    /// Popped: being bound.
    Out,
}

#[derive(Clone, Debug)]
struct Entry {
    rank: Rank,
    place: Place,
    attempts: u32,
    /// When the last attempt failed.
    failed: Option<Instant>,
}

/// Holds each pod at most once; so it is no longer than the number of pods.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: BTreeMap<Key, Entry>,
    active: BTreeSet<(Rank, Key)>,
    timers: BTreeSet<(Instant, Key)>,
    next: u64,
    /// Counts changes that may help: one that comes while a pod is out must not be missed.
    moves: u64,
}

impl Queue {
    /// A pod came, or changed in what it asks for.
    pub(super) fn add(&mut self, key: &Key, priority: i64) {
        let mut entry = match self.take(key) {
            Some(entry) => entry,
            None => {
                self.next += 1;
                let rank = (Reverse(priority), self.next);
                Entry { rank, place: Place::Active, attempts: 0, failed: None }
            }
        };
        entry.rank.0 = Reverse(priority);
        self.put(key, entry, Place::Active);
    }

    #[cfg(test)]
    fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    pub(super) fn remove(&mut self, key: &Key) {
        self.take(key);
    }

    /// The next pod, and a mark to give back with [`Queue::park`].
    pub(super) fn pop(&mut self) -> Option<(Key, u64)> {
        let (_, key) = self.active.pop_first()?;
        let entry = self.entries.get_mut(&key)?;
        entry.place = Place::Out;
        entry.attempts = entry.attempts.saturating_add(1);
        Some((key, self.moves))
    }

    /// No node fits: waits for a change, or only for its backoff when one came since `mark`.
    pub(super) fn park(&mut self, key: &Key, mark: u64, now: Instant) {
        if self.moves != mark {
            return self.retry(key, now);
        }
        self.fail(key, now, |_| Place::Unschedulable(now + UNSCHEDULABLE_MAX));
    }

    /// Binding failed: again after a backoff.
    pub(super) fn retry(&mut self, key: &Key, now: Instant) {
        self.fail(key, now, |attempts| Place::Backoff(now + backoff(attempts)));
    }

    fn fail(&mut self, key: &Key, now: Instant, place: impl Fn(u32) -> Place) {
        if let Some(mut entry) = self.take(key) {
            entry.failed = Some(now);
            let place = place(entry.attempts);
            self.put(key, entry, place);
        }
    }

    /// Something changed that may help: the unschedulable are tried again once they have backed off.
    pub(super) fn flush(&mut self, now: Instant) {
        self.moves += 1;
        let waiting: Vec<Key> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.place, Place::Unschedulable(_)))
            .map(|(key, _)| key.clone())
            .collect();
        for key in waiting {
            let Some(entry) = self.take(&key) else { continue };
            let end = entry.failed.map_or(now, |failed| failed + backoff(entry.attempts));
            let place = if end <= now { Place::Active } else { Place::Backoff(end) };
            self.put(&key, entry, place);
        }
    }

    /// Moves what is due and tells when the next timer is.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Option<Instant> {
        while let Some((at, key)) = self.timers.first().cloned() {
            if at > now {
                return Some(at);
            }
            if let Some(entry) = self.take(&key) {
                self.put(&key, entry, Place::Active);
            }
        }
        None
    }

    fn take(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        match entry.place {
            Place::Active => drop(self.active.remove(&(entry.rank, key.clone()))),
            Place::Backoff(at) | Place::Unschedulable(at) => {
                self.timers.remove(&(at, key.clone()));
            }
            Place::Out => (),
        }
        Some(entry)
    }

    fn put(&mut self, key: &Key, mut entry: Entry, place: Place) {
        match place {
            Place::Active => drop(self.active.insert((entry.rank, key.clone()))),
            Place::Backoff(at) | Place::Unschedulable(at) => {
                self.timers.insert((at, key.clone()));
            }
            Place::Out => (),
        }
        entry.place = place;
        self.entries.insert(key.clone(), entry);
    }
}

fn backoff(attempts: u32) -> Duration {
    BACKOFF_MIN.saturating_mul(2_u32.saturating_pow(attempts.saturating_sub(1))).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("ns", name)
    }

    #[test]
    fn the_important_and_then_the_old_come_first() {
        let mut queue = Queue::default();
        for (name, priority) in [("a", 0), ("b", 5), ("c", 0)] {
            queue.add(&key(name), priority);
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(key, _)| key.name).collect();
        assert_eq!(order, ["b", "a", "c"]);
    }

    #[test]
    fn an_unschedulable_pod_waits_for_a_change_and_its_backoff() {
        let mut queue = Queue::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        queue.add(&key("a"), 0);
        let (_, mark) = queue.pop().unwrap();
        queue.park(&key("a"), mark, start);
        assert_eq!(queue.handle_timeout(start), Some(after(300)));
        queue.flush(start);
        assert_eq!(queue.handle_timeout(start), Some(after(1)), "the first backoff is a second");
        assert_eq!(queue.handle_timeout(after(1)), None);
        let (_, mark) = queue.pop().unwrap();
        queue.park(&key("a"), mark, after(1));
        queue.flush(after(9));
        assert!(queue.pop().is_some(), "backed off long ago");
    }

    #[test]
    fn a_change_while_the_pod_was_out_is_not_missed() {
        let mut queue = Queue::default();
        let now = Instant::now();
        queue.add(&key("a"), 0);
        let (_, mark) = queue.pop().unwrap();
        queue.flush(now);
        queue.park(&key("a"), mark, now);
        assert_eq!(queue.handle_timeout(now), Some(now + Duration::from_secs(1)));
    }

    #[test]
    fn backoff_grows_to_ten_seconds() {
        let waits: Vec<u64> = (1..7).map(|attempts| backoff(attempts).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 10, 10]);
    }

    #[test]
    fn a_removed_pod_leaves_nothing_behind() {
        let mut queue = Queue::default();
        queue.add(&key("a"), 0);
        let (_, mark) = queue.pop().unwrap();
        queue.remove(&key("a"));
        queue.park(&key("a"), mark, Instant::now());
        assert!(!queue.contains(&key("a")));
        assert_eq!(queue.handle_timeout(Instant::now()), None);
    }
}
