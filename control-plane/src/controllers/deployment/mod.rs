//! Deployment: ReplicaSets that follow its template. Pure.
//!
//! Follows upstream's `pkg/controller/deployment`: one sync looks at the world and takes the next
//! step of the rollout; the watch events of that step bring the sync after it.

mod revision;
mod scale;
mod status;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};

use self::{
    revision::{NewSet, annotation_patch, new_set},
    scale::{Resize, Sizes},
};
use super::{
    adopt::{OwnerKind, family, owners_of},
    json::{Rounding, boolean, integer, scaled, text},
    model::{DEPLOYMENTS, Key, Object, PODS, REPLICA_SETS},
    sync::{Context, Controller, Note, Step, Sync, own_key, reference},
    world::{Change, World},
};

const KIND: OwnerKind =
    OwnerKind { api_version: "apps/v1", kind: "Deployment", resource: DEPLOYMENTS };
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAXIMUM: &str = "deployment.kubernetes.io/max-replicas";
const REVISION: &str = "deployment.kubernetes.io/revision";
const HASH_LABEL: &str = "pod-template-hash";

pub(super) const CONTROLLER: Controller =
    Controller { name: "deployment", component: "deployment-controller", keys, sync, first: None };

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(DEPLOYMENTS, change, out);
    if change.resource == REPLICA_SETS {
        owners_of(world, change, KIND, out);
    }
    // A Recreate rollout waits for the last old pod to be gone.
    if change.resource == PODS
        && change.new.is_none()
        && let Some(owner) = change.object().and_then(|pod| pod.meta.controller())
        && let Some(set) = world.by_uid(&owner.uid)
        && let Some(deployment) = set.meta.controller().and_then(|owner| world.by_uid(&owner.uid))
        && deployment.resource == DEPLOYMENTS
    {
        out.push(deployment.meta.key.clone());
    }
}

/// How old pods give way to new ones, in numbers of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strategy {
    Recreate,
    Rolling { surge: i64, unavailable: i64 },
}

/// A Deployment's spec as numbers.
#[derive(Debug)]
struct Deployment<'a> {
    object: &'a Object,
    replicas: i64,
    paused: bool,
    strategy: Strategy,
    min_ready_seconds: i64,
    /// `None` when no deadline is set (absent or the largest 32-bit number).
    deadline: Option<Duration>,
    history_limit: usize,
}

impl<'a> Deployment<'a> {
    fn new(object: &'a Object) -> Self {
        let spec = |field: &str| integer(&object.value, &format!("/spec/{field}"));
        let replicas = spec("replicas").unwrap_or(1);
        let deadline = spec("progressDeadlineSeconds")
            .filter(|seconds| *seconds != i64::from(i32::MAX))
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map(Duration::from_secs);
        let limit = spec("revisionHistoryLimit").unwrap_or(10);
        Self {
            object,
            replicas,
            paused: boolean(&object.value, "/spec/paused"),
            strategy: strategy(&object.value, replicas),
            min_ready_seconds: spec("minReadySeconds").unwrap_or(0),
            deadline,
            history_limit: usize::try_from(limit).unwrap_or(usize::MAX),
        }
    }

    fn template(&self) -> &Value {
        self.object.value.pointer("/spec/template").unwrap_or(&Value::Null)
    }

    fn surge(&self) -> i64 {
        match self.strategy {
            Strategy::Recreate => 0,
            Strategy::Rolling { surge, .. } => surge,
        }
    }

    /// Never more than there are.
    fn max_unavailable(&self) -> i64 {
        match self.strategy {
            Strategy::Recreate => 0,
            Strategy::Rolling { unavailable, .. } => unavailable.min(self.replicas),
        }
    }

    fn note(&self, reason: &'static str, message: String) -> Note {
        Note::normal(reference(self.object, "apps/v1", "Deployment"), reason, message)
    }
}

/// Surge rounds up and unavailability down; when both are 0 one pod may be unavailable, as otherwise
/// nothing could move (upstream `ResolveFenceposts`).
fn strategy(value: &Value, replicas: i64) -> Strategy {
    if text(value, "/spec/strategy/type") == "Recreate" {
        return Strategy::Recreate;
    }
    let field = |name: &str, rounding| {
        let value = value.pointer(&format!("/spec/strategy/rollingUpdate/{name}"));
        let quarter = json!("25%");
        scaled(Some(value.unwrap_or(&quarter)), replicas, rounding).unwrap_or(0)
    };
    let surge = field("maxSurge", Rounding::Up);
    let unavailable = field("maxUnavailable", Rounding::Down);
    let unavailable = if surge == 0 && unavailable == 0 { 1 } else { unavailable };
    Strategy::Rolling { surge, unavailable }
}

/// A ReplicaSet's numbers.
#[derive(Clone, Debug)]
struct Set<'a> {
    object: &'a Arc<Object>,
    /// `spec.replicas`.
    size: i64,
    /// `status.replicas`.
    pods: i64,
    ready: i64,
    available: i64,
}

impl<'a> Set<'a> {
    fn new(object: &'a Arc<Object>) -> Self {
        let status = |field: &str| integer(&object.value, &format!("/status/{field}")).unwrap_or(0);
        Self {
            object,
            size: integer(&object.value, "/spec/replicas").unwrap_or(1),
            pods: status("replicas"),
            ready: status("readyReplicas"),
            available: status("availableReplicas"),
        }
    }

