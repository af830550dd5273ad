//! What a writer is told of an object that is accepted all the same, in upstream's words: kubectl prints it. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use api::quantity::Quantity;
use base64::Engine as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::Value;

use super::{
    service::fields::{is_headless, kind, parse_ip},
    validate::list,
};
use crate::{
    api::prepare::text,
    schema::{Path, Served},
};

/// Of a written object. Upstream says nothing of a workload whose generation stayed, and nothing of a Pod that is not new.
#[must_use]
pub fn of(served: &Served, object: &Value, written: Written) -> Vec<String> {
    let mut said = Vec::new();
    match (served.group, served.plural, written) {
        ("", "pods", Written::New) => pod_spec(&mut said, &Path::new("spec"), &object["spec"]),
        ("apps", "deployments" | "replicasets", Written::New | Written::Changed) => {
            let path = Path::new("spec.template.spec");
            pod_spec(&mut said, &path, &object["spec"]["template"]["spec"]);
        }
        ("", "nodes", _) if !text(object, "/spec/externalID").is_empty() => {
            let why = "this field is deprecated, and is unused by Kubernetes";
            said.push(format!("spec.externalID: {why}"));
        }
        ("", "services", _) => service(&mut said, object),
        ("discovery.k8s.io", "endpointslices", Written::New) if object["addressType"] == "FQDN" => {
            said.push("spec.addressType: FQDN endpoints are deprecated".to_owned());
        }
        ("", "secrets", _) if object["type"] == "kubernetes.io/tls" => {
            said.extend(key_pair(object))
        }
        _ => {}
    }
    said
}

/// What became of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    New,
    /// It has another generation.
    Changed,
    Same,
}

fn pod_spec(said: &mut Vec<String>, path: &Path, spec: &Value) {
    gone(said, path, spec);
    doubles(said, path, spec);
    for (_, volume) in list(spec, "volumes") {
        let bare = |one: &Value| one.as_object().is_none_or(serde_json::Map::is_empty);
        for _ in list(&volume["projected"], "sources").filter(|(_, source)| bare(source)) {
            let name = text(volume, "/name");
            said.push(format!("volume {name:?} (Projected) has no sources provided"));
        }
    }
    for (index, secret) in list(spec, "imagePullSecrets") {
        if text(secret, "/name").is_empty() {
            let path = path.child("imagePullSecrets").index(index).child("name");
            said.push(format!("{path}: invalid empty name \"\""));
        }
    }
    for field in ["initContainers", "containers"] {
        for (index, container) in list(spec, field) {
            let path = path.child(field).index(index);
            fractions(said, &path.child("resources"), &container["resources"]);
            hidden(said, &path.child("env"), container);
        }
    }
    for (index, one) in list(spec, "topologySpreadConstraints") {
        unselective(said, &path.child("topologySpreadConstraints").index(index), one);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let (path, terms) = (path.child("affinity").child(kind), &spec["affinity"][kind]);
        let field = "requiredDuringSchedulingIgnoredDuringExecution";
        for (index, term) in list(terms, field) {
            unselective(said, &path.child(field).index(index), term);
        }
        let field = "preferredDuringSchedulingIgnoredDuringExecution";
        for (index, term) in list(terms, field) {
            let path = path.child(field).index(index).child("podAffinityTerm");
            unselective(said, &path, &term["podAffinityTerm"]);
        }
    }
}

/// Lists in which the second of two that are called the same is of no use.
fn doubles(said: &mut Vec<String>, path: &Path, spec: &Value) {
    for (items, field, what) in [("hostAliases", "ip", "ip"), ("imagePullSecrets", "name", "name")]
    {
        let mut seen = BTreeSet::new();
        for (index, one) in list(spec, items) {
            let word = one[field].as_str().unwrap_or("");
            if !seen.insert(word) {
                let path = path.child(items).index(index).child(field);
                said.push(format!("{path}: duplicate {what} {word:?}"));
            }
        }
    }
    let mut named: BTreeMap<&str, String> = BTreeMap::new();
    for field in ["initContainers", "containers"] {
        for (index, container) in list(spec, field) {
            for (number, port) in list(container, "ports") {
                let name = text(port, "/name");
                let own = path.child(field).index(index).child("ports").index(number).to_string();
                if let Some(first) = named.get(name) {
                    said.push(format!(
                        "{own}: duplicate port name {name:?} with {first}, services and probes that select ports by name will use {first}"
                    ));
                } else if !name.is_empty() {
                    named.insert(name, own);
                }
            }
        }
    }
}

/// Volumes that no version has any more, and the versions that say so.
const GONE: &[(&str, &str)] = &[
    ("photonPersistentDisk", "deprecated in v1.11, non-functional in v1.16+"),
    ("gitRepo", "deprecated in v1.11, and disabled by default in v1.33+"),
    ("scaleIO", "deprecated in v1.16, non-functional in v1.22+"),
    ("flocker", "deprecated in v1.22, non-functional in v1.25+"),
    ("quobyte", "deprecated in v1.22, non-functional in v1.25+"),
    ("glusterfs", "deprecated in v1.25, non-functional in v1.26+"),
    ("cephfs", "deprecated in v1.28, non-functional in v1.31+"),
    ("rbd", "deprecated in v1.28, non-functional in v1.31+"),
];

