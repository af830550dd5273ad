//! Which children a controller owns, takes over or lets go, by selector and controller reference. Pure.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    json::{controller_reference, selector_matches},
    model::{Key, Object},
    sync::Step,
    world::{Change, World},
};
use crate::client::Resource;

/// A controller's children and what must be done so that the right ones are its own.
#[derive(Debug, Default)]
pub(crate) struct Family<'a> {
    /// Owned by it and matching its selector.
    pub(crate) owned: Vec<&'a Arc<Object>>,
    /// Adoptions and releases.
    pub(crate) steps: Vec<Step>,
}

/// The API name of the owner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnerKind {
    pub(crate) api_version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) resource: Resource,
}

/// Sorts the children of `owner`. A controller that is being deleted neither adopts nor releases.
pub(crate) fn family<'a>(
    world: &'a World,
    owner: &Object,
    kind: OwnerKind,
    children: Resource,
) -> Family<'a> {
    let selector = owner.value.pointer("/spec/selector").unwrap_or(&Value::Null);
    let mut family = Family::default();
    let own = world.dependents(&owner.meta.uid).filter(|child| {
        child.resource == children
            && child.meta.controller().is_some_and(|owned| owned.uid == owner.meta.uid)
    });
    for child in own {
        if selector_matches(selector, &child.meta.labels) {
            family.owned.push(child);
        } else if owner.meta.deleted.is_none() && child.meta.deleted.is_none() {
            family.steps.push(release(child, &owner.meta.uid));
        }
    }
    if owner.meta.deleted.is_none() {
        family.steps.extend(
            world
                .orphans(children, &owner.meta.key.namespace)
                .filter(|child| {
                    child.meta.deleted.is_none()
                        && child.pod.as_ref().is_none_or(|pod| !pod.is_terminal())
                        && selector_matches(selector, &child.meta.labels)
                })
                .map(|child| adopt(child, owner, kind)),
        );
    }
    family
}

/// Keys of the owners of a child that changed: its controller, or for an orphan every one whose
/// selector it matches.
pub(crate) fn owners_of(world: &World, change: &Change, owner: OwnerKind, out: &mut Vec<Key>) {
    for child in change.both() {
        match child.meta.controller() {
            Some(reference) if reference.kind == owner.kind => {
                if let Some(object) = world.by_uid(&reference.uid) {
                    out.push(object.meta.key.clone());
                }
            }
            Some(_) => (),
            None => out.extend(
                world
                    .in_namespace(owner.resource, &child.meta.key.namespace)
                    .filter(|candidate| {
                        let selector = candidate.value.pointer("/spec/selector");
                        selector_matches(selector.unwrap_or(&Value::Null), &child.meta.labels)
                    })
                    .map(|candidate| candidate.meta.key.clone()),
            ),
        }
    }
}

fn adopt(child: &Object, owner: &Object, kind: OwnerKind) -> Step {
    let mut references = references(child);
    references.push(controller_reference(owner, kind.api_version, kind.kind));
    set_references(child, references)
}

fn release(child: &Object, uid: &str) -> Step {
    let mut references = references(child);
    references.retain(|reference| reference["uid"] != uid);
    set_references(child, references)
}

/// The resource version makes the store refuse when the list has changed meanwhile.
pub(crate) fn set_references(child: &Object, references: Vec<Value>) -> Step {
    let metadata = json!({
        "uid": child.meta.uid,
        "resourceVersion": child.meta.revision.to_string(),
        "ownerReferences": references,
    });
    Step::patch(child.place(), json!({"metadata": metadata}))
}

pub(crate) fn references(child: &Object) -> Vec<Value> {
    child
        .meta
        .owners
        .iter()
        .map(|owner| {
            let mut value = json!({
                "apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid,
            });
            if owner.controller {
                value["controller"] = json!(true);
            }
            if owner.block_deletion {
                value["blockOwnerDeletion"] = json!(true);
            }
            value
        })
        .collect()
}
