//! Tables of rows, and of pod states.

use serde_json::{Value, json};

use super::*;
use crate::schema::resource;

fn now() -> Timestamp {
    "2026-01-02T00:10:00Z".parse().unwrap()
}

fn shown(group: &str, plural: &str, object: &Value) -> Vec<String> {
    let resource = resource(group, "v1", plural).unwrap();
    let cells = cells(resource, object, now());
    assert_eq!(cells.len(), columns(resource).len(), "{plural}");
    cells
        .iter()
        .map(|cell| cell.as_str().map_or_else(|| cell.to_string(), ToOwned::to_owned))
        .collect()
}

fn pod(status: Value) -> Value {
    json!({"metadata": {"name": "p", "creationTimestamp": "2026-01-02T00:00:00Z"},
        "spec": {"containers": [{"name": "a"}, {"name": "b"}]}, "status": status})
}

#[test]
fn durations() {
    let day = 86_400;
    let cases = [
        (-5, "<invalid>"),
        (-1, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (192, "3m12s"),
        (600, "10m"),
        (10_799, "179m"),
        (10_800, "3h"),
        (11_100, "3h5m"),
        (8 * 3600, "8h"),
        (2 * day, "2d"),
        (2 * day + 3600, "2d1h"),
        (9 * day, "9d"),
        (729 * day, "729d"),
        (730 * day, "2y"),
        (731 * day, "2y1d"),
        (3000 * day, "8y"),
    ];
    for (seconds, text) in cases {
        assert_eq!(human_duration(seconds), text, "{seconds}");
    }
}

#[test]
fn pod_states() {
    let running = json!({"ready": true, "started": true, "state": {"running": {}}});
    let waiting = |reason: &str| json!({"state": {"waiting": {"reason": reason}}});
    let ended = |reason: &str, code: i64| json!({"state": {"terminated": {"reason": reason, "exitCode": code}}});
    let cases = [
        (json!({"phase": "Pending"}), "0/2", "Pending"),
        (json!({"phase": "Running", "containerStatuses": [running, running]}), "2/2", "Running"),
        (
            json!({"phase": "Pending", "containerStatuses": [waiting("ContainerCreating"), waiting("ErrImagePull")]}),
            "0/2",
            "ContainerCreating",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [running, waiting("CrashLoopBackOff")]}),
            "1/2",
            "CrashLoopBackOff",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [ended("OOMKilled", 137), running]}),
            "1/2",
            "OOMKilled",
        ),
        (
            json!({"phase": "Succeeded", "containerStatuses": [ended("Completed", 0), ended("Completed", 0)]}),
            "0/2",
            "Completed",
        ),
        (
            json!({"phase": "Running", "containerStatuses": [ended("Completed", 0), running]}),
            "1/2",
            "NotReady",
        ),
        (
            json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [ended("Completed", 0), running]}),
            "1/2",
            "Running",
        ),
        (json!({"phase": "Failed", "containerStatuses": [ended("", 3)]}), "0/2", "ExitCode:3"),
        (json!({"phase": "Failed", "reason": "Evicted"}), "0/2", "Evicted"),
        (
            json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "reason": "SchedulingGated"}]}),
            "0/2",
            "SchedulingGated",
        ),
    ];
    for (status, ready, text) in cases {
        let cells = shown("", "pods", &pod(status.clone()));
        assert_eq!(cells[1..3], [ready, text], "{status}");
    }
}