fn gone(said: &mut Vec<String>, path: &Path, spec: &Value) {
    for (index, volume) in list(spec, "volumes") {
        for (kind, why) in GONE.iter().filter(|(kind, _)| volume[*kind].is_object()) {
            let path = path.child("volumes").index(index).child(kind);
            said.push(format!("{path}: {why}"));
        }
    }
}

fn unselective(said: &mut Vec<String>, path: &Path, term: &Value) {
    if term["labelSelector"].is_null() {
        let path = path.child("labelSelector");
        said.push(format!("{path}: a null labelSelector results in matching no pod"));
    }
}

/// Bytes do not come in parts.
fn fractions(said: &mut Vec<String>, path: &Path, resources: &Value) {
    for name in ["memory", "ephemeral-storage"] {
        for list in ["limits", "requests"] {
            let amount = resources[list][name].as_str().and_then(|s| s.parse::<Quantity>().ok());
            let Some(amount) = amount.filter(|amount| amount.milli_value() % 1000 != 0) else {
                continue;
            };
            let (path, shown) = (path.child(list).key(name), amount.to_string());
            said.push(format!(
                "{path}: fractional byte value {shown:?} is invalid, must be an integer"
            ));
        }
    }
}

/// A variable that is set twice, unless the second time is made of the first.
fn hidden(said: &mut Vec<String>, path: &Path, container: &Value) {
    let mut seen = BTreeSet::new();
    for (index, variable) in list(container, "env") {
        let (name, value) = (text(variable, "/name"), text(variable, "/value"));
        let before = format!("$({name})");
        let anew = variable["valueFrom"].is_object() || value == before || !value.contains(&before);
        if !seen.insert(name) && anew {
            let path = path.index(index);
            said.push(format!(
                "{path}: hides previous definition of {name:?}, which may be dropped when using apply"
            ));
        }
    }
}

