//! Nodes that stop renewing their Lease: conditions, taints, and their pods' readiness and eviction.
//! Pure.
//!
//! Follows upstream's `node_lifecycle_controller.go` and `tainteviction`. Time is ours: a Lease
//! counts from when its renewal was seen here, as a node's clock may be wrong.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    conditions::find,
    json::{boolean, integer, items, rfc3339, text, time},
    model::{Key, LEASES, NODES, Object, PODS},
    sync::{Act, Context, Controller, Note, Step, Sync, own_key, reference},
    world::{Change, World},
};
use crate::client::Write;

/// `--node-monitor-grace-period`, upstream's default since 1.32.
const GRACE: SignedDuration = SignedDuration::from_secs(50);
/// `--node-startup-grace-period`: for a node that never renewed.
const STARTUP_GRACE: SignedDuration = SignedDuration::from_secs(60);
const LEASE_NAMESPACE: &str = "kube-node-lease";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

pub(super) const CONTROLLER: Controller =
    Controller { name: "nodelifecycle", component: "node-controller", keys, sync, first: None };

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(NODES, change, out);
    let Some(object) = change.object() else { return };
    if change.resource == LEASES && object.meta.key.namespace == LEASE_NAMESPACE {
        out.push(Key::new("", &object.meta.key.name));
    }
    if change.resource == PODS
        && let Some(pod) = change.new.as_ref().and_then(|object| object.pod.as_ref())
        && let Some(node) = world.get(NODES, &Key::new("", &pod.node))
        && (ready(node) != "True" || !no_execute(node).is_empty())
    {
        out.push(node.meta.key.clone());
    }
}

/// The status of the condition Ready; `Unknown` when there is none.
fn ready(node: &Object) -> &str {
    find(items(&node.value, "/status/conditions"), "Ready")
        .map_or("Unknown", |condition| text(condition, "/status"))
}

fn no_execute(node: &Object) -> Vec<&Value> {
    items(&node.value, "/spec/taints")
        .iter()
        .filter(|taint| text(taint, "/effect") == "NoExecute")
        .collect()
}

fn sync(world: &World, key: &Key, context: &Context) -> Sync {
    let Some(node) = world.get(NODES, key) else { return Sync::done() };
    if node.meta.deleted.is_some() {
        return Sync::done();
    }
    let mut answer = Sync::done();
    let lease = world.get(LEASES, &Key::new(LEASE_NAMESPACE, &key.name));
    let end = match lease {
        Some(lease) => lease.seen + GRACE,
        None => node.meta.created.max(first_seen(node)) + STARTUP_GRACE,
    };
    if end > context.now {
        let wait = end.duration_since(context.now);
        answer.requeue_in(Duration::try_from(wait).unwrap_or_default());
    } else if let Some(conditions) = unknown_conditions(node, context.now) {
        // The taints follow from the conditions, once they are stored.
        let mut patch = json!({"status": {"conditions": conditions}});
        patch["metadata"] = json!({"resourceVersion": node.meta.revision.to_string()});
        let note = Note::normal(
            reference(node, "v1", "Node"),
            "NodeNotReady",
            format!("Node {} status is now: NodeNotReady", key.name),
        );
        answer.steps.push(Step::status(node.place(), patch).noted(note));
        return answer;
    }
    // When no node is well the fault is more likely on our side: nobody is evicted.
    let any_well = world.all(NODES).any(|node| ready(node) == "True");
    if let Some(taints) = taints(node, any_well, context.now) {
        let metadata = json!({"resourceVersion": node.meta.revision.to_string()});
        let patch = json!({"metadata": metadata, "spec": {"taints": taints}});
        answer.steps.push(Step::patch(node.place(), patch));
    }
    if ready(node) != "True" {
        answer.steps.extend(world.pods_on(&key.name).filter_map(not_ready));
    }
    if any_well {
        evict(world, node, context.now, &mut answer);
    }
    answer
}

/// When this process first saw the node in its present state; a node without a Lease is not
/// written to by its kubelet either.
fn first_seen(node: &Object) -> Timestamp {
    node.seen
}

const CONDITIONS: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

/// The conditions with the kubelet's own ones unknown; `None` when they are already.
fn unknown_conditions(node: &Object, now: Timestamp) -> Option<Vec<Value>> {
    let old = items(&node.value, "/status/conditions");
    let mut list = old.to_vec();
    for kind in CONDITIONS {
        let slot = list.iter().position(|condition| text(condition, "/type") == kind);
        match slot {
            Some(slot) if text(&list[slot], "/status") == "Unknown" => (),
            Some(slot) => {
                let condition = &mut list[slot];
                condition["status"] = json!("Unknown");
                condition["reason"] = json!("NodeStatusUnknown");
                condition["message"] = json!("Kubelet stopped posting node status.");
                condition["lastTransitionTime"] = json!(rfc3339(now));
            }
            None => list.push(json!({
                "type": kind, "status": "Unknown", "reason": "NodeStatusNeverUpdated",
                "message": "Kubelet never posted node status.",
                "lastHeartbeatTime": rfc3339(node.meta.created), "lastTransitionTime": rfc3339(now),
            })),
        }
    }
    (list != old).then_some(list)
}

