//! The proofs that change something: a replica deleted, limits reached, an agent killed.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Covered, LoadPod, condition, judge, replicas};
use crate::{
    cluster::{Cluster, Node},
    guest::Guest,
    kubectl::{Kubectl, wait_for},
    paths::Paths,
    up::apply_file,
    watch::{Watch, now_ms},
};

/// Deletes a replica under load (`kubectl delete pod`) and holds every request to the rule of
/// `judge::deletion`. Returns the seconds until the replacement was ready.
///
/// # Errors
/// When a request broke the rule, or the replica was not replaced within 30 s.
pub(super) fn deletion_under_load(cluster: &Cluster) -> Result<f64> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let before = replicas(kubectl)?;
    let (victim, _) = before.first_key_value().context("no replica to delete")?;
    let address = pod_ip(kubectl, victim)?;
    let (pod, load) = LoadPod::until_stopped(kubectl, cluster.server()?, "proof-deletion", "5")?;
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices\
                  ?labelSelector=kubernetes.io%2Fservice-name%3Dnginx";
    let watch = Watch::start(kubectl, slices)?;
    let limit = Duration::from_secs(30);
    watch.until("the replica ready", limit, |slice| shows_ready(slice, &address))?;
    load.goes_on()?;
    let deleted = Instant::now();
    kubectl.run(&["delete", "pod", victim, "--wait=false"])?;
    let gone =
        watch.until("the replica not ready", limit, |slice| !shows_ready(slice, &address))?;
    let new = wait_for("a replacement to be ready", limit, || {
        let now = replicas(kubectl)?;
        Ok(now.keys().find(|name| !before.contains_key(*name)).cloned())
    })?;
    let replaced = deleted.elapsed().as_secs_f64();
    let new_address = pod_ip(kubectl, &new)?;
    // The slice's change is usually on its way already; one that came before the watch's last is seen too.
    let shown = if shows_ready(&gone.object, &new_address) {
        gone.at_ms
    } else {
        watch.until("the new replica", limit, |slice| shows_ready(slice, &new_address))?.at_ms
    };
    let ahead = clock_ahead_ms(cluster.server()?.shell())?;
    let there = |host_ms: u64| host_ms.checked_add_signed(ahead).context("clocks");
    let change = judge::Change {
        not_ready_ms: there(gone.at_ms)?,
        replaced_ms: there(shown)?,
        deleted: victim,
        replacement: &new,
    };
    load.until("the load to cover the change", |requests| judge::covers(requests, &change))?;
    let requests = pod.stop(&load)?;
    judge::deletion(&requests, &change)?;
    Ok(replaced)
}

/// Runs the busy loop and returns the cores it used over ten seconds, from its cgroup.
///
/// # Errors
/// When the pod does not run, its cgroup cannot be read, or no ten seconds of a minute are as `judge::held` wants them.
pub(super) fn cpu_limit(paths: &Paths, cluster: &Cluster) -> Result<f64> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "pod", "busy-loop", "--ignore-not-found", "--timeout=60s"])?;
    apply_file(paths, kubectl, "cpu-limit.yaml")?;
    let pod = wait_for("pod busy-loop to run", Duration::from_secs(60), || {
        let pod = kubectl.json(&["get", "pod", "busy-loop"])?;
        Ok((pod["status"]["phase"] == "Running").then_some(pod))
    })?;
    let node = cluster.node(pod["spec"]["nodeName"].as_str().unwrap_or_default())?;
    let uid = pod["metadata"]["uid"].as_str().context("a pod without uid")?;
    let mut samples = vec![cpu_used(node, uid)?];
    let cores = loop {
        std::thread::sleep(Duration::from_secs(10));
        samples.push(cpu_used(node, uid)?);
        match judge::held(&samples) {
            Ok(cores) => break cores,
            Err(error) if samples.len() > WINDOWS => return Err(error),
            Err(_) => (),
        }
    };
    kubectl.run(&["delete", "pod", "busy-loop", "--wait=false"])?;
    Ok(cores)
}

/// How often ten seconds are tried, as a node that stands still for half a second uses less in them.
const WINDOWS: usize = 6;

/// What a pod has used by its cgroup, and when that was read. The shell does both by itself, with the clock before and
/// after: where starting a program takes long, half a second may lie between.
fn cpu_used(node: &Node, uid: &str) -> Result<judge::CpuUsed> {
    let read = format!(
        "read -r before _ </proc/uptime; \
         while read -r key value; do [ $key != usage_usec ] || used=$value; \
         done <$(find /sys/fs/cgroup/kubepods -name 'pod{uid}')/cpu.stat; \
         read -r after _ </proc/uptime; echo $before $used $after"
    );
    wait_for("a reading of the CPU's use at one moment", Duration::from_secs(60), || {
        Ok(judge::CpuUsed::parse(&node.shell().sh(&read)?))
    })
}

/// Runs the pod that takes too much memory and returns its container's `state.terminated`.
///
/// # Errors
/// When it does not end.
pub(super) fn memory_limit(paths: &Paths, cluster: &Cluster) -> Result<Value> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "pod", "memory-hog", "--ignore-not-found", "--timeout=60s"])?;
    apply_file(paths, kubectl, "memory-limit.yaml")?;
    let state = wait_for("pod memory-hog to end", Duration::from_secs(60), || {
        let pod = kubectl.json(&["get", "pod", "memory-hog"])?;
        let state = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        Ok((!state.is_null()).then(|| state.clone()))
    })?;
    kubectl.run(&["delete", "pod", "memory-hog", "--wait=false"])?;
    Ok(state)
}

/// Kills the agents of the client's node and of a replica's node under load. Returns the requests,
/// all of which were answered.
///
/// # Errors
/// When a request failed, a container was restarted, or an agent did not come back.
pub fn agent_killed(cluster: &Cluster) -> Result<Covered> {
    agent_replaced(cluster, kill_agent)
}

