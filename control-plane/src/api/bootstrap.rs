//! Objects that a new cluster begins with, made through the API like all others.

use std::{net::IpAddr, sync::Arc};

use serde_json::{Value, json};

use crate::{
    admission::service::nth,
    api::{core::Api, local::Local},
    client::{ApiError, Client as _, ObjectRef, Resource, Write},
};

const fn core(plural: &'static str) -> Resource {
    Resource { group: "", version: "v1", plural }
}

const SLICES: Resource =
    Resource { group: "discovery.k8s.io", version: "v1", plural: "endpointslices" };

/// Makes what is missing: the four namespaces, `default` service accounts of three of them, the Service
/// `default/kubernetes` with its slice, and the Service of the cluster's DNS, which nodes answer themselves.
///
/// # Errors
/// What the API says to a creation, other than that the object exists.
pub async fn bootstrap(api: &Arc<Api>, advertise: IpAddr, port: u16) -> Result<(), ApiError> {
    let local = Local::new(Arc::clone(api), "kube-apiserver");
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        ensure(&local, core("namespaces"), "", json!({"metadata": {"name": name}})).await?;
        let account = json!({"metadata": {"name": "default"}});
        ensure(&local, core("serviceaccounts"), name, account).await?;
    }
    let address = |index| nth(api.networks.service_cidrs.first().copied()?, index);
    if let Some(address) = address(0) {
        let service = json!({"metadata": {"name": "kubernetes",
                "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {"clusterIP": address.to_string(), "type": "ClusterIP", "ports": [
                {"name": "https", "port": 443, "protocol": "TCP", "targetPort": port}]}});
        ensure(&local, core("services"), "default", service).await?;
    }
    if let Some(address) = address(9) {
        let service = json!({"metadata": {"name": "kube-dns", "labels": {"k8s-app": "kube-dns",
                "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"}},
            "spec": {"clusterIP": address.to_string(), "type": "ClusterIP", "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53}]}});
        ensure(&local, core("services"), "kube-system", service).await?;
    }
    endpoints(&local, advertise, port).await
}

/// The slice of `default/kubernetes` follows the advertised address.
async fn endpoints(local: &Local, advertise: IpAddr, port: u16) -> Result<(), ApiError> {
    let slice = json!({"metadata": {"name": "kubernetes",
            "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if advertise.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{"addresses": [advertise.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}]});
    ensure(local, SLICES, "default", slice.clone()).await?;
    let object = ObjectRef {
        resource: SLICES,
        namespace: "default".to_owned(),
        name: "kubernetes".to_owned(),
    };
    let patch = json!({"endpoints": slice["endpoints"], "ports": slice["ports"]});
    local.write(Write::Patch { object, subresource: "", patch }).await?;
    Ok(())
}

async fn ensure(
    local: &Local,
    resource: Resource,
    namespace: &str,
    object: Value,
) -> Result<(), ApiError> {
    let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let place = ObjectRef { resource, namespace: namespace.to_owned(), name };
    // A Service that exists would be refused for its address before its name is looked at.
    if local.read(&place).await.is_ok() {
        return Ok(());
    }
    let write = Write::Create { resource, namespace: namespace.to_owned(), object };
    match local.write(write).await {
        Err(error) if error.reason != "AlreadyExists" => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}
