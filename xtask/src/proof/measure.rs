//! The proofs that change something: a replica deleted, limits reached, an agent killed.

use std::{
    io::{BufRead as _, BufReader},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{LoadPod, condition, judge, replicas};
use crate::{
    cluster::{Cluster, Node},
    guest::Guest,
    kubectl::{Kubectl, wait_for},
    paths::Paths,
    up::apply_file,
};

/// Deletes a replica under load and holds every request to the rule of `judge::deletion`. Returns the
/// seconds until the replacement was ready.
///
/// # Errors
/// When a request broke the rule, or the replica was not replaced within 30 s.
pub fn deletion_under_load(cluster: &Cluster) -> Result<f64> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let before = replicas(kubectl)?;
    let (victim, _) = before.first_key_value().context("no replica to delete")?;
    let address = pod_ip(kubectl, victim)?;
    let load = LoadPod::start(kubectl, "proof-deletion", &["--seconds", "25", "--pause-ms", "5"])?;
    let watch = SliceWatch::start(kubectl)?;
    std::thread::sleep(Duration::from_secs(2));
    let deleted = Instant::now();
    kubectl.run(&["delete", "pod", victim, "--wait=false"])?;
    let host_ms = watch.not_ready(&address, Duration::from_secs(20))?;
    let replacement = wait_for("a replacement to be ready", Duration::from_secs(30), || {
        let now = replicas(kubectl)?;
        Ok(now.keys().find(|name| !before.contains_key(*name)).cloned())
    })?;
    let replaced = deleted.elapsed().as_secs_f64();
    let clock_ahead = clock_ahead_ms(cluster.server()?.shell())?;
    let requests = load.finish(Duration::from_secs(90))?;
    let not_ready_ms = host_ms.checked_add_signed(clock_ahead).context("clocks")?;
    judge::deletion(&requests, not_ready_ms, victim, &replacement)?;
    Ok(replaced)
}

/// Runs the busy loop and returns the cores it used over ten seconds, from its cgroup.
///
/// # Errors
/// When the pod does not run or its cgroup cannot be read.
pub fn cpu_limit(paths: &Paths, cluster: &Cluster) -> Result<f64> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    kubectl.run(&["delete", "pod", "busy-loop", "--ignore-not-found", "--timeout=60s"])?;
    apply_file(paths, kubectl, "cpu-limit.yaml")?;
    let pod = wait_for("pod busy-loop to run", Duration::from_secs(60), || {
        let pod = kubectl.json(&["get", "pod", "busy-loop"])?;
        Ok((pod["status"]["phase"] == "Running").then_some(pod))
    })?;
    let node = cluster.node(pod["spec"]["nodeName"].as_str().unwrap_or_default())?;
    let uid = pod["metadata"]["uid"].as_str().context("a pod without uid")?;
    let read = format!(
        "cat $(find /sys/fs/cgroup/kubepods -name 'pod{uid}')/cpu.stat; cut -d' ' -f1 /proc/uptime"
    );
    let sample = || -> Result<(f64, f64)> {
        let text = node.shell().sh(&read)?;
        let usage = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))
            .with_context(|| format!("no usage in {text:?}"))?;
        let uptime = text.lines().last().unwrap_or_default();
        Ok((usage.parse::<f64>()? / 1e6, uptime.parse()?))
    };
    let (used_before, from) = sample()?;
    std::thread::sleep(Duration::from_secs(10));
    let (used_after, to) = sample()?;
    kubectl.run(&["delete", "pod", "busy-loop", "--wait=false"])?;
    ensure!(to > from, "the node's clock stood still");
    Ok((used_after - used_before) / (to - from))
}