/// As `agent_killed`, with systemd's orderly restart of the unit.
///
/// # Errors
/// As `agent_killed`.
pub fn unit_restarted(cluster: &Cluster) -> Result<Covered> {
    agent_replaced(cluster, |node| replace_agent(node, "systemctl restart orlop-node-agent"))
}

fn agent_replaced(cluster: &Cluster, replace: impl Fn(&Node) -> Result<()>) -> Result<Covered> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let placed = replicas(kubectl)?;
    let restarts = restarts(kubectl)?;
    let (pod, load) = LoadPod::until_stopped(kubectl, cluster.server()?, "proof-kill", "2")?;
    load.goes_on()?;
    let mut victims = vec![cluster.server()?];
    if let Some(name) = placed.values().find(|name| *name != "server") {
        victims.push(cluster.node(name)?);
    }
    for node in victims {
        replace(node)?;
        load.goes_on()?;
    }
    let requests = pod.stop(&load)?;
    let tally = judge::tally(&requests);
    tally.all_answered(u32::try_from(requests.len()).unwrap_or(u32::MAX))?;
    ensure!(replicas(kubectl)? == placed, "the replicas are not the same as before");
    for node in &cluster.nodes {
        wait_for(&format!("node {} to be Ready", node.name), Duration::from_secs(60), || {
            let object = kubectl.json(&["get", "node", &node.name])?;
            Ok(condition(&object, "Ready").filter(|status| status == "True"))
        })?;
    }
    let after = self::restarts(kubectl)?;
    ensure!(after == restarts, "containers were restarted: {restarts:?} became {after:?}");
    Ok(Covered::of(&requests))
}

/// Prints the agent's process number, under systemd and under the VMs' own init.
const AGENT_PID: &str = "if [ -d /run/systemd/system ]; then systemctl show -P MainPID orlop-node-agent; \
                         else cat /run/vm/node-agent.pid; fi";

/// Kills a node's agent and waits for the next one.
pub(super) fn kill_agent(node: &Node) -> Result<()> {
    replace_agent(node, &format!("kill -9 $({AGENT_PID})"))
}

/// Runs `script`, and proves that another agent process took the place of the one before.
fn replace_agent(node: &Node, script: &str) -> Result<()> {
    let pid = node.shell().sh(AGENT_PID)?;
    node.shell().sh(script)?;
    wait_for(&format!("a new agent on {}", node.name), Duration::from_secs(20), || {
        let now = node.shell().sh(&format!("p=$({AGENT_PID}); kill -0 $p && echo $p"))?;
        Ok((now != pid).then_some(()))
    })
}

/// Container id and restart count of every pod that is to live on.
pub(super) fn restarts(kubectl: Kubectl<'_>) -> Result<Vec<(String, String, i64)>> {
    let pods = kubectl.json(&["get", "pods", "-l", "app in (nginx, client)"])?;
    let mut found = Vec::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for status in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
            let id = status["containerID"].as_str().unwrap_or_default();
            let count = status["restartCount"].as_i64().unwrap_or(-1);
            found.push((name.to_owned(), id.to_owned(), count));
        }
    }
    ensure!(!found.is_empty(), "no containers are reported");
    Ok(found)
}

/// No packet filter rule of any kind on any node.
///
/// # Errors
/// Names the node and shows the rules.
pub fn no_rules(cluster: &Cluster) -> Result<()> {
    let script = "iptables-legacy-save; nft list ruleset; iptables-nft-save; \
                  grep -q nf_tables /proc/modules || echo 'nf_tables is not loaded, so nft saw nothing'";
    for node in &cluster.nodes {
        let rules = node.shell().sh(script)?;
        if !rules.is_empty() {
            bail!("{} has packet filter rules:\n{rules}", node.name);
        }
        // That an empty answer means no rules is shown by adding one and seeing it.
        let seen = node.shell().sh(
            "nft add table ip orlop_proof && nft list ruleset; nft delete table ip orlop_proof",
        )?;
        ensure!(seen.contains("orlop_proof"), "nft on {} cannot see rules: {seen}", node.name);
    }
    Ok(())
}

fn pod_ip(kubectl: Kubectl<'_>, name: &str) -> Result<String> {
    let pod = kubectl.json(&["get", "pod", name])?;
    Ok(pod["status"]["podIP"].as_str().context("a pod without address")?.to_owned())
}

/// The most that the VM's clock can be ahead of the host's, in milliseconds: by that, what the host saw was no earlier.
/// Read again and again until it is known well.
fn clock_ahead_ms(guest: Guest) -> Result<i64> {
    let mut readings = Vec::new();
    loop {
        let before = now_ms();
        let there: u64 = guest.sh("load clock")?.parse().context("the VM's clock")?;
        readings.push(judge::Reading { before, there, after: now_ms() });
        let ahead = judge::ahead(&readings).context("a clock was set")?;
        let unsure = ahead.end() - ahead.start();
        if unsure <= SURE_MS || readings.len() >= READINGS {
            ensure!(unsure <= UNSURE_MS, "the VM's clock is known to {unsure} ms only");
            return Ok(*ahead.end());
        }
    }
}

/// How well the VM's clock is to be known, how often it is read for that, and how well it must be then.
const SURE_MS: i64 = 50;
const READINGS: usize = 50;
const UNSURE_MS: i64 = 500;

/// Whether a slice has `address` ready.
fn shows_ready(slice: &Value, address: &str) -> bool {
    slice["endpoints"].as_array().into_iter().flatten().any(|endpoint| {
        endpoint["addresses"][0] == address && endpoint["conditions"]["ready"] == true
    })
}
