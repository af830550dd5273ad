//! What load balancers in front of the cluster ask a node: whether it has endpoints of a Service
//! (`spec.healthCheckNodePort`), and whether its packet path follows the cluster at all.
//!
//! Pure here: what is to be listened at and what is answered, in kube-proxy's words
//! (`pkg/proxy/healthcheck`). `serve.rs` listens.

mod serve;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::json;
use tokio::time::Instant;

pub use serve::{checks, node};

use crate::model::ObjectKey;

/// What kube-proxy allows between a change and its programming (twice its `syncPeriod` of 30 s).
const LATE: Duration = Duration::from_secs(60);

/// What is to be answered for one Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Where it is asked.
    pub port: u16,
    /// Endpoints on this node that are ready.
    pub endpoints: usize,
}

/// Every Service whose endpoints on this node are asked for.
pub type Checks = BTreeMap<ObjectKey, Check>;

/// When the dataplane last looked at its tables, and since when it cannot do what they say.
#[derive(Clone, Copy, Debug)]
pub struct Pulse {
    pub at: Instant,
    pub behind_since: Option<Instant>,
}

impl Pulse {
    /// The pulse after a round that ended at `at`; it is `behind` when a part of it failed.
    #[must_use]
    pub fn after(self, at: Instant, behind: bool) -> Self {
        Self { at, behind_since: behind.then(|| self.behind_since.unwrap_or(at)) }
    }

    /// Whether the kernel's rows follow the cluster. One that is late for a moment still does.
    #[must_use]
    pub fn is_healthy(self, now: Instant) -> bool {
        let since = |at| now.saturating_duration_since(at) < LATE;
        since(self.at) && self.behind_since.is_none_or(since)
    }
}

/// Which ports to close, then which to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub close: Vec<ObjectKey>,
    pub open: Vec<(ObjectKey, u16)>,
}

/// What is to be done so that exactly `desired` is listened at. Closing comes first, as a port may move
/// from one Service to another.
#[must_use]
pub fn plan(desired: &Checks, open: &BTreeMap<ObjectKey, u16>) -> Plan {
    let wanted = |key: &ObjectKey| desired.get(key).map(|check| check.port);
    let close = open.iter().filter(|(key, port)| wanted(key) != Some(**port));
    let is_open = |key: &ObjectKey, port| open.get(key) == Some(&port);
    let missing = desired.iter().filter(|(key, check)| !is_open(key, check.port));
    Plan {
        close: close.map(|(key, _)| key.clone()).collect(),
        open: missing.map(|(key, check)| (key.clone(), check.port)).collect(),
    }
}

/// An answer in HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 200 sends traffic here, 503 keeps it away.
    pub is_well: bool,
    /// `X-Load-Balancing-Endpoint-Weight`.
    pub weight: Option<usize>,
    pub body: String,
}

/// The answer for a Service, laid out as kube-proxy's: some clients look for its very characters.
#[must_use]
pub fn answer(key: &ObjectKey, endpoints: usize, is_healthy: bool) -> Answer {
    let (namespace, name) = (json!(*key.namespace), json!(*key.name));
    Answer {
        is_well: endpoints != 0 && is_healthy,
        weight: Some(endpoints),
        body: format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": {namespace},\n\t\t\"name\": {name}\n\t}},\n\t\
             \"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {is_healthy}\n}}"
        ),
    }
}

/// The answer for the node at `/healthz` and `/livez`; `None` for another path. A node that is about to
/// go is well, but not to get new traffic: only `/healthz` tells. `updated` is when it last was well.
#[must_use]
pub fn node_answer(
    path: &str,
    is_healthy: bool,
    is_eligible: bool,
    (updated, now): (&str, &str),
) -> Option<Answer> {
    let (is_well, eligible) = match path {
        "/healthz" => (is_healthy && is_eligible, format!(", \"nodeEligible\": {is_eligible}")),
        "/livez" => (is_healthy, String::new()),
        _ => return None,
    };
    let updated = if is_well { now } else { updated };
    let body = format!("{{\"lastUpdated\": \"{updated}\",\"currentTime\": \"{now}\"{eligible}}}");
    Some(Answer { is_well, weight: None, body })
}

