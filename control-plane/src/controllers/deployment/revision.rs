//! The ReplicaSet of the current template: finding, making, numbering, and forgetting old ones. Pure.

use serde_json::{Value, json};

use super::{DESIRED, Deployment, HASH_LABEL, MAXIMUM, REVISION, Set, Sets, scale};
use crate::controllers::{
    json::{controller_reference, integer, normal, safe_encode, stable_hash},
    model::{Key, Object, REPLICA_SETS},
    sync::Step,
    world::World,
};

const HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// Annotations of a Deployment that are its own and not its ReplicaSets'.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    HISTORY,
    DESIRED,
    MAXIMUM,
    "deprecated.deployment.rollback.to",
];

/// What is to be done about the new ReplicaSet before sizes are looked at.
#[derive(Debug)]
pub(super) enum NewSet {
    /// There is none, and none may be made now.
    Missing,
    /// These steps first; the next sync goes on.
    Settle(Vec<Step>),
    /// It is there; these steps bring its annotations up to date.
    Current(Vec<Step>),
}

/// Whether a ReplicaSet was made from the Deployment's template as it is now.
pub(super) fn same_template(deployment: &Deployment<'_>, set: &Object) -> bool {
    let mut template = set.value.pointer("/spec/template").cloned().unwrap_or(Value::Null);
    let mut wanted = deployment.template().clone();
    for template in [&mut template, &mut wanted] {
        if let Some(labels) =
            template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut)
        {
            labels.remove(HASH_LABEL);
        }
    }
    normal(&template) == normal(&wanted)
}

pub(super) fn new_set(
    world: &World,
    deployment: &Deployment<'_>,
    sets: &Sets<'_>,
    may_create: bool,
) -> NewSet {
    let newest_old = sets.old.iter().filter_map(|set| set.number(REVISION)).max().unwrap_or(0);
    let Some(new) = &sets.new else {
        if !may_create {
            return NewSet::Missing;
        }
        return NewSet::Settle(create(world, deployment, sets, newest_old + 1));
    };
    let revision = new.number(REVISION).unwrap_or(0).max(newest_old + 1);
    let mut steps = Vec::new();
    if !deployment.paused {
        steps.extend(update_new(deployment, new, revision));
        let own = deployment
            .object
            .value
            .pointer("/metadata/annotations")
            .and_then(|annotations| annotations.get(REVISION))
            .and_then(Value::as_str);
        if own != Some(revision.to_string().as_str()) {
            let patch = annotation_patch(&[(REVISION, revision.to_string())]);
            steps.push(Step::patch(deployment.object.place(), patch));
        }
    }
    if steps.is_empty() { NewSet::Current(steps) } else { NewSet::Settle(steps) }
}

fn update_new(deployment: &Deployment<'_>, new: &Set<'_>, revision: i64) -> Option<Step> {
    let mut annotations: Vec<(String, String)> = copied(deployment)
        .filter(|(name, value)| new.annotation(name) != Some(value))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let number = new.number(REVISION);
    if number != Some(revision) {
        annotations.push((REVISION.to_owned(), revision.to_string()));
        if let Some(number) = number.filter(|number| *number > 0) {
            let history = match new.annotation(HISTORY) {
                Some(history) if !history.is_empty() => format!("{history},{number}"),
                _ => number.to_string(),
            };
            annotations.push((HISTORY.to_owned(), history));
        }
    }
    let min_ready = integer(&new.object.value, "/spec/minReadySeconds").unwrap_or(0);
    if annotations.is_empty() && min_ready == deployment.min_ready_seconds {
        return None;
    }
    let annotations: Vec<(&str, String)> =
        annotations.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    let mut patch = annotation_patch(&annotations);
    if min_ready != deployment.min_ready_seconds {
        patch["spec"] = json!({"minReadySeconds": deployment.min_ready_seconds});
    }
    Some(Step::patch(new.object.place(), patch))
}

