//! Tables for the rollout's arithmetic and steps; numbers as in upstream's
//! `pkg/controller/deployment/{rolling_test,sync_test}.go`.

use super::{
    scale::{Resize, Size, Sizes, Which, proportional, recreate, rolling},
    *,
};
use crate::{
    client::Write,
    controllers::testing::{context, deployment, set_of, world},
};

fn object(replicas: i64, surge: Value, unavailable: Value) -> Value {
    let mut value = deployment("web", replicas);
    value["spec"]["strategy"] = json!({
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable},
    });
    value
}

fn decoded(value: &Value) -> Object {
    Object::decode(DEPLOYMENTS, &Arc::new(value.clone()), context().now).unwrap()
}

fn size((spec, available): (i64, i64)) -> Size {
    Size { spec, available, before: None }
}

fn sizes(new: (i64, i64), old: &[(i64, i64)]) -> Sizes {
    Sizes { new: Some(size(new)), old: old.iter().copied().map(size).collect() }
}

#[test]
fn fenceposts_are_resolved() {
    let cases = [
        (json!("25%"), json!("25%"), 4, (1, 1)),
        (json!("25%"), json!("25%"), 3, (1, 0)),
        (json!(0), json!("10%"), 3, (0, 1)),
        (json!(2), json!(0), 3, (2, 0)),
    ];
    for (surge, unavailable, replicas, (s, u)) in cases {
        let value = object(replicas, surge, unavailable);
        assert_eq!(strategy(&value, replicas), Strategy::Rolling { surge: s, unavailable: u });
    }
}

#[test]
fn a_rolling_update_never_leaves_its_bounds() {
    // (replicas, surge, unavailable, new, old) -> changes
    let new = |to| Resize { which: Which::New, to };
    let old = |index, to| Resize { which: Which::Old(index), to };
    let table: Vec<(i64, i64, i64, Sizes, Vec<Resize>)> = vec![
        (10, 2, 0, sizes((0, 0), &[(10, 10)]), vec![new(2)]),
        (10, 2, 0, sizes((2, 0), &[(10, 10)]), vec![]),
        (10, 2, 0, sizes((2, 2), &[(10, 10)]), vec![old(0, 8)]),
        (10, 0, 2, sizes((0, 0), &[(10, 10)]), vec![old(0, 8)]),
        (10, 0, 2, sizes((0, 0), &[(8, 8)]), vec![new(2)]),
        (10, 0, 2, sizes((2, 0), &[(8, 8)]), vec![]),
        // Unhealthy old pods go first, of all old sets.
        (10, 0, 2, sizes((0, 0), &[(5, 3), (5, 5)]), vec![old(0, 3)]),
        (10, 2, 0, sizes((12, 12), &[]), vec![new(10)]),
    ];
    for (replicas, surge, unavailable, sizes, expected) in table {
        let value = object(replicas, json!(surge), json!(unavailable));
        let object = decoded(&value);
        let unchanged = sizes.new.unwrap().spec;
        let mut resizes = rolling(&Deployment::new(&object), &sizes);
        resizes.retain(|resize| *resize != new(unchanged));
        assert_eq!(resizes, expected, "{sizes:?}");
    }
}

