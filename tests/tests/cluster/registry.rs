//! Images from a real registry: Debian's docker-registry on the host's loopback, without TLS.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use xtask::{
    cluster::HOST_OF_VMS,
    kubectl::{Kubectl, wait_for},
    watch::Watch,
};

use crate::{cluster, events, pod_path};

/// Ended when dropped.
struct Registry(Child);

impl Registry {
    fn start(folder: &Path, port: u16) -> Self {
        let config = folder.join("config.yml");
        let store = folder.join("store");
        let text = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: 127.0.0.1:{port}\n",
            store.display()
        );
        fs::write(&config, text).unwrap();
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut program = Command::new("docker-registry");
        program.arg("serve").arg(&config).stdin(Stdio::null());
        let started = program.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let registry = Self(started);
        wait_for("the registry", Duration::from_secs(20), || {
            Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok())
        })
        .unwrap();
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn push(archive: &Path, to: &str) {
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--insecure-policy", "--dest-tls-verify=false"]);
    skopeo.arg(format!("oci-archive:{}", archive.display())).arg(format!("docker://{to}"));
    let out = skopeo.output().unwrap();
    assert!(out.status.success(), "skopeo: {}", String::from_utf8_lossy(&out.stderr));
}

fn pod(name: &str, image: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "containers": [{ "name": "main", "image": image, "command": ["echo", "pulled"] }],
        },
    })
}

/// The reason and message of the only container's waiting state.
fn waiting(pod: &Value) -> Option<(String, String)> {
    let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
    let text = |field: &str| waiting[field].as_str().map(str::to_owned);
    Some((text("reason")?, text("message").unwrap_or_default()))
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn image_is_pulled_and_a_missing_one_is_reported_in_the_registrys_words() {
    let (paths, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let folder = tempfile::tempdir().unwrap();
    let _registry = Registry::start(folder.path(), cluster.registry_port);
    let port = cluster.registry_port;
    push(&paths.images.join("tools-amd64.tar"), &format!("127.0.0.1:{port}/hello:1"));
    kubectl
        .run(&["delete", "pod", "pulled", "missing", "--ignore-not-found", "--timeout=60s"])
        .unwrap();

    kubectl.apply(&pod("pulled", &format!("{HOST_OF_VMS}:{port}/hello:1"))).unwrap();
    wait_for("pod pulled to end well", Duration::from_secs(60), || {
        let pod = kubectl.json(&["get", "pod", "pulled"])?;
        Ok((pod["status"]["phase"] == "Succeeded").then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", events(kubectl, "pulled")));
    assert_eq!(kubectl.run(&["logs", "pulled"]).unwrap(), "pulled\n");
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(log.contains("GET /v2/hello/blobs/"), "no layer was asked for:\n{log}");

    let watch = Watch::start(kubectl, &pod_path("missing")).unwrap();
    kubectl.apply(&pod("missing", &format!("{HOST_OF_VMS}:{port}/hello:nowhere"))).unwrap();
    let mut seen = Vec::new();
    for wanted in ["ErrImagePull", "ImagePullBackOff"] {
        watch
            .until(wanted, Duration::from_secs(60), |pod| {
                let found = waiting(pod);
                seen.extend(found.clone());
                found.is_some_and(|(reason, message)| {
                    reason == wanted && message.contains("manifest unknown")
                })
            })
            .unwrap_or_else(|error| panic!("{error:#}; seen: {seen:?}"));
    }
    wait_for("an Event that says why", Duration::from_secs(30), || {
        let told =
            |event: &String| event.starts_with("Failed:") && event.contains("manifest unknown");
        Ok(events(kubectl, "missing").iter().any(told).then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", events(kubectl, "missing")));
    kubectl.run(&["delete", "pod", "pulled", "missing", "--wait=false"]).unwrap();
}
