//! The status that a new Pod begins with. Pure.

use std::collections::BTreeMap;

use api::quantity::Quantity;
use serde_json::{Value, json};

/// `Pending`, with the QoS class that its requests and limits give.
pub(super) fn initial(pod: &mut Value) {
    pod["status"] = json!({"phase": "Pending", "qosClass": qos(pod)});
}

type Amounts = BTreeMap<String, Quantity>;

/// Upstream's `ComputePodQOS`: cpu and memory of containers and init containers.
fn qos(pod: &Value) -> &'static str {
    let (mut requests, mut limits) = (Amounts::new(), Amounts::new());
    let mut guaranteed = true;
    let containers = ["containers", "initContainers"]
        .into_iter()
        .flat_map(|list| pod["spec"][list].as_array().into_iter().flatten());
    for container in containers {
        let resources = &container["resources"];
        add(&mut requests, &resources["requests"]);
        let limited = add(&mut limits, &resources["limits"]);
        guaranteed &= limited == 2;
    }
    if requests.is_empty() && limits.is_empty() {
        return "BestEffort";
    }
    let equal = requests.len() == limits.len()
        && requests.iter().all(|(name, amount)| {
            limits.get(name).is_some_and(|limit| limit.minus(*amount).is_zero())
        });
    if guaranteed && equal { "Guaranteed" } else { "Burstable" }
}

/// Adds what is more than zero; returns how many of cpu and memory that were.
fn add(sum: &mut Amounts, list: &Value) -> usize {
    let mut found = 0;
    for name in ["cpu", "memory"] {
        let amount = list[name].as_str().and_then(|text| text.parse::<Quantity>().ok());
        if let Some(amount) = amount.filter(|amount| amount.sign() > 0) {
            let entry = sum.entry(name.to_owned()).or_default();
            *entry = entry.plus(amount);
            found += 1;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        let pod = |resources: Value| json!({"spec": {"containers": [{"resources": resources}]}});
        let both = json!({"cpu": "100m", "memory": "1Mi"});
        let table = [
            (json!({}), "BestEffort"),
            (json!({"requests": {"cpu": "0.1"}}), "Burstable"),
            (json!({"requests": both, "limits": {"cpu": "0.1", "memory": "1024Ki"}}), "Guaranteed"),
            (json!({"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}), "Burstable"),
        ];
        for (resources, want) in table {
            assert_eq!(qos(&pod(resources.clone())), want, "{resources}");
        }
    }
}
