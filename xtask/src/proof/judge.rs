//! Pure: what a list of requests means.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive};

use anyhow::{Context as _, Result, bail, ensure};

/// One request as `load` reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Milliseconds since 1970 by the clock of the node it was sent on.
    pub start_ms: u64,
    /// When its connection began, in microseconds after the start; `None` when it failed before, in its look-up.
    pub connected: Option<u64>,
    pub micros: u64,
    /// The name of the pod that answered, or why there was no answer.
    pub answer: Result<String, String>,
}

/// Requests counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub by_replica: BTreeMap<String, u32>,
    /// Why, and when in the course of all.
    pub failed: Vec<String>,
}

impl Tally {
    /// Every request was answered, and there were as many as asked for.
    ///
    /// # Errors
    /// Says how many were not, with the first reasons.
    pub fn all_answered(&self, wanted: u32) -> Result<()> {
        let answered: u32 = self.by_replica.values().sum();
        ensure!(
            self.failed.is_empty() && answered == wanted,
            "{answered} of {wanted} requests were answered, {} failed: {:?}",
            self.failed.len(),
            self.failed.iter().take(3).collect::<Vec<_>>()
        );
        Ok(())
    }
}

/// How many requests there were meanwhile, and how long the longest took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    pub requests: usize,
    pub longest_ms: u64,
}

impl Covered {
    pub(crate) fn of(requests: &[Request]) -> Self {
        let longest = requests.iter().map(|request| request.micros).max().unwrap_or_default();
        Self { requests: requests.len(), longest_ms: longest / 1000 }
    }
}

impl fmt::Display for Covered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests of at most {} ms", self.requests, self.longest_ms)
    }
}

/// The lines of `load http`. A line that is none of its own is an error: nothing may be lost unseen.
pub(crate) fn parse(log: &str) -> Result<Vec<Request>> {
    log.lines()
        .map(|line| {
            let mut words = line.splitn(5, ' ');
            let mut word = || words.next().with_context(|| format!("a broken line: {line:?}"));
            let number =
                |text: &str| text.parse().with_context(|| format!("a broken line: {line:?}"));
            let start_ms = number(word()?)?;
            let connected = match word()? {
                "-" => None,
                text => Some(number(text)?),
            };
            let micros = number(word()?)?;
            let (kind, rest) = (word()?, word()?.to_owned());
            let is_possible = connected.map_or(kind == "failed", |connected| connected <= micros);
            ensure!(is_possible, "a broken line: {line:?}");
            let answer = match kind {
                "ok" => Ok(rest),
                "failed" => Err(rest),
                _ => bail!("a broken line: {line:?}"),
            };
            Ok(Request { start_ms, connected, micros, answer })
        })
        .collect()
}

/// What was printed without a last line that has no end yet.
pub(crate) fn whole_lines(printed: &str) -> &str {
    printed.rsplit_once('\n').map_or("", |(whole, _)| whole)
}

/// How many requests began after a moment.
pub(crate) fn begun_after(requests: &[Request], ms: u64) -> usize {
    requests.iter().filter(|request| request.start_ms > ms).count()
}

pub(crate) fn tally(requests: &[Request]) -> Tally {
    let mut tally = Tally::default();
    let first = requests.iter().map(|request| request.start_ms).min().unwrap_or_default();
    for request in requests {
        match &request.answer {
            Ok(replica) => *tally.by_replica.entry(replica.clone()).or_default() += 1,
            Err(why) => {
                let (after, took) = (request.start_ms - first, request.micros / 1000);
                tally.failed.push(format!("{why}, after {took} ms, {after} ms after the first"));
            }
        }
    }
    tally
}

/// Milliseconds after the slice shows an endpoint not ready in which a request may still fail.
const GRACE_MS: u64 = 500;

/// A replica that was deleted, by the requests' clock; each moment the latest that it can have been, as far as that
/// clock and the host's are known.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    /// When the EndpointSlice showed it not ready.
    pub(crate) not_ready_ms: u64,
    /// When the slice showed the new one ready.
    pub(crate) replaced_ms: u64,
    pub(crate) deleted: &'a str,
    pub(crate) replacement: &'a str,
}