/// Ports that two Services claim: the first by name has it, the other is to be told.
#[must_use]
pub fn rivals(desired: &Checks) -> BTreeMap<ObjectKey, String> {
    let mut taken: BTreeMap<u16, &ObjectKey> = BTreeMap::new();
    let mut rivals = BTreeMap::new();
    for (key, check) in desired {
        if let Some(owner) = taken.get(&check.port) {
            rivals.insert(key.clone(), words(check.port, format_args!("service {owner} has it")));
        } else {
            taken.insert(check.port, key);
        }
    }
    rivals
}

/// Why a Service's port is not served.
fn words(port: u16, why: impl std::fmt::Display) -> String {
    format!("spec.healthCheckNodePort {port} is not served: {why}")
}

/// The checks less those of `without`.
fn less(desired: &Checks, without: &BTreeSet<&ObjectKey>) -> Checks {
    let kept = desired.iter().filter(|(key, _)| !without.contains(key));
    kept.map(|(key, check)| (key.clone(), *check)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("d", name)
    }

    fn check(port: u16) -> Check {
        Check { port, endpoints: 1 }
    }

    #[test]
    fn a_port_that_moves_is_closed_before_it_is_opened_and_nothing_else_is_touched() {
        let desired = Checks::from([
            (key("kept"), check(31_000)),
            (key("moved"), check(31_002)),
            (key("new"), check(31_001)),
        ]);
        let open =
            BTreeMap::from([(key("gone"), 31_003), (key("kept"), 31_000), (key("moved"), 31_001)]);
        let planned = plan(&desired, &open);
        assert_eq!(planned.close, [key("gone"), key("moved")]);
        assert_eq!(planned.open, [(key("moved"), 31_002), (key("new"), 31_001)]);
        let after = desired.iter().map(|(key, check)| (key.clone(), check.port)).collect();
        assert_eq!(plan(&desired, &after), Plan::default(), "idempotent");
    }

    #[test]
    fn of_two_services_with_one_port_the_second_is_told_who_has_it() {
        let desired = Checks::from([(key("a"), check(31_000)), (key("b"), check(31_000))]);
        let rivals = rivals(&desired);
        assert_eq!(
            rivals.into_iter().collect::<Vec<_>>(),
            [(
                key("b"),
                "spec.healthCheckNodePort 31000 is not served: service d/a has it".to_owned()
            )]
        );
    }

    #[test]
    fn answers_are_kube_proxys() {
        let well = answer(&key("web"), 2, true);
        assert_eq!((well.is_well, well.weight), (true, Some(2)));
        assert_eq!(
            well.body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"d\",\n\t\t\"name\": \"web\"\n\t},\n\t\
             \"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
        );
        assert!(!answer(&key("web"), 0, true).is_well, "nobody here");
        assert!(!answer(&key("web"), 2, false).is_well, "nobody programs");
    }

    #[test]
    fn a_node_that_is_about_to_go_lives_and_gets_no_new_traffic() {
        let ask = |path, healthy, eligible| node_answer(path, healthy, eligible, ("then", "now"));
        let well = ask("/healthz", true, true).unwrap();
        let body = r#"{"lastUpdated": "now","currentTime": "now", "nodeEligible": true}"#;
        assert_eq!((well.is_well, well.body.as_str()), (true, body));
        let leaving = ask("/healthz", true, false).unwrap();
        assert!(!leaving.is_well && leaving.body.contains("\"lastUpdated\": \"then\""));
        assert!(ask("/livez", true, false).unwrap().is_well);
        assert!(!ask("/livez", false, true).unwrap().is_well);
        assert_eq!(ask("/", true, true), None);
    }

    #[test]
    fn a_dataplane_is_unwell_when_it_is_late_or_stuck() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let pulse = Pulse { at: start, behind_since: None };
        assert!(pulse.is_healthy(at(59)) && !pulse.is_healthy(at(60)), "stuck");
        let behind = pulse.after(at(10), true).after(at(40), true);
        assert!(behind.is_healthy(at(69)) && !behind.is_healthy(at(70)), "late since 10");
        assert!(behind.after(at(65), false).is_healthy(at(70)), "it caught up");
    }
}
