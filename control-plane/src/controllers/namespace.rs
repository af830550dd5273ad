//! Empties a namespace that is being deleted, then lets it go. Pure.
//!
//! Follows upstream's `namespaced_resources_deleter.go`: pods go first, and what remains is told in
//! the namespace's conditions.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    conditions::{self, Said},
    json::{items, text},
    model::{Key, NAMESPACES, Object, PODS},
    sync::{Act, Context, Controller, Step, Sync, delete_write, own_key},
    world::{Change, World},
};
use crate::client::Write;

/// How long a namespace must have been going before it counts as empty: an object that was created
/// just before may not have come through its own watch yet. Deletion timestamps are cut to the
/// second, so the real wait is 0.5 to 1.5 s.
const SETTLE: SignedDuration = SignedDuration::from_millis(1500);
/// Deletions in one sync.
const BURST: usize = 500;

pub(super) const CONTROLLER: Controller =
    Controller { name: "namespace", component: "namespace-controller", keys, sync, first: None };

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(NAMESPACES, change, out);
    if let Some(object) = change.object()
        && !object.meta.key.namespace.is_empty()
    {
        let namespace = world.namespace(&object.meta.key.namespace);
        if namespace.is_none_or(|namespace| namespace.meta.deleted.is_some()) {
            out.push(Key::new("", &object.meta.key.namespace));
        }
    }
}

fn sync(world: &World, key: &Key, context: &Context) -> Sync {
    let content = content(world, &key.name);
    let Some(namespace) = world.get(NAMESPACES, key) else {
        return stray(key, &content);
    };
    if namespace.meta.deleted.is_none() {
        return Sync::done();
    }
    let mut answer = Sync::done();
    let pods_live = content.iter().any(|object| object.resource == PODS);
    answer.steps = content
        .iter()
        .filter(|object| object.meta.deleted.is_none())
        .filter(|object| !pods_live || object.resource == PODS)
        .take(BURST)
        .map(|object| Step::delete_with(object, Some("Background")))
        .collect();
    if let Some(patch) = status(namespace, &content, context.now) {
        answer.steps.push(Step::status(namespace.place(), patch));
    }
    if !content.is_empty() {
        return answer;
    }
    let age = context.now.duration_since(namespace.meta.deleted.unwrap_or(context.now));
    if age < SETTLE {
        answer.requeue_in(Duration::try_from(SETTLE - age).unwrap_or_default());
        return answer;
    }
    answer.steps.extend(finalize(namespace));
    answer
}

fn content<'a>(world: &'a World, name: &str) -> Vec<&'a Arc<Object>> {
    world
        .settings
        .kinds
        .iter()
        .filter(|kind| kind.namespaced)
        .flat_map(|kind| world.in_namespace(kind.resource, name))
        .collect()
}

/// Objects of a namespace that is gone: created in the moment of its end.
fn stray(key: &Key, content: &[&Arc<Object>]) -> Sync {
    let owners = vec![(key.at(NAMESPACES), String::new())];
    let steps = content
        .iter()
        .filter(|object| object.meta.deleted.is_none())
        .take(BURST)
        .map(|object| {
            let write = delete_write(object, Some("Background"), None);
            Step::new(Act::IfAbsent { owners: owners.clone(), write })
        })
        .collect();
    Sync { steps, ..Sync::default() }
}

fn finalize(namespace: &Object) -> Option<Step> {
    let all = items(&namespace.value, "/spec/finalizers");
    let kept: Vec<&Value> = all.iter().filter(|name| **name != "kubernetes").collect();
    if kept.len() == all.len() {
        return None;
    }
    let mut value = Value::clone(&namespace.value);
    value["spec"]["finalizers"] = json!(kept);
    let object = namespace.place();
    Some(Step::write(Write::UpdateSub { object, subresource: "finalize", value }))
}

