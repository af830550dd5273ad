//! Server-side apply: ownership, conflicts, removal.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::schema::kind;

fn deployment() -> Type {
    kind("apps", "v1", "Deployment").unwrap().body
}

fn writer(manager: &str) -> Writer<'_> {
    Writer { manager, api_version: "apps/v1", subresource: "", time: "2026-01-02T03:04:05Z" }
}

fn run(
    live: Option<&Value>,
    config: &Value,
    manager: &str,
    force: Force,
) -> Result<Value, ApplyError> {
    apply(deployment(), live, config, writer(manager), (force, &["status"]))
}

fn web(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec})
}

fn fields(object: &Value, manager: &str) -> Value {
    let entries = object["metadata"]["managedFields"].as_array().unwrap();
    let found = entries.iter().find(|entry| entry["manager"] == manager);
    found.map(|entry| entry["fieldsV1"].clone()).unwrap_or_default()
}

#[test]
fn creating_owns_what_is_applied() {
    let config = web(json!({"replicas": 2, "template": {"metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{"name": "a", "image": "i", "ports": [{"containerPort": 80}]}]}}}));
    let object = run(None, &config, "me", Force::No).unwrap();
    assert_eq!(object["spec"], config["spec"]);
    assert_eq!(
        fields(&object, "me"),
        json!({"f:spec": {"f:replicas": {}, "f:template": {
            "f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {},
                "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}}}}}}}}})
    );
    let again = run(Some(&object), &config, "me", Force::No).unwrap();
    assert_eq!(again, object);
}

#[test]
fn conflicts_name_manager_and_field() {
    let created = update(
        deployment(),
        (None, web(json!({"replicas": 1, "paused": true}))),
        writer("kubectl-client-side-apply"),
        &[],
    );
    let error = run(Some(&created), &web(json!({"replicas": 3})), "me", Force::No).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 1 conflict: conflict with \"kubectl-client-side-apply\" using apps/v1: .spec.replicas"
    );
    assert_eq!(
        error.causes(),
        [json!({"reason": "FieldManagerConflict", "field": ".spec.replicas",
            "message": "conflict with \"kubectl-client-side-apply\" using apps/v1"})]
    );
    let both = web(json!({"replicas": 3, "paused": false}));
    assert_eq!(
        run(Some(&created), &both, "me", Force::No).unwrap_err().to_string(),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-client-side-apply\" using apps/v1:\n- .spec.paused\n- .spec.replicas"
    );
    // The same value is no conflict: both own it.
    let shared = run(Some(&created), &web(json!({"replicas": 1})), "me", Force::No).unwrap();
    assert_eq!(fields(&shared, "me"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(fields(&shared, "kubectl-client-side-apply")["f:spec"]["f:replicas"], json!({}));
    let forced = run(Some(&created), &web(json!({"replicas": 3})), "me", Force::Yes).unwrap();
    assert_eq!(forced["spec"], json!({"replicas": 3, "paused": true}));
    assert_eq!(fields(&forced, "kubectl-client-side-apply"), json!({"f:spec": {"f:paused": {}}}));
}

#[test]
fn what_is_no_longer_applied_goes() {
    let template = |labels: Value, containers: Value| json!({"metadata": {"labels": labels}, "spec": {"containers": containers}});
    let (a, b) = (json!({"name": "a", "image": "i"}), json!({"name": "b", "image": "j"}));
    let first = web(json!({"replicas": 2, "paused": true,
        "template": template(json!({"a": "1", "b": "2"}), json!([a, b]))}));
    let created = run(None, &first, "me", Force::No).unwrap();
    // Another one owns the second container's image and a label.
    let other = web(json!({"template": template(json!({"b": "2"}), json!([b]))}));
    let shared = run(Some(&created), &other, "other", Force::No).unwrap();
    let second = json!({"replicas": 2, "template": {"spec": {"containers": [a]}}});
    let object = run(Some(&shared), &web(second), "me", Force::No).unwrap();
    assert_eq!(
        object["spec"],
        json!({"replicas": 2, "template": template(json!({"b": "2"}), json!([a, b]))})
    );
    let last = run(Some(&object), &web(json!({"replicas": 2})), "other", Force::No).unwrap();
    assert_eq!(last["spec"], json!({"replicas": 2, "template": {"spec": {"containers": [a]}}}));
}

#[test]
fn a_set_loses_only_its_own_entries() {
    let with = |finalizers: Value| {
        json!({"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {"name": "web", "finalizers": finalizers}})
    };
    let created = run(None, &with(json!(["a/a", "b/b"])), "me", Force::No).unwrap();
    let shared = run(Some(&created), &with(json!(["c/c"])), "other", Force::No).unwrap();
    let object = run(Some(&shared), &with(json!(["b/b"])), "me", Force::No).unwrap();
    assert_eq!(object["metadata"]["finalizers"], json!(["b/b", "c/c"]));
}

#[test]
fn updates_take_ownership() {
    let created = run(None, &web(json!({"replicas": 2})), "me", Force::No).unwrap();
    let mut scaled = created.clone();
    scaled["spec"]["replicas"] = 5.into();
    let scaled = update(deployment(), (Some(&created), scaled), writer("kubectl-scale"), &[]);
    assert_eq!(fields(&scaled, "kubectl-scale"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(fields(&scaled, "me"), Value::Null);
    let unchanged = update(deployment(), (Some(&scaled), scaled.clone()), writer("nobody"), &[]);
    assert_eq!(unchanged, scaled);
}

#[test]
fn what_a_write_does_not_reach_is_neither_gained_nor_lost() {
    let mut object = web(json!({"replicas": 2}));
    object["status"] = json!({"replicas": 1});
    let of_status = Writer { subresource: "status", ..writer("counter") };
    let counted = update(deployment(), (None, object.clone()), of_status, &["spec"]);
    assert_eq!(fields(&counted, "counter"), json!({"f:status": {"f:replicas": {}}}));
    object["spec"]["replicas"] = json!(3);
    object.as_object_mut().unwrap().remove("status");
    let scaled = update(deployment(), (Some(&counted), object), writer("me"), &["status"]);
    assert_eq!(fields(&scaled, "me"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(fields(&scaled, "counter"), json!({"f:status": {"f:replicas": {}}}));
}

#[test]
fn ownership_can_be_moved_and_cleared() {
    let created = update(deployment(), (None, web(json!({"replicas": 2}))), writer("old"), &[]);
    let mut moved = created.clone();
    moved["metadata"]["managedFields"][0]["manager"] = "new".into();
    let moved = update(deployment(), (Some(&created), moved), writer("old"), &[]);
    assert_eq!(fields(&moved, "new"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(fields(&moved, "old"), Value::Null);
    let mut kept = moved.clone();
    kept["metadata"].as_object_mut().unwrap().remove("managedFields");
    assert_eq!(update(deployment(), (Some(&moved), kept), writer("old"), &[]), moved);
    let mut cleared = moved.clone();
    cleared["metadata"]["managedFields"] = json!([{}]);
    let cleared = update(deployment(), (Some(&moved), cleared), writer("old"), &[]);
    assert_eq!(cleared["metadata"].get("managedFields"), None);
}

#[test]
fn refusals() {
    let cases = [
        (
            web(json!({"foo": 1})),
            "failed to create typed patch object (/web; apps/v1, Kind=Deployment): .spec.foo: field not declared in schema",
        ),
        (
            web(json!({"template": {"spec": {"containers": [{"image": "x"}]}}})),
            "failed to create typed patch object (/web; apps/v1, Kind=Deployment): .spec.template.spec.containers: element 0: associative list with keys has an element that omits key field \"name\" (and doesn't have default value)",
        ),
        (
            json!({"metadata": {"managedFields": [{"manager": "x"}]}}),
            "metadata.managedFields must be nil",
        ),
    ];
    for (config, text) in cases {
        assert_eq!(run(None, &config, "me", Force::No).unwrap_err().to_string(), text);
    }
}

fn spec() -> impl Strategy<Value = Value> {
    let container = ("[a-c]", "[x-z]").prop_map(|(name, image)| (name, image));
    (
        proptest::option::of(0..3_i32),
        proptest::collection::btree_map("[a-c]", "[0-2]", 0..3),
        proptest::collection::btree_map(container.clone().prop_map(|(n, _)| n), "[x-z]", 0..3),
    )
        .prop_map(|(replicas, labels, containers)| {
            let containers: Vec<Value> =
                containers.iter().map(|(name, image)| json!({"name": name, "image": image})).collect();
            let mut spec = json!({"template": {"metadata": {"labels": labels}, "spec": {"containers": containers}}});
            if let Some(replicas) = replicas {
                spec["replicas"] = replicas.into();
            }
            web(spec)
        })
}

proptest! {
    #[test]
    fn apply_is_idempotent_and_complete(first in spec(), second in spec(), mine in spec()) {
        let live = run(None, &first, "a", Force::Yes).unwrap();
        let live = run(Some(&live), &mine, "me", Force::Yes).unwrap();
        let live = run(Some(&live), &second, "me", Force::Yes).unwrap();
        // Complete: what is applied is there.
        let wanted = fields_of(Shape::Object(deployment()), &second, "").unwrap();
        let found = fields_of(Shape::Object(deployment()), &live, "").unwrap();
        // An applied empty map is there with whatever others put into it.
        let missing = wanted.difference(&found).paths();
        prop_assert!(missing.iter().all(|path| path.ends_with(".labels")), "{:?}", missing);
        let again = run(Some(&live), &second, "me", Force::No).unwrap();
        prop_assert_eq!(again, live);
    }

    #[test]
    fn field_sets_survive_json(object in spec()) {
        let set = fields_of(Shape::Object(deployment()), &object, "").unwrap();
        prop_assert_eq!(FieldSet::from_json(&set.to_json()), set.clone());
        prop_assert!(set.difference(&set).is_empty());
        prop_assert_eq!(set.union(&set), set.clone());
        prop_assert_eq!(set.intersection(&set), set);
    }
}