/// Taints that mirror the node's state: condition type, its status, taint.
const MIRRORED: [(&str, &str, &str); 6] = [
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";

/// The taints that the node should have; `None` when it has them.
fn taints(node: &Object, any_well: bool, now: Timestamp) -> Option<Vec<Value>> {
    let conditions = items(&node.value, "/status/conditions");
    let holds = |kind: &str, status: &str| match find(conditions, kind) {
        Some(condition) => text(condition, "/status") == status,
        None => kind == "Ready" && status == "Unknown",
    };
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    for (kind, status, taint) in MIRRORED {
        if holds(kind, status) {
            wanted.push((taint, "NoSchedule"));
            if kind == "Ready" && any_well {
                wanted.push((taint, "NoExecute"));
            }
        }
    }
    if boolean(&node.value, "/spec/unschedulable") {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let ours = |key: &str| key == UNSCHEDULABLE || MIRRORED.iter().any(|(.., taint)| *taint == key);
    let old = items(&node.value, "/spec/taints");
    let is = |taint: &Value, (key, effect): (&str, &str)| {
        text(taint, "/key") == key && text(taint, "/effect") == effect
    };
    let mut list: Vec<Value> = old
        .iter()
        .filter(|taint| {
            !ours(text(taint, "/key")) || wanted.iter().any(|wanted| is(taint, *wanted))
        })
        .cloned()
        .collect();
    for want in wanted {
        if !list.iter().any(|taint| is(taint, want)) {
            list.push(json!({"key": want.0, "effect": want.1, "timeAdded": rfc3339(now)}));
        }
    }
    (list != old).then_some(list)
}

fn not_ready(pod: &Arc<Object>) -> Option<Step> {
    let facts = pod.pod.as_ref()?;
    (facts.ready && pod.meta.deleted.is_none() && !facts.is_terminal()).then(|| {
        let note = Note::warning(reference(pod, "v1", "Pod"), "NodeNotReady", "Node is not ready");
        let act =
            Act::Edit { object: pod.place(), edit: set_not_ready, argument: pod.meta.uid.clone() };
        Step::new(act).noted(note)
    })
}

/// A pod's status with Ready=False, for exactly the pod of this uid.
fn set_not_ready(pod: &Value, uid: &str, now: Timestamp) -> Option<Write> {
    if text(pod, "/metadata/uid") != uid {
        return None;
    }
    let mut conditions = items(pod, "/status/conditions").to_vec();
    let ready = conditions
        .iter_mut()
        .find(|condition| text(condition, "/type") == "Ready")
        .filter(|condition| text(condition, "/status") == "True")?;
    ready["status"] = json!("False");
    ready["lastTransitionTime"] = json!(rfc3339(now));
    let patch = json!({
        "metadata": {"resourceVersion": pod["metadata"]["resourceVersion"]},
        "status": {"conditions": conditions},
    });
    let object = Key::new(text(pod, "/metadata/namespace"), text(pod, "/metadata/name")).at(PODS);
    Some(Write::Patch { object, subresource: "status", patch })
}

fn evict(world: &World, node: &Object, now: Timestamp, answer: &mut Sync) {
    let taints = no_execute(node);
    if taints.is_empty() {
        return;
    }
    for pod in world.pods_on(&node.meta.key.name) {
        if pod.meta.deleted.is_some() {
            continue;
        }
        let Some(facts) = &pod.pod else { continue };
        let Some(at) = eviction(&taints, &facts.tolerations, now) else { continue };
        if at > now {
            let wait = at.duration_since(now);
            answer.requeue_in(Duration::try_from(wait).unwrap_or_default());
            continue;
        }
        let message =
            format!("Marking for deletion Pod {}/{}", pod.meta.key.namespace, pod.meta.key.name);
        let note = Note::normal(reference(pod, "v1", "Pod"), "TaintManagerEviction", message);
        answer.steps.push(Step::delete(pod).noted(note));
    }
}

/// When a pod with these tolerations must leave a node with these taints; `None` for never.
fn eviction(taints: &[&Value], tolerations: &Value, now: Timestamp) -> Option<Timestamp> {
    let tolerations = items(tolerations, "");
    let mut earliest: Option<Timestamp> = None;
    for taint in taints {
        let added = time(taint, "/timeAdded").unwrap_or(now);
        let fitting: Vec<&Value> = tolerations
            .iter()
            .filter(|toleration| crate::scheduler::tolerates(toleration, taint))
            .collect();
        if fitting.is_empty() {
            return Some(now);
        }
        let seconds = fitting.iter().filter_map(|fit| integer(fit, "/tolerationSeconds")).min();
        if let Some(seconds) = seconds {
            let at = added
                .saturating_add(SignedDuration::from_secs(seconds.max(0)))
                .unwrap_or(Timestamp::MAX);
            earliest = Some(earliest.map_or(at, |earliest| earliest.min(at)));
        }
    }
    earliest
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, node, pod, world_at};
    use super::*;

    fn lease(name: &str) -> Value {
        json!({"kind": "Lease", "metadata": {"name": name, "namespace": LEASE_NAMESPACE, "uid": format!("l-{name}")}})
    }

    /// The sync of `n1`, `seconds` after all objects were last seen to change.
    fn after(seconds: i64, objects: Vec<Value>) -> Sync {
        let context = context();
        let seen = context.now - SignedDuration::from_secs(seconds);
        sync(&world_at(objects, seen), &Key::new("", "n1"), &context)
    }

    fn unknown(name: &str) -> Value {
        let mut value = node(name);
        value["status"]["conditions"] = json!([{"type": "Ready", "status": "Unknown"}]);
        value
    }

    #[test]
    fn a_node_is_lost_50_s_after_its_last_renewal() {
        let answer = after(49, vec![node("n1"), node("n2"), lease("n1")]);
        assert_eq!((answer.steps.len(), answer.requeue), (0, Some(Duration::from_secs(1))));
        let answer = after(50, vec![node("n1"), node("n2"), lease("n1")]);
        let [Write::Patch { subresource: "status", patch, .. }] = &answer.writes()[..] else {
            unreachable!()
        };
        let ready = &patch["status"]["conditions"][0];
        assert_eq!(ready["status"], "Unknown");
        assert_eq!(ready["reason"], "NodeStatusUnknown");
        assert_eq!(ready["message"], "Kubelet stopped posting node status.");
    }

    #[test]
    fn a_lost_node_is_tainted_unless_all_are_lost() {
        let added = |objects| {
            let writes = after(1, objects).writes();
            let Write::Patch { patch, .. } = &writes[0] else { unreachable!() };
            patch["spec"]["taints"]
                .as_array()
                .unwrap()
                .iter()
                .map(|taint| format!("{}:{}", text(taint, "/key"), text(taint, "/effect")))
                .collect::<Vec<_>>()
        };
        let schedule = format!("{UNREACHABLE}:NoSchedule");
        let execute = format!("{UNREACHABLE}:NoExecute");
        assert_eq!(
            added(vec![unknown("n1"), node("n2"), lease("n1")]),
            [schedule.clone(), execute]
        );
        assert_eq!(added(vec![unknown("n1"), lease("n1")]), [schedule]);
    }

    #[test]
    fn a_node_that_returns_loses_our_taints_only() {
        let mut back = node("n1");
        back["spec"]["taints"] = json!([
            {"key": "mine", "effect": "NoSchedule"},
            {"key": UNREACHABLE, "effect": "NoExecute"},
        ]);
        let writes = after(1, vec![back, lease("n1")]).writes();
        let Write::Patch { patch, .. } = &writes[0] else { unreachable!() };
        assert_eq!(patch["spec"]["taints"], json!([{"key": "mine", "effect": "NoSchedule"}]));
    }

    #[test]
    fn pods_of_a_lost_node_leave_when_their_toleration_ends() {
        let mut lost = unknown("n1");
        let taint = |effect: &str| json!({"key": UNREACHABLE, "effect": effect, "timeAdded": "2025-12-31T23:55:00Z"});
        lost["spec"]["taints"] = json!([taint("NoSchedule"), taint("NoExecute")]);
        let tolerant = |name: &str, seconds: Value| {
            let mut pod = pod(name, "web", "n1", false);
            pod["spec"]["tolerations"] = json!([{
                "key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds,
            }]);
            pod
        };
        let answer = after(
            1,
            vec![
                lost,
                node("n2"),
                lease("n1"),
                tolerant("due", json!(300)),
                tolerant("later", json!(320)),
                tolerant("forever", Value::Null),
                pod("at-once", "web", "n1", false),
            ],
        );
        let gone: Vec<_> = answer
            .writes()
            .into_iter()
            .map(|write| {
                if let Write::Delete { object, .. } = write { object.name } else { unreachable!() }
            })
            .collect();
        assert_eq!(gone, ["at-once", "due"]);
        assert_eq!(answer.requeue, Some(Duration::from_secs(20)));
    }

    #[test]
    fn pods_of_a_lost_node_are_marked_not_ready() {
        let mut lost = unknown("n1");
        lost["spec"]["taints"] = json!([{"key": UNREACHABLE, "effect": "NoSchedule"}]);
        let running = pod("web-1", "web", "n1", true);
        let answer = after(1, vec![lost, lease("n1"), running.clone()]);
        let Act::Edit { edit, argument, .. } = &answer.steps[0].act else { unreachable!() };
        let Some(Write::Patch { patch, .. }) = edit(&running, argument, context().now) else {
            unreachable!()
        };
        assert_eq!(patch["status"]["conditions"][0]["status"], "False");
        assert_eq!(edit(&running, "another", context().now), None);
    }
}