/// Requests that the rule of `deletion` wants to see after a change.
const LATE: usize = 50;

/// Whether a load has gone on long enough to be judged: some requests began when the new replica was in the
/// slice, and it has answered.
pub(crate) fn covers(requests: &[Request], change: &Change<'_>) -> bool {
    let limit = change.not_ready_ms + GRACE_MS;
    let is_late_answer = |request: &Request| {
        request.start_ms > limit && request.answer.as_deref() == Ok(change.replacement)
    };
    begun_after(requests, change.replaced_ms.max(limit)) >= LATE
        && requests.iter().any(is_late_answer)
}

/// The rule: no request that starts more than `GRACE_MS` after the change fails or is answered by the
/// deleted replica; the new one answers some, and none fails on it. A request that fails names no
/// replica, so it counts as one on the new one when its connection, which is when the replica is chosen, began
/// after the slice had that; or, when it had none, when it ended after.
pub(crate) fn deletion(requests: &[Request], change: &Change<'_>) -> Result<()> {
    let limit = change.not_ready_ms + GRACE_MS;
    let late: Vec<&Request> = requests.iter().filter(|request| request.start_ms > limit).collect();
    ensure!(
        late.len() >= LATE && late.len() < requests.len(),
        "{} of {} requests came after the change: the load did not cover it",
        late.len(),
        requests.len()
    );
    for request in requests {
        let after = i128::from(request.start_ms) - i128::from(change.not_ready_ms);
        let chosen = request.start_ms + request.connected.unwrap_or(request.micros) / 1000;
        match &request.answer {
            Err(why) => ensure!(
                request.start_ms <= limit && chosen < change.replaced_ms,
                "a request {after} ms after the slice showed the change failed: {why}"
            ),
            Ok(replica) => ensure!(
                request.start_ms <= limit || replica != change.deleted,
                "{replica} answered a request {after} ms after it was taken out"
            ),
        }
    }
    let new = change.replacement;
    let answered = late.iter().filter(|request| request.answer.as_deref() == Ok(new)).count();
    ensure!(answered > 0, "the new replica {new} answered none of {} late requests", late.len());
    Ok(())
}

/// What a VM's clock said, between two looks at the host's; milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) before: u64,
    pub(crate) there: u64,
    pub(crate) after: u64,
}

/// How many milliseconds a VM's clock can be ahead of the host's by all readings, each of which has lost parts of one;
/// `None` when they contradict each other.
pub(crate) fn ahead(readings: &[Reading]) -> Option<RangeInclusive<i64>> {
    let bounds = readings.iter().map(|reading| {
        let least = reading.there.checked_signed_diff(reading.after)?.checked_sub(1)?;
        let most = reading.there.checked_signed_diff(reading.before)?.checked_add(1)?;
        Some(least..=most)
    });
    let both = |one: Option<RangeInclusive<i64>>, other: Option<RangeInclusive<i64>>| {
        let (one, other) = (one?, other?);
        Some(*one.start().max(other.start())..=*one.end().min(other.end()))
    };
    bounds.reduce(both)?.filter(|ahead| !ahead.is_empty())
}

/// Cores that a container with `limits.cpu: 200m` may be seen to use. 5 % either way: one period of 100 ms more or
/// less in ten seconds is 1 %, the rest is emulation.
const FIFTH_OF_A_CORE: RangeInclusive<f64> = 0.19..=0.21;
/// Seconds between the readings of the clock before and after that of the use: 0.2 % of ten seconds.
const ONE_MOMENT: f64 = 0.02;

/// CPU time used until a moment, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct CpuUsed {
    used: f64,
    uptime: f64,
}

impl CpuUsed {
    /// `<uptime before> <µs used> <uptime after>`; `None` also when too much time lies between.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ').map(|word| word.parse::<f64>().ok());
        let (before, used, after) = (words.next()??, words.next()??, words.next()??);
        let is_one_moment = after - before <= ONE_MOMENT + 1e-6;
        is_one_moment.then_some(Self { used: used / 1e6, uptime: before.midpoint(after) })
    }
}

