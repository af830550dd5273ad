//! Pods that nobody will finish: on nodes that are gone, ended ones beyond a threshold, and deleted
//! ones that no node ever had. Pure. Follows upstream's `pkg/controller/podgc`.

use std::time::Duration;

use super::{
    model::{Key, NODES, Object, PODS},
    sync::{Act, Context, Controller, Step, Sync, delete_write},
    world::{Change, World},
};

/// `--terminated-pod-gc-threshold`.
const TERMINATED_LIMIT: usize = 12_500;
/// Upstream's `gcCheckPeriod`.
const PERIOD: Duration = Duration::from_secs(20);
const BURST: usize = 500;

pub(super) const CONTROLLER: Controller = Controller {
    name: "podgc",
    component: "pod-garbage-collector",
    keys,
    sync,
    first: Some(Key::default),
};

/// A key's name is a node that does not exist; the empty key is the periodic round.
fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    if change.resource == NODES && change.new.is_none() {
        out.extend(change.object().map(|node| node.meta.key.clone()));
    }
    if change.resource == PODS
        && let Some(object) = &change.new
        && let Some(pod) = &object.pod
    {
        if pod.node.is_empty() {
            if object.meta.deleted.is_some() {
                out.push(Key::default());
            }
        } else if world.get(NODES, &Key::new("", &pod.node)).is_none() {
            out.push(Key::new("", &pod.node));
        }
    }
}

fn sync(world: &World, key: &Key, _context: &Context) -> Sync {
    if key.name.is_empty() {
        return periodic(world);
    }
    if world.get(NODES, key).is_some() {
        return Sync::done();
    }
    let steps = world.pods_on(&key.name).take(BURST).map(|pod| {
        // The node may be younger than our cache of nodes: the store is asked.
        let owners = vec![(key.at(NODES), String::new())];
        Step::new(Act::IfAbsent { owners, write: at_once(pod) })
    });
    Sync { steps: steps.collect(), ..Sync::default() }
}

fn at_once(pod: &Object) -> crate::client::Write {
    delete_write(pod, None, Some(0))
}

fn periodic(world: &World) -> Sync {
    let mut answer = Sync::after(PERIOD);
    let lost = world.pods_on("").filter(|pod| pod.meta.deleted.is_some());
    answer.steps.extend(lost.take(BURST).map(|pod| Step::write(at_once(pod))));
    for node in world.nodes_with_pods() {
        if world.get(NODES, &Key::new("", node)).is_none() {
            answer.steps.extend(sync(world, &Key::new("", node), &NOTHING).steps);
        }
    }
    let is_ended = |pod: &&std::sync::Arc<Object>| {
        pod.meta.deleted.is_none() && pod.pod.as_ref().is_some_and(|pod| pod.is_terminal())
    };
    let count = world.all(PODS).filter(is_ended).count();
    if count > TERMINATED_LIMIT {
        let mut ended: Vec<_> = world.all(PODS).filter(is_ended).collect();
        ended.sort_by_key(|pod| pod.meta.created);
        let excess = (count - TERMINATED_LIMIT).min(BURST);
        answer.steps.extend(ended.into_iter().take(excess).map(|pod| Step::write(at_once(pod))));
    }
    answer
}

/// A sync by node name looks at nothing but the world.
const NOTHING: Context = Context { now: jiff::Timestamp::UNIX_EPOCH, failure: None };

#[cfg(test)]
mod tests {
    use super::super::testing::{context, node, pod, world};
    use super::*;
    use crate::client::Write;

    fn deleted(answer: &Sync) -> Vec<String> {
        answer
            .writes()
            .into_iter()
            .map(|write| {
                let Write::Delete { object, options } = write else { unreachable!() };
                assert_eq!(options.grace_period_seconds, Some(0));
                object.name
            })
            .collect()
    }

    #[test]
    fn pods_of_a_gone_node_go_after_the_store_was_asked() {
        let objects = vec![node("n1"), pod("a", "web", "n1", true), pod("b", "web", "n2", true)];
        let answer = sync(&world(objects), &Key::default(), &context());
        assert_eq!(deleted(&answer), ["b"]);
        assert!(
            matches!(&answer.steps[0].act, Act::IfAbsent { owners, .. } if owners[0].0.name == "n2")
        );
        assert_eq!(answer.requeue, Some(PERIOD));
    }

    #[test]
    fn a_deleted_pod_without_a_node_goes_at_once() {
        let mut lost = pod("a", "web", "", false);
        lost["metadata"]["deletionTimestamp"] = serde_json::json!("2026-01-01T00:00:00Z");
        let answer =
            sync(&world(vec![lost, pod("b", "web", "", false)]), &Key::default(), &context());
        assert_eq!(deleted(&answer), ["a"]);
    }
}
