//! Decisions over snapshots.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    Decision, Pod, Snapshot, message, schedule,
    snapshot::{Helps, Node},
};
use crate::controllers::testing;

fn snapshot(nodes: &[Value]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for node in nodes {
        assert_eq!(snapshot.put_node(node), Helps::Maybe);
    }
    snapshot
}

fn pod(name: &str, requests: Value) -> Value {
    let mut pod = testing::pod(name, "web", "", false);
    pod["spec"]["containers"][0]["resources"] = json!({"requests": requests});
    pod
}

fn nodes(count: usize) -> Vec<Value> {
    (1..=count).map(|n| testing::node(&format!("n{n}"))).collect()
}

fn wait(nodes: &[Value], pod: &Value) -> String {
    let snapshot = snapshot(nodes);
    let decision = schedule(&snapshot, &Pod::decode(pod), 7);
    message(&decision, snapshot.count()).unwrap_or_else(|| format!("{decision:?}"))
}

#[test]
fn pods_of_one_owner_are_spread_evenly() {
    let mut snapshot = snapshot(&nodes(3));
    let mut counts = BTreeMap::new();
    for n in 0..9 {
        let pod = Pod::decode(&pod(&format!("p{n}"), json!({"cpu": "100m"})));
        let Decision::Bind(node) = schedule(&snapshot, &pod, n) else { unreachable!() };
        snapshot.put_pod(&pod, &node);
        *counts.entry(node).or_insert(0) += 1;
    }
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [3, 3, 3]);
}

#[test]
fn the_emptier_node_is_taken() {
    let mut snapshot = snapshot(&nodes(2));
    let mut big = Pod::decode(&pod("big", json!({"cpu": "3", "memory": "6Gi"})));
    big.group = String::new();
    snapshot.put_pod(&big, "n1");
    let mut next = Pod::decode(&pod("next", json!({"cpu": "100m"})));
    next.group = String::new();
    for seed in 0..10 {
        assert_eq!(schedule(&snapshot, &next, seed), Decision::Bind("n2".to_owned()));
    }
}

#[test]
fn reasons_are_counted_in_upstreams_words() {
    let mut all = nodes(3);
    for node in &mut all[1..] {
        node["spec"]["taints"] =
            json!([{"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}]);
    }
    assert_eq!(
        wait(&all, &pod("p", json!({"cpu": "5", "memory": "9Gi"}))),
        "0/3 nodes are available: 1 Insufficient cpu, 1 Insufficient memory, \
         2 node(s) had untolerated taint {dedicated: gpu}."
    );
    assert_eq!(wait(&[], &pod("p", json!({}))), "no nodes available to schedule pods");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
fn each_filter_speaks() {
    let node = |change: fn(&mut Value)| {
        let mut node = testing::node("n1");
        change(&mut node);
        vec![node]
    };
    let asks = |change: fn(&mut Value)| {
        let mut pod = pod("p", json!({"cpu": "1"}));
        change(&mut pod);
        pod
    };
    let plain = || asks(|_| ());
    let affinity = |operator: &str| {
        let mut pod = plain();
        pod["spec"]["affinity"] = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": operator, "values": ["n1"]},
            ]}],
        }}});
        pod
    };
    let bound = format!("{:?}", Decision::Bind("n1".to_owned()));
    let table: Vec<(Vec<Value>, Value, &str)> = vec![
        (node(|_| ()), plain(), ""),
        (
            node(|n| n["spec"]["unschedulable"] = json!(true)),
            plain(),
            "1 node(s) were unschedulable",
        ),
        (
            node(|n| n["spec"]["unschedulable"] = json!(true)),
            asks(|p| p["spec"]["tolerations"] = json!([{"operator": "Exists"}])),
            "",
        ),
        (
            node(|n| n["spec"]["taints"] = json!([{"key": "k", "effect": "NoExecute"}])),
            asks(|p| p["spec"]["tolerations"] = json!([{"key": "k", "effect": "NoSchedule"}])),
            "1 node(s) had untolerated taint {k: }",
        ),
        (
            node(|n| {
                n["spec"]["taints"] = json!([{"key": "k", "value": "v", "effect": "NoSchedule"}])
            }),
            asks(|p| p["spec"]["tolerations"] = json!([{"key": "k", "value": "v"}])),
            "",
        ),
        (
            node(|_| ()),
            asks(|p| p["spec"]["nodeSelector"] = json!({"disk": "ssd"})),
            "1 node(s) didn't match Pod's node affinity/selector",
        ),
        (node(|_| ()), affinity("In"), ""),
        (node(|_| ()), affinity("NotIn"), "1 node(s) didn't match Pod's node affinity/selector"),
        (node(|n| n["status"]["allocatable"]["pods"] = json!("0")), plain(), "1 Too many pods"),
        (node(|_| ()), pod("p", json!({"example.com/gpu": "1"})), "1 Insufficient example.com/gpu"),
    ];
    for (nodes, pod, expected) in table {
        let said = wait(&nodes, &pod);
        if expected.is_empty() {
            assert_eq!(said, bound);
        } else {
            assert_eq!(said, format!("0/1 nodes are available: {expected}."));
        }
    }
}

