//! What a cluster refuses, and in which words: a wrong join token, fields that are not implemented.

use std::time::Duration;

use serde_json::json;
use xtask::{
    cluster::Node,
    image::TOOLS_REFERENCE,
    kubectl::{Kubectl, wait_for},
};

use crate::{cluster, events};

/// Long enough for a field that was wrongly taken to be acted upon: five times what a pod or Service takes.
const SETTLE: Duration = Duration::from_secs(5);

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn wrong_join_token_is_refused_with_a_reason() {
    let (_, cluster) = cluster();
    let shell = cluster.node("worker-1").unwrap().shell();
    let token = shell.sh("cat /var/lib/orlop/token").unwrap();
    let parts: Vec<&str> = token.trim().split('.').collect();
    let [id, secret, ca] = parts[..] else { panic!("a token of three parts: {token}") };
    let join = |token: &str| {
        let script = format!(
            "timeout 30 node-agent run --server https://192.168.77.1:6443 --token {token} \
             --node-name stranger --kubeconfig /tmp/stranger/kubeconfig \
             --state-dir /tmp/stranger --run-dir /tmp/stranger/run; code=$?; \
             rm -r /tmp/stranger; exit $code"
        );
        shell.run(&script, Duration::from_secs(60)).unwrap()
    };
    let other =
        |text: &str| text.chars().map(|c| if c == 'a' { 'b' } else { 'a' }).collect::<String>();
    let said = join(&format!("{id}.{}.{ca}", other(secret)));
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.text.contains("the server refused the token"), "{said:?}");
    let said = join(&format!("{id}.{secret}.{}", other(ca)));
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.text.contains("another CA than the token names"), "{said:?}");
    let found = Kubectl::new(&cluster.kubeconfig).said(&["get", "node", "stranger"]).unwrap();
    assert!(found.code != 0 && found.stderr.contains("NotFound"), "{found:?}");
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn pod_with_an_unimplemented_field_is_not_started_and_says_which() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "pod", "odd", "--ignore-not-found", "--timeout=60s"]).unwrap();
    kubectl
        .apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "odd" },
            "spec": {
                "hostPID": true,
                "terminationGracePeriodSeconds": 1,
                "containers": [{ "name": "main", "image": TOOLS_REFERENCE }],
            },
        }))
        .unwrap();
    wait_for("a condition that names the field", Duration::from_secs(30), || {
        let pod = kubectl.json(&["get", "pod", "odd"])?;
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let named = conditions.iter().any(|condition| {
            condition["status"] == "False"
                && condition["reason"] == "UnsupportedField"
                && condition["message"].as_str().is_some_and(|text| text.contains("spec.hostPID"))
        });
        Ok(named.then_some(()))
    })
    .unwrap();
    wait_for("an Event that names the field", Duration::from_secs(30), || {
        let events = events(kubectl, "odd");
        let named = |event: &String| {
            event.starts_with("UnsupportedField:") && event.contains("spec.hostPID")
        };
        Ok(events.iter().any(named).then_some(()))
    })
    .unwrap();
    std::thread::sleep(SETTLE);
    let pod = kubectl.json(&["get", "pod", "odd"]).unwrap();
    assert_eq!(pod["status"]["phase"], "Pending");
    let node = cluster.node(pod["spec"]["nodeName"].as_str().unwrap()).unwrap().shell();
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let found = node.sh(&format!("find /sys/fs/cgroup/kubepods -name '*{uid}*'")).unwrap();
    assert_eq!(found, "", "it has a cgroup, so it was started");
    kubectl.run(&["delete", "pod", "odd", "--timeout=30s"]).unwrap();
}

/// SCTP keeps its port, as its checksum cannot be renewed: another target port is not supported.
fn odd_service(sctp_target: u16) -> serde_json::Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "odd-service" },
        "spec": {
            "selector": { "app": "nginx" },
            "ports": [
                { "name": "http", "port": 80 },
                { "name": "sctp", "port": 81, "protocol": "SCTP", "targetPort": sctp_target },
            ],
        },
    })
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn service_with_an_unimplemented_field_is_not_programmed_and_says_which() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "service", "odd-service", "--ignore-not-found"]).unwrap();
    kubectl.apply(&odd_service(82)).unwrap();
    let condition = || -> anyhow::Result<serde_json::Value> {
        let service = kubectl.json(&["get", "service", "odd-service"])?;
        let conditions = service["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions
            .into_iter()
            .find(|condition| condition["type"] == "Programmed")
            .unwrap_or_default())
    };
    let named = |text: &str| text.contains("spec.ports[1].targetPort");
    wait_for("a condition that names the field", Duration::from_secs(30), || {
        let found = condition()?;
        let told = found["status"] == "False"
            && found["reason"] == "UnsupportedField"
            && found["message"].as_str().is_some_and(named);
        Ok(told.then_some(()))
    })
    .unwrap();
    wait_for("an Event that names the field", Duration::from_secs(30), || {
        let events = events(kubectl, "odd-service");
        let told = |event: &String| event.starts_with("UnsupportedField:") && named(event);
        Ok(events.iter().any(told).then_some(()))
    })
    .unwrap();
    std::thread::sleep(SETTLE);
    let service_object = kubectl.json(&["get", "service", "odd-service"]).unwrap();
    let ip = service_object["spec"]["clusterIP"].as_str().unwrap();
    // Asked on every node: each programs for itself.
    let get = |node: &Node| {
        let said = node
            .shell()
            .run(&format!("load http --host {ip} --count 1"), Duration::from_secs(60))?;
        anyhow::Ok(said.text.contains(" ok nginx-"))
    };
    for node in &cluster.nodes {
        assert!(!get(node).unwrap(), "it answers on {}, so it was programmed", node.name);
    }

    // With the field taken away it works, so that nothing but the field was in the way.
    kubectl.apply(&odd_service(81)).unwrap();
    for node in &cluster.nodes {
        let what = format!("the Service to answer on {}", node.name);
        wait_for(&what, Duration::from_secs(30), || Ok(get(node)?.then_some(()))).unwrap();
    }
    wait_for("the condition to change", Duration::from_secs(30), || {
        Ok((condition()?["status"] != "False").then_some(()))
    })
    .unwrap();
    kubectl.run(&["delete", "service", "odd-service"]).unwrap();
}
