//! Garbage collection by owner references: background, foreground, orphan. Pure.
//!
//! Follows upstream's `pkg/controller/garbagecollector`. A key's namespace is the object's uid and
//! its name empty, as the graph knows objects by uid only.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    adopt::{references, set_references},
    model::{Key, Object, Owner},
    sync::{Act, Context, Controller, Step, Sync},
    world::{Change, World},
};
use crate::client::{DeleteOptions, ObjectRef, Write};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

pub(super) const CONTROLLER: Controller = Controller {
    name: "garbage-collector",
    component: "garbage-collector-controller",
    keys,
    sync,
    first: None,
};

fn key(uid: &str) -> Key {
    Key::new(uid, "")
}

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    let goes = change.new.as_ref().is_none_or(|object| object.meta.deleted.is_some());
    if let Some(object) = change.object()
        && goes
    {
        out.extend(world.dependents(&object.meta.uid).map(|object| key(&object.meta.uid)));
    }
    // The namesake of a dead object: its dependents are looked at, too.
    if let (Some(old), Some(new)) = (&change.old, &change.new)
        && old.meta.uid != new.meta.uid
    {
        out.extend(world.dependents(&old.meta.uid).map(|object| key(&object.meta.uid)));
    }
    if let Some(new) = &change.new
        && (!new.meta.owners.is_empty() || new.meta.deleted.is_some())
    {
        out.push(key(&new.meta.uid));
    }
    // Owners that wait for their dependents.
    for owner in change.both().flat_map(|object| &object.meta.owners) {
        if world.by_uid(&owner.uid).is_some_and(|owner| owner.meta.deleted.is_some()) {
            out.push(key(&owner.uid));
        }
    }
}

fn sync(world: &World, key: &Key, _context: &Context) -> Sync {
    let Some(object) = world.by_uid(&key.namespace) else { return Sync::done() };
    let steps = if object.meta.deleted.is_none() {
        collect(world, object)
    } else if object.meta.has_finalizer(ORPHAN) {
        orphan(world, object)
    } else if object.meta.has_finalizer(FOREGROUND) {
        foreground(world, object)
    } else {
        Vec::new()
    };
    Sync { steps, ..Sync::default() }
}

/// What an owner reference is worth.
enum Worth {
    /// It holds the object; also when its kind is not watched, as nothing can be said of it.
    Solid,
    /// It is being deleted and waits for us.
    Waiting,
    /// It does not exist, as far as the caches know.
    Absent(ObjectRef),
}

fn worth(world: &World, object: &Object, owner: &Owner) -> Worth {
    if let Some(found) = world.by_uid(&owner.uid) {
        let waits = found.meta.deleted.is_some()
            && found.meta.has_finalizer(FOREGROUND)
            && owner.block_deletion;
        return if waits { Worth::Waiting } else { Worth::Solid };
    }
    match world.kind(&owner.api_version, &owner.kind) {
        None => Worth::Solid,
        Some(kind) => {
            let namespace = if kind.namespaced { &object.meta.key.namespace } else { "" };
            Worth::Absent(Key::new(namespace, &owner.name).at(kind.resource))
        }
    }
}

fn collect(world: &World, object: &Arc<Object>) -> Vec<Step> {
    let (mut solid, mut waiting, mut absent, mut lost) = (false, false, Vec::new(), Vec::new());
    for owner in &object.meta.owners {
        match worth(world, object, owner) {
            Worth::Solid => solid = true,
            Worth::Waiting => {
                waiting = true;
                lost.push(owner.uid.as_str());
            }
            Worth::Absent(place) => {
                absent.push((place, owner.uid.clone()));
                lost.push(owner.uid.as_str());
            }
        }
    }
    if lost.is_empty() {
        return Vec::new();
    }
    if solid {
        let kept: Vec<Value> = references(object)
            .into_iter()
            .filter(|owner| owner["uid"].as_str().is_none_or(|uid| !lost.contains(&uid)))
            .collect();
        return vec![if_absent(absent, set_references(object, kept))];
    }
    let blocked = world.dependents(&object.meta.uid).next().is_some();
    let propagation = if object.meta.has_finalizer(ORPHAN) {
        "Orphan"
    } else if object.meta.has_finalizer(FOREGROUND) || (waiting && blocked) {
        "Foreground"
    } else {
        "Background"
    };
    vec![if_absent(absent, Step::write(delete_as_seen(object, propagation)))]
}

/// The revision makes the store refuse when somebody has changed the object meanwhile: it may have
/// another owner by now, or none that is missing.
fn delete_as_seen(object: &Object, propagation: &'static str) -> Write {
    let options = DeleteOptions {
        uid: Some(object.meta.uid.clone()),
        resource_version: Some(object.meta.revision.to_string()),
        propagation: Some(propagation),
        ..DeleteOptions::default()
    };
    Write::Delete { object: object.place(), options }
}

/// The step, but only if the store does not know the owners either.
fn if_absent(owners: Vec<(ObjectRef, String)>, step: Step) -> Step {
    if let Act::Write(write) = &step.act
        && !owners.is_empty()
    {
        return Step::new(Act::IfAbsent { owners, write: write.clone() });
    }
    step
}

