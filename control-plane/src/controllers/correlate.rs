//! Which Events are written, counted up, combined or dropped. Pure; time is passed in.
//!
//! Numbers are upstream's (`client-go/tools/record/events_cache.go`): the same event is counted; more than ten
//! that differ only in their message within ten minutes become one; a source may tell 25 of one object at once
//! and then one in five minutes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Remembered events and objects (`maxLruCacheEntries`).
const MEMORY: usize = 4096;
/// `defaultAggregateMaxEvents`.
const ALIKE: u32 = 10;
/// `defaultAggregateIntervalInSeconds`.
const INTERVAL: Duration = Duration::from_secs(600);
/// `defaultSpamBurst`.
const BURST: f64 = 25.0;
/// `defaultSpamQPS`: one in five minutes.
const PER_SECOND: f64 = 1.0 / 300.0;

/// Source component, uid of the object, reason.
type Subject = (&'static str, String, &'static str);

/// What is to be done about an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Drop,
    /// Writes a new Event with this message, then calls [`Correlator::written`].
    Create {
        message: String,
    },
    /// Counts the Event of this name up.
    Count {
        name: String,
        count: u64,
        message: String,
    },
}

#[derive(Debug)]
struct Alike {
    since: Instant,
    count: u32,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

#[derive(Debug)]
struct Known {
    name: String,
    count: u64,
    at: Instant,
}

/// The memory of what was told.
#[derive(Debug, Default)]
pub(super) struct Correlator {
    known: BTreeMap<(Subject, String), Known>,
    alike: BTreeMap<Subject, Alike>,
    buckets: BTreeMap<(&'static str, String), Bucket>,
}

impl Correlator {
    pub(super) fn judge(&mut self, subject: &Subject, message: &str, now: Instant) -> Verdict {
        let id = self.identity(subject, message, now);
        if !self.may_tell(subject, now) {
            return Verdict::Drop;
        }
        let message = if id.1.is_empty() {
            format!("(combined from similar events): {message}")
        } else {
            message.to_owned()
        };
        match self.known.get_mut(&id) {
            Some(known) => {
                known.count += 1;
                known.at = now;
                Verdict::Count { name: known.name.clone(), count: known.count, message }
            }
            None => Verdict::Create { message },
        }
    }

    /// The event that [`Correlator::judge`] had created has this name.
    pub(super) fn written(&mut self, subject: &Subject, message: &str, name: String, now: Instant) {
        if self.known.len() >= MEMORY
            && let Some(oldest) =
                self.known.iter().min_by_key(|(_, known)| known.at).map(|(id, _)| id.clone())
        {
            self.known.remove(&oldest);
        }
        let combined = self.alike.get(subject).is_some_and(|alike| alike.count > ALIKE);
        let message = if combined { String::new() } else { message.to_owned() };
        self.known.insert((subject.clone(), message), Known { name, count: 1, at: now });
    }

    /// The event of this name is no longer there.
    pub(super) fn forget(&mut self, name: &str) {
        self.known.retain(|_, known| known.name != name);
    }

    /// The message, or nothing for the event that combines many.
    fn identity(&mut self, subject: &Subject, message: &str, now: Instant) -> (Subject, String) {
        let told = (subject.clone(), message.to_owned());
        if self.known.contains_key(&told) {
            return told;
        }
        if self.alike.len() >= MEMORY {
            self.alike.retain(|_, alike| now.duration_since(alike.since) < INTERVAL);
        }
        if self.alike.len() >= MEMORY {
            self.alike.clear();
        }
        let alike = self.alike.entry(subject.clone()).or_insert(Alike { since: now, count: 0 });
        if now.duration_since(alike.since) >= INTERVAL {
            *alike = Alike { since: now, count: 0 };
        }
        alike.count = alike.count.saturating_add(1);
        if alike.count > ALIKE { (told.0, String::new()) } else { told }
    }

    fn may_tell(&mut self, subject: &Subject, now: Instant) -> bool {
        if self.buckets.len() >= MEMORY {
            self.buckets.retain(|_, bucket| bucket.refilled(now) < BURST);
        }
        if self.buckets.len() >= MEMORY {
            self.buckets.clear();
        }
        let bucket = self
            .buckets
            .entry((subject.0, subject.1.clone()))
            .or_insert(Bucket { left: BURST, at: now });
        bucket.left = bucket.refilled(now);
        bucket.at = now;
        let may = bucket.left >= 1.0;
        if may {
            bucket.left -= 1.0;
        }
        may
    }
}

impl Bucket {
    fn refilled(&self, now: Instant) -> f64 {
        (self.left + now.duration_since(self.at).as_secs_f64() * PER_SECOND).min(BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHO: (&str, &str, &str) = ("replicaset-controller", "uid", "SuccessfulCreate");

    fn subject() -> Subject {
        (WHO.0, WHO.1.to_owned(), WHO.2)
    }

    #[test]
    fn the_same_event_is_counted() {
        let (mut memory, now) = (Correlator::default(), Instant::now());
        assert_eq!(memory.judge(&subject(), "m", now), Verdict::Create { message: "m".into() });
        memory.written(&subject(), "m", "e1".into(), now);
        let counted = Verdict::Count { name: "e1".into(), count: 2, message: "m".into() };
        assert_eq!(memory.judge(&subject(), "m", now), counted);
        memory.forget("e1");
        assert_eq!(memory.judge(&subject(), "m", now), Verdict::Create { message: "m".into() });
    }

    #[test]
    fn many_alike_become_one_and_too_many_are_dropped() {
        let (mut memory, now) = (Correlator::default(), Instant::now());
        let (mut created, mut counted, mut dropped) = (0, 0, 0);
        for n in 0..100 {
            let message = format!("Created pod: web-{n}");
            match memory.judge(&subject(), &message, now) {
                Verdict::Create { message: told } => {
                    created += 1;
                    memory.written(&subject(), &message, format!("e{n}"), now);
                    assert_eq!(told.starts_with("(combined"), n == 10);
                }
                Verdict::Count { name, .. } => {
                    counted += 1;
                    assert_eq!(name, "e10");
                }
                Verdict::Drop => dropped += 1,
            }
        }
        assert_eq!((created, counted, dropped), (11, 14, 75));
        let later = now + Duration::from_secs(600);
        let fresh = memory.judge(&subject(), "x", later);
        assert_eq!(fresh, Verdict::Create { message: "x".into() }, "two may be told again");
    }
}