fn copied<'a>(deployment: &'a Deployment<'_>) -> impl Iterator<Item = (&'a str, &'a str)> {
    deployment
        .object
        .value
        .pointer("/metadata/annotations")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter(|(name, _)| !NOT_COPIED.contains(&name.as_str()))
        .filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)))
}

pub(super) fn annotation_patch(annotations: &[(&str, String)]) -> Value {
    let map: serde_json::Map<String, Value> =
        annotations.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    json!({"metadata": {"annotations": map}})
}

fn create(world: &World, deployment: &Deployment<'_>, sets: &Sets<'_>, revision: i64) -> Vec<Step> {
    let collisions = integer(&deployment.object.value, "/status/collisionCount");
    let extra = collisions.map(|count| count.to_string()).unwrap_or_default();
    let hash = safe_encode(stable_hash(deployment.template(), &extra));
    let key = &deployment.object.meta.key;
    let name = format!("{}-{hash}", key.name);
    if world.get(REPLICA_SETS, &Key::new(&key.namespace, &name)).is_some() {
        // Another template has the same hash: the next number makes another hash.
        let patch = json!({"status": {"collisionCount": collisions.unwrap_or(0) + 1}});
        return vec![Step::status(deployment.object.place(), patch)];
    }
    let total = sets.old.iter().map(|set| set.size).sum();
    let size = scale::new_size(deployment, total, 0);
    let object = replica_set(deployment, (&name, &hash), size, revision);
    let mut step = Step::create(REPLICA_SETS, &key.namespace, object);
    if size > 0 {
        let message = format!("Scaled up replica set {name} from 0 to {size}");
        step =
            step.noted(deployment.note("ScalingReplicaSet", message).or(
                "ReplicaSetCreateError",
                format!("Failed to create new replica set {name:?}: "),
            ));
    }
    vec![step]
}

fn replica_set(
    deployment: &Deployment<'_>,
    (name, hash): (&str, &str),
    size: i64,
    revision: i64,
) -> Value {
    let mut template = deployment.template().clone();
    template["metadata"]["labels"][HASH_LABEL] = json!(hash);
    let mut selector =
        deployment.object.value.pointer("/spec/selector").cloned().unwrap_or_else(|| json!({}));
    selector["matchLabels"][HASH_LABEL] = json!(hash);
    let mut annotations: serde_json::Map<String, Value> =
        copied(deployment).map(|(name, value)| (name.to_owned(), json!(value))).collect();
    annotations.insert(REVISION.to_owned(), json!(revision.to_string()));
    annotations.insert(DESIRED.to_owned(), json!(deployment.replicas.to_string()));
    let maximum = deployment.replicas + deployment.surge();
    annotations.insert(MAXIMUM.to_owned(), json!(maximum.to_string()));
    json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": name,
            "namespace": deployment.object.meta.key.namespace,
            "labels": template["metadata"]["labels"],
            "annotations": annotations,
            "ownerReferences": [controller_reference(deployment.object, "apps/v1", "Deployment")],
        },
        "spec": {
            "replicas": size,
            "minReadySeconds": deployment.min_ready_seconds,
            "selector": selector,
            "template": template,
        },
    })
}

/// Deletes the oldest empty ReplicaSets beyond the history limit.
pub(super) fn forget_history(deployment: &Deployment<'_>, sets: &Sets<'_>) -> Vec<Step> {
    let mut empty: Vec<&Set<'_>> = sets
        .old
        .iter()
        .filter(|set| {
            let observed = integer(&set.object.value, "/status/observedGeneration").unwrap_or(0);
            set.size == 0
                && set.pods == 0
                && set.object.meta.deleted.is_none()
                && set.object.meta.generation <= observed
        })
        .collect();
    empty.sort_by_key(|set| set.number(REVISION).unwrap_or(0));
    let excess = empty.len().saturating_sub(deployment.history_limit);
    empty.into_iter().take(excess).map(|set| Step::delete(set.object)).collect()
}
