//! Pods that are refused by what their fields mean: HTTP status, reason and field are upstream's.

use super::{
    bad_input::{STRICT, refused},
    server,
};

/// A Pod whose only container has these fields besides, and whose spec has those.
fn pod(container: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{containers: [{{name: c, image: i{container}}}]{spec}}}"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_priority_that_is_not_its_class() {
    let Some(server) = server().await else { return };
    let nope = pod("", ", priorityClassName: nope");
    let said = refused(&server, STRICT, &nope, "403 Forbidden").await;
    assert!(
        said.contains("pods \"p\" is forbidden: no PriorityClass with name nope was found"),
        "{said}"
    );
    let said = refused(&server, STRICT, &pod("", ", priority: 5"), "403 Forbidden").await;
    assert!(said.contains("the integer value of priority (5) must not be provided in pod spec; priority admission controller computed 0 from"), "{said}");

    // With all that the server would complete, so that a replacement changes nothing else.
    let account =
        "serviceAccount: default, serviceAccountName: default, automountServiceAccountToken: false";
    let critical = pod("", &format!(", {account}, priorityClassName: system-node-critical"));
    server.ok(STRICT, &critical).await;
    let spec = server.json("get pod p").await["spec"].clone();
    assert_eq!(spec["priority"], 2_000_001_000);
    assert_eq!(spec["preemptionPolicy"], "PreemptLowerPriority");
    // What was computed is not in the manifest.
    server.ok("replace -f -", &critical.replace("{name: p}", "{name: p, labels: {a: b}}")).await;
    let replaced = server.json("get pod p").await;
    assert_eq!(replaced["metadata"]["labels"]["a"], "b");
    assert_eq!(replaced["spec"]["priority"], 2_000_001_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_contradicts_itself() {
    let Some(server) = server().await else { return };
    let probe = "readinessProbe: {tcpSocket: {port: 80}}";
    let gpu = "{limits: {nvidia.com/gpu: 1500m}}";
    let rows = [
        (
            pod(&format!(", resources: {gpu}"), ""),
            "spec.containers[0].resources.limits[nvidia.com/gpu]: Invalid value: \"1500m\": must be an integer",
        ),
        (
            pod("", ", volumes: [{name: v, emptyDir: {sizeLimit: -1Gi}}]"),
            "spec.volumes[0].emptyDir.sizeLimit: Forbidden: SizeLimit field must be a valid resource quantity",
        ),
        (
            pod("", &format!(", initContainers: [{{name: i, image: i, {probe}}}]")),
            "spec.initContainers[0].readinessProbe: Forbidden: may not be set for init containers without restartPolicy=Always",
        ),
        (
            pod(", ports: [{containerPort: 80, hostPort: 81}]", ", hostNetwork: true"),
            "spec.containers[0].ports[0].hostPort: Invalid value: 81: must match `containerPort` when `hostNetwork` is true",
        ),
    ];
    for (manifest, words) in rows {
        let said = refused(&server, STRICT, &manifest, "422 Unprocessable Entity").await;
        assert!(said.contains(words), "{said}");
    }
    let node =
        "apiVersion: v1\nkind: Node\nmetadata: {name: worker}\nstatus: {capacity: {cpu: -1}}";
    let said = refused(&server, STRICT, node, "422 Unprocessable Entity").await;
    assert!(
        said.contains(
            "status.capacity.cpu: Invalid value: \"-1\": must be greater than or equal to 0"
        ),
        "{said}"
    );
}
