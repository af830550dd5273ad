//! Whether the node's network is ready, in the words of its Ready condition.
//!
//! Task: [`follow`] reads the pod network and the overlay's trouble and writes the condition's reason.

use tokio::sync::watch;

use crate::model::PodNetwork;

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
    loop {
        let words = if pods.borrow_and_update().is_none() {
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
            changed = pods.changed() => if changed.is_err() { return "overlay" },
            changed = trouble.changed() => if changed.is_err() { return "overlay" },
        }
    }
}
