//! A Deployment's status: counts and the conditions Available, Progressing, ReplicaFailure. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{Deployment, Set, Sets};
use crate::controllers::{
    conditions::{self, Said, find},
    json::{integer, items, rfc3339, text, time},
    sync::{Context, Step, Sync},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    replicas: i64,
    updated: i64,
    ready: i64,
    available: i64,
    unavailable: i64,
}

impl Counts {
    fn of(sets: &Sets<'_>) -> Self {
        let sum = |number: fn(&Set<'_>) -> i64| sets.all().map(number).sum::<i64>();
        let available = sum(|set| set.available);
        Self {
            replicas: sum(|set| set.pods),
            updated: sets.new.as_ref().map_or(0, |set| set.pods),
            ready: sum(|set| set.ready),
            available,
            unavailable: (sum(|set| set.size) - available).max(0),
        }
    }

    fn stored(deployment: &Deployment<'_>) -> Self {
        let number = |field: &str| {
            integer(&deployment.object.value, &format!("/status/{field}")).unwrap_or(0)
        };
        Self {
            replicas: number("replicas"),
            updated: number("updatedReplicas"),
            ready: number("readyReplicas"),
            available: number("availableReplicas"),
            unavailable: number("unavailableReplicas"),
        }
    }

    fn is_complete(&self, deployment: &Deployment<'_>) -> bool {
        [self.updated, self.replicas, self.available] == [deployment.replicas; 3]
    }

    /// Whether the rollout came further since `old` (upstream `DeploymentProgressing`).
    fn is_beyond(&self, old: &Self) -> bool {
        self.updated > old.updated
            || self.replicas - self.updated < old.replicas - old.updated
            || self.ready > old.ready
            || self.available > old.available
    }
}

/// Whether every pod is of the new template and available.
pub(super) fn is_complete(deployment: &Deployment<'_>, sets: &Sets<'_>) -> bool {
    Counts::of(sets).is_complete(deployment)
}

/// Adds the status step, when the status is to change, and the time to look again.
pub(super) fn report(
    deployment: &Deployment<'_>,
    sets: &Sets<'_>,
    context: &Context,
    answer: &mut Sync,
) {
    let counts = Counts::of(sets);
    let old = items(&deployment.object.value, "/status/conditions");
    let mut list = old.to_vec();
    available(deployment, &counts, &mut list, context.now);
    failure(sets, context, &mut list);
    if deployment.object.meta.deleted.is_none() {
        progress(deployment, sets, &counts, (&mut list, context.now));
        if let Some(wait) = deadline_left(deployment, &counts, &list, context.now) {
            answer.requeue_in(wait);
        }
    }
    let generation = deployment.object.meta.generation;
    let observed = integer(&deployment.object.value, "/status/observedGeneration");
    if counts == Counts::stored(deployment) && list == old && observed == Some(generation) {
        return;
    }
    let patch = json!({"status": {
        "observedGeneration": generation,
        "replicas": counts.replicas,
        "updatedReplicas": counts.updated,
        "readyReplicas": counts.ready,
        "availableReplicas": counts.available,
        "unavailableReplicas": counts.unavailable,
        "conditions": list,
    }});
    answer.steps.push(Step::status(deployment.object.place(), patch));
}

fn available(deployment: &Deployment<'_>, counts: &Counts, list: &mut Vec<Value>, now: Timestamp) {
    let said = if counts.available >= deployment.replicas - deployment.max_unavailable() {
        let message = "Deployment has minimum availability.";
        Said::new("Available", "True", "MinimumReplicasAvailable", message)
    } else {
        let message = "Deployment does not have minimum availability.";
        Said::new("Available", "False", "MinimumReplicasUnavailable", message)
    };
    set(list, &said, now);
}

/// Sets a condition, unless status and reason are said already; Deployments also carry the time of
/// the last update.
fn set(list: &mut Vec<Value>, said: &Said<'_>, now: Timestamp) {
    if conditions::says(list, said) {
        return;
    }
    put(list, said, now);
}

fn put(list: &mut Vec<Value>, said: &Said<'_>, now: Timestamp) {
    conditions::put(list, said, now);
    let put = list.iter_mut().find(|condition| text(condition, "/type") == said.kind);
    if let Some(condition) = put {
        condition["lastUpdateTime"] = json!(rfc3339(now));
    }
}

/// Tells a ReplicaSet's failure, the new one's first, or our own failure to make one.
fn failure(sets: &Sets<'_>, context: &Context, list: &mut Vec<Value>) {
    if sets.new.is_none()
        && let Some(error) = context.failure.as_ref().filter(|error| error.code != 409)
    {
        let said =
            Said::new("Progressing", "False", "ReplicaSetCreateError", error.message.clone());
        set(list, &said, context.now);
    }
    let told = sets.new.iter().chain(&sets.old).find_map(|set| {
        find(items(&set.object.value, "/status/conditions"), "ReplicaFailure")
            .filter(|condition| text(condition, "/status") == "True")
    });
    match told {
        Some(told) => {
            let (reason, message) = (text(told, "/reason"), text(told, "/message"));
            set(list, &Said::new("ReplicaFailure", "True", reason, message), context.now);
        }
        None => conditions::remove(list, "ReplicaFailure"),
    }
}

fn subject(deployment: &Deployment<'_>, sets: &Sets<'_>) -> String {
    match &sets.new {
        Some(new) => format!("ReplicaSet {:?}", new.name()),
        None => format!("Deployment {:?}", deployment.object.meta.key.name),
    }
}

fn progress(
    deployment: &Deployment<'_>,
    sets: &Sets<'_>,
    counts: &Counts,
    (list, now): (&mut Vec<Value>, Timestamp),
) {
    if deployment.deadline.is_none() {
        conditions::remove(list, "Progressing");
        return;
    }
    let reason = find(list, "Progressing").map_or("", |old| text(old, "/reason")).to_owned();
    if deployment.paused {
        if !matches!(reason.as_str(), "DeploymentPaused" | "ProgressDeadlineExceeded") {
            let message = "Deployment is paused";
            put(list, &Said::new("Progressing", "Unknown", "DeploymentPaused", message), now);
        }
        return;
    }
    if reason == "DeploymentPaused" {
        let message = "Deployment is resumed";
        put(list, &Said::new("Progressing", "Unknown", "DeploymentResumed", message), now);
        return;
    }
    if reason.is_empty()
        && let Some(new) = &sets.new
    {
        let message = format!("Created new replica set {:?}", new.name());
        put(list, &Said::new("Progressing", "True", "NewReplicaSetCreated", message), now);
    }
    if counts.replicas == counts.updated && reason == "NewReplicaSetAvailable" {
        return;
    }
    let subject = subject(deployment, sets);
    if counts.is_complete(deployment) {
        let message = format!("{subject} has successfully progressed.");
        set(list, &Said::new("Progressing", "True", "NewReplicaSetAvailable", message), now);
    } else if counts.is_beyond(&Counts::stored(deployment)) {
        // Put even when said already: the time of the last update holds the deadline off.
        let message = format!("{subject} is progressing.");
        put(list, &Said::new("Progressing", "True", "ReplicaSetUpdated", message), now);
    } else if is_late(deployment, list, now) {
        let message = format!("{subject} has timed out progressing.");
        set(list, &Said::new("Progressing", "False", "ProgressDeadlineExceeded", message), now);
    }
}

fn late_at(deployment: &Deployment<'_>, list: &[Value]) -> Option<Timestamp> {
    let condition = find(list, "Progressing")?;
    let since = time(condition, "/lastUpdateTime")?;
    let deadline = SignedDuration::try_from(deployment.deadline?).ok()?;
    (text(condition, "/reason") != "NewReplicaSetAvailable")
        .then(|| since.saturating_add(deadline).ok())
        .flatten()
}

fn is_late(deployment: &Deployment<'_>, list: &[Value], now: Timestamp) -> bool {
    late_at(deployment, list).is_some_and(|late| late < now)
}

/// How long until the deadline passes if nothing moves.
fn deadline_left(
    deployment: &Deployment<'_>,
    counts: &Counts,
    list: &[Value],
    now: Timestamp,
) -> Option<Duration> {
    let late = late_at(deployment, list)?;
    let told = find(list, "Progressing").map_or("", |old| text(old, "/reason"));
    if deployment.paused || counts.is_complete(deployment) || told == "ProgressDeadlineExceeded" {
        return None;
    }
    // A second more, as the deadline counts in whole seconds.
    Duration::try_from(late.duration_since(now)).ok().map(|left| left + Duration::from_secs(1))
}
