//! The proofs that `prove` prints and the tests on clusters run: each measures, holds the figures to their bounds, and
//! gives a line with them.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::measure;
use crate::{cluster::Cluster, paths::Paths};

/// Longest until a deleted replica's replacement is ready, on two cores that emulate three machines.
const REPLACED_S: f64 = 20.0;

/// One proof on a cluster where the sample runs.
pub(crate) struct Part {
    /// What is done, as a step's title.
    pub(crate) title: &'static str,
    /// Does it; the line says what was seen, with figures.
    pub(crate) run: fn(&Paths, &Cluster) -> Result<String>,
}

/// All of them, in order; what deletes a replica comes last.
pub(crate) const PARTS: [Part; 5] = [
    Part { title: "look for packet filter rules on every node", run: rules },
    Part { title: "run a busy loop with limits.cpu: 200m", run: cpu },
    Part { title: "run a pod that allocates past its limits.memory", run: memory },
    Part { title: "kill -9 two node agents under load", run: agents },
    Part { title: "kubectl delete pod of a replica under load", run: deletion },
];

/// No node has a packet filter rule.
///
/// # Errors
/// As `measure::no_rules`.
pub fn rules(_: &Paths, cluster: &Cluster) -> Result<String> {
    measure::no_rules(cluster)?;
    let nodes = cluster.nodes.len();
    Ok(format!("iptables-save and nft list ruleset are empty on {nodes} nodes"))
}

/// A busy loop is held to its limit.
///
/// # Errors
/// When it cannot be measured, or used more or less.
pub fn cpu(paths: &Paths, cluster: &Cluster) -> Result<String> {
    let used = measure::cpu_limit(paths, cluster)?;
    Ok(format!("it used {used:.3} cores over ten seconds"))
}

/// A container past its memory limit is killed, and its status says by what.
///
/// # Errors
/// When it ended otherwise, or not at all.
pub fn memory(paths: &Paths, cluster: &Cluster) -> Result<String> {
    killed(&measure::memory_limit(paths, cluster)?)
}

/// Agents that are killed cost no request and restart no container.
///
/// # Errors
/// As `measure::agent_killed`.
pub fn agents(_: &Paths, cluster: &Cluster) -> Result<String> {
    let requests = measure::agent_killed(cluster)?;
    Ok(format!(
        "{requests} meanwhile, each with a look-up of the name, all answered; no container restarted"
    ))
}

/// A deleted replica is taken out in time and replaced.
///
/// # Errors
/// As `measure::deletion_under_load`, or when it took too long.
pub fn deletion(_: &Paths, cluster: &Cluster) -> Result<String> {
    replaced(measure::deletion_under_load(cluster)?)
}

fn killed(state: &Value) -> Result<String> {
    ensure!(state["reason"] == "OOMKilled" && state["exitCode"] == 137, "it ended with {state}");
    Ok("it was killed: reason OOMKilled, exit code 137".to_owned())
}

fn replaced(seconds: f64) -> Result<String> {
    ensure!(seconds < REPLACED_S, "it took {seconds:.1} s until the replacement was ready");
    Ok(format!(
        "replaced after {seconds:.1} s; no request failed that began more than 500 ms after the EndpointSlice \
         showed it not ready, and none on the new replica"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_out_of_their_bounds_are_no_proof() {
        assert!(replaced(3.25).unwrap().starts_with("replaced after 3.2 s"));
        replaced(20.0).unwrap_err();
    }

    #[test]
    fn only_a_kill_for_memory_is_one() {
        let of = |reason: &str, code: i32| killed(&json!({ "reason": reason, "exitCode": code }));
        assert!(of("OOMKilled", 137).unwrap().contains("OOMKilled"));
        of("Error", 137).unwrap_err();
        of("OOMKilled", 1).unwrap_err();
    }
}
