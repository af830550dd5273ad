//! The ServiceAccount plugin: every pod runs as an account of its namespace. Pure.

use serde_json::{Value, json};

use super::{Attempt, View, about};
use crate::{api::prepare::text, client::ApiError};

/// The pod's account must be there; its pull secrets are the pod's, and its token is mounted unless the pod or
/// the account says no.
///
/// # Errors
/// 403 without the account.
pub(super) fn assign(
    attempt: &Attempt<'_>,
    view: &View<'_>,
    pod: &mut Value,
) -> Result<(), ApiError> {
    if !text(pod, "/metadata/annotations/kubernetes.io~1config.mirror").is_empty() {
        return Ok(());
    }
    if text(pod, "/spec/serviceAccountName").is_empty() {
        pod["spec"]["serviceAccountName"] = json!("default");
    }
    pod["spec"]["serviceAccount"] = pod["spec"]["serviceAccountName"].clone();
    let namespace = text(pod, "/metadata/namespace");
    let name = text(pod, "/spec/serviceAccountName");
    let Some(account) = &view.service_account else {
        let why = format!(
            "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
        );
        return Err(about(attempt, pod).forbidden(&why));
    };
    if pod["spec"].get("imagePullSecrets").is_none()
        && let Some(secrets) = account.get("imagePullSecrets")
    {
        pod["spec"]["imagePullSecrets"] = secrets.clone();
    }
    let says = |of: &Value| of["automountServiceAccountToken"].as_bool();
    if says(&pod["spec"]).or_else(|| says(account)).unwrap_or(true) {
        mount_token(&mut pod["spec"], &view.suffix);
    }
    Ok(())
}

/// Where every container finds its token (`client-go`'s `rest.InClusterConfig`).
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Upstream's: an hour and seven seconds, by which such tokens are told from those that somebody asked for.
const TOKEN_SECONDS: u32 = 3607;

/// Adds the volume with token, CA and namespace to each container that has nothing at its place.
fn mount_token(spec: &mut Value, suffix: &str) {
    let name = format!("kube-api-access-{suffix}");
    let mut used = false;
    for list in ["containers", "initContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            let Some(container) = container.as_object_mut() else { continue };
            let mounts = container.entry("volumeMounts").or_insert_with(|| json!([]));
            let Some(mounts) = mounts.as_array_mut() else { continue };
            if mounts.iter().all(|mount| mount["mountPath"] != MOUNT_PATH) {
                mounts.push(json!({"name": name, "readOnly": true, "mountPath": MOUNT_PATH}));
                used = true;
            }
        }
        if spec[list].is_null()
            && let Some(spec) = spec.as_object_mut()
        {
            spec.remove(list);
        }
    }
    if !used {
        return;
    }
    let volume = json!({"name": name, "projected": {"defaultMode": 0o644, "sources": [
        {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace",
            "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]}});
    match spec["volumes"].as_array_mut() {
        Some(volumes) => volumes.push(volume),
        None => spec["volumes"] = json!([volume]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_mounted_where_nothing_is_yet() {
        let own = json!([{"name": "mine", "mountPath": MOUNT_PATH}]);
        let mut spec = json!({"containers": [{"name": "a"}, {"name": "b", "volumeMounts": own}]});
        mount_token(&mut spec, "x7");
        assert_eq!(
            spec["containers"][0]["volumeMounts"],
            json!([{"name": "kube-api-access-x7", "readOnly": true, "mountPath": MOUNT_PATH}])
        );
        assert_eq!(spec["containers"][1]["volumeMounts"], own);
        assert_eq!(spec["volumes"][0]["name"], "kube-api-access-x7");
        assert_eq!(spec["volumes"][0]["projected"]["sources"].as_array().unwrap().len(), 3);
        assert!(spec.get("initContainers").is_none());

        let alone = json!({"containers": [{"name": "b", "volumeMounts": own}]});
        let mut spec = alone.clone();
        mount_token(&mut spec, "x7");
        assert_eq!(spec, alone);
    }
}
