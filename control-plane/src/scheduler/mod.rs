//! The scheduler: which node a pod goes to.
//!
//! `pod.rs` reads what a pod asks for, `snapshot.rs` holds what nodes have, `filter.rs` and `score.rs` judge,
//! `queue.rs` orders the waiting; all pure. `bind.rs` is the loop that watches and writes.

mod bind;
mod filter;
mod pod;
mod queue;
mod score;
mod snapshot;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{
    filter::{Reason, tolerates},
    pod::Pod,
    snapshot::Snapshot,
};
use crate::client::Client;

/// Starts the scheduler; the task ends soon after `stop` is cancelled.
pub fn start(client: Arc<dyn Client>, stop: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(bind::run(client, stop))
}

/// Where a pod goes, or why nowhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Bind(String),
    /// Every node with each of its reasons.
    Wait(Vec<(String, Reason)>),
    /// A field of the pod that asks for what this scheduler cannot do: never ignored.
    Unsupported(String),
}

/// Nodes below which all are looked at (upstream `minFeasibleNodesToFind`).
const MIN_FEASIBLE: usize = 100;

/// How many fitting nodes are enough to choose from (upstream `numFeasibleNodesToFind`): all of up to
/// 100, then 50 % less 1 % per 125 nodes, at least 5 %.
fn enough(nodes: usize) -> usize {
    if nodes < MIN_FEASIBLE {
        return nodes;
    }
    let percent = 50_usize.saturating_sub(nodes / 125).max(5);
    (nodes * percent / 100).max(MIN_FEASIBLE)
}

/// Decides about one pod. `seed` picks where the search begins and among equals.
pub(crate) fn schedule(snapshot: &Snapshot, pod: &Pod, seed: u64) -> Decision {
    if let Some(field) = &pod.unsupported {
        return Decision::Unsupported(field.clone());
    }
    let nodes = snapshot.nodes();
    let wanted = enough(nodes.len());
    let start = usize::try_from(seed).unwrap_or(0).checked_rem(nodes.len()).unwrap_or(0);
    let (mut fitting, mut reasons) = (Vec::with_capacity(wanted), Vec::new());
    for node in nodes[start..].iter().chain(&nodes[..start]) {
        if !node.present {
            continue;
        }
        let before = reasons.len();
        filter::filter(node, pod, &mut reasons);
        if reasons.len() == before {
            fitting.push(node);
            if fitting.len() == wanted {
                break;
            }
        }
    }
    match score::best(&fitting, pod, seed) {
        Some(node) => Decision::Bind(node.name.clone()),
        None => Decision::Wait(reasons),
    }
}

/// Upstream's sentence about a decision to wait.
pub(crate) fn message(decision: &Decision, nodes: usize) -> Option<String> {
    match decision {
        Decision::Bind(_) => None,
        Decision::Unsupported(field) => Some(format!(
            "0/{nodes} nodes are available: {field} is not supported by this scheduler."
        )),
        Decision::Wait(_) if nodes == 0 => Some("no nodes available to schedule pods".to_owned()),
        Decision::Wait(reasons) => {
            let mut counts = std::collections::BTreeMap::new();
            for (_, reason) in reasons {
                *counts.entry(reason.to_string()).or_insert(0_usize) += 1;
            }
            let mut parts: Vec<String> =
                counts.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            parts.sort();
            Some(format!("0/{nodes} nodes are available: {}.", parts.join(", ")))
        }
    }
}
