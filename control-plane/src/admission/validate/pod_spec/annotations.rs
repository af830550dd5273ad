//! Annotations that mean something of a pod. Pure.

use serde_json::Value;

use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Set by the kubelet on the objects of its static pods.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Which pods of a set go first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Upstream's `ValidatePodSpecificAnnotations`, without what annotations said of seccomp and AppArmor once.
pub(in crate::admission::validate) fn annotations(
    errors: &mut Vec<FieldError>,
    path: &Path,
    annotations: &Value,
    spec: &Value,
) {
    let mut refuse = |key: &str, why: &str| {
        errors.push(FieldError::invalid(&path.key(key), &annotations[key], why));
    };
    if annotations[MIRROR].is_string() && text(spec, "/nodeName").is_empty() {
        refuse(MIRROR, "must set spec.nodeName if mirror pod annotation is set");
    }
    if annotations[DELETION_COST].as_str().is_some_and(|cost| !is_number(cost)) {
        refuse(DELETION_COST, "must be a 32bit integer");
    }
}

/// As it is printed: without a plus sign and leading zeros.
fn is_number(text: &str) -> bool {
    text.parse::<i32>().is_ok_and(|number| text == "-0" || text == number.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::validate::lines;

    #[test]
    fn what_they_say_must_make_sense() {
        let cost = |value: &str| json!({DELETION_COST: value});
        let number = |value: &str| {
            format!(
                "a[controller.kubernetes.io/pod-deletion-cost]: Invalid value: \"{value}\": must be a 32bit integer"
            )
        };
        let table = [
            (json!({}), json!({}), String::new()),
            (cost("-5"), json!({}), String::new()),
            (cost("2147483648"), json!({}), number("2147483648")),
            (cost("+1"), json!({}), number("+1")),
            (cost("01"), json!({}), number("01")),
            (json!({MIRROR: "x"}), json!({"nodeName": "n"}), String::new()),
            (
                json!({MIRROR: "x"}),
                json!({}),
                "a[kubernetes.io/config.mirror]: Invalid value: \"x\": must set spec.nodeName if mirror pod annotation is set".to_owned(),
            ),
        ];
        for (map, spec, want) in table {
            let mut errors = Vec::new();
            annotations(&mut errors, &Path::new("a"), &map, &spec);
            assert_eq!(lines(&errors), want, "{map} {spec}");
        }
    }
}
