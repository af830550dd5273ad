//! Deployments and ReplicaSets. Pure.

use serde_json::{Value, json};

use super::{
    immutable, labels, meta, non_negative,
    pod_spec::{self, Of},
    selector, selects,
};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

pub(super) fn deployment(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let (path, spec) = (Path::new("spec"), &object["spec"]);
    let mut errors = common(object, old);
    for field in ["minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"] {
        non_negative(&mut errors, &path.child(field), &spec[field]);
    }
    let least = spec["minReadySeconds"].as_i64().unwrap_or(0);
    if spec["progressDeadlineSeconds"].as_i64().is_some_and(|deadline| deadline <= least) {
        errors.push(FieldError::invalid(
            &path.child("progressDeadlineSeconds"),
            &spec["progressDeadlineSeconds"],
            "must be greater than minReadySeconds",
        ));
    }
    strategy(&mut errors, &path.child("strategy"), &spec["strategy"]);
    errors
}

fn strategy(errors: &mut Vec<FieldError>, path: &Path, strategy: &Value) {
    let rolling = &strategy["rollingUpdate"];
    match text(strategy, "/type") {
        "Recreate" if !rolling.is_null() => errors.push(FieldError::forbidden(
            &path.child("rollingUpdate"),
            "may not be specified when strategy `type` is 'Recreate'",
        )),
        "RollingUpdate" => {
            let path = path.child("rollingUpdate");
            let mut zero = 0;
            for field in ["maxUnavailable", "maxSurge"] {
                let value = &rolling[field];
                zero += usize::from(amount(errors, &path.child(field), value) == Some(0));
            }
            if zero == 2 {
                errors.push(FieldError::invalid(
                    &path.child("maxUnavailable"),
                    &rolling["maxUnavailable"],
                    "may not be 0 when `maxSurge` is 0",
                ));
            }
            let most = &rolling["maxUnavailable"];
            if percent(most).is_some_and(|percent| percent > 100) {
                let why = "must not be greater than 100%";
                errors.push(FieldError::invalid(&path.child("maxUnavailable"), most, why));
            }
        }
        "Recreate" => {}
        _ => {
            let given = json!({"Type": text(strategy, "/type"), "RollingUpdate": rolling});
            let types = ["Recreate", "RollingUpdate"];
            errors.push(FieldError::not_supported(path, &given, &types));
        }
    }
}

/// Digits and a sign behind them.
fn percent(value: &Value) -> Option<i64> {
    let digits = value.as_str()?.strip_suffix('%')?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// A number or a percentage.
fn amount(errors: &mut Vec<FieldError>, path: &Path, value: &Value) -> Option<i64> {
    match value {
        Value::String(_) => {
            let number = percent(value);
            if number.is_none() {
                errors.push(FieldError::invalid(
                    path,
                    value,
                    "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
                ));
            }
            number
        }
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::Array(_)
        | Value::Object(_)) => {
            non_negative(errors, path, other);
            other.as_i64()
        }
    }
}

pub(super) fn replica_set(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = common(object, old);
    let least = Path::new("spec.minReadySeconds");
    non_negative(&mut errors, &least, &object["spec"]["minReadySeconds"]);
    errors
}

fn common(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let (path, spec) = (Path::new("spec"), &object["spec"]);
    let mut errors = Vec::new();
    non_negative(&mut errors, &path.child("replicas"), &spec["replicas"]);
    let place = path.child("selector");
    match spec["selector"].as_object() {
        None => errors.push(FieldError::required(&place, "")),
        Some(fields) if fields.is_empty() => {
            let why = "empty selector is invalid for deployment";
            errors.push(FieldError::invalid(&place, &json!({}), why));
        }
        // It cannot be changed, and was taken by a server that asked less.
        Some(_) if old.is_some_and(|old| old["spec"]["selector"] == spec["selector"]) => {}
        Some(_) => {
            let before = errors.len();
            selector(&mut errors, &place, &spec["selector"]);
            if errors.len() > before {
                // Upstream looks no further then.
                let why = "invalid label selector";
                errors.push(FieldError::invalid(&place, &spec["selector"], why));
                return unchanged(errors, spec, old);
            }
        }
    }
    let template = &spec["template"];
    let place = path.child("template");
    let own = &template["metadata"]["labels"];
    // Without a selector nothing is selected.
    if !spec["selector"].is_object() || !selects(&spec["selector"], own) {
        errors.push(FieldError::invalid(
            &place.child("metadata").child("labels"),
            own,
            "`selector` does not match template `labels`",
        ));
    }
    if old.is_none_or(|old| old["spec"]["template"] != *template) {
        // Upstream names them without `metadata`.
        labels(&mut errors, &place.child("labels"), own);
        let (path, notes) = (place.child("annotations"), &template["metadata"]["annotations"]);
        meta::annotations(&mut errors, &path, notes);
        pod_spec::annotations(&mut errors, &path, notes, &template["spec"]);
        errors.extend(pod_spec::spec(Of::Template, &template["spec"], &place.child("spec")));
    }
    let restart = &template["spec"]["restartPolicy"];
    if restart.as_str().is_some_and(|policy| policy != "Always") {
        let place = place.child("spec").child("restartPolicy");
        errors.push(FieldError::not_supported(&place, restart, &["Always"]));
    }
    let deadline = &template["spec"]["activeDeadlineSeconds"];
    if !deadline.is_null() {
        let place = place.child("spec").child("activeDeadlineSeconds");
        let why = "activeDeadlineSeconds in ReplicaSet is not Supported";
        errors.push(FieldError::forbidden(&place, why));
    }
    unchanged(errors, spec, old)
}

