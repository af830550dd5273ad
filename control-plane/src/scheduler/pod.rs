//! What a pod asks of a node. Pure.

use std::collections::BTreeMap;

use api::quantity::Quantity;
use serde_json::Value;

use super::snapshot::{HostPort, Resources};
use crate::controllers::{
    json::{integer, items, labels_at, text},
    model::{Key, Labels},
};

/// What a container without a request counts for when nodes are compared, not when they are filled
/// (upstream `DefaultMilliCPURequest`, `DefaultMemoryRequest`).
const SCORED_MILLI_CPU: i64 = 100;
const SCORED_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// A toleration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Toleration {
    pub(crate) key: String,
    pub(crate) exists: bool,
    pub(crate) value: String,
    pub(crate) effect: String,
}

impl Toleration {
    pub(crate) fn decode(value: &Value) -> Self {
        Self {
            key: text(value, "/key").to_owned(),
            exists: text(value, "/operator") == "Exists",
            value: text(value, "/value").to_owned(),
            effect: text(value, "/effect").to_owned(),
        }
    }
}

/// A pod that is to be scheduled, or is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pod {
    pub(crate) key: Key,
    pub(crate) uid: String,
    pub(crate) requests: Resources,
    /// As `requests`, with defaults for containers that ask for nothing.
    pub(crate) scored: Resources,
    /// `spec.nodeName`, empty while unassigned.
    pub(crate) node: String,
    pub(crate) node_selector: Labels,
    /// `nodeSelectorTerms` of the required node affinity, of which one must match; `None`: no demand.
    pub(crate) required: Option<Vec<Value>>,
    /// Weight and term of the preferred node affinity.
    pub(crate) preferred: Vec<(i64, Value)>,
    pub(crate) tolerations: Vec<Toleration>,
    pub(crate) host_ports: Vec<HostPort>,
    /// Pods of one group are spread over nodes: those of one controller, else those with the same
    /// labels. Empty for a pod with neither.
    pub(crate) group: String,
    pub(crate) priority: i64,
    /// Whether it waits for `spec.schedulingGates`.
    pub(crate) gated: bool,
    /// The first field that asks for what is not implemented.
    pub(crate) unsupported: Option<String>,
}

impl Pod {
    pub(crate) fn decode(value: &Value) -> Self {
        let node_affinity = value.pointer("/spec/affinity/nodeAffinity").unwrap_or(&Value::Null);
        let required = node_affinity
            .pointer("/requiredDuringSchedulingIgnoredDuringExecution")
            .map(|required| items(required, "/nodeSelectorTerms").to_vec());
        let preferred = items(node_affinity, "/preferredDuringSchedulingIgnoredDuringExecution")
            .iter()
            .map(|term| (integer(term, "/weight").unwrap_or(0), term["preference"].clone()))
            .collect();
        Self {
            key: Key::new(text(value, "/metadata/namespace"), text(value, "/metadata/name")),
            uid: text(value, "/metadata/uid").to_owned(),
            requests: requests(value, &container_requests),
            scored: requests(value, &scored_requests),
            node: text(value, "/spec/nodeName").to_owned(),
            node_selector: labels_at(value, "/spec/nodeSelector"),
            required,
            preferred,
            tolerations: items(value, "/spec/tolerations").iter().map(Toleration::decode).collect(),
            host_ports: host_ports(value),
            group: group(value),
            priority: integer(value, "/spec/priority").unwrap_or(0),
            gated: !items(value, "/spec/schedulingGates").is_empty(),
            unsupported: unsupported(value),
        }
    }
}

