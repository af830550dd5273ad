//! The Priority plugin: a pod has the priority of its class. There are no objects of classes yet, so the names are
//! those of upstream's two own ones, and none. Pure.

use serde_json::{Value, json};

use super::{Attempt, about};
use crate::{api::prepare::text, client::ApiError};

/// The priority of pods without a class, where no class is the default (upstream's
/// `DefaultPriorityWhenNoDefaultClassExists`).
const DEFAULT: i64 = 0;
/// Upstream's `SystemPriorityClasses`: twice the highest that a user may define, and a thousand above.
const CLASSES: &[(&str, i64)] = &[
    ("", DEFAULT),
    ("system-cluster-critical", 2_000_000_000),
    ("system-node-critical", 2_000_001_000),
];
/// What all these classes, and pods without one, say of preemption.
const PREEMPTION: &str = "PreemptLowerPriority";

/// Sets a new pod's `priority` and `preemptionPolicy`.
///
/// # Errors
/// 403 for a class that does not exist, and for a pod that says another number or policy than its class.
pub(super) fn resolve(attempt: &Attempt<'_>, pod: &mut Value) -> Result<(), ApiError> {
    let class = text(pod, "/spec/priorityClassName");
    let spec = &pod["spec"];
    let found = CLASSES.iter().find(|(name, _)| *name == class);
    let (own, policy) = (spec["priority"].as_i64(), spec["preemptionPolicy"].as_str());
    let why = match found {
        None => format!("no PriorityClass with name {class} was found"),
        Some((_, priority)) if own.is_some_and(|own| own != *priority) => {
            let own = own.unwrap_or(DEFAULT);
            deviates(&format!("integer value of priority ({own})"), &priority.to_string())
        }
        Some(_) if policy.is_some_and(|policy| policy != PREEMPTION) => {
            let policy = policy.unwrap_or("");
            deviates(&format!("string value of PreemptionPolicy ({policy})"), PREEMPTION)
        }
        Some((_, priority)) => {
            pod["spec"]["priority"] = json!(priority);
            pod["spec"]["preemptionPolicy"] = json!(PREEMPTION);
            return Ok(());
        }
    };
    Err(about(attempt, pod).forbidden(&why))
}

fn deviates(what: &str, computed: &str) -> String {
    format!(
        "the {what} must not be provided in pod spec; priority admission controller computed {computed} from the given PriorityClass name"
    )
}

/// An update that does not speak of them leaves them: a manifest has neither.
pub(super) fn keep(pod: &mut Value, old: &Value) {
    let Some(spec) = pod["spec"].as_object_mut() else { return };
    for field in ["priority", "preemptionPolicy"] {
        if let Some(before) = old["spec"].get(field) {
            spec.entry(field).or_insert_with(|| before.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{authn::User, prepare::Part, route::Verb},
        schema,
    };

    /// What becomes of `priority` and `preemptionPolicy`, or what is said.
    fn resolved(spec: Value) -> Result<(i64, String), String> {
        let attempt = Attempt {
            served: schema::resource("", "v1", "pods").unwrap(),
            verb: Verb::Create,
            part: Part::Main,
            user: &User::default(),
            old: None,
        };
        let mut pod = json!({"metadata": {"name": "p"}, "spec": spec});
        match resolve(&attempt, &mut pod) {
            Ok(()) => {
                let policy = text(&pod, "/spec/preemptionPolicy").to_owned();
                Ok((pod["spec"]["priority"].as_i64().unwrap(), policy))
            }
            Err(error) => {
                assert_eq!((error.code, error.reason), (403, "Forbidden"));
                Err(error.message)
            }
        }
    }

    #[test]
    fn a_class_gives_the_number() {
        let gives = |priority: i64| Ok((priority, "PreemptLowerPriority".to_owned()));
        let refused = |why: &str| Err(format!("pods \"p\" is forbidden: {why}"));
        let computed = "must not be provided in pod spec; priority admission controller computed";
        let table = [
            (json!({}), gives(0)),
            (json!({"priorityClassName": ""}), gives(0)),
            (json!({"priorityClassName": "system-cluster-critical"}), gives(2_000_000_000)),
            (json!({"priorityClassName": "system-node-critical"}), gives(2_000_001_000)),
            (
                json!({"priorityClassName": "nope"}),
                refused("no PriorityClass with name nope was found"),
            ),
            (json!({"priority": 0, "preemptionPolicy": "PreemptLowerPriority"}), gives(0)),
            (
                json!({"priority": 5}),
                refused(&format!(
                    "the integer value of priority (5) {computed} 0 from the given PriorityClass name"
                )),
            ),
            (
                json!({"priorityClassName": "system-node-critical", "priority": 2_000_000_000_i64}),
                refused(&format!(
                    "the integer value of priority (2000000000) {computed} 2000001000 from the given PriorityClass name"
                )),
            ),
            (
                json!({"preemptionPolicy": "Never"}),
                refused(&format!(
                    "the string value of PreemptionPolicy (Never) {computed} PreemptLowerPriority from the given PriorityClass name"
                )),
            ),
        ];
        for (spec, want) in table {
            assert_eq!(resolved(spec.clone()), want, "{spec}");
        }
    }

    #[test]
    fn an_update_without_them_keeps_them() {
        let old = json!({"spec": {"priority": 7, "preemptionPolicy": "Never"}});
        let mut pod = json!({"spec": {}});
        keep(&mut pod, &old);
        assert_eq!(pod, old);
        let mut other = json!({"spec": {"priority": 8, "preemptionPolicy": "Never"}});
        keep(&mut other, &old);
        assert_eq!(other["spec"]["priority"], 8);
        let mut older = json!({"spec": {}});
        keep(&mut older, &json!({"spec": {}}));
        assert_eq!(older, json!({"spec": {}}));
    }
}
