//! ReplicaSet: as many pods as asked for. Pure.
//!
//! Follows upstream's `pkg/controller/replicaset/replica_set.go` and the victim order of
//! `pkg/controller/controller_utils.go` (`ActivePodsWithRanks`).

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    adopt::{OwnerKind, family, owners_of},
    conditions::{self, Said},
    json::{controller_reference, integer, items, labels_at},
    model::{Key, Object, PODS, Phase, PodFacts, REPLICA_SETS},
    sync::{Context, Controller, Note, Order, Step, Sync, own_key, reference},
    world::{Change, World},
};

/// Pods created or deleted in one sync (upstream `BurstReplicas`).
const BURST: usize = 500;

const KIND: OwnerKind =
    OwnerKind { api_version: "apps/v1", kind: "ReplicaSet", resource: REPLICA_SETS };

pub(super) const CONTROLLER: Controller =
    Controller { name: "replicaset", component: "replicaset-controller", keys, sync, first: None };

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(REPLICA_SETS, change, out);
    if change.resource == PODS {
        owners_of(world, change, KIND, out);
    }
}

fn sync(world: &World, key: &Key, context: &Context) -> Sync {
    let Some(set) = world.get(REPLICA_SETS, key) else { return Sync::done() };
    let family = family(world, set, KIND, PODS);
    if !family.steps.is_empty() {
        // Counting waits until the right pods are ours.
        return Sync { steps: family.steps, ..Sync::default() };
    }
    let active: Vec<_> = family.owned.into_iter().filter(|pod| is_active(pod)).collect();
    let mut answer = Sync { order: Order::SlowStart, ..Sync::default() };
    if set.meta.deleted.is_none() {
        answer.steps = scale(world, set, &active, context.now);
    }
    let status = status(set, &active, context);
    if status.ready != status.available {
        answer.requeue_in(min_ready(set));
    }
    if let Some(patch) = status.patch(set) {
        answer.steps.push(Step::status(set.place(), patch));
    }
    answer
}

fn is_active(pod: &Object) -> bool {
    pod.meta.deleted.is_none() && pod.pod.as_ref().is_some_and(|pod| !pod.is_terminal())
}

fn scale(world: &World, set: &Object, active: &[&Arc<Object>], now: Timestamp) -> Vec<Step> {
    let desired = usize::try_from(integer(&set.value, "/spec/replicas").unwrap_or(1)).unwrap_or(0);
    let regarding = || reference(set, "apps/v1", "ReplicaSet");
    if active.len() < desired {
        let pod = new_pod(set);
        let note = Note::normal(regarding(), "SuccessfulCreate", "Created pod: {name}")
            .or("FailedCreate", "Error creating: ");
        let step = Step::create(PODS, &set.meta.key.namespace, pod).noted(note);
        return vec![step; (desired - active.len()).min(BURST)];
    }
    let excess = (active.len() - desired).min(BURST);
    victims(world, set, active, now)
        .into_iter()
        .take(excess)
        .map(|pod| {
            let message = format!("Deleted pod: {}", pod.meta.key.name);
            let note = Note::normal(regarding(), "SuccessfulDelete", message)
                .or("FailedDelete", "Error deleting: ");
            Step::delete(pod).noted(note)
        })
        .collect()
}

fn new_pod(set: &Object) -> Value {
    let template = set.value.pointer("/spec/template").unwrap_or(&Value::Null);
    let mut metadata = json!({
        "generateName": format!("{}-", set.meta.key.name),
        "namespace": set.meta.key.namespace,
        "ownerReferences": [controller_reference(set, "apps/v1", "ReplicaSet")],
    });
    for field in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer(&format!("/metadata/{field}")) {
            metadata[field] = value.clone();
        }
    }
    let spec = template.get("spec").cloned().unwrap_or_else(|| json!({}));
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
}

/// All pods, the first one to be deleted first.
fn victims<'a>(
    world: &World,
    set: &Object,
    active: &[&'a Arc<Object>],
    now: Timestamp,
) -> Vec<&'a Arc<Object>> {
    let crowd = crowd_by_node(world, set);
    let rank = |pod: &PodFacts| crowd.get(&pod.node).copied().unwrap_or(0);
    let mut pods = active.to_vec();
    pods.sort_by(|one, two| {
        let (Some(a), Some(b)) = (&one.pod, &two.pod) else { return Ordering::Equal };
        (!a.node.is_empty())
            .cmp(&!b.node.is_empty())
            .then_with(|| order(a.phase).cmp(&order(b.phase)))
            .then_with(|| a.ready.cmp(&b.ready))
            .then_with(|| a.deletion_cost.cmp(&b.deletion_cost))
            .then_with(|| rank(b).cmp(&rank(a)))
            .then_with(|| {
                if a.ready && b.ready {
                    younger(a.ready_since, b.ready_since, now)
                } else {
                    Ordering::Equal
                }
            })
            .then_with(|| b.restarts.cmp(&a.restarts))
            .then_with(|| younger(Some(one.meta.created), Some(two.meta.created), now))
            .then_with(|| one.meta.uid.cmp(&two.meta.uid))
    });
    pods
}

