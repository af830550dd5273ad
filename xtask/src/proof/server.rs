//! The proof that the control plane may be killed: it costs no request, no pod and nothing that it said
//! was stored.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{LoadPod, condition, judge, measure, replicas};
use crate::{
    cluster::Cluster,
    kubectl::{Kubectl, wait_for},
};

/// Objects written around the kill, one after the other.
const WRITES: usize = 24;
/// After how many the server is killed.
const KILL_AFTER: usize = 8;

/// What a killed server cost.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerKilled {
    /// Requests to the sample meanwhile, all answered.
    pub requests: usize,
    /// From the kill until `kubectl` got an answer again.
    pub seconds: f64,
    /// Writes that the server acknowledged, all of which were found afterwards.
    pub acknowledged: usize,
}

/// Kills the control plane under load while objects are written, and looks for all of them afterwards.
///
/// # Errors
/// When a request failed, an acknowledged object was lost or changed, or a container was restarted.
pub fn server_killed(cluster: &Cluster) -> Result<ServerKilled> {
    let kubectl = Kubectl::new(&cluster.kubeconfig);
    let (placed, restarts) = (replicas(kubectl)?, measure::restarts(kubectl)?);
    kubectl.run(&["delete", "configmaps", "-l", "proof=server", "--ignore-not-found"])?;
    let server = cluster.server()?;
    let (pod, load) = LoadPod::until_stopped(kubectl, server, "proof-server", "2")?;
    let mut acknowledged = Vec::new();
    let mut killed = None;
    let mut back = None;
    for number in 0..WRITES {
        if number == KILL_AFTER {
            load.goes_on()?;
            server.shell().sh("kill -9 $(cat /run/vm/control-plane.pid)")?;
            killed = Some(Instant::now());
        }
        let name = format!("proof-server-{number}");
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": { "name": name, "labels": { "proof": "server" } },
            "data": { "number": number.to_string() },
        });
        // One that fails was not acknowledged, and may be there or not.
        if kubectl.apply(&object).is_ok() {
            acknowledged.push((name, number.to_string()));
            if killed.is_some() && back.is_none() {
                back = Some(Instant::now());
            }
        } else {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let killed = killed.context("the server was not killed")?;
    let back = match back {
        Some(back) => back,
        None => wait_for("the API server", Duration::from_secs(60), || {
            kubectl.run(&["get", "--raw", "/readyz"]).map(|_| Some(Instant::now()))
        })?,
    };
    ensure!(acknowledged.len() >= KILL_AFTER, "only {} writes succeeded", acknowledged.len());
    let found = kubectl.json(&["get", "configmaps", "-l", "proof=server"])?;
    for (name, number) in &acknowledged {
        let kept = found["items"].as_array().into_iter().flatten().any(|object| {
            object["metadata"]["name"] == *name && object["data"]["number"] == *number
        });
        ensure!(kept, "{name} was acknowledged and is lost");
    }
    load.goes_on()?;
    let requests = pod.stop(&load)?;
    let tally = judge::tally(&requests);
    tally.all_answered(u32::try_from(requests.len()).unwrap_or(u32::MAX))?;
    for node in &cluster.nodes {
        wait_for(&format!("node {} to be Ready", node.name), Duration::from_secs(60), || {
            let object = kubectl.json(&["get", "node", &node.name])?;
            Ok(condition(&object, "Ready").filter(|status| status == "True"))
        })?;
    }
    ensure!(replicas(kubectl)? == placed, "the replicas are not the same as before");
    let after = measure::restarts(kubectl)?;
    ensure!(after == restarts, "containers were restarted: {restarts:?} became {after:?}");
    kubectl.run(&["delete", "configmaps", "-l", "proof=server"])?;
    let seconds = back.duration_since(killed).as_secs_f64();
    Ok(ServerKilled { requests: requests.len(), seconds, acknowledged: acknowledged.len() })
}
