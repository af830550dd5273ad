//! Pure: what a list of requests means.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};

/// One request as `load` reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Milliseconds since 1970 by the clock of the node it was sent on.
    pub start_ms: u64,
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

/// The lines of `load http`. A line that is none of its own is an error: nothing may be lost unseen.
pub(crate) fn parse(log: &str) -> Result<Vec<Request>> {
    log.lines()
        .map(|line| {
            let mut words = line.splitn(4, ' ');
            let mut word = || words.next().with_context(|| format!("a broken line: {line:?}"));
            let number =
                |text: &str| text.parse().with_context(|| format!("a broken line: {line:?}"));
            let (start_ms, micros) = (number(word()?)?, number(word()?)?);
            let (kind, rest) = (word()?, word()?.to_owned());
            let answer = match kind {
                "ok" => Ok(rest),
                "failed" => Err(rest),
                _ => bail!("a broken line: {line:?}"),
            };
            Ok(Request { start_ms, micros, answer })
        })
        .collect()
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

/// A replica that was deleted, by the requests' clock.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    /// When the EndpointSlice showed it not ready.
    pub(crate) not_ready_ms: u64,
    /// When the slice showed the new one ready.
    pub(crate) replaced_ms: u64,
    pub(crate) deleted: &'a str,
    pub(crate) replacement: &'a str,
}

/// The rule: no request that starts more than `GRACE_MS` after the change fails or is answered by the
/// deleted replica; the new one answers some, and none fails on it. A request that fails names no
/// replica, so every failure that ends when the new one was already served counts as one on it.
pub(crate) fn deletion(requests: &[Request], change: &Change<'_>) -> Result<()> {
    let limit = change.not_ready_ms + GRACE_MS;
    let late: Vec<&Request> = requests.iter().filter(|request| request.start_ms > limit).collect();
    ensure!(
        late.len() >= 50 && late.len() < requests.len(),
        "{} of {} requests came after the change: the load did not cover it",
        late.len(),
        requests.len()
    );
    for request in requests {
        let after = i128::from(request.start_ms) - i128::from(change.not_ready_ms);
        let end = request.start_ms + request.micros / 1000;
        match &request.answer {
            Err(why) => ensure!(
                request.start_ms <= limit && end < change.replaced_ms,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(start_ms: u64, replica: &str) -> Request {
        Request { start_ms, micros: 1, answer: Ok(replica.into()) }
    }

    /// 100 requests 10 ms apart; from 500 ms on the new replica answers.
    fn load() -> Vec<Request> {
        (0..200).map(|n| ok(n * 10, if n < 50 { "old" } else { "new" })).collect()
    }

    #[test]
    fn lines_become_requests_and_broken_ones_are_errors() {
        let found = parse("5 70 ok nginx-a\n6 80 failed connect: refused").unwrap();
        assert_eq!(found[0], Request { start_ms: 5, micros: 70, answer: Ok("nginx-a".into()) });
        assert_eq!(found[1].answer, Err("connect: refused".into()));
        parse("5 x ok nginx-a").unwrap_err();
        parse("5 6 maybe nginx-a").unwrap_err();
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
        let mut early = load();
        early[90].answer = Err("refused".into());
        let sooner = Change { replaced_ms: 850, ..change() };
        assert!(deletion(&early, &sooner).is_err(), "it may have been the new replica's");
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