/// Upstream's order has Pending < Unknown < Running; ended pods are not active.
fn order(phase: Phase) -> u8 {
    match phase {
        Phase::Pending => 0,
        Phase::Unknown => 1,
        Phase::Running | Phase::Succeeded | Phase::Failed => 2,
    }
}

/// The younger first, ages compared by their order of magnitude (base 2), so that among pods of
/// about the same age the choice is spread.
fn younger(a: Option<Timestamp>, b: Option<Timestamp>, now: Timestamp) -> Ordering {
    match (a, b) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) => Ordering::Less,
        (Some(_), None) => Ordering::Greater,
        (Some(a), Some(b)) => {
            let magnitude = |then: Timestamp| {
                let age = now.duration_since(then).as_nanos();
                u64::try_from(age).unwrap_or(0).checked_ilog2()
            };
            magnitude(a).cmp(&magnitude(b))
        }
    }
}

/// Active pods per node of all ReplicaSets that have the same controller as this one.
fn crowd_by_node(world: &World, set: &Object) -> BTreeMap<String, usize> {
    let siblings: Vec<&str> = match set.meta.controller() {
        Some(owner) => world
            .dependents(&owner.uid)
            .filter(|sibling| sibling.resource == REPLICA_SETS)
            .map(|sibling| sibling.meta.uid.as_str())
            .collect(),
        None => vec![&set.meta.uid],
    };
    let mut crowd = BTreeMap::new();
    for pod in siblings.into_iter().flat_map(|uid| world.dependents(uid)) {
        if let Some(facts) = &pod.pod
            && is_active(pod)
        {
            *crowd.entry(facts.node.clone()).or_insert(0) += 1;
        }
    }
    crowd
}

