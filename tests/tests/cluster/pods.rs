//! `kubectl logs`, `exec`, `cp` and `set image` against pods on other nodes than the server.

use std::{fs, time::Duration};

use serde_json::{Value, json};
use xtask::{
    image::{NGINX_REFERENCE, TOOLS_REFERENCE},
    kubectl::{Kubectl, wait_for},
};

use crate::{cluster, events};

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

/// A container's status, found by its name.
fn status<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let all = pod["status"]["containerStatuses"].as_array();
    let found = all.into_iter().flatten().find(|status| status["name"] == name);
    found.unwrap_or(&Value::Null)
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn changed_image_restarts_its_container_and_no_other() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "pod", "changed", "--ignore-not-found", "--timeout=60s"]).unwrap();
    let container = |name: &str| json!({"name": name, "image": TOOLS_REFERENCE});
    kubectl
        .apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": "changed" },
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "containers": [container("main"), container("beside")],
            },
        }))
        .unwrap();
    let both_run = |restarts: u32| {
        let pod = kubectl.json(&["get", "pod", "changed"])?;
        let run = ["main", "beside"].map(|name| !status(&pod, name)["state"]["running"].is_null());
        let done = run == [true, true] && status(&pod, "main")["restartCount"] == restarts;
        Ok(done.then_some(pod))
    };
    let before = wait_for("both to run", Duration::from_secs(60), || both_run(0)).unwrap();
    kubectl.run(&["set", "image", "pod/changed", &format!("main={NGINX_REFERENCE}")]).unwrap();
    let after = wait_for("the changed one to run", Duration::from_secs(60), || both_run(1))
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", events(kubectl, "changed")));

    let [old, new] = [&before, &after].map(|pod| status(pod, "main"));
    assert_ne!(new["imageID"], old["imageID"]);
    assert_eq!(new["lastState"]["terminated"]["containerID"], old["containerID"], "{new}");
    let [old, new] = [&before, &after].map(|pod| status(pod, "beside"));
    assert_eq!((&new["containerID"], &new["restartCount"]), (&old["containerID"], &json!(0)));
    let told = "Killing: Container main definition changed, will be restarted";
    wait_for("the Event that says so", Duration::from_secs(30), || {
        Ok(events(kubectl, "changed").iter().any(|event| event == told).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", events(kubectl, "changed")));
    // The new image's files, not the old one's.
    kubectl.run(&["exec", "changed", "-c", "main", "--", "/usr/sbin/nginx", "-v"]).unwrap();
    kubectl.run(&["delete", "pod", "changed", "--wait=false"]).unwrap();
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn command_that_the_image_does_not_have_fails_a_pod_that_is_not_restarted() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "pod", "nosuch", "--ignore-not-found", "--timeout=60s"]).unwrap();
    let image = format!("--image={TOOLS_REFERENCE}");
    kubectl
        .run(&["run", "nosuch", &image, "--restart=Never", "--command", "--", "nosuch"])
        .unwrap();
    let pod = wait_for("pod nosuch to fail", Duration::from_secs(60), || {
        let pod = kubectl.json(&["get", "pod", "nosuch"])?;
        Ok((pod["status"]["phase"] == "Failed").then_some(pod))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", events(kubectl, "nosuch")));
    let ended = &status(&pod, "nosuch")["state"]["terminated"];
    assert_eq!((&ended["reason"], &ended["exitCode"]), (&json!("StartError"), &json!(128)));
    let message = ended["message"].as_str().unwrap_or_default();
    assert!(message.contains("\"nosuch\": executable file not found in $PATH"), "{message}");
    kubectl.run(&["delete", "pod", "nosuch", "--wait=false"]).unwrap();
}