/// Runs the pod that takes too much memory and returns its container's `state.terminated`.
///
/// # Errors
/// When it does not end.
pub fn memory_limit(paths: &Paths, cluster: &Cluster) -> Result<Value> {
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

/// Kills the agents of the client's node and of a replica's node under load. Returns the number of
/// requests, all of which were answered.
///
/// # Errors
/// When a request failed, a container was restarted, or an agent did not come back.
pub fn agent_killed(cluster: &Cluster) -> Result<usize> {
    agent_replaced(cluster, &format!("kill -9 $({AGENT_PID})"))
}

/// As `agent_killed`, with systemd's orderly restart of the unit.
///
/// # Errors
/// As `agent_killed`.
pub fn unit_restarted(cluster: &Cluster) -> Result<usize> {
    agent_replaced(cluster, "systemctl restart orlop-node-agent")
}

fn agent_replaced(cluster: &Cluster, script: &str) -> Result<usize> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let placed = replicas(kubectl)?;
    let restarts = restarts(kubectl)?;
    let load = LoadPod::start(kubectl, "proof-kill", &["--seconds", "25", "--pause-ms", "2"])?;
    std::thread::sleep(Duration::from_secs(2));
    let mut victims = vec![cluster.server()?];
    if let Some(name) = placed.values().find(|name| *name != "server") {
        victims.push(cluster.node(name)?);
    }
    for node in victims {
        replace_agent(node, script)?;
    }
    let requests = load.finish(Duration::from_secs(90))?;
    let tally = judge::tally(&requests);
    ensure!(requests.len() >= 100, "only {} requests in 25 s", requests.len());
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
    Ok(requests.len())
}

/// Prints the agent's process number, under systemd and under the VMs' own init.
const AGENT_PID: &str = "if [ -d /run/systemd/system ]; then systemctl show -P MainPID orlop-node-agent; \
                         else cat /run/vm/node-agent.pid; fi";

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
fn restarts(kubectl: Kubectl<'_>) -> Result<Vec<(String, String, i64)>> {
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

/// How many milliseconds the VM's clock is ahead of the host's: of five answers the quickest, whose
/// middle is taken as the moment of its reading.
fn clock_ahead_ms(guest: Guest) -> Result<i64> {
    let mut best: Option<(u64, i64)> = None;
    for _ in 0..5 {
        let before = now_ms();
        let there: u64 = guest.sh("load clock")?.parse().context("the VM's clock")?;
        let after = now_ms();
        let middle = before.midpoint(after);
        let ahead = there.checked_signed_diff(middle).context("clocks")?;
        let took = after.saturating_sub(before);
        if best.is_none_or(|(quickest, _)| took < quickest) {
            best = Some((took, ahead));
        }
    }
    best.map(|(_, ahead)| ahead).context("no answer")
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A `kubectl get -w` on the Service's slices, as any client would see them.
struct SliceWatch {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<(u64, String)>,
}

impl SliceWatch {
    fn start(kubectl: Kubectl<'_>) -> Result<Self> {
        // The watch itself, one event a line.
        let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices\
                    ?watch=true&labelSelector=kubernetes.io%2Fservice-name%3Dnginx";
        let args = ["get", "--raw", path];
        let mut child = kubectl.spawn(&args)?;
        let out = child.stdout.take().context("kubectl's stdout")?;
        let (send, lines) = std::sync::mpsc::sync_channel(1000);
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(std::result::Result::ok) {
                if send.send((now_ms(), line)).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The host's time at which the slice no longer showed `address` ready; it must have shown it before.
    fn not_ready(mut self, address: &str, limit: Duration) -> Result<u64> {
        let end = Instant::now() + limit;
        let mut was_ready = false;
        let found = loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((at, line)) if was_ready && !shows_ready(&line, address) => break Ok(at),
                Ok((_, line)) => was_ready |= shows_ready(&line, address),
                Err(error) => {
                    break Err(error).with_context(|| {
                        format!("the EndpointSlice never showed {address} ready and then not ready")
                    });
                }
            }
        };
        self.child.kill().context("end kubectl")?;
        self.child.wait().context("end kubectl")?;
        found
    }
}

/// Whether a watch event's slice has `address` ready.
fn shows_ready(event: &str, address: &str) -> bool {
    let event: Value = serde_json::from_str(event).unwrap_or_default();
    event["object"]["endpoints"].as_array().into_iter().flatten().any(|endpoint| {
        endpoint["addresses"][0] == address && endpoint["conditions"]["ready"] == true
    })
}
