//! Columns and cells of every kind but pods. Pure.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::{
    AGE, Column, NAME, age, human_duration, integer, list, number, or, since, string, text, wide,
};

pub(super) fn columns(group: &str, kind: &str) -> &'static [Column] {
    match (group, kind) {
        ("", "Namespace") => const { &[NAME, text("Status", "The status of the namespace"), AGE] },
        ("", "Node") => NODE,
        ("", "Service") => SERVICE,
        ("", "Endpoints") => {
            const {
                &[
                    NAME,
                    text("Endpoints", "The set of all endpoints is the union of all subsets."),
                    AGE,
                ]
            }
        }
        ("", "ConfigMap") => {
            const { &[NAME, number("Data", "Data contains the configuration data."), AGE] }
        }
        ("", "Secret") => {
            const {
                &[
                    NAME,
                    text("Type", "Used to facilitate programmatic handling of secret data."),
                    number("Data", "Data contains the secret data."),
                    AGE,
                ]
            }
        }
        ("", "ServiceAccount") => {
            const { &[NAME, number("Secrets", "Secrets that pods with this account may use."), AGE] }
        }
        ("" | "events.k8s.io", "Event") => EVENT,
        ("apps", "Deployment") => DEPLOYMENT,
        ("apps", "ReplicaSet") => REPLICA_SET,
        ("discovery.k8s.io", "EndpointSlice") => {
            const {
                &[
                    NAME,
                    text("AddressType", "The type of address carried by this EndpointSlice."),
                    text("Ports", "The network ports exposed by each endpoint in this slice."),
                    text("Endpoints", "The unique endpoints in this slice."),
                    AGE,
                ]
            }
        }
        ("coordination.k8s.io", "Lease") => {
            const { &[NAME, text("Holder", "The identity of the holder of a current lease."), AGE] }
        }
        ("certificates.k8s.io", "CertificateSigningRequest") => SIGNING_REQUEST,
        _ => OTHER,
    }
}

pub(super) fn cells(group: &str, kind: &str, object: &Value, now: Timestamp) -> Vec<Value> {
    let name: Value = string(object, "/metadata/name").into();
    let age = age(object, now);
    match (group, kind) {
        ("", "Namespace") => vec![name, string(object, "/status/phase").into(), age],
        ("", "Node") => node(object, age),
        ("", "Service") => service(object, age),
        ("", "Endpoints") => vec![name, endpoints(object).into(), age],
        ("", "ConfigMap") => {
            vec![name, (size(object, "data") + size(object, "binaryData")).into(), age]
        }
        ("", "Secret") => {
            vec![name, string(object, "/type").into(), size(object, "data").into(), age]
        }
        ("", "ServiceAccount") => vec![name, list(object, "/secrets").len().into(), age],
        ("" | "events.k8s.io", "Event") => event(object, now),
        ("apps", "Deployment") => deployment(object, age),
        ("apps", "ReplicaSet") => replica_set(object, age),
        ("discovery.k8s.io", "EndpointSlice") => endpoint_slice(object, age),
        ("coordination.k8s.io", "Lease") => {
            vec![name, string(object, "/spec/holderIdentity").into(), age]
        }
        ("certificates.k8s.io", "CertificateSigningRequest") => signing_request(object, age),
        _ => vec![name, string(object, "/metadata/creationTimestamp").into()],
    }
}

const OTHER: &[Column] = &[
    NAME,
    Column {
        name: "Created At",
        kind: "date",
        format: "",
        description: "CreationTimestamp is a timestamp representing the server time when this object was created.",
        priority: 0,
    },
];

fn size(object: &Value, field: &str) -> usize {
    object.get(field).and_then(Value::as_object).map_or(0, serde_json::Map::len)
}

/// `a=b,c=d`, or `<none>`.
fn labels(object: &Value, pointer: &str) -> String {
    let entries = object.pointer(pointer).and_then(Value::as_object).into_iter().flatten();
    let entries: Vec<String> = entries
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    or(&entries.join(","), "<none>").to_owned()
}