#[test]
fn a_host_port_is_given_once() {
    let mut snapshot = snapshot(&nodes(1));
    let mut value = pod("a", json!({}));
    value["spec"]["containers"][0]["ports"] = json!([{"containerPort": 80, "hostPort": 80}]);
    let first = Pod::decode(&value);
    value["metadata"]["uid"] = json!("other");
    let second = Pod::decode(&value);
    snapshot.put_pod(&first, "n1");
    let decision = schedule(&snapshot, &second, 0);
    assert_eq!(
        message(&decision, 1).unwrap(),
        "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports."
    );
    assert_eq!(snapshot.remove_pod(&first.uid), Helps::Maybe);
    assert_eq!(schedule(&snapshot, &second, 0), Decision::Bind("n1".to_owned()));
}

#[test]
fn what_is_not_implemented_is_named() {
    let mut spread = pod("p", json!({}));
    spread["spec"]["topologySpreadConstraints"] = json!([{"maxSkew": 1}]);
    assert_eq!(
        wait(&nodes(2), &spread),
        "0/2 nodes are available: spec.topologySpreadConstraints is not supported by this scheduler."
    );
    let mut claim = pod("p", json!({}));
    claim["spec"]["volumes"] =
        json!([{"name": "a", "emptyDir": {}}, {"name": "b", "persistentVolumeClaim": {}}]);
    assert!(wait(&nodes(1), &claim).contains("spec.volumes[1].persistentVolumeClaim"));
}

#[test]
fn init_containers_and_sidecars_count_as_upstream_says() {
    let mut value = pod("p", json!({"cpu": "2"}));
    value["spec"]["initContainers"] = json!([
        {"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": "1"}}},
        {"name": "i", "resources": {"requests": {"cpu": "3"}}},
    ]);
    assert_eq!(Pod::decode(&value).requests.amount("cpu"), 4000);
    value["spec"]["initContainers"][1]["resources"]["requests"]["cpu"] = json!("1");
    assert_eq!(Pod::decode(&value).requests.amount("cpu"), 3000);
}

#[test]
fn the_snapshot_forgets_what_goes() {
    let mut snapshot = snapshot(&nodes(2));
    let pod = Pod::decode(&pod("p", json!({"cpu": "1"})));
    snapshot.put_pod(&pod, "n2");
    snapshot.put_pod(&pod, "n2");
    let used = |snapshot: &Snapshot| {
        snapshot.nodes().iter().map(|node: &Node| node.used.amount("cpu")).sum::<i64>()
    };
    assert_eq!(used(&snapshot), 1000, "told twice, counted once");
    snapshot.remove_node("n2");
    assert_eq!((snapshot.count(), snapshot.nodes().len()), (1, 2), "kept while a pod is there");
    assert_eq!(snapshot.remove_pod(&pod.uid), Helps::Maybe);
    assert_eq!(snapshot.nodes().len(), 1);
    assert_eq!(snapshot.put_node(&testing::node("n1")), Helps::No, "a heartbeat helps nobody");
}

#[test]
fn large_clusters_are_sampled() {
    let counts: Vec<usize> = [3, 100, 1000, 5000, 15000].map(super::enough).to_vec();
    assert_eq!(counts, [3, 100, 420, 500, 750]);
}
