//! Whether the node's network is ready, in the words of its Ready condition.
//!
//! Task: [`follow`] reads the pod network and the overlay's trouble and writes the condition's reason.

use std::time::Duration;

use tokio::{sync::watch, time};

use crate::{kubelet::node::STARTING, model::PodNetwork};

/// How long an agent may take to hear of its pod network before the node is told to have none: the first
/// list of nodes takes that at most where a server answers.
const PATIENCE: Duration = Duration::from_secs(10);

/// Upstream's words while no CNI configuration is there.
const NO_NETWORK: &str = "container runtime network not ready: NetworkReady=false \
    reason:NetworkPluginNotReady message:Network plugin returns error: cni plugin not initialized";

/// Says why the node is not ready: no pod CIDR yet, or the overlay's trouble.
pub async fn follow(
    out: watch::Sender<Option<String>>,
    pods: Option<watch::Receiver<Option<PodNetwork>>>,
    trouble: Option<watch::Receiver<Option<String>>>,
) -> &'static str {
    let (Some(mut pods), Some(mut trouble)) = (pods, trouble) else {
        out.send_replace(None);
        return std::future::pending().await;
    };
    let mut patience = std::pin::pin!(time::sleep(PATIENCE));
    loop {
        let has_network = pods.borrow_and_update().is_some();
        let told = trouble.borrow_and_update().clone();
        let words = reason(has_network, patience.is_elapsed(), told);
        out.send_if_modified(|old| {
            let differs = *old != words;
            old.clone_from(&words);
            differs
        });
        tokio::select! {
            () = &mut patience, if !patience.is_elapsed() => {}
            changed = pods.changed() => if changed.is_err() { return "overlay" },
            changed = trouble.changed() => if changed.is_err() { return "overlay" },
        }
    }
}

/// Why the node is not ready. Where there is no pod network yet, the overlay's trouble may be the cause.
fn reason(has_network: bool, is_late: bool, trouble: Option<String>) -> Option<String> {
    match (has_network, is_late) {
        (true, _) => trouble,
        (false, false) => Some(STARTING.to_owned()),
        (false, true) => Some(trouble.unwrap_or_else(|| NO_NETWORK.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_pod_network_tells_the_trouble_that_keeps_it_from_one() {
        let trouble = || Some("no device has the node address".to_owned());
        for (has_network, is_late, told, expected) in [
            (true, true, None, None),
            (true, false, trouble(), trouble()),
            (false, false, trouble(), Some(STARTING.to_owned())),
            (false, true, None, Some(NO_NETWORK.to_owned())),
            (false, true, trouble(), trouble()),
        ] {
            assert_eq!(reason(has_network, is_late, told), expected);
        }
    }
}