/// A whole `LabelSelector` object as text.
fn selector(object: &Value) -> String {
    let Some(selector) = object.pointer("/spec/selector") else { return "<none>".to_owned() };
    match api::selector::LabelSelector::from_object(selector) {
        Ok(selector) => or(&selector.to_string(), "<none>").to_owned(),
        Err(_) => "<error>".to_owned(),
    }
}

/// Names and images of a template's containers.
fn containers(object: &Value) -> [Value; 2] {
    let containers = list(object, "/spec/template/spec/containers");
    let join = |field: &str| -> Value {
        let texts: Vec<&str> =
            containers.iter().map(|container| string(container, field)).collect();
        texts.join(",").into()
    };
    [join("/name"), join("/image")]
}

const NODE: &[Column] = &[
    NAME,
    text("Status", "The status of the node"),
    text("Roles", "The roles of the node"),
    AGE,
    text("Version", "Kubelet Version reported by the node."),
    wide("Internal-IP", "List of addresses reachable to the node."),
    wide("External-IP", "List of addresses reachable to the node."),
    wide("OS-Image", "OS Image reported by the node from /etc/os-release."),
    wide("Kernel-Version", "Kernel Version reported by the node from 'uname -r'."),
    wide("Container-Runtime", "ContainerRuntime Version reported by the node."),
];

