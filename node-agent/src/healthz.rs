//! The door at which load balancers ask whether this node is well: kube-proxy's `/healthz`.

use std::net::SocketAddr;

use tokio::sync::watch;

use crate::{
    dataplane::health::{self, Pulse},
    model::{NodeRow, ObjectKey},
    table::Table,
};

/// Answers until cancelled: by the dataplane's pulse, and whether `node` is about to go.
pub async fn serve(
    address: SocketAddr,
    pulse: watch::Receiver<Pulse>,
    nodes: Table<ObjectKey, NodeRow>,
    node: ObjectKey,
) -> &'static str {
    let is_eligible = move || nodes.row(&node).is_none_or(|row| !row.leaving);
    if let Err(error) = health::node(address, pulse, is_eligible).await {
        tracing::warn!(%error, %address, "the node's health is not served");
    }
    // This is no reason to end the agent.
    std::future::pending().await
}
