//! The proof that the control plane may be killed: it costs no request, no pod and nothing that it said
//! was stored.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Covered, LoadPod, condition, judge, measure, replicas};
use crate::{
    cluster::Cluster,
    kubectl::{Kubectl, wait_for},
};

/// Objects written around the kill, one after the other.
const WRITES: usize = 24;
/// After how many the server is killed.
const KILL_AFTER: usize = 8;
/// Kills the server and notes in the background, by the VM's own clock, when that was and when the next said that it
/// was ready: the host would count its own `kubectl` with it, and writes that fail meanwhile.
const KILL: &str = "
    ready() { grep -c 'control plane ready' /var/log/control-plane.log; }
    rm -f /run/proof-server; before=$(ready); read -r from _ </proc/uptime
    kill -9 $(cat /run/vm/control-plane.pid)
    (
        for _ in $(seq 1200); do
            [ \"$(ready)\" = \"$before\" ] || break
            usleep 50000
        done
        read -r to _ </proc/uptime; echo $from $to >/run/proof-server
    ) >/dev/null 2>&1 &";
/// The server's first start, and when it was killed and ready again.
const BACK: &str =
    "grep -m 1 'control plane ready' /var/log/control-plane.log && cat /run/proof-server";

/// What a killed server cost.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerKilled {
    /// Requests to the sample meanwhile, all answered.
    pub requests: Covered,
    /// From the kill until the next server was ready.
    pub seconds: f64,
    /// How long its first start took, when the VM booted.
    pub first_seconds: f64,
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
    for number in 0..WRITES {
        if number == KILL_AFTER {
            load.goes_on()?;
            server.shell().sh(KILL)?;
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
        } else {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    wait_for("the API server", Duration::from_secs(60), || {
        kubectl.run(&["get", "--raw", "/readyz"]).map(Some)
    })?;
    let told =
        wait_for("the VM's times", Duration::from_secs(60), || server.shell().sh(BACK).map(Some))?;
    let (first_seconds, seconds) = times(&told).with_context(|| format!("no times: {told}"))?;
    in_time(first_seconds, seconds)?;
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
    let (requests, acknowledged) = (Covered::of(&requests), acknowledged.len());
    Ok(ServerKilled { requests, seconds, first_seconds, acknowledged })
}

/// What `BACK` printed: how long the first start took, and from the kill to the next server's readiness, in seconds.
fn times(told: &str) -> Option<(f64, f64)> {
    let (ready, uptimes) = told.split_once('\n')?;
    let (_, first) = ready.split_once("took_ms=")?;
    let (from, to) = uptimes.split_once(' ')?;
    let number = |text: &str| text.trim().parse::<f64>().ok();
    Some((number(first)? / 1000.0, number(to)? - number(from)?))
}

/// A server that takes over has nothing to make, but a store to read and clients that all come at once. The ten
/// seconds are for a VM that stands still; what waits for something to run out takes longer.
fn in_time(first_seconds: f64, seconds: f64) -> Result<()> {
    let most = 3.0 * first_seconds + 10.0;
    ensure!(
        seconds <= most,
        "{seconds:.1} s without an API server, which started in {first_seconds:.1} s at first"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_is_held_against_the_first_start() {
        let told = "2026-01-01T00:00:00.000000Z  INFO control_plane::run: control plane ready \
                    address=0.0.0.0:6443 took_ms=1500\n20.25 23.75";
        assert_eq!(times(told), Some((1.5, 3.5)));
        assert_eq!(times("took_ms=1500"), None);
        assert_eq!(times("took_ms=1500\n20.25"), None);
        in_time(1.5, 3.5).unwrap();
        in_time(0.5, 15.0).unwrap_err();
        in_time(5.0, 15.0).unwrap();
    }
}
