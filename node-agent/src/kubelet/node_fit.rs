//! Whether a pod belongs on a node by its labels and taints: for pods that no scheduler has placed. Pure.
//!
//! As upstream's kubelet, only `NoExecute` taints count here; the others are the scheduler's business.

use std::collections::BTreeMap;

use api::selector::Operator;
use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration,
};

use super::admit::Rejection;

/// Why the pod is turned away; the words are upstream's.
#[must_use]
pub fn belongs(pod: &PodSpec, node: &Node) -> Option<Rejection> {
    if !is_selected(pod, node) {
        return Some(failed("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"));
    }
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let tolerations = || pod.tolerations.iter().flatten();
    let mut evicting = taints.filter(|taint| taint.effect == "NoExecute");
    evicting
        .any(|taint| !tolerations().any(|toleration| tolerates(toleration, taint)))
        .then(|| failed("TaintToleration", "node(s) had taints that the pod didn't tolerate"))
}

fn failed(predicate: &'static str, why: &str) -> Rejection {
    let message = format!("Pod was rejected: Predicate {predicate} failed: {why}");
    Rejection { reason: predicate, message }
}

fn is_selected(pod: &PodSpec, node: &Node) -> bool {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let mut selector = pod.node_selector.iter().flatten();
    let affinity = pod.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required =
        affinity.and_then(|node| node.required_during_scheduling_ignored_during_execution.as_ref());
    let name = node.metadata.name.as_deref();
    selector.all(|(key, value)| labels.get(key) == Some(value))
        && required.is_none_or(|required| {
            required.node_selector_terms.iter().any(|term| matches(term, labels, name))
        })
}

/// One without any expression matches nothing.
fn matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, name: Option<&str>) -> bool {
    let by_label = term.match_expressions.as_deref().unwrap_or_default();
    let by_field = term.match_fields.as_deref().unwrap_or_default();
    !(by_label.is_empty() && by_field.is_empty())
        && by_label.iter().all(|one| holds(one, labels.get(&one.key).map(String::as_str)))
        && by_field.iter().all(|one| one.key == "metadata.name" && holds(one, name))
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.iter().flatten();
    Operator::named(&requirement.operator).is_some_and(|operator| operator.holds(value, values))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    let exists = toleration.operator.as_deref() == Some("Exists");
    (effect.is_empty() || effect == taint.effect)
        && (key.is_empty() || key == taint.key)
        && (exists || (!key.is_empty() && text(&toleration.value) == text(&taint.value)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn reason(pod: Value, taints: &Value) -> Option<Rejection> {
        let node = json!({"metadata": {"name": "n", "labels": {"zone": "a", "cores": "4"}},
            "spec": {"taints": taints}});
        let mut spec = json!({"containers": []});
        spec.as_object_mut().unwrap().extend(pod.as_object().unwrap().clone());
        belongs(&serde_json::from_value(spec).unwrap(), &serde_json::from_value(node).unwrap())
    }

    #[test]
    fn a_pod_for_other_nodes_is_rejected_in_upstreams_words() {
        let rejection = reason(json!({"nodeSelector": {"zone": "b"}}), &json!([])).unwrap();
        assert_eq!(
            (rejection.reason, &*rejection.message),
            (
                "NodeAffinity",
                "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node \
                 affinity/selector"
            )
        );
        assert_eq!(reason(json!({"nodeSelector": {"zone": "a"}}), &json!([])), None);
        let table = [
            (
                json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}),
                false,
            ),
            (
                json!({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["a"]}]}),
                true,
            ),
            (json!({"matchExpressions": [{"key": "x", "operator": "Exists"}]}), false),
            (json!({"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}), true),
            (
                json!({"matchExpressions": [{"key": "cores", "operator": "Gt", "values": ["3"]}]}),
                true,
            ),
            (
                json!({"matchExpressions": [{"key": "cores", "operator": "Lt", "values": ["4"]}]}),
                false,
            ),
            (
                json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}),
                true,
            ),
            (
                json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["m"]}]}),
                false,
            ),
            (json!({}), false),
        ];
        for (term, good) in table {
            let required = json!({"nodeSelectorTerms": [term]});
            let pod = json!({"affinity": {"nodeAffinity":
                {"requiredDuringSchedulingIgnoredDuringExecution": required}}});
            assert_eq!(reason(pod, &json!([])).is_none(), good, "{term}");
        }
    }

    #[test]
    fn only_taints_that_evict_turn_a_placed_pod_away() {
        let taint = |effect| json!([{"key": "k", "value": "v", "effect": effect}]);
        assert_eq!(reason(json!({}), &taint("NoSchedule")), None);
        let rejection = reason(json!({}), &taint("NoExecute")).unwrap();
        assert_eq!(rejection.reason, "TaintToleration");
        assert!(rejection.message.ends_with("node(s) had taints that the pod didn't tolerate"));
        let table = [
            (json!({"operator": "Exists"}), true),
            (json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}), true),
            (json!({"key": "k", "value": "v"}), true),
            (json!({"key": "k", "value": "w"}), false),
            (json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"}), false),
        ];
        for (toleration, good) in table {
            let pod = json!({"tolerations": [toleration]});
            assert_eq!(reason(pod, &taint("NoExecute")).is_none(), good, "{toleration}");
        }
    }
}
