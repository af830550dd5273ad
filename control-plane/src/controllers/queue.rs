//! Keys that wait for their sync: deduplicated, delayed, backed off. Pure; time is passed in.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use super::model::Key;

/// Upstream's `DefaultControllerRateLimiter`: 5 ms doubled per failure up to 1000 s.
const BACKOFF_MIN: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(1000);

/// A queue that holds each key at most once; so it is no longer than the number of objects.
#[derive(Debug, Default)]
pub(crate) struct KeyQueue {
    ready: VecDeque<Key>,
    queued: BTreeSet<Key>,
    /// When a key becomes ready by itself.
    timers: BTreeMap<(Instant, Key), ()>,
    due: BTreeMap<Key, Instant>,
    failures: BTreeMap<Key, u32>,
    /// Being worked on; touched ones come again afterwards.
    busy: BTreeMap<Key, Touched>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touched {
    No,
    Yes,
}

impl KeyQueue {
    /// Something about this key changed.
    pub(crate) fn touch(&mut self, key: Key) {
        if let Some(touched) = self.busy.get_mut(&key) {
            *touched = Touched::Yes;
            return;
        }
        if self.queued.insert(key.clone()) {
            self.ready.push_back(key);
        }
    }

    /// The key is to be looked at again at `at`, or earlier when it was already planned so.
    pub(crate) fn touch_at(&mut self, key: Key, at: Instant) {
        if let Some(due) = self.due.get(&key) {
            if *due <= at {
                return;
            }
            self.timers.remove(&(*due, key.clone()));
        }
        self.due.insert(key.clone(), at);
        self.timers.insert((at, key), ());
    }

    /// Moves what is due and tells when the next timer is.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Option<Instant> {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                return Some(entry.key().0);
            }
            let ((_, key), ()) = entry.remove_entry();
            self.due.remove(&key);
            self.touch(key);
        }
        None
    }

    /// The next key, which is busy from now until [`KeyQueue::finish`].
    pub(crate) fn pop(&mut self) -> Option<Key> {
        let key = self.ready.pop_front()?;
        self.queued.remove(&key);
        self.busy.insert(key.clone(), Touched::No);
        Some(key)
    }

    /// How many keys are busy.
    pub(crate) fn busy(&self) -> usize {
        self.busy.len()
    }

    /// The key's sync worked.
    pub(crate) fn finish(&mut self, key: &Key) {
        self.failures.remove(key);
        self.release(key);
    }

    /// The key's sync failed: again after a backoff, lengthened by up to a tenth (`jitter` in 0..=1).
    pub(crate) fn fail(&mut self, key: &Key, now: Instant, jitter: f64) {
        let failures = self.failures.entry(key.clone()).or_insert(0);
        let backoff = BACKOFF_MIN.saturating_mul(2_u32.saturating_pow(*failures)).min(BACKOFF_MAX);
        *failures = failures.saturating_add(1);
        self.busy.remove(key);
        self.touch_at(key.clone(), now + backoff + backoff.mul_f64(jitter.clamp(0.0, 1.0) / 10.0));
    }

    fn release(&mut self, key: &Key) {
        if self.busy.remove(key) == Some(Touched::Yes) {
            self.touch(key.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("ns", name)
    }

    #[test]
    fn a_key_touched_twice_comes_once_and_again_when_touched_while_busy() {
        let mut queue = KeyQueue::default();
        queue.touch(key("a"));
        queue.touch(key("a"));
        assert_eq!(queue.pop(), Some(key("a")));
        assert_eq!(queue.pop(), None);
        queue.touch(key("a"));
        assert_eq!(queue.pop(), None, "busy keys are never given to a second worker");
        queue.finish(&key("a"));
        assert_eq!(queue.pop(), Some(key("a")));
    }

    #[test]
    fn failures_double_the_wait_up_to_the_limit_and_success_forgets_them() {
        let mut queue = KeyQueue::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..20 {
            queue.touch(key("a"));
            queue.pop().unwrap();
            queue.fail(&key("a"), now, 0.0);
            let next = queue.handle_timeout(now).unwrap();
            waits.push(next - now);
            now = next;
            assert_eq!(queue.handle_timeout(now), None);
        }
        assert_eq!(waits[..3], [5, 10, 20].map(Duration::from_millis));
        assert_eq!(waits[19], Duration::from_secs(1000));
        queue.pop().unwrap();
        queue.finish(&key("a"));
        queue.touch(key("a"));
        queue.pop().unwrap();
        queue.fail(&key("a"), now, 0.0);
        assert_eq!(queue.handle_timeout(now), Some(now + Duration::from_millis(5)));
    }

    #[test]
    fn the_earlier_of_two_timers_counts() {
        let mut queue = KeyQueue::default();
        let now = Instant::now();
        let (soon, late) = (now + Duration::from_secs(1), now + Duration::from_secs(9));
        queue.touch_at(key("a"), late);
        queue.touch_at(key("a"), soon);
        queue.touch_at(key("a"), late);
        assert_eq!(queue.handle_timeout(now), Some(soon));
        assert_eq!(queue.handle_timeout(soon), None);
        assert_eq!(queue.pop(), Some(key("a")));
    }
}
