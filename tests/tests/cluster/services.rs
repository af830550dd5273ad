//! What kube-proxy's users rely on beyond the sample, between real nodes: affinity, load balancers'
//! addresses, local traffic policy, the way out, and a node that comes back before its server does.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    time::Duration,
};

use serde_json::json;
use xtask::{
    cluster::{Cluster, Node},
    kubectl::{Kubectl, wait_for},
};

use crate::cluster;

/// A Service of the sample's pods.
fn service(kubectl: Kubectl<'_>, name: &str, spec: serde_json::Value) {
    let mut spec = spec;
    spec["selector"] = json!({ "app": "nginx" });
    let port = spec["nodePort"].take();
    spec.as_object_mut().unwrap().remove("nodePort");
    spec["ports"] = json!([{ "port": 80, "targetPort": 80 }]);
    if !port.is_null() {
        spec["ports"][0]["nodePort"] = port;
    }
    let object = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": name },
        "spec": spec,
    });
    kubectl.apply(&object).unwrap();
}

/// What the client pod gets from an address, once it gets anything.
fn answer(kubectl: Kubectl<'_>, url: &str) -> String {
    wait_for(&format!("{url} to answer a pod"), Duration::from_secs(30), || {
        let said = kubectl.said(&["exec", "client", "--", "wget", "-qO-", url])?;
        Ok((said.code == 0).then_some(said.stdout))
    })
    .unwrap()
}

/// What a node gets from an address; `None` when it is refused or not answered.
fn asked_by(node: &Node, url: &str) -> Option<String> {
    node.shell().sh(&format!("timeout 10 wget -qO- {url}")).ok()
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn a_client_with_affinity_stays_with_its_replica() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    service(kubectl, "sticky", json!({ "sessionAffinity": "ClientIP" }));
    let first = answer(kubectl, "http://sticky");
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do wget -qO- http://sticky; done";
    let said = kubectl.run(&["exec", "client", "--", "sh", "-c", script]).unwrap();
    let replicas: BTreeSet<&str> = said.lines().collect();
    assert_eq!(replicas, BTreeSet::from([first.trim()]), "of three replicas the same each time");
    kubectl.run(&["delete", "service", "sticky"]).unwrap();
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn a_load_balancers_address_answers_pods() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    service(kubectl, "balanced", json!({ "type": "LoadBalancer" }));
    let status = r#"{"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.7"}]}}}"#;
    let patch = ["patch", "service", "balanced", "--subresource=status", "--type=merge", "-p"];
    kubectl.run(&[&patch[..], &[status]].concat()).unwrap();
    assert!(answer(kubectl, "http://203.0.113.7").starts_with("nginx-"));
    kubectl.run(&["delete", "service", "balanced"]).unwrap();
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn with_the_local_policy_only_nodes_with_a_replica_answer() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let local = json!({ "type": "NodePort", "externalTrafficPolicy": "Local", "nodePort": 30_081 });
    service(kubectl, "local", local);
    let asker = cluster.node("worker-1").unwrap();
    let url = |node: &Node| format!("http://{}:30081", node.ip);
    let other = cluster.node("worker-2").unwrap();
    let from = wait_for("a node with replicas to answer", Duration::from_secs(30), || {
        Ok(asked_by(asker, &url(other)))
    });
    assert!(from.unwrap().starts_with("nginx-"));
    // Every replica is on a worker.
    assert_eq!(asked_by(asker, &url(cluster.server().unwrap())), None);
    kubectl.run(&["delete", "service", "local"]).unwrap();
}

#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn pods_reach_the_outside_under_their_nodes_address() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // The host, as the VMs see it: it answers nobody but the VM itself.
    let url = format!("http://10.0.2.2:{}", listener.local_addr().unwrap().port());
    // A first one may fail, and is asked again.
    let _server = std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            if lines.take_while(|line| !line.is_empty()).count() > 0 {
                let reply = b"HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\noutside";
                let _gone = stream.write_all(reply);
            }
        }
    });
    assert_eq!(answer(kubectl, &url), "outside");
}

/// Last of all tests of the cluster: its worker's pods are started anew.
#[test]
#[ignore = "needs the VMs: cargo xtask test --vm"]
fn z_rebooted_node_serves_before_its_server_does() {
    let (_, cluster) = cluster();
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let (asker, rebooted) = (cluster.node("worker-1").unwrap(), cluster.node("worker-2").unwrap());
    let server = cluster.server().unwrap().shell();
    let before = uptime_s(rebooted).unwrap();
    // What a node knows is written down at most ten seconds later.
    std::thread::sleep(Duration::from_secs(12));
    server.sh("kill -STOP $(cat /run/vm/control-plane.pid)").unwrap();
    // The shell goes with the machine.
    drop(rebooted.shell().sh("sync; (sleep 1; echo b > /proc/sysrq-trigger) >/dev/null 2>&1 &"));
    std::thread::sleep(Duration::from_secs(3));
    let answered = served_again(asker, rebooted, before);
    server.sh("kill -CONT $(cat /run/vm/control-plane.pid)").unwrap();
    let from = answered.unwrap();
    assert!(from.starts_with("nginx-"), "{from}");
    recovered(&cluster, kubectl);
}

/// The first answer of the rebooted node's port. The replicas that it had are gone with its memory, and
/// nobody has told it; those of other nodes answer.
fn served_again(asker: &Node, rebooted: &Node, before_s: u64) -> anyhow::Result<String> {
    wait_for("the node to answer again", Duration::from_secs(120), || {
        let is_new = uptime_s(rebooted).is_some_and(|now_s| now_s < before_s);
        Ok(is_new.then(|| asked_by(asker, &format!("http://{}:30080", rebooted.ip))).flatten())
    })
}

fn uptime_s(node: &Node) -> Option<u64> {
    node.shell().sh("cut -d. -f1 /proc/uptime").ok()?.trim().parse().ok()
}

fn recovered(cluster: &Cluster, kubectl: Kubectl<'_>) {
    for node in &cluster.nodes {
        let ready = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        wait_for(&format!("{} to be Ready", node.name), Duration::from_secs(120), || {
            let said = kubectl.run(&["get", "node", &node.name, "-o", ready]).unwrap_or_default();
            Ok((said == "True").then_some(()))
        })
        .unwrap();
    }
}