fn orphan(world: &World, owner: &Object) -> Vec<Step> {
    let released: Vec<Step> = world
        .dependents(&owner.meta.uid)
        .map(|object| {
            let mut kept = references(object);
            kept.retain(|reference| reference["uid"] != owner.meta.uid.as_str());
            set_references(object, kept)
        })
        .collect();
    if !released.is_empty() {
        return released;
    }
    // What the caches have not seen would lose its owner and be taken for garbage.
    let write = without_finalizer(owner, ORPHAN);
    let (uid, namespace) = (owner.meta.uid.clone(), owner.meta.key.namespace.clone());
    let kinds = world.settings.kinds.iter();
    let resources = kinds
        .filter(|kind| kind.namespaced || namespace.is_empty())
        .map(|kind| kind.resource)
        .collect();
    vec![Step::new(Act::IfChildless { uid, namespace, resources, write })]
}

fn foreground(world: &World, owner: &Object) -> Vec<Step> {
    let blocks = |object: &Object| {
        object
            .meta
            .owners
            .iter()
            .any(|reference| reference.uid == owner.meta.uid && reference.block_deletion)
    };
    // The dependents' own keys delete them; here is only waited.
    if world.dependents(&owner.meta.uid).any(|object| blocks(object)) {
        return Vec::new();
    }
    vec![Step::write(without_finalizer(owner, FOREGROUND))]
}

fn without_finalizer(object: &Object, name: &str) -> Write {
    let kept: Vec<&String> =
        object.meta.finalizers.iter().filter(|finalizer| *finalizer != name).collect();
    let metadata = json!({"resourceVersion": object.meta.revision.to_string(), "finalizers": kept});
    Write::Patch { object: object.place(), subresource: "", patch: json!({"metadata": metadata}) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, deployment, pod, replica_set, world};
    use super::*;

    fn writes(objects: &[Value], uid: &str) -> Vec<Write> {
        sync(&world(objects.to_vec()), &key(uid), &context()).writes()
    }

    fn going(mut value: Value, finalizer: &str) -> Value {
        value["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        value["metadata"]["finalizers"] = json!([finalizer]);
        value
    }

    fn propagation(write: &Write) -> (&str, Option<&str>) {
        let Write::Delete { object, options } = write else { unreachable!("{write:?}") };
        (object.name.as_str(), options.propagation)
    }

    #[test]
    fn a_dependent_of_a_gone_owner_is_deleted_after_asking_the_store() {
        let objects = [pod("web-1", "web", "n1", true)];
        let answer = sync(&world(objects.to_vec()), &key("uid-web-1"), &context());
        let Act::IfAbsent { owners, .. } = &answer.steps[0].act else { unreachable!() };
        assert_eq!((owners[0].0.name.as_str(), owners[0].1.as_str()), ("web", "uid-web"));
        let writes = answer.writes();
        assert_eq!(propagation(&writes[0]), ("web-1", Some("Background")));
        let Write::Delete { options, .. } = &writes[0] else { unreachable!() };
        assert_eq!(options.resource_version.as_deref(), Some("1"), "as it was seen, or not at all");
    }

    #[test]
    fn an_owner_of_an_unknown_kind_holds_its_dependents() {
        let mut object = pod("web-1", "web", "n1", true);
        object["metadata"]["ownerReferences"][0]["kind"] = json!("Backup");
        assert_eq!(writes(&[object], "uid-web-1"), []);
    }

    #[test]
    fn foreground_waits_for_blocking_dependents() {
        let owner = going(replica_set("web", 1), FOREGROUND);
        let child = pod("web-1", "web", "n1", true);
        let both = [owner.clone(), child];
        assert_eq!(writes(&both, "uid-web"), [], "the set waits");
        assert_eq!(propagation(&writes(&both, "uid-web-1")[0]), ("web-1", Some("Background")));
        let last = writes(&[owner], "uid-web");
        let Write::Patch { patch, .. } = &last[0] else { unreachable!() };
        assert_eq!(patch["metadata"]["finalizers"], json!([]));
    }

    #[test]
    fn foreground_goes_down_the_whole_tree() {
        let owner = going(deployment("top", 1), FOREGROUND);
        let mut set = replica_set("web", 1);
        set["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "apps/v1", "kind": "Deployment", "name": "top", "uid": "uid-top",
            "controller": true, "blockOwnerDeletion": true,
        }]);
        let objects = [owner, set, pod("web-1", "web", "n1", true)];
        assert_eq!(propagation(&writes(&objects, "uid-web")[0]), ("web", Some("Foreground")));
    }

    #[test]
    fn orphaning_releases_the_dependents_first() {
        let owner = going(replica_set("web", 1), ORPHAN);
        let both = [owner.clone(), pod("web-1", "web", "n1", true)];
        let released = writes(&both, "uid-web");
        let Write::Patch { object, patch, .. } = &released[0] else { unreachable!() };
        assert_eq!(
            (object.name.as_str(), &patch["metadata"]["ownerReferences"]),
            ("web-1", &json!([]))
        );
        let Write::Patch { object, .. } = &writes(&[owner], "uid-web")[0] else { unreachable!() };
        assert_eq!(object.name, "web");
    }

    #[test]
    fn one_living_owner_is_enough() {
        let mut object = pod("web-1", "web", "n1", true);
        let mut gone = object["metadata"]["ownerReferences"][0].clone();
        gone["uid"] = json!("gone");
        object["metadata"]["ownerReferences"].as_array_mut().unwrap().push(gone);
        let released = writes(&[replica_set("web", 1), object], "uid-web-1");
        let Write::Patch { patch, .. } = &released[0] else { unreachable!() };
        assert_eq!(patch["metadata"]["ownerReferences"].as_array().unwrap().len(), 1);
    }
}