fn min_ready(set: &Object) -> Duration {
    let seconds = integer(&set.value, "/spec/minReadySeconds").unwrap_or(0);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

struct Status {
    replicas: usize,
    labelled: usize,
    ready: usize,
    available: usize,
    conditions: Vec<Value>,
}

fn status(set: &Object, active: &[&Arc<Object>], context: &Context) -> Status {
    let labels = labels_at(&set.value, "/spec/template/metadata/labels");
    let min_ready = jiff::SignedDuration::try_from(min_ready(set)).unwrap_or_default();
    let count = |test: &dyn Fn(&Object) -> bool| active.iter().filter(|pod| test(pod)).count();
    let ready = |pod: &Object| pod.pod.as_ref().is_some_and(|pod| pod.ready);
    let available = |pod: &Object| {
        let since = pod.pod.as_ref().and_then(|pod| pod.ready_since);
        ready(pod)
            && (min_ready.is_zero()
                || since.is_some_and(|since| context.now.duration_since(since) >= min_ready))
    };
    let mut conditions = items(&set.value, "/status/conditions").to_vec();
    match &context.failure {
        Some(error) => {
            let reason = if active.len() < wanted(set) { "FailedCreate" } else { "FailedDelete" };
            let said = Said::new("ReplicaFailure", "True", reason, error.message.clone());
            if !conditions::says(&conditions, &said) {
                conditions::put(&mut conditions, &said, context.now);
            }
        }
        None => conditions::remove(&mut conditions, "ReplicaFailure"),
    }
    Status {
        replicas: active.len(),
        labelled: count(&|pod| {
            labels.iter().all(|(key, value)| pod.meta.labels.get(key) == Some(value))
        }),
        ready: count(&ready),
        available: count(&available),
        conditions,
    }
}

fn wanted(set: &Object) -> usize {
    usize::try_from(integer(&set.value, "/spec/replicas").unwrap_or(1)).unwrap_or(0)
}

impl Status {
    /// The patch that makes the stored status this one; `None` when it is already.
    fn patch(&self, set: &Object) -> Option<Value> {
        let stored = |field: &str| integer(&set.value, &format!("/status/{field}")).unwrap_or(0);
        let numbers = [
            ("replicas", self.replicas),
            ("fullyLabeledReplicas", self.labelled),
            ("readyReplicas", self.ready),
            ("availableReplicas", self.available),
        ];
        let same = numbers.iter().all(|(field, value)| Ok(stored(field)) == i64::try_from(*value))
            && stored("observedGeneration") == set.meta.generation
            && items(&set.value, "/status/conditions") == self.conditions;
        (!same).then(|| {
            let mut status = json!({"observedGeneration": set.meta.generation});
            for (field, value) in numbers {
                status[field] = json!(value);
            }
            // Null takes an absent list away.
            status["conditions"] =
                if self.conditions.is_empty() { Value::Null } else { json!(self.conditions) };
            json!({"status": status})
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, pod, replica_set, world};
    use super::*;
    use crate::client::Write;

    fn sync_of(objects: Vec<Value>) -> Vec<Write> {
        sync(&world(objects), &Key::new("ns", "web"), &context()).writes()
    }

    fn deleted(writes: &[Write]) -> Vec<&str> {
        writes
            .iter()
            .filter_map(|write| match write {
                Write::Delete { object, .. } => Some(object.name.as_str()),
                Write::Create { .. }
                | Write::Update { .. }
                | Write::UpdateSub { .. }
                | Write::Patch { .. } => None,
            })
            .collect()
    }

    #[test]
    fn missing_pods_are_created_from_the_template_and_counted_in_the_status() {
        let writes = sync_of(vec![replica_set("web", 3), pod("web-1", "web", "n1", true)]);
        assert_eq!(writes.len(), 3, "two pods and a status");
        let Write::Create { resource, namespace, object } = &writes[0] else { unreachable!() };
        assert_eq!((*resource, namespace.as_str()), (PODS, "ns"));
        assert_eq!(object["metadata"]["generateName"], "web-");
        assert_eq!(object["metadata"]["labels"]["app"], "web");
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "uid-web");
        assert_eq!(object["spec"]["containers"][0]["image"], "nginx");
        let Write::Patch { subresource: "status", patch, .. } = &writes[2] else { unreachable!() };
        assert_eq!(patch["status"]["replicas"], 1);
        assert_eq!(patch["status"]["readyReplicas"], 1);
        assert_eq!(patch["status"]["availableReplicas"], 1);
    }

    #[test]
    fn the_victim_is_the_least_useful_pod() {
        let mut costly = pod("web-c", "web", "n1", true);
        costly["metadata"]["annotations"] =
            json!({"controller.kubernetes.io/pod-deletion-cost": "9"});
        let all = vec![
            replica_set("web", 1),
            costly,
            pod("web-ready", "web", "n1", true),
            pod("web-alone", "web", "n2", true),
            pod("web-unready", "web", "n1", false),
            pod("web-unassigned", "web", "", false),
        ];
        let writes = sync_of(all);
        assert_eq!(deleted(&writes), ["web-unassigned", "web-unready", "web-ready", "web-alone"]);
    }

    #[test]
    fn an_orphan_that_matches_is_adopted_and_a_relabelled_pod_released() {
        let mut orphan = pod("stray", "web", "n1", true);
        orphan["metadata"]["ownerReferences"] = json!([]);
        let mut other = pod("web-1", "web", "n1", true);
        other["metadata"]["labels"] = json!({"app": "debug"});
        let writes = sync_of(vec![replica_set("web", 1), orphan, other]);
        let patches: Vec<_> = writes
            .iter()
            .map(|write| match write {
                Write::Patch { object, patch, .. } => (
                    object.name.as_str(),
                    patch["metadata"]["ownerReferences"].as_array().unwrap().len(),
                ),
                Write::Create { .. }
                | Write::Update { .. }
                | Write::UpdateSub { .. }
                | Write::Delete { .. } => unreachable!("{write:?}"),
            })
            .collect();
        assert_eq!(patches, [("web-1", 0), ("stray", 1)]);
    }

    #[test]
    fn a_set_that_is_being_deleted_creates_nothing() {
        let mut set = replica_set("web", 3);
        set["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        set["status"] = json!({"observedGeneration": 1});
        assert_eq!(sync_of(vec![set]), []);
    }

    #[test]
    fn a_failed_create_becomes_a_condition_and_goes_again() {
        let mut context = context();
        context.failure = Some(crate::client::ApiError {
            code: 403,
            reason: "Forbidden",
            message: "exceeded quota".into(),
            details: Value::Null,
        });
        let mut world_with = world(vec![replica_set("web", 1)]);
        let answer = sync(&world_with, &Key::new("ns", "web"), &context);
        let last = answer.steps.last().unwrap();
        assert!(last.always, "the status is told although the creation fails");
        let writes = answer.writes();
        let Write::Patch { patch, .. } = writes.last().unwrap() else { unreachable!() };
        let condition = &patch["status"]["conditions"][0];
        assert_eq!(
            (condition["reason"].as_str(), condition["message"].as_str()),
            (Some("FailedCreate"), Some("exceeded quota"))
        );
        let mut set = replica_set("web", 0);
        set["status"] = json!({"observedGeneration": 1, "conditions": [condition]});
        world_with = world(vec![set]);
        let writes =
            sync(&world_with, &Key::new("ns", "web"), &super::super::testing::context()).writes();
        let Write::Patch { patch, .. } = &writes[0] else { unreachable!() };
        assert_eq!(patch["status"]["conditions"], Value::Null);
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let mut set = replica_set("web", 1);
        set["status"] = json!({"replicas": 1, "fullyLabeledReplicas": 1, "readyReplicas": 1, "availableReplicas": 1, "observedGeneration": 1});
        assert_eq!(sync_of(vec![set, pod("web-1", "web", "n1", true)]), []);
    }
}