    fn name(&self) -> &str {
        &self.object.meta.key.name
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.object.value.get("metadata")?.get("annotations")?.get(name)?.as_str()
    }

    fn number(&self, name: &str) -> Option<i64> {
        self.annotation(name)?.parse().ok()
    }
}

/// A Deployment's ReplicaSets, the old ones from oldest to newest.
#[derive(Debug)]
struct Sets<'a> {
    new: Option<Set<'a>>,
    old: Vec<Set<'a>>,
}

impl<'a> Sets<'a> {
    fn all(&self) -> impl Iterator<Item = &Set<'a>> {
        self.old.iter().chain(&self.new)
    }

    fn sizes(&self) -> Sizes {
        let size = |set: &Set<'_>| scale::Size {
            spec: set.size,
            available: set.available,
            before: set.number(MAXIMUM),
        };
        Sizes { new: self.new.as_ref().map(size), old: self.old.iter().map(size).collect() }
    }
}

fn sync(world: &World, key: &Key, context: &Context) -> Sync {
    let Some(object) = world.get(DEPLOYMENTS, key) else { return Sync::done() };
    let family = family(world, object, KIND, REPLICA_SETS);
    if !family.steps.is_empty() {
        return Sync { steps: family.steps, ..Sync::default() };
    }
    let deployment = Deployment::new(object);
    let sets = split(&deployment, &family.owned);
    if object.meta.deleted.is_some() {
        let mut answer = Sync::done();
        status::report(&deployment, &sets, context, &mut answer);
        return answer;
    }
    let mut answer = Sync { steps: advance(world, &deployment, &sets), ..Sync::default() };
    status::report(&deployment, &sets, context, &mut answer);
    answer
}

fn split<'a>(deployment: &Deployment<'_>, owned: &[&'a Arc<Object>]) -> Sets<'a> {
    let mut all: Vec<Set<'a>> = owned.iter().map(|object| Set::new(object)).collect();
    all.sort_by(|a, b| {
        let (a, b) = (&a.object.meta, &b.object.meta);
        a.created.cmp(&b.created).then_with(|| a.key.name.cmp(&b.key.name))
    });
    let same = all.iter().position(|set| revision::same_template(deployment, set.object));
    let new = same.map(|index| all.remove(index));
    Sets { new, old: all }
}

/// The next step of the rollout.
fn advance(world: &World, deployment: &Deployment<'_>, sets: &Sets<'_>) -> Vec<Step> {
    let was_scaled = sets.all().any(|set| {
        set.size > 0 && set.number(DESIRED).is_some_and(|desired| desired != deployment.replicas)
    });
    let may_create = !deployment.paused
        && !was_scaled
        && !(deployment.strategy == Strategy::Recreate
            && (sets.old.iter().any(|set| set.size > 0) || old_pods_live(world, sets)));
    let mut steps = match new_set(world, deployment, sets, may_create) {
        NewSet::Missing => Vec::new(),
        NewSet::Settle(steps) => return steps,
        NewSet::Current(steps) => steps,
    };
    let resizes = if deployment.paused || was_scaled {
        scale::proportional(deployment, &sets.sizes())
    } else {
        match deployment.strategy {
            Strategy::Rolling { .. } => scale::rolling(deployment, &sets.sizes()),
            Strategy::Recreate => scale::recreate(deployment, &sets.sizes(), may_create),
        }
    };
    let changed = resizes.iter().filter_map(|resize| resize_step(deployment, sets, *resize));
    steps.extend(changed);
    if steps.is_empty() && (deployment.paused || status::is_complete(deployment, sets)) {
        steps = revision::forget_history(deployment, sets);
    }
    steps
}

/// Whether a pod that is not of the new set still runs.
fn old_pods_live(world: &World, sets: &Sets<'_>) -> bool {
    sets.old
        .iter()
        .flat_map(|set| world.dependents(&set.object.meta.uid))
        .any(|pod| pod.pod.as_ref().is_some_and(|pod| !pod.is_terminal()))
}

fn resize_step(deployment: &Deployment<'_>, sets: &Sets<'_>, resize: Resize) -> Option<Step> {
    let set = match resize.which {
        scale::Which::New => sets.new.as_ref()?,
        scale::Which::Old(index) => sets.old.get(index)?,
    };
    let maximum = deployment.replicas + deployment.surge();
    let annotated =
        set.number(DESIRED) == Some(deployment.replicas) && set.number(MAXIMUM) == Some(maximum);
    if set.size == resize.to && annotated {
        return None;
    }
    let mut patch = annotation_patch(&[
        (DESIRED, deployment.replicas.to_string()),
        (MAXIMUM, maximum.to_string()),
    ]);
    // Refused when another writer was faster: the sizes were counted from this state.
    patch["metadata"]["resourceVersion"] = json!(set.object.meta.revision.to_string());
    if set.size == resize.to {
        return Some(Step::patch(set.object.place(), patch));
    }
    patch["spec"] = json!({"replicas": resize.to});
    let way = if resize.to > set.size { "up" } else { "down" };
    let message =
        format!("Scaled {way} replica set {} from {} to {}", set.name(), set.size, resize.to);
    let note = deployment.note("ScalingReplicaSet", message);
    Some(Step::patch(set.object.place(), patch).noted(note))
}