fn node(node: &Value, age: Value) -> Vec<Value> {
    let ready = list(node, "/status/conditions").iter().find(|c| string(c, "/type") == "Ready");
    let mut status = match ready.map(|condition| string(condition, "/status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node.pointer("/spec/unschedulable").and_then(Value::as_bool) == Some(true) {
        status.push_str(",SchedulingDisabled");
    }
    let address = |kind: &str| -> Value {
        let addresses = list(node, "/status/addresses");
        let found = addresses.iter().find(|address| string(address, "/type") == kind);
        found.map_or("<none>", |address| string(address, "/address")).into()
    };
    let info = |field: &str| -> Value {
        or(string(node, &format!("/status/nodeInfo/{field}")), "<unknown>").into()
    };
    vec![
        string(node, "/metadata/name").into(),
        status.into(),
        roles(node).into(),
        age,
        string(node, "/status/nodeInfo/kubeletVersion").into(),
        address("InternalIP"),
        address("ExternalIP"),
        info("osImage"),
        info("kernelVersion"),
        info("containerRuntimeVersion"),
    ]
}

fn roles(node: &Value) -> String {
    let labels = node.pointer("/metadata/labels").and_then(Value::as_object).into_iter().flatten();
    let mut roles: Vec<&str> = labels
        .filter_map(|(key, value)| {
            let role = match key.strip_prefix("node-role.kubernetes.io/") {
                Some(role) => role,
                None if key == "kubernetes.io/role" => value.as_str()?,
                None => return None,
            };
            (!role.is_empty()).then_some(role)
        })
        .collect();
    roles.sort_unstable();
    roles.dedup();
    or(&roles.join(","), "<none>").to_owned()
}

const SERVICE: &[Column] = &[
    NAME,
    text("Type", "type determines how the Service is exposed."),
    text(
        "Cluster-IP",
        "clusterIP is the IP address of the service and is usually assigned randomly.",
    ),
    text(
        "External-IP",
        "IP addresses for which nodes in the cluster will also accept traffic for this service.",
    ),
    text("Port(s)", "The list of ports that are exposed by this service."),
    AGE,
    wide(
        "Selector",
        "Route service traffic to pods with label keys and values matching this selector.",
    ),
];

fn service(service: &Value, age: Value) -> Vec<Value> {
    let cluster_ip = list(service, "/spec/clusterIPs").first().and_then(Value::as_str);
    let cluster_ip = cluster_ip.unwrap_or_else(|| string(service, "/spec/clusterIP"));
    vec![
        string(service, "/metadata/name").into(),
        string(service, "/spec/type").into(),
        or(cluster_ip, "<none>").into(),
        external_ip(service).into(),
        ports(service).into(),
        age,
        labels(service, "/spec/selector").into(),
    ]
}

fn external_ip(service: &Value) -> String {
    let external: Vec<&str> =
        list(service, "/spec/externalIPs").iter().filter_map(Value::as_str).collect();
    match string(service, "/spec/type") {
        "LoadBalancer" => {
            let balancers = list(service, "/status/loadBalancer/ingress").iter();
            let all: BTreeSet<&str> = balancers
                .map(|b| or(string(b, "/ip"), string(b, "/hostname")))
                .filter(|text| !text.is_empty())
                .collect();
            let mut all: Vec<&str> = all.into_iter().collect();
            all.extend(external);
            or(&all.join(","), "<pending>").to_owned()
        }
        "ExternalName" => string(service, "/spec/externalName").to_owned(),
        _ => or(&external.join(","), "<none>").to_owned(),
    }
}

fn ports(service: &Value) -> String {
    let ports: Vec<String> = list(service, "/spec/ports")
        .iter()
        .map(|port| {
            let (number, protocol) = (integer(port, "/port"), or(string(port, "/protocol"), "TCP"));
            match integer(port, "/nodePort") {
                0 => format!("{number}/{protocol}"),
                node => format!("{number}:{node}/{protocol}"),
            }
        })
        .collect();
    or(&ports.join(","), "<none>").to_owned()
}

/// At most three entries, and how many more there are.
fn at_most_three(all: &[String], none: &str) -> String {
    match all {
        [] => none.to_owned(),
        [a, b, c, rest @ ..] if !rest.is_empty() => {
            format!("{a},{b},{c} + {} more...", rest.len())
        }
        few => few.join(","),
    }
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in list(object, "/subsets") {
        for address in list(subset, "/addresses") {
            let ip = string(address, "/ip");
            let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
            let ports = list(subset, "/ports");
            if ports.is_empty() {
                all.push(ip.to_owned());
            }
            all.extend(ports.iter().map(|port| format!("{host}:{}", integer(port, "/port"))));
        }
    }
    at_most_three(&all, "<none>")
}

fn endpoint_slice(slice: &Value, age: Value) -> Vec<Value> {
    let ports: Vec<String> = list(slice, "/ports")
        .iter()
        .map(|port| match port.get("port").and_then(Value::as_i64) {
            Some(number) => number.to_string(),
            None => or(string(port, "/name"), "*").to_owned(),
        })
        .collect();
    let endpoints = list(slice, "/endpoints").iter();
    let addresses: Vec<String> = endpoints
        .flat_map(|endpoint| list(endpoint, "/addresses"))
        .filter_map(|address| address.as_str().map(ToOwned::to_owned))
        .collect();
    vec![
        string(slice, "/metadata/name").into(),
        string(slice, "/addressType").into(),
        at_most_three(&ports, "<unset>").into(),
        at_most_three(&addresses, "<unset>").into(),
        age,
    ]
}

const EVENT: &[Column] = &[
    text("Last Seen", "Time when this Event was last observed"),
    text("Type", "Type of this event (Normal, Warning), new types could be added in the future"),
    text(
        "Reason",
        "This should be a short, machine understandable string that gives the reason for the transition into the object's current status.",
    ),
    text("Object", "The object that this event is about."),
    wide(
        "Subobject",
        "If referring to a piece of an object instead of an entire object, this string should contain a valid JSON/Go field access statement",
    ),
    wide(
        "Source",
        "The component reporting this event. Should be a short machine understandable string.",
    ),
    text("Message", "A human-readable description of the status of this operation."),
    wide("First Seen", "The time at which the event was first recorded."),
    wide("Count", "The number of times this event has occurred."),
    Column {
        name: "Name",
        kind: "string",
        format: "name",
        description: "Name must be unique within a namespace.",
        priority: 1,
    },
];

/// Events of both groups: `regarding`, `note` and `deprecated…` are the newer names.
fn event(event: &Value, now: Timestamp) -> Vec<Value> {
    let either = |a: &str, b: &str| or(string(event, a), string(event, b)).to_owned();
    let first_time =
        or(&either("/firstTimestamp", "/deprecatedFirstTimestamp"), string(event, "/eventTime"))
            .to_owned();
    let last_time =
        or(&either("/lastTimestamp", "/deprecatedLastTimestamp"), &first_time).to_owned();
    let count = integer(event, "/count").max(integer(event, "/deprecatedCount")).max(1);
    let (last_time, count) = match event.get("series") {
        Some(series) => (string(series, "/lastObservedTime").to_owned(), integer(series, "/count")),
        None => (last_time, count),
    };
    let object = either("/involvedObject/kind", "/regarding/kind").to_lowercase();
    let name = either("/involvedObject/name", "/regarding/name");
    let object = if name.is_empty() { object } else { format!("{object}/{name}") };
    let component = either("/source/component", "/deprecatedSource/component");
    let (component, host) = if component.is_empty() {
        let reporter = either("/reportingComponent", "/reportingController");
        (reporter, string(event, "/reportingInstance").to_owned())
    } else {
        (component, either("/source/host", "/deprecatedSource/host"))
    };
    let source = if host.is_empty() { component } else { format!("{component}, {host}") };
    vec![
        since(&last_time, now).into(),
        string(event, "/type").into(),
        string(event, "/reason").into(),
        object.into(),
        either("/involvedObject/fieldPath", "/regarding/fieldPath").into(),
        source.into(),
        either("/message", "/note").trim().into(),
        since(&first_time, now).into(),
        count.into(),
        string(event, "/metadata/name").into(),
    ]
}

const DEPLOYMENT: &[Column] = &[
    NAME,
    text("Ready", "Number of the pod with ready state"),
    number(
        "Up-to-date",
        "Total number of non-terminating pods targeted by this deployment that have the desired template spec.",
    ),
    number("Available", "Total number of available pods targeted by this deployment."),
    AGE,
    wide("Containers", "Names of each container in the template."),
    wide("Images", "Images referenced by each container in the template."),
    wide("Selector", "Label selector for pods."),
];

fn deployment(deployment: &Value, age: Value) -> Vec<Value> {
    let [names, images] = containers(deployment);
    let status = |field: &str| integer(deployment, &format!("/status/{field}"));
    vec![
        string(deployment, "/metadata/name").into(),
        format!("{}/{}", status("readyReplicas"), integer(deployment, "/spec/replicas")).into(),
        status("updatedReplicas").into(),
        status("availableReplicas").into(),
        age,
        names,
        images,
        selector(deployment).into(),
    ]
}

const REPLICA_SET: &[Column] = &[
    NAME,
    number("Desired", "Replicas is the number of desired pods."),
    number("Current", "Replicas is the most recently observed number of non-terminating pods."),
    number(
        "Ready",
        "The number of non-terminating pods targeted by this ReplicaSet with a Ready Condition.",
    ),
    AGE,
    wide("Containers", "Names of each container in the template."),
    wide("Images", "Images referenced by each container in the template."),
    wide("Selector", "Label selector for pods."),
];

fn replica_set(set: &Value, age: Value) -> Vec<Value> {
    let [names, images] = containers(set);
    vec![
        string(set, "/metadata/name").into(),
        integer(set, "/spec/replicas").into(),
        integer(set, "/status/replicas").into(),
        integer(set, "/status/readyReplicas").into(),
        age,
        names,
        images,
        selector(set).into(),
    ]
}

const SIGNING_REQUEST: &[Column] = &[
    NAME,
    AGE,
    text("SignerName", "signerName indicates the requested signer."),
    text("Requestor", "username contains the name of the user that created the request."),
    text(
        "RequestedDuration",
        "expirationSeconds is the requested duration of validity of the issued certificate.",
    ),
    text("Condition", "conditions applied to the request."),
];

fn signing_request(request: &Value, age: Value) -> Vec<Value> {
    let conditions = list(request, "/status/conditions");
    let has = |kind: &str| conditions.iter().any(|c| string(c, "/type") == kind);
    let mut status = if has("Denied") {
        "Denied"
    } else if has("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if has("Failed") {
        status.push_str(",Failed");
    }
    if !string(request, "/status/certificate").is_empty() {
        status.push_str(",Issued");
    }
    let duration = match request.pointer("/spec/expirationSeconds").and_then(Value::as_i64) {
        Some(seconds) => human_duration(seconds),
        None => "<none>".to_owned(),
    };
    vec![
        string(request, "/metadata/name").into(),
        age,
        string(request, "/spec/signerName").into(),
        string(request, "/spec/username").into(),
        duration.into(),
        status.into(),
    ]
}
