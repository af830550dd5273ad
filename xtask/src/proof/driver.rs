//! The proof that XDP carries what clients outside ask of the workers' node ports: the drivers count the frames
//! that a program of theirs has sent on, of which tc never hears.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{get, judge, load::Running, measure, replicas};
use crate::{
    cluster::{Cluster, Node, Role, SAMPLE_NODE_PORT},
    kubectl::{Kubectl, wait_for},
};

/// Requests to a worker from another node, and from the host: so many miss one kind of three replicas, here or
/// elsewhere, once in three hundred million times.
const REQUESTS: [u32; 2] = [60, 50];
/// Frames that a client sends for one request at the least: SYN, ACK, request, FIN.
const FRAMES: u64 = 4;
/// By which devices a worker is asked: the network of the nodes, and the host's.
const DEVICES: [&str; 2] = ["eth1", "eth0"];
/// On the client's node: what ends its requests, and where they are printed meanwhile.
const STOP: &str = "/run/proof-driver.stop";
const PRINTED: &str = "/run/proof-driver.log";
/// As `node-agent status` says it.
const IN_DRIVER: &str = "XDP in the driver";

/// Requests to a node's port and what XDP did for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    pub node: String,
    pub device: &'static str,
    /// Answers of replicas on that node.
    pub here: u32,
    /// Answers of replicas on other nodes.
    pub elsewhere: u32,
    /// Frames that came in by the device and were sent on by XDP.
    pub frames: u64,
}

/// Requests to each worker's port by both of its devices.
///
/// # Errors
/// When one was not answered, or XDP did not send on what went to replicas elsewhere.
pub fn carried_by_xdp(cluster: &Cluster) -> Result<Vec<Carried>> {
    let server = cluster.server()?;
    let path = paths(server)?;
    let is_off = path["eth1"].as_str().is_some_and(|path| path.contains("switched off"));
    ensure!(is_off, "the server has no XDP asked for, and says {path}");
    let mut all = Vec::new();
    for worker in cluster.nodes.iter().filter(|node| node.role == Role::Worker) {
        let path = paths(worker)?;
        for device in DEVICES {
            ensure!(path[device] == IN_DRIVER, "{} says {path}", worker.name);
        }
        let [from_node, from_host] = REQUESTS;
        all.push(carried(cluster, worker, DEVICES[0], || {
            load(server, worker, &format!("--count {from_node} --parallel 4"))
        })?);
        all.push(carried(cluster, worker, DEVICES[1], || {
            (0..from_host).map(|_| get(worker.node_port)).collect()
        })?);
    }
    Ok(all)
}

/// Kills a worker's agent twice under load on the worker's port.
///
/// # Errors
/// When a request failed, or XDP did not carry them all the while.
pub fn xdp_outlives_agent(cluster: &Cluster) -> Result<Carried> {
    let (server, worker) = (cluster.server()?, cluster.node("worker-1")?);
    let shell = server.shell();
    shell.sh(&format!("rm -f {STOP}; : >{PRINTED}"))?;
    let kill = || -> Result<()> {
        let load = Running::new(server, || shell.sh(&format!("cat {PRINTED}")));
        for _ in 0..2 {
            std::thread::sleep(Duration::from_secs(4));
            load.goes_on()?;
            measure::kill_agent(worker)?;
        }
        load.goes_on()?;
        load.lasts()
    };
    let carried = carried(cluster, worker, DEVICES[0], || {
        let how_long =
            format!("--until {STOP} --seconds 600 --pause-ms 2 --parallel 2 | tee {PRINTED}");
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| load(server, worker, &how_long));
            let killed = kill();
            shell.sh(&format!("touch {STOP}"))?;
            killed?;
            asking.join().ok().context("the thread that asks")?
        })
    })?;
    wait_for("the new agent to say what carries traffic", Duration::from_secs(60), || {
        let path = paths(worker)?;
        Ok(DEVICES.iter().all(|device| path[device] == IN_DRIVER).then_some(()))
    })?;
    Ok(carried)
}