fn status(namespace: &Object, content: &[&Arc<Object>], now: Timestamp) -> Option<Value> {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut finalizers: BTreeMap<&str, usize> = BTreeMap::new();
    for object in content {
        let name = match object.resource.group {
            "" => object.resource.plural.to_owned(),
            group => format!("{}.{group}", object.resource.plural),
        };
        *kinds.entry(name).or_insert(0) += 1;
        for finalizer in &object.meta.finalizers {
            *finalizers.entry(finalizer).or_insert(0) += 1;
        }
    }
    let list = |counts: Vec<String>| counts.join(", ");
    let remaining = if kinds.is_empty() {
        Said::new(
            "NamespaceContentRemaining",
            "False",
            "ContentRemoved",
            "All content successfully removed",
        )
    } else {
        let told =
            kinds.iter().map(|(kind, count)| format!("{kind} has {count} resource instances"));
        let message = format!("Some resources are remaining: {}", list(told.collect()));
        Said::new("NamespaceContentRemaining", "True", "SomeResourcesRemain", message)
    };
    let held = if finalizers.is_empty() {
        Said::new(
            "NamespaceFinalizersRemaining",
            "False",
            "ContentHasNoFinalizers",
            "All content-preserving finalizers finished",
        )
    } else {
        let told = finalizers
            .iter()
            .map(|(finalizer, count)| format!("{finalizer} in {count} resource instances"));
        let message = format!(
            "Some content in the namespace has finalizers remaining: {}",
            list(told.collect())
        );
        Said::new("NamespaceFinalizersRemaining", "True", "SomeFinalizersRemain", message)
    };
    let old = items(&namespace.value, "/status/conditions");
    let mut conditions = old.to_vec();
    for said in [remaining, held] {
        let same = conditions::says(&conditions, &said)
            && conditions::find(&conditions, said.kind)
                .is_some_and(|old| text(old, "/message") == said.message);
        if !same {
            conditions::put(&mut conditions, &said, now);
        }
    }
    (conditions != old).then(|| json!({"status": {"conditions": conditions}}))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, pod, service, world};
    use super::*;

    fn namespace() -> Value {
        json!({
            "kind": "Namespace",
            "metadata": {"name": "ns", "uid": "uid-ns", "deletionTimestamp": "2025-12-31T00:00:00Z"},
            "spec": {"finalizers": ["kubernetes", "other"]},
        })
    }

    fn writes(objects: Vec<Value>) -> Vec<Write> {
        let mut context = context();
        context.now += SignedDuration::from_secs(5);
        sync(&world(objects), &Key::new("", "ns"), &context).writes()
    }

    #[test]
    fn pods_go_before_all_else_and_the_rest_is_told() {
        let all = writes(vec![namespace(), pod("web-1", "web", "n1", true), service("web")]);
        let Write::Delete { object, .. } = &all[0] else { unreachable!() };
        assert_eq!(object.name, "web-1");
        let Write::Patch { patch, .. } = &all[1] else { unreachable!() };
        assert_eq!(
            patch["status"]["conditions"][0]["message"],
            "Some resources are remaining: pods has 1 resource instances, services has 1 resource instances"
        );
        assert_eq!(all.len(), 2, "the namespace is not let go");
    }

    #[test]
    fn an_empty_namespace_is_let_go_by_our_finalizer_only() {
        let all = writes(vec![namespace()]);
        let Write::UpdateSub { subresource: "finalize", value, .. } = &all.last().unwrap() else {
            unreachable!("{all:?}")
        };
        assert_eq!(value["spec"]["finalizers"], json!(["other"]));
    }

    #[test]
    fn a_namespace_that_stays_keeps_its_content() {
        let mut stays = namespace();
        stays["metadata"]["deletionTimestamp"] = Value::Null;
        assert_eq!(writes(vec![stays, service("web")]), []);
    }

    #[test]
    fn objects_of_a_vanished_namespace_are_removed() {
        let all = writes(vec![service("web")]);
        assert!(matches!(&all[..], [Write::Delete { .. }]), "{all:?}");
    }
}
