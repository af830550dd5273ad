//! Upstream's `SetDefaults_*` for the served kinds. Pure, and idempotent.

use base64::Engine as _;
use serde_json::{Map, Value, json};

use crate::{api::prepare::text, schema::Served};

/// Fills in what the writer left out.
pub fn apply(served: &Served, object: &mut Value) {
    match (served.group, served.plural) {
        ("", "pods") => {
            pod_spec(&mut object["spec"]);
            pod(&mut object["spec"]);
        }
        ("", "services") => service(&mut object["spec"]),
        ("", "nodes") => {
            plural(object, ("/spec", "podCIDR", "podCIDRs"), &|cidr| cidr);
        }
        ("apps", "deployments") => deployment(&mut object["spec"]),
        ("apps", "replicasets") => {
            set(&mut object["spec"], "replicas", json!(1));
            pod_spec(&mut object["spec"]["template"]["spec"]);
        }
        ("", "secrets") => secret(object),
        ("", "namespaces") => {
            let name = object["metadata"]["name"].clone();
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
        }
        ("discovery.k8s.io", "endpointslices") => {
            for port in items(object, "ports") {
                set(port, "name", json!(""));
                set(port, "protocol", json!("TCP"));
            }
        }
        ("", "endpoints") => {
            for subset in items(object, "subsets") {
                for port in items(subset, "ports") {
                    set(port, "protocol", json!("TCP"));
                }
            }
        }
        _ => {}
    }
}

fn items<'a>(of: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> + use<'a> {
    of.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Sets a field that is not there. What is no object is left for validation.
fn set(of: &mut Value, key: &str, value: Value) {
    if of.is_null() {
        *of = Value::Object(Map::new());
    }
    if let Some(fields) = of.as_object_mut() {
        fields.entry(key).or_insert(value);
    }
}

fn set_text(of: &mut Value, key: &str, value: &str) {
    if of.get(key).and_then(Value::as_str).is_none_or(str::is_empty)
        && let Some(fields) = of.as_object_mut()
    {
        fields.insert(key.to_owned(), json!(value));
    }
}

fn deployment(spec: &mut Value) {
    set(spec, "replicas", json!(1));
    set(spec, "strategy", json!({}));
    let strategy = &mut spec["strategy"];
    set_text(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate" {
        set(strategy, "rollingUpdate", json!({}));
        set(&mut strategy["rollingUpdate"], "maxUnavailable", json!("25%"));
        set(&mut strategy["rollingUpdate"], "maxSurge", json!("25%"));
    }
    set(spec, "revisionHistoryLimit", json!(10));
    set(spec, "progressDeadlineSeconds", json!(600));
    pod_spec(&mut spec["template"]["spec"]);
}

fn service(spec: &mut Value) {
    if spec.is_null() {
        *spec = json!({});
    }
    set_text(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "None"
        && let Some(fields) = spec.as_object_mut()
    {
        fields.remove("sessionAffinityConfig");
    }
    if spec["sessionAffinity"] == "ClientIP"
        && spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null()
    {
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 10_800}});
    }
    set_text(spec, "type", "ClusterIP");
    for port in items(spec, "ports") {
        set_text(port, "protocol", "TCP");
        let target = &port["targetPort"];
        if target.is_null() || *target == json!(0) || *target == json!("") {
            port["targetPort"] = port["port"].clone();
        }
    }
    let kind = text(spec, "/type").to_owned();
    let listed = spec["externalIPs"].as_array().is_some_and(|list| !list.is_empty());
    let balanced = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    if balanced || (kind == "ClusterIP" && listed) {
        set_text(spec, "externalTrafficPolicy", "Cluster");
    }
    if (balanced || kind == "ClusterIP") && spec["internalTrafficPolicy"].is_null() {
        spec["internalTrafficPolicy"] = json!("Cluster");
    }
    if kind == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"].is_null() {
        spec["allocateLoadBalancerNodePorts"] = json!(true);
    }
}