/// With what an update may not change.
fn unchanged(mut errors: Vec<FieldError>, spec: &Value, old: Option<&Value>) -> Vec<FieldError> {
    if let Some(old) = old {
        let (path, before) = (Path::new("spec.selector"), &old["spec"]["selector"]);
        immutable(&mut errors, &path, &spec["selector"], before);
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};
    use crate::{admission::defaults, schema::resource};

    fn said(spec: Value) -> String {
        let mut object = json!({"spec": {"selector": {"matchLabels": {"a": "b"}}, "template":
            {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        for (field, value) in spec.as_object().unwrap() {
            object["spec"][field] = value.clone();
        }
        defaults::apply(resource("apps", "v1", "deployments").unwrap(), &mut object);
        let errors = deployment(&object, None);
        lines(&errors)
    }

    #[test]
    fn a_selector_that_was_taken_before_stops_no_update() {
        let spec = json!({"selector": {"matchLabels": {"a": "b"}, "matchExpressions": [
            {"key": "a", "operator": "NotIn", "values": ["a b"]}]}});
        assert!(said(spec.clone()).contains("invalid label selector"));
        let old = json!({"spec": spec});
        let mut new = old.clone();
        new["spec"]["replicas"] = json!(3);
        new["spec"]["template"] = json!({"metadata": {"labels": {"a": "b"}}});
        assert!(!lines(&common(&new, Some(&old))).contains("selector"));
    }

    #[test]
    fn how_many_may_be_missing() {
        let rolling = |least: Value, more: Value| json!({"strategy": {"rollingUpdate": {"maxUnavailable": least, "maxSurge": more}}});
        let at = "spec.strategy.rollingUpdate.maxUnavailable";
        let form = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
        let table = [
            (rolling(json!("100%"), json!("150%")), String::new()),
            (rolling(json!(150), json!(0)), String::new()),
            (
                rolling(json!("150%"), json!(0)),
                format!("{at}: Invalid value: \"150%\": must not be greater than 100%"),
            ),
            (
                rolling(json!("0%"), json!(0)),
                format!("{at}: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0"),
            ),
            (rolling(json!("-5%"), json!(1)), format!("{at}: Invalid value: \"-5%\": {form}")),
            (rolling(json!("+5%"), json!(1)), format!("{at}: Invalid value: \"+5%\": {form}")),
            (rolling(json!("%"), json!(1)), format!("{at}: Invalid value: \"%\": {form}")),
        ];
        for (spec, want) in table {
            assert_eq!(said(spec.clone()), want, "{spec}");
        }
    }

    #[test]
    fn labels_and_annotations_of_a_template() {
        let metadata = json!({"labels": {"a": "b", "c": "d e"}, "annotations": {"x y": "",
            "controller.kubernetes.io/pod-deletion-cost": "much"}});
        let spec = json!({"containers": [{"name": "c", "image": "i"}]});
        let said = said(json!({"template": {"metadata": metadata, "spec": spec}}));
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 3, "{said}");
        assert!(lines[0].starts_with("spec.template.labels: Invalid value: \"d e\": "), "{said}");
        assert!(
            lines[1].starts_with("spec.template.annotations: Invalid value: \"x y\": "),
            "{said}"
        );
    }

    #[test]
    fn either_strategy_may_stand_alone() {
        for kind in ["Recreate", "RollingUpdate"] {
            assert_eq!(said(json!({"strategy": {"type": kind}})), "");
        }
    }

    #[test]
    fn an_invalid_selector_is_all_that_is_said_of_the_template() {
        let selector = json!({"matchExpressions": [{"key": "a", "operator": "X"}]});
        assert_eq!(
            said(json!({"selector": selector, "template": {}})),
            "spec.selector.matchExpressions[0].operator: Invalid value: \"X\": not a valid selector operator\n\
             spec.selector: Invalid value: {\"matchExpressions\":[{\"key\":\"a\",\"operator\":\"X\"}]}: invalid label selector"
        );
        let unlabelled = json!({"spec": {"containers": [{"name": "c", "image": "i"}]}});
        assert_eq!(
            said(json!({"template": unlabelled, "strategy": {"type": "X"}})),
            "spec.template.metadata.labels: Invalid value: null: `selector` does not match template `labels`\n\
             spec.strategy: Unsupported value: {\"RollingUpdate\":null,\"Type\":\"X\"}: supported values: \"Recreate\", \"RollingUpdate\""
        );
    }

    #[test]
    fn a_template_has_no_deadline() {
        let spec = json!({"activeDeadlineSeconds": 5, "containers": [{"name": "c", "image": "i"}]});
        let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": spec});
        assert_eq!(
            said(json!({"template": template})),
            "spec.template.spec.activeDeadlineSeconds: Forbidden: activeDeadlineSeconds in ReplicaSet is not Supported"
        );
    }
}