/// The cores used between the last two samples: a fifth, and over all of them no more. What a node that stands still
/// lets a container take too much, the kernel takes back in the next periods.
pub(crate) fn held(samples: &[CpuUsed]) -> Result<f64> {
    let cores = |from: &CpuUsed, to: &CpuUsed| (to.used - from.used) / (to.uptime - from.uptime);
    let [first, .., before, last] = samples else {
        let [first, last] = samples else { bail!("nothing was measured") };
        return within(cores(first, last));
    };
    let whole = cores(first, last);
    ensure!(whole <= *FIFTH_OF_A_CORE.end(), "it used {whole:.3} cores in all, not 0.2");
    within(cores(before, last))
}

fn within(cores: f64) -> Result<f64> {
    ensure!(FIFTH_OF_A_CORE.contains(&cores), "it used {cores:.3} cores, not 0.2");
    Ok(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(start_ms: u64, replica: &str) -> Request {
        Request { start_ms, connected: Some(1), micros: 2, answer: Ok(replica.into()) }
    }

    /// 200 requests 10 ms apart; from 500 ms on the new replica answers.
    fn load() -> Vec<Request> {
        (0..200).map(|n| ok(n * 10, if n < 50 { "old" } else { "new" })).collect()
    }

    #[test]
    fn lines_become_requests_and_broken_ones_are_errors() {
        let found = parse("5 60 70 ok nginx-a\n6 - 80 failed no address: 3").unwrap();
        let (connected, answer) = (Some(60), Ok("nginx-a".into()));
        assert_eq!(found[0], Request { start_ms: 5, connected, micros: 70, answer });
        let answer = Err("no address: 3".into());
        assert_eq!(found[1], Request { start_ms: 6, connected: None, micros: 80, answer });
        let broken =
            ["5 x 7 ok a", "5 6 x ok a", "5 6 7 maybe a", "5 6 ok a", "5 8 7 ok a", "5 - 7 ok a"];
        for line in broken {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn missing_and_failed_requests_are_seen() {
        let tally = tally(&[ok(1, "a"), ok(2, "a"), ok(3, "b")]);
        tally.all_answered(3).unwrap();
        tally.all_answered(4).unwrap_err();
        let failed = Tally { failed: vec!["refused".into()], ..tally };
        failed.all_answered(3).unwrap_err();
    }

    fn change<'a>() -> Change<'a> {
        Change { not_ready_ms: 500, replaced_ms: 1100, deleted: "old", replacement: "new" }
    }

    #[test]
    fn failures_count_from_half_a_second_after_the_change() {
        deletion(&load(), &change()).unwrap();
        let fail_at = |index: usize| {
            let mut requests = load();
            requests[index].answer = Err("refused".into());
            deletion(&requests, &change())
        };
        assert!(fail_at(100).is_ok(), "500 ms after the change");
        assert!(fail_at(101).is_err(), "510 ms after the change");
    }

    #[test]
    fn failure_is_the_new_replicas_when_its_connection_began_after_that() {
        let sooner = Change { replaced_ms: 850, ..change() };
        let fails = |start_ms: u64, connected: Option<u64>, micros: u64| {
            let mut requests = load();
            let answer = Err("timed out".into());
            requests.push(Request { start_ms, connected, micros, answer });
            deletion(&requests, &sooner)
        };
        assert!(fails(600, Some(9_000), 5_000_000).is_ok(), "it was chosen before");
        assert!(fails(600, Some(249_999), 300_000).is_ok(), "chosen 1 ms before");
        assert!(fails(600, Some(250_000), 300_000).is_err(), "chosen in that moment");
        assert!(fails(900, Some(1), 2).is_err(), "begun after");
        assert!(fails(600, None, 200_000).is_ok(), "a look-up that failed before");
        assert!(fails(600, None, 250_000).is_err(), "a look-up that ended after");
        assert!(fails(1001, Some(1), 2).is_err(), "too long after the change");
    }

    #[test]
    fn load_covers_a_change_when_it_went_on_and_met_the_new_replica() {
        assert!(covers(&load(), &change()));
        // Of the requests from 0 ms on, 10 ms apart, the fiftieth after 1100 ms is at 1600 ms.
        assert!(covers(&load()[..161], &change()));
        assert!(!covers(&load()[..160], &change()));
        assert!(!covers(&load(), &Change { replaced_ms: 1500, ..change() }));
        assert!(!covers(&load(), &Change { replacement: "other", ..change() }));
        assert!(
            !covers(&load(), &Change { not_ready_ms: 1000, ..change() }),
            "also after the grace"
        );
        let mut early = load();
        early[101..].fill(ok(1990, "other"));
        assert!(!covers(&early, &change()), "the new one answered before only");
    }

    #[test]
    fn unfinished_line_of_a_load_that_runs_is_left_out() {
        assert_eq!(whole_lines("5 6 7 ok a\n6 7"), "5 6 7 ok a");
        assert_eq!(whole_lines("5 6 7 ok a\n"), "5 6 7 ok a");
        assert_eq!(whole_lines("5 6"), "");
        assert_eq!(begun_after(&load(), 1980), 1);
        assert_eq!(begun_after(&load(), 1990), 0);
        let slow = Request { micros: 7_000_000, ..ok(1, "a") };
        assert_eq!(Covered::of(&[ok(1, "a"), slow]).to_string(), "2 requests of at most 7000 ms");
    }

    #[test]
    fn container_is_held_when_ten_seconds_are_right_and_all_are_not_too_much() {
        let of = |used: &[f64]| {
            let samples: Vec<CpuUsed> = (0_u32..)
                .zip(used)
                .map(|(at, used)| CpuUsed { used: *used, uptime: f64::from(at) * 10.0 })
                .collect();
            held(&samples).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[5.0, 7.0]), Ok(0.2));
        assert_eq!(of(&[0.0, 4.0]), Err("it used 0.400 cores, not 0.2".into()));
        assert_eq!(of(&[0.0, 1.0]), Err("it used 0.100 cores, not 0.2".into()));
        assert_eq!(of(&[0.0, 1.7, 3.7]), Ok(0.2), "it stood still in the first ten seconds");
        assert_eq!(of(&[0.0, 4.0, 6.0]), Err("it used 0.300 cores in all, not 0.2".into()));
        assert!(of(&[0.0, 2.3, 4.1]).is_err(), "what was too much is being taken back");
        assert_eq!(of(&[0.0, 2.3, 4.1, 6.1]).map(|cores| format!("{cores:.2}")), Ok("0.20".into()));
        of(&[1.0]).unwrap_err();
    }

    #[test]
    fn every_reading_of_a_clock_narrows_what_it_can_be_ahead() {
        let read = |before, there, after| Reading { before, there, after };
        let slow = read(1000, 5000, 1600);
        assert_eq!(ahead(&[slow]), Some(3399..=4001));
        assert_eq!(ahead(&[slow, read(2000, 5990, 2400)]), Some(3589..=3991));
        assert_eq!(
            ahead(&[slow, read(2000, 5990, 2400), read(3000, 6950, 3010)]),
            Some(3939..=3951)
        );
        assert_eq!(ahead(&[slow, read(2000, 9000, 2010)]), None);
        assert_eq!(ahead(&[read(5000, 1000, 5002)]), Some(-4003..=-3999));
        assert_eq!(ahead(&[]), None);
    }

    #[test]
    fn use_of_the_cpu_is_read_at_one_moment_or_again() {
        let read = CpuUsed::parse("10.00 2500000 10.02");
        assert_eq!(read, Some(CpuUsed { used: 2.5, uptime: 10.01 }));
        assert_eq!(CpuUsed::parse("10.00 2500000 10.03"), None);
        assert_eq!(CpuUsed::parse("10.00  10.00"), None);
    }

    #[test]
    fn deleted_replica_must_be_silent_and_the_new_one_heard() {
        let mut requests = load();
        requests[150] = ok(1500, "old");
        assert!(deletion(&requests, &change()).is_err());
        let other = Change { replacement: "other", ..change() };
        assert!(deletion(&load(), &other).is_err());
        assert!(deletion(&load()[..90], &change()).is_err(), "load ended too early");
    }
}