#[test]
fn recreate_waits_for_the_old_pods() {
    let mut value = deployment("web", 3);
    value["spec"]["strategy"] = json!({"type": "Recreate"});
    let object = decoded(&value);
    let deployment = Deployment::new(&object);
    let old = sizes((0, 0), &[(3, 3)]);
    assert_eq!(recreate(&deployment, &old, false), [Resize { which: Which::Old(0), to: 0 }]);
    assert_eq!(recreate(&deployment, &sizes((0, 0), &[(0, 0)]), false), []);
    let all = [Resize { which: Which::New, to: 3 }];
    assert_eq!(recreate(&deployment, &sizes((0, 0), &[(0, 0)]), true), all);
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_shared_in_proportion() {
    let sized = |spec, before| Size { spec, available: spec, before: Some(before) };
    let value = object(15, json!(3), json!(2));
    let object = decoded(&value);
    let during = Sizes { new: Some(sized(5, 13)), old: vec![sized(8, 13)] };
    let resizes = proportional(&Deployment::new(&object), &during);
    // 18 in all; 8/13 and 5/13 of the growth from 13: 11 and 7 (upstream's own example).
    assert_eq!(
        resizes,
        [Resize { which: Which::Old(0), to: 11 }, Resize { which: Which::New, to: 7 }]
    );
    assert_eq!(resizes.iter().map(|resize| resize.to).sum::<i64>(), 18);
}

fn steps(objects: Vec<Value>) -> Vec<Write> {
    sync(&world(objects), &Key::new("ns", "web"), &context()).writes()
}

#[test]
fn a_new_deployment_gets_a_replica_set_with_the_template_hash() {
    let writes = steps(vec![deployment("web", 3)]);
    let Write::Create { resource, object, .. } = &writes[0] else { unreachable!("{writes:?}") };
    assert_eq!(*resource, REPLICA_SETS);
    let hash = object["metadata"]["labels"][HASH_LABEL].as_str().unwrap();
    assert_eq!(object["metadata"]["name"], format!("web-{hash}"));
    assert_eq!(object["spec"]["selector"]["matchLabels"][HASH_LABEL], hash);
    assert_eq!(object["spec"]["template"]["metadata"]["labels"][HASH_LABEL], hash);
    assert_eq!(object["spec"]["replicas"], 3);
    assert_eq!(object["metadata"]["annotations"][REVISION], "1");
    assert_eq!(object["metadata"]["annotations"][MAXIMUM], "4");
}

#[test]
fn a_rollback_reuses_the_old_set_under_a_new_revision() {
    let value = deployment("web", 3);
    let same = set_of(&value, "1", 0);
    let mut newer = set_of(&value, "2", 3);
    newer["metadata"]["name"] = json!("web-newer");
    newer["metadata"]["uid"] = json!("uid-newer");
    newer["spec"]["template"]["spec"]["containers"][0]["image"] = json!("nginx:2");
    let writes = steps(vec![value, same, newer]);
    let Write::Patch { object, patch, .. } = &writes[0] else { unreachable!("{writes:?}") };
    assert!(object.name.starts_with("web-") && object.name != "web-newer");
    assert_eq!(patch["metadata"]["annotations"][REVISION], "3");
    assert_eq!(patch["metadata"]["annotations"]["deployment.kubernetes.io/revision-history"], "1");
}

#[test]
fn a_hash_collision_is_counted_and_not_overwritten() {
    let value = deployment("web", 1);
    let mut other = set_of(&value, "1", 0);
    other["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "Deployment", "name": "x", "uid": "x", "controller": true}]);
    let writes = steps(vec![value, other]);
    let Write::Patch { subresource: "status", patch, .. } = &writes[0] else {
        unreachable!("{writes:?}")
    };
    assert_eq!(patch["status"]["collisionCount"], 1);
}

#[test]
fn a_complete_rollout_is_told_in_upstreams_words_and_then_left_alone() {
    let mut value = deployment("web", 1);
    value["metadata"]["annotations"] = json!({REVISION: "1"});
    let mut set = set_of(&value, "1", 1);
    set["status"] =
        json!({"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "observedGeneration": 1});
    let writes = steps(vec![value.clone(), set.clone()]);
    let Write::Patch { patch, .. } = writes.last().unwrap() else { unreachable!() };
    let reasons: Vec<_> = patch["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|condition| condition["reason"].as_str().unwrap())
        .collect();
    assert_eq!(reasons, ["MinimumReplicasAvailable", "NewReplicaSetAvailable"]);
    value["status"] = patch["status"].clone();
    assert_eq!(steps(vec![value, set]), [], "nothing left to do");
}

#[test]
fn a_rollout_that_does_not_move_is_late_after_its_deadline() {
    let mut value = deployment("web", 1);
    value["metadata"]["annotations"] = json!({REVISION: "1"});
    value["spec"]["progressDeadlineSeconds"] = json!(600);
    let set = set_of(&value, "1", 1);
    value["status"] = json!({"conditions": [{
        "type": "Progressing", "status": "True", "reason": "NewReplicaSetCreated", "message": "",
        "lastUpdateTime": "2025-12-31T00:00:00Z", "lastTransitionTime": "2025-12-31T00:00:00Z",
    }]});
    let writes = steps(vec![value, set]);
    let Write::Patch { patch, .. } = writes.last().unwrap() else { unreachable!() };
    let progressing = &patch["status"]["conditions"][0];
    assert_eq!(progressing["reason"], "ProgressDeadlineExceeded");
    assert_eq!(progressing["status"], "False");
}

#[test]
fn history_beyond_the_limit_is_forgotten_oldest_first() {
    let mut value = deployment("web", 0);
    value["metadata"]["annotations"] = json!({REVISION: "4"});
    value["spec"]["revisionHistoryLimit"] = json!(1);
    let mut objects = vec![set_of(&value, "4", 0)];
    for revision in ["1", "2", "3"] {
        let mut set = set_of(&value, revision, 0);
        set["metadata"]["name"] = json!(format!("web-{revision}"));
        set["metadata"]["uid"] = json!(format!("uid-{revision}"));
        set["spec"]["template"]["spec"]["containers"][0]["image"] = json!(revision);
        set["status"] = json!({"observedGeneration": 1});
        objects.push(set);
    }
    objects.push(value);
    let deleted: Vec<_> = steps(objects)
        .into_iter()
        .filter_map(
            |write| if let Write::Delete { object, .. } = write { Some(object.name) } else { None },
        )
        .collect();
    assert_eq!(deleted, ["web-1", "web-2"]);
}