/// Names the first scheduling field that would have to be ignored.
fn unsupported(pod: &Value) -> Option<String> {
    let lists = [
        "/spec/topologySpreadConstraints",
        "/spec/resourceClaims",
        "/spec/affinity/podAffinity/requiredDuringSchedulingIgnoredDuringExecution",
        "/spec/affinity/podAffinity/preferredDuringSchedulingIgnoredDuringExecution",
        "/spec/affinity/podAntiAffinity/requiredDuringSchedulingIgnoredDuringExecution",
        "/spec/affinity/podAntiAffinity/preferredDuringSchedulingIgnoredDuringExecution",
    ];
    if let Some(list) = lists.iter().find(|list| !items(pod, list).is_empty()) {
        return Some(list.trim_start_matches('/').replace('/', "."));
    }
    items(pod, "/spec/volumes").iter().enumerate().find_map(|(index, volume)| {
        ["persistentVolumeClaim", "ephemeral"]
            .iter()
            .find(|source| volume.get(source).is_some_and(|source| !source.is_null()))
            .map(|source| format!("spec.volumes[{index}].{source}"))
    })
}

fn group(pod: &Value) -> String {
    let owner = items(pod, "/metadata/ownerReferences")
        .iter()
        .find(|owner| owner["controller"] == true)
        .map(|owner| text(owner, "/uid").to_owned());
    owner.unwrap_or_else(|| {
        let labels = labels_at(pod, "/metadata/labels");
        if labels.is_empty() {
            return String::new();
        }
        let mut group = text(pod, "/metadata/namespace").to_owned();
        for (key, value) in &labels {
            group.extend(["\n", key, "=", value]);
        }
        group
    })
}

fn host_ports(pod: &Value) -> Vec<HostPort> {
    items(pod, "/spec/containers")
        .iter()
        .chain(items(pod, "/spec/initContainers"))
        .flat_map(|container| items(container, "/ports"))
        .filter_map(|port| {
            let number = integer(port, "/hostPort").filter(|number| *number > 0)?;
            let ip = match text(port, "/hostIP") {
                "" => "0.0.0.0",
                ip => ip,
            };
            let protocol = match text(port, "/protocol") {
                "" => "TCP",
                protocol => protocol,
            };
            Some(HostPort { ip: ip.to_owned(), protocol: protocol.to_owned(), port: number })
        })
        .collect()
}

/// The amounts of a `requests` or `allocatable` map; CPU in milli-cores, all else in whole units.
pub(crate) fn resources(value: Option<&Value>) -> Resources {
    let amounts = value
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(name, amount)| {
            let text = match amount {
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
            };
            // Admission has refused what is no quantity.
            let quantity: Quantity = text.parse().ok()?;
            let amount = if name == "cpu" { quantity.milli_value() } else { quantity.value() };
            Some((name.clone(), amount))
        })
        .collect::<BTreeMap<_, _>>();
    Resources(amounts)
}

fn container_requests(container: &Value) -> Resources {
    resources(container.pointer("/resources/requests"))
}

fn scored_requests(container: &Value) -> Resources {
    let mut requests = container_requests(container);
    requests.0.entry("cpu".to_owned()).or_insert(SCORED_MILLI_CPU);
    requests.0.entry("memory".to_owned()).or_insert(SCORED_MEMORY_BYTES);
    requests
}

/// The larger of what the init containers need one after the other and what the others need together;
/// sidecars (init containers that restart) run beside all that come after them. Upstream:
/// `resourcehelper.PodRequests`.
fn requests(pod: &Value, of: &dyn Fn(&Value) -> Resources) -> Resources {
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for container in items(pod, "/spec/initContainers") {
        let mut needed = of(container);
        if text(container, "/restartPolicy") == "Always" {
            sidecars.add(&needed);
            peak.raise(&sidecars);
        } else {
            needed.add(&sidecars);
            peak.raise(&needed);
        }
    }
    let mut together = sidecars;
    for container in items(pod, "/spec/containers") {
        together.add(&of(container));
    }
    together.raise(&peak);
    // Requests of the pod as a whole take the place of its containers'.
    let whole = resources(pod.pointer("/spec/resources/requests"));
    together.0.extend(whole.0);
    together.add(&resources(pod.pointer("/spec/overhead")));
    together
}
