//! Tests on a cluster of VMs: a server and two workers with the sample deployed. Run by `cargo xtask test
//! --vm`, one after the other, on a cluster of their own; elsewhere they are listed as ignored.
#![expect(clippy::print_stdout, reason = "measured values are part of the test's report")]
#![expect(clippy::tests_outside_test_module, reason = "an integration test is one module of tests")]
#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]
#![expect(
    clippy::disallowed_methods,
    reason = "plain test threads: they may sleep and start programs"
)]

mod bad_input;
mod pods;
mod proof;
mod registry;
mod services;

use xtask::{cluster::Cluster, kubectl::Kubectl, paths::Paths};

fn cluster() -> (Paths, Cluster) {
    let paths = Paths::for_tests();
    let cluster =
        Cluster::running(&paths).expect("no test cluster runs: use `cargo xtask test --vm`");
    assert!(cluster.nodes.len() >= 3, "the proof is about a server and two workers");
    (paths, cluster)
}

/// The path of a pod, for a watch.
fn pod_path(name: &str) -> String {
    format!("/api/v1/namespaces/default/pods?fieldSelector=metadata.name%3D{name}")
}

/// The messages of the Events about an object, with their reasons: `Failed: Error: ErrImagePull`.
fn events(kubectl: Kubectl<'_>, name: &str) -> Vec<String> {
    let selector = format!("--field-selector=involvedObject.name={name}");
    let events = kubectl.json(&["get", "events", &selector]).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    events["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|event| format!("{}: {}", text(&event["reason"]), text(&event["message"])))
        .collect()
}
