//! Whether the node's network is ready, in the words of its Ready condition.
//!
//! Task: [`follow`] reads the pod network and the overlay's trouble and writes the condition's reason.

use std::time::Duration;

use tokio::{sync::watch, time};

use crate::{kubelet::node::STARTING, model::PodNetwork};

/// How long an agent may take to hear of its pod network before the node is told to have none: the first
/// list of nodes takes that at most where a server answers.
const PATIENCE: Duration = Duration::from_secs(10);

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
        let words = if !has_network && !patience.is_elapsed() {
            Some(STARTING.to_owned())
        } else if !has_network {
            // Upstream's words while no CNI configuration is there.
            Some(
                "container runtime network not ready: NetworkReady=false \
                  reason:NetworkPluginNotReady message:Network plugin returns error: \
                  cni plugin not initialized"
                    .to_owned(),
            )
        } else {
            trouble.borrow_and_update().clone()
        };
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
