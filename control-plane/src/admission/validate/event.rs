//! Events. Pure.
//!
//! Follows upstream's `ValidateEventCreate` and `ValidateEventUpdate`: one with an `eventTime` is checked as those of
//! `events.k8s.io` are, which come here in the form in which they are stored.

use api::names;
use serde_json::{Value, json};

use super::{immutable, invalid};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

/// Bytes of the fields that programs read, and of the text for people.
const WORD: usize = 128;
const NOTE: usize = 1024;

pub(super) fn event(group: &str, event: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let own = text(event, "/metadata/namespace");
    let about = text(event, "/involvedObject/namespace");
    let timed = !text(event, "/eventTime").is_empty();
    let fits = match (about.is_empty(), timed) {
        (true, true) => own == "default" || own == "kube-system",
        (true, false) => own == "default",
        (false, timed) => timed || own == about,
    };
    if !fits {
        let path = Path::new("involvedObject.namespace");
        let why = "does not match event.namespace";
        errors.push(FieldError::invalid(&path, &json!(about), why));
    }
    if timed {
        reporter(&mut errors, group, event);
    }
    if group == "events.k8s.io" {
        match old {
            None => strict(&mut errors, event),
            Some(old) => unchanged(&mut errors, event, old),
        }
    }
    errors
}

fn reporter(errors: &mut Vec<FieldError>, group: &str, event: &Value) {
    let field = if group.is_empty() { "reportingComponent" } else { "reportingController" };
    let (path, name) = (Path::new(field), text(event, "/reportingComponent"));
    if name.is_empty() {
        errors.push(FieldError::required(&path, ""));
    }
    invalid(errors, &path, &json!(name), names::qualified_name(name));
    let fields =
        [("reportingInstance", WORD), ("action", WORD), ("reason", WORD), ("message", NOTE)];
    for (field, most) in fields {
        let (path, word) = (Path::new(field), event[field].as_str().unwrap_or(""));
        if word.is_empty() && field != "message" {
            errors.push(FieldError::required(&path, ""));
        }
        if word.len() > most {
            let why = format!("can have at most {most} characters");
            errors.push(FieldError::invalid(&path, &json!(""), why));
        }
    }
}

/// A new one has none of what the older form had instead.
fn strict(errors: &mut Vec<FieldError>, event: &Value) {
    series(errors, event);
    if text(event, "/eventTime").is_empty() {
        errors.push(FieldError::required(&Path::new("eventTime"), ""));
    }
    let kind = text(event, "/type");
    if kind != "Normal" && kind != "Warning" {
        let why = format!("has invalid value: {kind}");
        errors.push(FieldError::invalid(&Path::new("type"), &json!(""), why));
    }
    let source = ["/source/component", "/source/host"];
    for (field, set) in [
        ("firstTimestamp", !text(event, "/firstTimestamp").is_empty()),
        ("lastTimestamp", !text(event, "/lastTimestamp").is_empty()),
        ("count", event["count"].as_i64().unwrap_or(0) != 0),
        ("source", source.iter().any(|part| !text(event, part).is_empty())),
    ] {
        if set {
            let path = Path::new(field);
            errors.push(FieldError::invalid(&path, &json!(""), "needs to be unset"));
        }
    }
}

fn series(errors: &mut Vec<FieldError>, event: &Value) {
    let series = &event["series"];
    if series.is_null() {
        return;
    }
    if series["count"].as_i64().unwrap_or(0) < 2 {
        let path = Path::new("series.count");
        errors.push(FieldError::invalid(&path, &json!(""), "should be at least 2"));
    }
    if text(series, "/lastObservedTime").is_empty() {
        errors.push(FieldError::required(&Path::new("series.lastObservedTime"), ""));
    }
}

/// Only the series goes on.
fn unchanged(errors: &mut Vec<FieldError>, event: &Value, old: &Value) {
    if event["series"] != old["series"] {
        series(errors, event);
    }
    for (field, shown) in [
        ("involvedObject", "involvedObject"),
        ("reason", "reason"),
        ("message", "message"),
        ("source", "source"),
        ("firstTimestamp", "firstTimestamp"),
        ("lastTimestamp", "lastTimestamp"),
        ("count", "count"),
        ("type", "type"),
        ("eventTime", "eventTime"),
        ("action", "action"),
        ("related", "related"),
        ("reportingComponent", "reportingController"),
        ("reportingInstance", "reportingInstance"),
    ] {
        if !(is_unset(&event[field]) && is_unset(&old[field])) {
            immutable(errors, &Path::new(shown), &event[field], &old[field]);
        }
    }
}

/// Whether a field is as one that is not there, to a client that has a zero for it.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is) => !is,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_unset),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};

    fn said(group: &str, change: Value) -> String {
        let mut object = json!({"metadata": {"namespace": "default"}, "type": "Normal",
            "involvedObject": {"namespace": "default"}, "reason": "R"});
        for (field, value) in change.as_object().unwrap() {
            object[field] = value.clone();
        }
        lines(&event(group, &object, None))
    }

    #[test]
    fn of_another_namespace() {
        let elsewhere = json!({"namespace": "other"});
        assert_eq!(
            said("", json!({"involvedObject": elsewhere})),
            "involvedObject.namespace: Invalid value: \"other\": does not match event.namespace"
        );
        assert_eq!(said("", json!({"involvedObject": {}})), "");
        let system = json!({"namespace": "kube-system"});
        assert_eq!(said("", json!({"involvedObject": {}, "metadata": system})).lines().count(), 1);
    }

    #[test]
    fn one_with_a_time_says_who_reports_what() {
        let time = "2026-01-01T00:00:00.000000Z";
        let said_of = said("", json!({"eventTime": time}));
        let lines: Vec<&str> = said_of.lines().collect();
        assert_eq!(lines[0], "reportingComponent: Required value");
        assert_eq!(
            lines[1],
            "reportingComponent: Invalid value: \"\": name part must be non-empty"
        );
        assert_eq!(lines[3..], ["reportingInstance: Required value", "action: Required value"]);
        let whole = json!({"eventTime": time, "reportingComponent": "a.b/c",
            "reportingInstance": "x", "action": "y"});
        assert_eq!(said("", whole.clone()), "");
        assert_eq!(said("events.k8s.io", whole.clone()), "");
        let mut long = whole;
        long["message"] = json!("x".repeat(1025));
        long["count"] = json!(1);
        assert_eq!(
            said("events.k8s.io", long),
            "message: Invalid value: \"\": can have at most 1024 characters\n\
             count: Invalid value: \"\": needs to be unset"
        );
        assert_eq!(
            said("events.k8s.io", json!({"series": {"count": 1}, "type": "X"})),
            "series.count: Invalid value: \"\": should be at least 2\n\
             series.lastObservedTime: Required value\n\
             eventTime: Required value\n\
             type: Invalid value: \"\": has invalid value: X"
        );
    }
}
