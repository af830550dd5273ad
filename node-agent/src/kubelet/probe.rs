//! When a probe runs and what its results mean: a pure schedule with virtual time.
//!
//! The pod machine owns one schedule for each probe of a running container; `prober` does the asking.

use std::time::{Duration, Instant};

/// Which of the three probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

impl ProbeKind {
    /// As in the words of events: `Readiness probe failed: …`.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// The timings of a probe, with upstream's defaults filled in (period 10 s, timeout 1 s, success 1, failure 3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePlan {
    pub initial_delay: Duration,
    pub period: Duration,
    pub timeout: Duration,
    pub success_threshold: u32,
    pub failure_threshold: u32,
    /// `terminationGracePeriodSeconds` of the probe: used instead of the pod's when it kills.
    pub grace: Option<Duration>,
}

/// What a result changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The threshold was reached just now: the probe succeeds.
    TurnedGood,
    /// The threshold was reached just now: the probe fails.
    TurnedBad,
    Unchanged,
}

/// The schedule of one probe of one container instance.
#[derive(Clone, Debug)]
pub struct ProbeSchedule {
    plan: ProbePlan,
    next: Instant,
    in_flight: bool,
    /// `None` until a threshold was reached for the first time.
    good: Option<bool>,
    successes: u32,
    failures: u32,
}

impl ProbeSchedule {
    /// Starts a schedule for a container that runs since `started`.
    #[must_use]
    pub fn new(plan: ProbePlan, started: Instant) -> Self {
        let next = started + plan.initial_delay;
        Self { plan, next, in_flight: false, good: None, successes: 0, failures: 0 }
    }

    /// As `new`, but with a result that is already known: a container taken over while it ran.
    #[must_use]
    pub fn resumed(plan: ProbePlan, now: Instant, good: bool) -> Self {
        Self { good: Some(good), ..Self::new(plan, now) }
    }

    /// When the next attempt is due; `None` while one is in flight.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        (!self.in_flight).then_some(self.next)
    }

    /// Takes an attempt if one is due and returns its time limit.
    pub fn take(&mut self, now: Instant) -> Option<Duration> {
        if self.in_flight || now < self.next {
            return None;
        }
        self.in_flight = true;
        self.next = now + self.plan.period;
        Some(self.plan.timeout)
    }

    /// Counts a result and plans the next attempt, one period after the last one began.
    pub fn record(&mut self, success: bool, now: Instant) -> Verdict {
        self.in_flight = false;
        self.next = self.next.max(now);
        if success {
            self.successes = self.successes.saturating_add(1);
            self.failures = 0;
        } else {
            self.failures = self.failures.saturating_add(1);
            self.successes = 0;
        }
        let reached = if success {
            self.successes >= self.plan.success_threshold
        } else {
            self.failures >= self.plan.failure_threshold
        };
        if !reached || self.good == Some(success) {
            return Verdict::Unchanged;
        }
        self.good = Some(success);
        if success { Verdict::TurnedGood } else { Verdict::TurnedBad }
    }

    /// Grace of a kill that this probe asks for, if it has one of its own.
    #[must_use]
    pub const fn grace(&self) -> Option<Duration> {
        self.plan.grace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn plan(success: u32, failure: u32) -> ProbePlan {
        ProbePlan {
            initial_delay: Duration::from_secs(5),
            period: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            success_threshold: success,
            failure_threshold: failure,
            grace: None,
        }
    }

    #[test]
    fn attempts_begin_after_the_delay_and_follow_each_other_by_the_period() {
        let start = Instant::now();
        let mut probe = ProbeSchedule::new(plan(1, 3), start);
        assert_eq!(probe.take(start + Duration::from_secs(4)), None);
        assert_eq!(probe.take(start + Duration::from_secs(5)), Some(Duration::from_secs(1)));
        assert_eq!(probe.due(), None, "one attempt at a time");
        assert_eq!(probe.take(start + Duration::from_secs(50)), None);
        probe.record(true, start + Duration::from_secs(6));
        assert_eq!(probe.due(), Some(start + Duration::from_secs(15)));
    }

    #[test]
    fn a_threshold_must_be_reached_in_a_row() {
        let now = Instant::now();
        let mut probe = ProbeSchedule::new(plan(2, 3), now);
        let verdicts: Vec<Verdict> =
            [true, false, true, true, true, false, false, true, false, false, false, false]
                .into_iter()
                .map(|success| probe.record(success, now))
                .collect();
        let mut expected = vec![Verdict::Unchanged; 12];
        expected[3] = Verdict::TurnedGood;
        expected[10] = Verdict::TurnedBad;
        assert_eq!(verdicts, expected);
    }

    #[test]
    fn a_late_result_does_not_make_attempts_pile_up() {
        let start = Instant::now();
        let mut probe = ProbeSchedule::new(plan(1, 1), start);
        assert!(probe.take(start + Duration::from_secs(5)).is_some());
        let late = start + Duration::from_secs(100);
        assert_eq!(probe.record(false, late), Verdict::TurnedBad);
        assert_eq!(probe.due(), Some(late));
    }
}