/// What a status gets beyond what its writer said.
pub fn status(served: &Served, object: &mut Value) {
    if (served.group, served.plural) == ("", "pods") {
        for (single, list) in [("podIP", "podIPs"), ("hostIP", "hostIPs")] {
            plural(object, ("/status", single, list), &|ip| json!({"ip": ip}));
        }
    }
    if (served.group, served.plural) == ("", "services")
        && let Some(balancer) = object.pointer_mut("/status/loadBalancer")
    {
        for ingress in items(balancer, "ingress") {
            if !text(ingress, "/ip").is_empty() && ingress["ipMode"].is_null() {
                ingress["ipMode"] = json!("VIP");
            }
        }
    }
}

/// A field of one value, and the list that came after it: either may be all that a client knows. Where they differ,
/// the one value wins, as in upstream's conversions.
fn plural(
    object: &mut Value,
    (at, single, list): (&str, &str, &str),
    entry: &dyn Fn(Value) -> Value,
) {
    let Some(of) = object.pointer_mut(at).filter(|of| of.is_object()) else { return };
    let one = of[single].as_str().filter(|text| !text.is_empty()).map(ToOwned::to_owned);
    let first = of[list].get(0).cloned();
    match (one, first) {
        (Some(one), first) if first != Some(entry(json!(one))) => {
            of[list] = json!([entry(json!(one))]);
        }
        (None, Some(first)) => {
            of[single] = first.get("ip").cloned().unwrap_or(first);
        }
        _ => {}
    }
}

fn secret(object: &mut Value) {
    let engine = base64::engine::general_purpose::STANDARD;
    let plain = object.as_object_mut().and_then(|fields| fields.remove("stringData"));
    for (key, value) in plain.as_ref().and_then(Value::as_object).into_iter().flatten() {
        object["data"][key] = json!(engine.encode(value.as_str().unwrap_or("")));
    }
    set_text(object, "type", "Opaque");
}

/// Only of Pods, not of templates.
fn pod(spec: &mut Value) {
    set(spec, "enableServiceLinks", json!(true));
    let host = spec["hostNetwork"] == true;
    for list in ["containers", "initContainers"] {
        for container in items(spec, list) {
            let limits = container["resources"]["limits"].as_object().cloned();
            for (name, amount) in limits.into_iter().flatten() {
                set(&mut container["resources"], "requests", json!({}));
                set(&mut container["resources"]["requests"], &name, amount);
            }
            if host {
                for port in items(container, "ports") {
                    let number = port["containerPort"].clone();
                    set(port, "hostPort", number);
                }
            }
        }
    }
}

fn pod_spec(spec: &mut Value) {
    set_text_or_new(spec, "restartPolicy", "Always");
    set_text_or_new(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "terminationGracePeriodSeconds", json!(30));
    set(spec, "securityContext", json!({}));
    set_text_or_new(spec, "schedulerName", "default-scheduler");
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for one in items(spec, list) {
            container(one);
        }
    }
    for one in items(spec, "volumes") {
        volume(one);
    }
}

fn set_text_or_new(of: &mut Value, key: &str, value: &str) {
    if of.is_null() {
        *of = Value::Object(Map::new());
    }
    set_text(of, key, value);
}

