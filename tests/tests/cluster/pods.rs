//! `kubectl logs`, `exec` and `cp` against pods on other nodes than the server.

use std::{fs, time::Duration};

use serde_json::json;
use xtask::{
    image::TOOLS_REFERENCE,
    kubectl::{Kubectl, wait_for},
};

use crate::cluster;

/// A pod on a worker that says two lines and stays.
fn speaker(kubectl: Kubectl<'_>) {
    kubectl.run(&["delete", "pod", "speaker", "--ignore-not-found", "--timeout=60s"]).unwrap();
    kubectl
        .apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "speaker" },
            "spec": {
                "nodeSelector": { "kubernetes.io/hostname": "worker-1" },
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "speaker",
                    "image": TOOLS_REFERENCE,
                    "command": ["sh", "-c", "echo one; echo two >&2; exec sleep 3600"],
                }],
            },
        }))
        .unwrap();
    wait_for("pod speaker to run", Duration::from_secs(60), || {
        let pod = kubectl.json(&["get", "pod", "speaker"])?;
        Ok((pod["status"]["phase"] == "Running").then_some(()))
    })
    .unwrap();
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn logs_exec_and_cp_work_from_outside() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    speaker(kubectl);

    let logs = wait_for("both lines", Duration::from_secs(20), || {
        let logs = kubectl.run(&["logs", "speaker"])?;
        Ok((logs.lines().count() == 2).then_some(logs))
    })
    .unwrap();
    assert!(logs.contains("one\n") && logs.contains("two\n"), "{logs:?}");
    assert_eq!(kubectl.run(&["logs", "speaker", "--tail=1"]).unwrap().lines().count(), 1);

    let said =
        kubectl.said(&["exec", "speaker", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    let said = said.unwrap();
    assert_eq!((said.code, said.stdout.as_str()), (7, "out\n"), "{said:?}");
    assert!(said.stderr.contains("err\n"), "{said:?}");
    assert!(said.stderr.contains("command terminated with exit code 7"), "{said:?}");
    let said = kubectl.said(&["exec", "speaker", "--", "hostname"]).unwrap();
    assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (0, "speaker\n", ""));

    let folder = tempfile::tempdir().unwrap();
    let (from, back) = (folder.path().join("from"), folder.path().join("back"));
    // More than one frame of the stream, and every byte value.
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    fs::write(&from, &bytes).unwrap();
    let (from, to) = (from.to_string_lossy(), back.to_string_lossy());
    kubectl.run(&["cp", &from, "speaker:/tmp/file"]).unwrap();
    kubectl.run(&["cp", "speaker:/tmp/file", &to]).unwrap();
    assert_eq!(fs::read(&back).unwrap(), bytes, "what comes back is what was sent");
    kubectl.run(&["delete", "pod", "speaker", "--wait=false"]).unwrap();
}
