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
    for request in requests {
        match &request.answer {
            Ok(replica) => *tally.by_replica.entry(replica.clone()).or_default() += 1,
            Err(why) => tally.failed.push(why.clone()),
        }
    }
    tally
}

/// Milliseconds after the slice shows an endpoint not ready in which a request may still fail.
const GRACE_MS: u64 = 500;

/// The rule for a replica that is deleted under load: no request that starts more than `GRACE_MS` after
/// `not_ready_ms` (by the requests' clock) fails or is answered by the deleted one, and `replacement`
/// answers some. A request that fails names no replica, so any failure after that time counts.
pub(crate) fn deletion(
    requests: &[Request],
    not_ready_ms: u64,
    deleted: &str,
    replacement: &str,
) -> Result<()> {
    let late: Vec<&Request> =
        requests.iter().filter(|request| request.start_ms > not_ready_ms + GRACE_MS).collect();
    ensure!(
        late.len() >= 50 && late.len() < requests.len(),
        "{} of {} requests came after the change: the load did not cover it",
        late.len(),
        requests.len()
    );
    for request in &late {
        match &request.answer {
            Err(why) => bail!(
                "a request {} ms after the slice showed the change failed: {why}",
                request.start_ms - not_ready_ms
            ),
            Ok(replica) => ensure!(replica != deleted, "{deleted} answered after it was taken out"),
        }
    }
    let new = late.iter().filter(|request| request.answer.as_deref() == Ok(replacement)).count();
    ensure!(new > 0, "the new replica {replacement} answered none of {} late requests", late.len());
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

    #[test]
    fn failures_count_from_half_a_second_after_the_change() {
        deletion(&load(), 500, "old", "new").unwrap();
        let fail_at = |index: usize| {
            let mut requests = load();
            requests[index].answer = Err("refused".into());
            deletion(&requests, 500, "old", "new")
        };
        assert!(fail_at(100).is_ok(), "500 ms after the change");
        assert!(fail_at(101).is_err(), "510 ms after the change");
    }

    #[test]
    fn deleted_replica_must_be_silent_and_the_new_one_heard() {
        let mut requests = load();
        requests[150] = ok(1500, "old");
        assert!(deletion(&requests, 500, "old", "new").is_err());
        assert!(deletion(&load(), 500, "old", "other").is_err());
        assert!(deletion(&load()[..90], 500, "old", "new").is_err(), "load ended too early");
    }
}