fn service(said: &mut Vec<String>, service: &Value) {
    let spec = &service["spec"];
    let hints = "service.kubernetes.io/topology-aware-hints";
    if service["metadata"]["annotations"].get(hints).is_some() {
        said.push(format!(
            "annotation {hints} is deprecated, please use service.kubernetes.io/topology-mode instead"
        ));
    }
    let headless = is_headless(service) && kind(service) == "ClusterIP";
    let external = kind(service) == "ExternalName";
    let outside = list(spec, "externalIPs").next().is_some();
    let balanced = text(spec, "/loadBalancerIP");
    if !headless && !external {
        addresses(said, &Path::new("spec.clusterIPs"), &spec["clusterIPs"]);
    }
    if headless {
        for (ignored, field) in [
            (!balanced.is_empty(), "loadBalancerIP"),
            (outside, "externalIPs"),
            (spec["sessionAffinity"] != "None", "SessionAffinity"),
        ] {
            if ignored {
                said.push(format!("spec.{field} is ignored for headless services"));
            }
        }
    }
    addresses(said, &Path::new("spec.externalIPs"), &spec["externalIPs"]);
    if !balanced.is_empty() {
        address(said, &Path::new("spec.loadBalancerIP"), balanced);
    }
    if outside && !headless && !external {
        let why =
            "spec.externalIPs is deprecated and may no longer be implemented in some clusters";
        said.push(why.to_owned());
    }
    if outside && external {
        said.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if !external && !text(spec, "/externalName").is_empty() {
        let why = "spec.externalName is ignored when spec.type is not \"ExternalName\"";
        said.push(why.to_owned());
    }
    if spec["trafficDistribution"] == "PreferClose" {
        let why = "\"PreferClose\" is deprecated; use \"PreferSameZone\"";
        said.push(format!("spec.trafficDistribution: {why}"));
    }
}

/// Upstream's `GetWarningsForIP`: what was stored before it was refused, and what has a shorter form.
fn addresses(said: &mut Vec<String>, path: &Path, list: &Value) {
    for (index, value) in list.as_array().into_iter().flatten().enumerate() {
        address(said, &path.index(index), value.as_str().unwrap_or(""));
    }
}

fn address(said: &mut Vec<String>, path: &Path, value: &str) {
    let Some(address) = parse_ip(value) else { return };
    match (address, value.parse::<IpAddr>()) {
        (IpAddr::V4(v4), Err(_)) => said.push(strange(path, value, IpAddr::V4(v4))),
        (IpAddr::V6(v6), _) => match v6.to_ipv4_mapped() {
            Some(v4) => said.push(strange(path, value, IpAddr::V4(v4))),
            None if v6.to_string() != value => said.push(format!(
                "{path}: IPv6 address {value:?} should be in RFC 5952 canonical format (\"{v6}\")"
            )),
            None => {}
        },
        (IpAddr::V4(_), Ok(_)) => {}
    }
}

fn strange(path: &Path, value: &str, address: IpAddr) -> String {
    format!("{path}: non-standard IP address {value:?} is invalid: use \"{address}\"")
}

/// Why the certificate and key of a Secret are none; in Go's words as far as no certificate has to be read.
fn key_pair(secret: &Value) -> Option<String> {
    let engine = base64::engine::general_purpose::STANDARD;
    let bytes = |key: &str| engine.decode(secret["data"][key].as_str().unwrap_or("")).ok();
    let (certificate, key) = (bytes("tls.crt")?, bytes("tls.key")?);
    if CertificateDer::from_pem_slice(&certificate).is_err() {
        return Some("tls: failed to find any PEM data in certificate input".to_owned());
    }
    if PrivateKeyDer::from_pem_slice(&key).is_err() {
        return Some("tls: failed to find any PEM data in key input".to_owned());
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::resource;

    fn said(plural: &str, object: &Value) -> Vec<String> {
        of(resource("", "v1", plural).unwrap(), object, Written::New)
    }

    #[test]
    fn pods() {
        let spec = json!({
            "volumes": [{"name": "v", "projected": {"sources": [{}]}}],
            "imagePullSecrets": [{"name": ""}, {"name": "a"}],
            "topologySpreadConstraints": [{"maxSkew": 1}],
            "containers": [{"name": "c",
                "resources": {"limits": {"memory": "1500m", "cpu": "1500m"}},
                "env": [{"name": "A", "value": "1"}, {"name": "A", "value": "$(A)2"},
                    {"name": "A", "value": "3"}]}]});
        let want = [
            "volume \"v\" (Projected) has no sources provided",
            "spec.imagePullSecrets[0].name: invalid empty name \"\"",
            "spec.containers[0].resources.limits[memory]: fractional byte value \"1500m\" is invalid, must be an integer",
            "spec.containers[0].env[2]: hides previous definition of \"A\", which may be dropped when using apply",
            "spec.topologySpreadConstraints[0].labelSelector: a null labelSelector results in matching no pod",
        ];
        let pod = json!({"spec": spec});
        assert_eq!(said("pods", &pod), want);
        let pods = resource("", "v1", "pods").unwrap();
        assert_eq!(of(pods, &pod, Written::Changed), Vec::<String>::new());
        let deployments = resource("apps", "v1", "deployments").unwrap();
        let deployment = json!({"spec": {"template": {"spec": spec}}});
        let all = of(deployments, &deployment, Written::Changed);
        assert_eq!(all.len(), want.len());
        assert!(all[1].starts_with("spec.template.spec.imagePullSecrets[0].name: "), "{all:?}");
        assert_eq!(of(deployments, &deployment, Written::Same), Vec::<String>::new());
    }

    #[test]
    fn what_stands_twice_and_what_is_gone() {
        let named = json!([{"containerPort": 1, "name": "a"}]);
        let spec = json!({
            "volumes": [{"name": "v", "glusterfs": {"path": "a"}}],
            "hostAliases": [{"ip": "1.2.3.4"}, {"ip": "1.2.3.4"}],
            "imagePullSecrets": [{"name": "a"}, {"name": "a"}],
            "containers": [{"ports": named}, {"ports": named}]});
        assert_eq!(
            said("pods", &json!({ "spec": spec })),
            [
                "spec.volumes[0].glusterfs: deprecated in v1.25, non-functional in v1.26+",
                "spec.hostAliases[1].ip: duplicate ip \"1.2.3.4\"",
                "spec.imagePullSecrets[1].name: duplicate name \"a\"",
                "spec.containers[1].ports[0]: duplicate port name \"a\" with spec.containers[0].ports[0], services and probes that select ports by name will use spec.containers[0].ports[0]",
            ]
        );
        let node = json!({"spec": {"externalID": "x"}});
        assert_eq!(said("nodes", &node).len(), 1);
    }

    #[test]
    fn services_and_secrets() {
        let spec = json!({"type": "ClusterIP", "clusterIPs": ["010.96.0.1", "fd00:0::1"],
            "loadBalancerIP": "010.1.1.1", "externalIPs": ["1.2.3.4"], "externalName": "x", "trafficDistribution": "PreferClose"});
        assert_eq!(
            said("services", &json!({"spec": spec})),
            [
                "spec.clusterIPs[0]: non-standard IP address \"010.96.0.1\" is invalid: use \"10.96.0.1\"",
                "spec.clusterIPs[1]: IPv6 address \"fd00:0::1\" should be in RFC 5952 canonical format (\"fd00::1\")",
                "spec.loadBalancerIP: non-standard IP address \"010.1.1.1\" is invalid: use \"10.1.1.1\"",
                "spec.externalIPs is deprecated and may no longer be implemented in some clusters",
                "spec.externalName is ignored when spec.type is not \"ExternalName\"",
                "spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"",
            ]
        );
        let pair =
            json!({"type": "kubernetes.io/tls", "data": {"tls.crt": "eA==", "tls.key": "eA=="}});
        assert_eq!(
            said("secrets", &pair),
            ["tls: failed to find any PEM data in certificate input"]
        );
        assert!(said("secrets", &json!({"type": "Opaque"})).is_empty());
    }
}
