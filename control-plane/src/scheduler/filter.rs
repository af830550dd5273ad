//! Whether a pod can run on a node. Pure. Order and words are upstream's plug-ins'.

use std::fmt;

use serde_json::Value;

use super::{
    pod::{Pod, Toleration},
    snapshot::{Node, Taint},
};
use crate::controllers::json::{items, labels_at, requirement_matches, text};

/// Why a node is not for a pod. Displayed as upstream says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Unschedulable,
    NodeName,
    Taint { key: String, value: String },
    Affinity,
    Ports,
    Pods,
    Insufficient(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unschedulable => f.write_str("node(s) were unschedulable"),
            Self::NodeName => f.write_str("node(s) didn't match the requested node name"),
            Self::Taint { key, value } => {
                write!(f, "node(s) had untolerated taint {{{key}: {value}}}")
            }
            Self::Affinity => f.write_str("node(s) didn't match Pod's node affinity/selector"),
            Self::Ports => {
                f.write_str("node(s) didn't have free ports for the requested pod ports")
            }
            Self::Pods => f.write_str("Too many pods"),
            Self::Insufficient(resource) => write!(f, "Insufficient {resource}"),
        }
    }
}

/// Adds why the pod cannot run on the node; nothing when it can.
pub(super) fn filter(node: &Node, pod: &Pod, reasons: &mut Vec<(String, Reason)>) {
    let mut add = |reason| reasons.push((node.name.clone(), reason));
    if let Some(reason) = veto(node, pod) {
        return add(reason);
    }
    if node.pods >= node.allocatable.amount("pods") {
        add(Reason::Pods);
    }
    for (resource, amount) in &pod.requests.0 {
        let free = node.allocatable.amount(resource).saturating_sub(node.used.amount(resource));
        if *amount > 0 && *amount > free {
            add(Reason::Insufficient(resource.clone()));
        }
    }
}

fn veto(node: &Node, pod: &Pod) -> Option<Reason> {
    if node.unschedulable {
        let cordon = Taint {
            key: "node.kubernetes.io/unschedulable".to_owned(),
            value: String::new(),
            effect: "NoSchedule".to_owned(),
        };
        if !pod.tolerations.iter().any(|toleration| tolerated(toleration, &cordon)) {
            return Some(Reason::Unschedulable);
        }
    }
    if !pod.node.is_empty() && pod.node != node.name {
        return Some(Reason::NodeName);
    }
    let untolerated = node.taints.iter().find(|taint| {
        matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")
            && !pod.tolerations.iter().any(|toleration| tolerated(toleration, taint))
    });
    if let Some(taint) = untolerated {
        return Some(Reason::Taint { key: taint.key.clone(), value: taint.value.clone() });
    }
    let selected = pod.node_selector.iter().all(|(key, value)| node.labels.get(key) == Some(value));
    let wanted =
        pod.required.as_ref().is_none_or(|terms| terms.iter().any(|term| term_matches(term, node)));
    if !selected || !wanted {
        return Some(Reason::Affinity);
    }
    let taken =
        pod.host_ports.iter().any(|port| node.host_ports.iter().any(|used| used.conflicts(port)));
    taken.then_some(Reason::Ports)
}

/// Whether a node affinity term matches; one without any expression matches nothing.
pub(super) fn term_matches(term: &Value, node: &Node) -> bool {
    let (labels, fields) = (items(term, "/matchExpressions"), items(term, "/matchFields"));
    if labels.is_empty() && fields.is_empty() {
        return false;
    }
    labels.iter().all(|expression| requirement_matches(expression, &node.labels))
        && fields.iter().all(|expression| {
            text(expression, "/key") == "metadata.name" && {
                let name = serde_json::json!({"metadata.name": node.name});
                requirement_matches(expression, &labels_at(&name, ""))
            }
        })
}

/// Whether a toleration covers a taint (upstream `Toleration.ToleratesTaint`).
pub(super) fn tolerated(toleration: &Toleration, taint: &Taint) -> bool {
    (toleration.effect.is_empty() || toleration.effect == taint.effect)
        && (toleration.key.is_empty() || toleration.key == taint.key)
        && (toleration.exists || (!toleration.key.is_empty() && toleration.value == taint.value))
}

/// The same, of API values.
pub(crate) fn tolerates(toleration: &Value, taint: &Value) -> bool {
    tolerated(&Toleration::decode(toleration), &Taint::decode(taint))
}
