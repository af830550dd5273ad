//! This node's Lease: the heartbeat by which the cluster knows that the node lives.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::sync::watch;
use tracing::warn;

use super::chain;

/// Namespace of node leases.
const NAMESPACE: &str = "kube-node-lease";
/// `leaseDurationSeconds`, and the renewal at a quarter of it (kubelet's defaults).
const DURATION_SECONDS: i32 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// Pause after a failed renewal, doubling to `RENEW`.
const RETRY: Duration = Duration::from_millis(200);

/// Renews the lease until cancelled; begins once the node is registered.
pub async fn run(client: Client, node: Arc<str>, mut registered: watch::Receiver<Option<String>>) {
    let api: Api<Lease> = Api::namespaced(client, NAMESPACE);
    let mut pause = RETRY;
    loop {
        let uid = match registered.wait_for(Option::is_some).await {
            Ok(uid) => uid.clone(),
            Err(_gone) => return,
        };
        match renew(&api, &node, uid.as_deref()).await {
            Ok(()) => {
                pause = RETRY;
                tokio::time::sleep(RENEW).await;
            }
            Err(error) => {
                warn!(error = chain(&error), "lease not renewed");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RENEW);
            }
        }
    }
}

async fn renew(api: &Api<Lease>, node: &str, uid: Option<&str>) -> Result<(), kube::Error> {
    let now = MicroTime(Timestamp::now());
    let patch = json!({"spec": {
        "holderIdentity": node, "leaseDurationSeconds": DURATION_SECONDS, "renewTime": now}});
    match api.patch(node, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 => {}
        result => return result.map(drop),
    }
    let owner = uid.map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.to_owned(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    });
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(node.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(node.to_owned()),
            lease_duration_seconds: Some(DURATION_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    api.create(&PostParams::default(), &lease).await.map(drop)
}