#[test]
fn pods_that_initialize_or_end() {
    let mut object = pod(json!({"phase": "Pending", "initContainerStatuses": [
        {"name": "i", "state": {"terminated": {"exitCode": 0}}}, {"name": "j", "state": {"running": {}}}]}));
    object["spec"]["initContainers"] = json!([{"name": "i"}, {"name": "j"}]);
    assert_eq!(shown("", "pods", &object)[2], "Init:1/2");
    object["status"]["initContainerStatuses"][1]["state"] =
        json!({"terminated": {"exitCode": 1, "reason": "Error"}});
    assert_eq!(shown("", "pods", &object)[2], "Init:Error");
    object["spec"]["initContainers"][1]["restartPolicy"] = "Always".into();
    object["status"] = json!({"phase": "Running", "initContainerStatuses": [
        {"name": "i", "state": {"terminated": {"exitCode": 0}}, "restartCount": 4},
        {"name": "j", "started": true, "ready": true, "state": {"running": {}}, "restartCount": 1}],
        "containerStatuses": [{"ready": true, "state": {"running": {}}, "restartCount": 2,
            "lastState": {"terminated": {"finishedAt": "2026-01-02T00:09:00Z"}}}],
        "podIPs": [{"ip": "10.244.1.2"}]});
    let cells = shown("", "pods", &object);
    assert_eq!(
        cells,
        ["p", "2/3", "Running", "3 (60s ago)", "10m", "10.244.1.2", "<none>", "<none>", "<none>"]
    );
    object["metadata"]["deletionTimestamp"] = "2026-01-02T00:00:00Z".into();
    assert_eq!(shown("", "pods", &object)[2], "Terminating");
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table of cases")]
fn other_kinds() {
    let meta = json!({"name": "x", "creationTimestamp": "2026-01-02T00:00:00Z"});
    let with = |mut object: Value| {
        object["metadata"] = meta.clone();
        object
    };
    let cases = [
        (
            "",
            "services",
            with(
                json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.5", "clusterIPs": ["10.96.0.5"], "selector": {"app": "web"}, "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}}),
            ),
            vec!["x", "NodePort", "10.96.0.5", "<none>", "80:30080/TCP,53/UDP", "10m", "app=web"],
        ),
        (
            "",
            "services",
            with(json!({"spec": {"type": "LoadBalancer", "clusterIP": "None"}})),
            vec!["x", "LoadBalancer", "None", "<pending>", "<none>", "10m", "<none>"],
        ),
        (
            "apps",
            "deployments",
            with(
                json!({"spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}}, "template": {"spec": {"containers": [{"name": "a", "image": "i"}]}}}, "status": {"readyReplicas": 2, "updatedReplicas": 3}}),
            ),
            vec!["x", "2/3", "3", "0", "10m", "a", "i", "app=web"],
        ),
        (
            "apps",
            "replicasets",
            with(json!({"spec": {"replicas": 3, "selector": {}}, "status": {"replicas": 2}})),
            vec!["x", "3", "2", "0", "10m", "", "", "<none>"],
        ),
        (
            "discovery.k8s.io",
            "endpointslices",
            with(
                json!({"addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["1"]}, {"addresses": ["2"]}, {"addresses": ["3"]}, {"addresses": ["4"]}]}),
            ),
            vec!["x", "IPv4", "80", "1,2,3 + 1 more...", "10m"],
        ),
        (
            "",
            "configmaps",
            with(json!({"data": {"a": ""}, "binaryData": {"b": ""}})),
            vec!["x", "2", "10m"],
        ),
        ("", "secrets", with(json!({"type": "Opaque"})), vec!["x", "Opaque", "0", "10m"]),
        (
            "",
            "namespaces",
            with(json!({"status": {"phase": "Active"}})),
            vec!["x", "Active", "10m"],
        ),
        (
            "coordination.k8s.io",
            "leases",
            with(json!({"spec": {"holderIdentity": "n"}})),
            vec!["x", "n", "10m"],
        ),
        (
            "certificates.k8s.io",
            "certificatesigningrequests",
            with(
                json!({"spec": {"signerName": "s", "username": "u", "expirationSeconds": 3600}, "status": {"conditions": [{"type": "Approved"}], "certificate": "AA=="}}),
            ),
            vec!["x", "10m", "s", "u", "60m", "Approved,Issued"],
        ),
        (
            "",
            "nodes",
            with(
                json!({"spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "nodeInfo": {"kubeletVersion": "v1"}}}),
            ),
            vec![
                "x",
                "Ready,SchedulingDisabled",
                "<none>",
                "10m",
                "v1",
                "10.0.0.1",
                "<none>",
                "<unknown>",
                "<unknown>",
                "<unknown>",
            ],
        ),
        (
            "",
            "events",
            with(
                json!({"type": "Normal", "reason": "Pulled", "message": "m ", "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "f"}, "source": {"component": "kubelet", "host": "n"}, "firstTimestamp": "2026-01-02T00:00:00Z", "lastTimestamp": "2026-01-02T00:09:00Z", "count": 3}),
            ),
            vec!["60s", "Normal", "Pulled", "pod/p", "f", "kubelet, n", "m", "10m", "3", "x"],
        ),
    ];
    for (group, plural, object, wanted) in cases {
        assert_eq!(shown(group, plural, &object), wanted, "{plural}");
    }
}

#[test]
fn tables_carry_metadata() {
    let resource = resource("", "v1", "pods").unwrap();
    let object = pod(json!({"phase": "Succeeded"}));
    let options =
        TableOptions { version: "v1", include: IncludeObject::Metadata, headers: true, now: now() };
    let made = table(resource, &[&object], json!({"resourceVersion": "7"}), options);
    assert_eq!(made["apiVersion"], "meta.k8s.io/v1");
    assert_eq!(made["columnDefinitions"][3]["name"], "Restarts");
    assert_eq!(made["columnDefinitions"][5]["priority"], 1);
    assert_eq!(made["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    assert_eq!(made["rows"][0]["object"]["metadata"]["name"], "p");
    assert_eq!(made["rows"][0]["conditions"][0]["type"], "Completed");
}