/// The hops of a client's packet to each worker's port, by the programs' names, as the worker's agent traces it.
///
/// # Errors
/// When it does not answer.
pub fn traced(cluster: &Cluster) -> Result<Vec<Vec<String>>> {
    let client = cluster.server()?.ip;
    let workers = cluster.nodes.iter().filter(|node| node.role == Role::Worker);
    let trace = |worker: &Node| -> Result<Vec<String>> {
        let ask = format!("node-agent trace {client} {}:{SAMPLE_NODE_PORT} -o json", worker.ip);
        let hops: Value = serde_json::from_str(&worker.shell().sh(&ask)?).context("a trace")?;
        let programs = hops.as_array().into_iter().flatten().map(|hop| &hop["program"]);
        Ok(programs.filter_map(Value::as_str).map(str::to_owned).collect())
    };
    workers.map(trace).collect()
}

/// Runs requests and holds their number against what the driver counted meanwhile.
fn carried(
    cluster: &Cluster,
    worker: &Node,
    device: &'static str,
    ask: impl FnOnce() -> Result<Vec<String>>,
) -> Result<Carried> {
    let placed = replicas(Kubectl::new(&cluster.kubeconfig))?;
    let before = frames(worker, device)?;
    let answers = ask().with_context(|| format!("{} by {device}", worker.name))?;
    let frames = frames(worker, device)?.saturating_sub(before);
    let mut carried = Carried { node: worker.name.clone(), device, here: 0, elsewhere: 0, frames };
    for replica in answers {
        let node = placed.get(&replica).with_context(|| format!("an answer of {replica:?}"))?;
        let count = if *node == worker.name { &mut carried.here } else { &mut carried.elsewhere };
        *count += 1;
    }
    ensure!(carried.here > 0 && carried.elsewhere > 0, "no replica of one kind: {carried:?}");
    let least = FRAMES * u64::from(carried.elsewhere);
    ensure!(frames >= least, "XDP sent on less than {least} frames: {carried:?}");
    Ok(carried)
}

/// Requests from a node to another's port, all of which must be answered; gives who did.
fn load(from: &Node, to: &Node, how_long: &str) -> Result<Vec<String>> {
    let to = to.ip;
    let script =
        format!("set -o pipefail; load http --host {to} --port {SAMPLE_NODE_PORT} {how_long}");
    let requests = judge::parse(&from.shell().sh(&script)?)?;
    judge::tally(&requests).all_answered(u32::try_from(requests.len())?)?;
    Ok(requests.into_iter().filter_map(|request| request.answer.ok()).collect())
}

/// What carries the service traffic of each of a node's devices, as its agent says.
fn paths(node: &Node) -> Result<Value> {
    let status = node.shell().sh("node-agent status -o json")?;
    let status: Value = serde_json::from_str(&status).context("the agent's status")?;
    Ok(status["dataplane"]["paths"]["xdp"].clone())
}

/// Frames that came in by a device and were sent on by XDP since it was made.
fn frames(node: &Node, device: &str) -> Result<u64> {
    let text = node.shell().sh(&format!("ethtool -S {device}"))?;
    sent_on(&text).with_context(|| format!("{} has no counters of XDP: {text}", node.name))
}

/// The sum of the queues' counters of frames that XDP took in and sent on, back or by another device;
/// `None` when there is none. Their names as virtio_net has them in Linux 6.1 and 6.12.
fn sent_on(text: &str) -> Option<u64> {
    let counts = text.lines().filter_map(|line| {
        let (name, count) = line.trim().split_once(": ")?;
        let is_sent_on = name.ends_with("_xdp_tx") || name.ends_with("_xdp_redirects");
        if name.starts_with("rx") && is_sent_on { count.parse().ok() } else { None }
    });
    counts.reduce(|sum: u64, count| sum + count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_came_in_and_went_on_are_counted() {
        let text = "NIC statistics:\n     rx_queue_0_packets: 9\n     rx_queue_0_xdp_packets: 8\n\
                    \x20    rx_queue_0_xdp_tx: 3\n     rx_queue_0_xdp_redirects: 4\n\
                    \x20    rx_queue_1_xdp_tx: 1\n     tx_queue_0_xdp_tx: 70\n";
        assert_eq!(sent_on(text), Some(8));
        assert_eq!(sent_on("NIC statistics:\n     rx0_xdp_tx: 2\n"), Some(2));
        assert_eq!(sent_on("no stats available\n"), None);
    }
}