fn container(container: &mut Value) {
    if text(container, "/imagePullPolicy").is_empty() {
        let policy = if is_latest(text(container, "/image")) { "Always" } else { "IfNotPresent" };
        set(container, "imagePullPolicy", json!(policy));
    }
    set_text(container, "terminationMessagePath", "/dev/termination-log");
    set_text(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    for port in items(container, "ports") {
        set_text(port, "protocol", "TCP");
    }
    for env in items(container, "env") {
        if let Some(reference) = env.pointer_mut("/valueFrom/fieldRef") {
            set_text(reference, "apiVersion", "v1");
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(name) {
            for (field, value) in [
                ("timeoutSeconds", 1),
                ("periodSeconds", 10),
                ("successThreshold", 1),
                ("failureThreshold", 3),
            ] {
                if probe[field].as_i64().unwrap_or(0) == 0 {
                    probe[field] = json!(value);
                }
            }
            handler(probe);
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(hook) = container.pointer_mut(&format!("/lifecycle/{hook}")) {
            handler(hook);
        }
    }
}

fn handler(of: &mut Value) {
    if let Some(get) = of.get_mut("httpGet") {
        set_text(get, "path", "/");
        set_text(get, "scheme", "HTTP");
    }
    if let Some(grpc) = of.get_mut("grpc") {
        set(grpc, "service", json!(""));
    }
}

/// An image without tag or digest is its `latest`.
fn is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

fn volume(volume: &mut Value) {
    let sources =
        volume.as_object().map_or(0, |fields| fields.keys().filter(|k| *k != "name").count());
    if sources == 0 {
        set(volume, "emptyDir", json!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(source) {
            set(source, "defaultMode", json!(0o644));
            for item in items(source, "items") {
                if let Some(reference) = item.get_mut("fieldRef") {
                    set_text(reference, "apiVersion", "v1");
                }
            }
            for part in items(source, "sources") {
                if let Some(token) = part.get_mut("serviceAccountToken") {
                    set(token, "expirationSeconds", json!(3600));
                }
            }
        }
    }
    if let Some(path) = volume.get_mut("hostPath") {
        set(path, "type", json!(""));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema;

    fn defaulted(group: &str, plural: &str, mut object: Value) -> Value {
        let served = schema::resource(group, "v1", plural).unwrap();
        apply(served, &mut object);
        let mut again = object.clone();
        apply(served, &mut again);
        assert_eq!(again, object, "not idempotent");
        object
    }

    #[test]
    fn a_deployment_gets_what_describe_needs() {
        let object = defaulted(
            "apps",
            "deployments",
            json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "r:5000/nginx"}]}}}}),
        );
        assert_eq!(
            object["spec"],
            json!({"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600,
                "strategy": {"type": "RollingUpdate",
                    "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}},
                "template": {"spec": {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst",
                    "terminationGracePeriodSeconds": 30, "securityContext": {},
                    "schedulerName": "default-scheduler", "containers": [{"name": "c",
                        "image": "r:5000/nginx", "imagePullPolicy": "Always", "resources": {},
                        "terminationMessagePath": "/dev/termination-log",
                        "terminationMessagePolicy": "File"}]}}})
        );
    }

    #[test]
    fn one_address_and_the_list_of_them_agree() {
        let node = |spec: Value| defaulted("", "nodes", json!({"spec": spec}))["spec"].take();
        let both = json!({"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]});
        assert_eq!(node(json!({"podCIDR": "10.0.0.0/24"})), both);
        assert_eq!(node(json!({"podCIDRs": ["10.0.0.0/24"]})), both);
        assert_eq!(node(json!({"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.9.0.0/24"]})), both);
        let dual = json!({"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24", "fd00::/64"]});
        assert_eq!(node(dual.clone()), dual);
        let mut pod = json!({"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}});
        status(schema::resource("", "v1", "pods").unwrap(), &mut pod);
        assert_eq!(pod["status"]["podIP"], "10.0.0.1");
        let mut old = json!({"status": {"podIP": "10.0.0.1", "hostIP": "192.0.2.1"}});
        status(schema::resource("", "v1", "pods").unwrap(), &mut old);
        assert_eq!(old["status"]["podIPs"], json!([{"ip": "10.0.0.1"}]));
        assert_eq!(old["status"]["hostIPs"], json!([{"ip": "192.0.2.1"}]));
    }

    #[test]
    fn a_service_and_a_pod() {
        let service = defaulted(
            "",
            "services",
            json!({"spec": {"type": "NodePort", "ports": [{"port": 80}]}}),
        );
        assert_eq!(
            service["spec"]["ports"],
            json!([{"port": 80, "protocol": "TCP", "targetPort": 80}])
        );
        assert_eq!(service["spec"]["externalTrafficPolicy"], "Cluster");
        let pod = defaulted(
            "",
            "pods",
            json!({"spec": {"containers": [{"image": "a:1", "resources": {"limits": {"cpu": "1"}},
                "readinessProbe": {"httpGet": {"port": 80}}}]}}),
        );
        let container = &pod["spec"]["containers"][0];
        assert_eq!(container["imagePullPolicy"], "IfNotPresent");
        assert_eq!(container["resources"]["requests"], json!({"cpu": "1"}));
        assert_eq!(
            container["readinessProbe"],
            json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3})
        );
        let secret = defaulted("", "secrets", json!({"stringData": {"a": "b"}}));
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "Yg=="}}));
    }
}
