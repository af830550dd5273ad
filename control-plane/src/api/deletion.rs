//! What becomes of an object that is to be deleted. Pure.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::{
    api::{
        error::{self, About},
        prepare::{has_finalizers, metadata, text},
    },
    client::ApiError,
    schema::{FieldError, Path, decode::print_time},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Background,
    Foreground,
    Orphan,
}

/// `meta/v1` `DeleteOptions`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Seconds; `None` is the object's own.
    pub grace: Option<i64>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    pub propagation: Option<Propagation>,
    pub dry_run: bool,
}

impl Options {
    /// From the body of a request, already decoded.
    ///
    /// # Errors
    /// 422 for another policy than the three, for both ways of saying one, and for another `dryRun` than `All`.
    pub fn read(body: &Value) -> Result<Self, ApiError> {
        let owned = |pointer: &str| body.pointer(pointer)?.as_str().map(str::to_owned);
        let path = Path::new("propagationPolicy");
        let refused = |error| error::invalid(("meta.k8s.io", "DeleteOptions"), "", &[error]);
        let policy = &body["propagationPolicy"];
        let propagation = match (policy.as_str(), body["orphanDependents"].as_bool()) {
            (Some(_), Some(_)) => {
                let why = "orphanDependents and deletionPropagation cannot be both set";
                return Err(refused(FieldError::invalid(&path, policy, why)));
            }
            (Some("Background"), None) | (None, Some(false)) => Some(Propagation::Background),
            (Some("Foreground"), None) => Some(Propagation::Foreground),
            (Some("Orphan"), None) | (None, Some(true)) => Some(Propagation::Orphan),
            (Some(_), None) => {
                let supported = ["Foreground", "Background", "Orphan", "nil"];
                return Err(refused(FieldError::not_supported(&path, policy, &supported)));
            }
            (None, None) => None,
        };
        let words = body.get("dryRun").and_then(Value::as_array);
        if let Some(words) = words.filter(|words| words.iter().any(|word| word != "All")) {
            let path = Path::new("dryRun");
            let shown = Value::Array(words.clone());
            return Err(refused(FieldError::not_supported(&path, &shown, &["All"])));
        }
        Ok(Self {
            grace: body.get("gracePeriodSeconds").and_then(Value::as_i64),
            uid: owned("/preconditions/uid"),
            resource_version: owned("/preconditions/resourceVersion"),
            propagation,
            dry_run: words.is_some_and(|words| !words.is_empty()),
        })
    }

    /// # Errors
    /// 409 when the object is not the one meant.
    pub fn check(&self, about: About<'_>, object: &Value) -> Result<(), ApiError> {
        let stored = text(object, "/metadata/uid");
        if let Some(uid) = self.uid.as_deref().filter(|uid| *uid != stored) {
            return Err(about.conflict(&format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {stored}"
            )));
        }
        let stored = text(object, "/metadata/resourceVersion");
        if let Some(asked) = self.resource_version.as_deref().filter(|rv| *rv != stored) {
            return Err(about.conflict(&format!(
                "Precondition failed: ResourceVersion in precondition: {asked}, ResourceVersion in object meta: {stored}"
            )));
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Deletion {
    Remove,
    /// Store this: somebody has to act first.
    Mark(Value),
    /// It is being deleted already, and not sooner by this request.
    Unchanged,
}

/// Decides about one object.
#[must_use]
pub fn decide(object: &Value, options: &Options, now: Timestamp) -> Deletion {
    let mut marked = object.clone();
    propagate(&mut marked, options.propagation);
    let grace = grace(object, options);
    let waits = has_finalizers(&marked);
    if grace == 0 && !waits {
        return Deletion::Remove;
    }
    let before = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    let since = text(object, "/metadata/deletionTimestamp").parse::<Timestamp>().ok();
    let end = match (since, before) {
        (Some(end), before) => {
            let before = before.unwrap_or(0);
            if options.grace.is_none_or(|_| grace >= before) {
                return if marked == *object {
                    Deletion::Unchanged
                } else {
                    Deletion::Mark(marked)
                };
            }
            // The period began when it was first asked for.
            shift(end, grace - before)
        }
        (None, _) => shift(now, grace),
    };
    let generation = object.pointer("/metadata/generation").and_then(Value::as_i64);
    let fields = metadata(&mut marked);
    fields.insert("deletionTimestamp".into(), json!(print_time(end, false)));
    fields.insert("deletionGracePeriodSeconds".into(), json!(grace));
    if let Some(generation) = generation.filter(|_| since.is_none()) {
        fields.insert("generation".into(), json!(generation + 1));
    }
    if object["kind"] == "Namespace" {
        marked["status"]["phase"] = json!("Terminating");
    }
    Deletion::Mark(marked)
}

/// Whether an update was the last thing that a deletion waited for.
#[must_use]
pub fn is_finished(object: &Value) -> bool {
    let metadata = &object["metadata"];
    metadata.get("deletionTimestamp").is_some()
        && !has_finalizers(object)
        && metadata.get("deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0) == 0
}

/// Seconds. Only Pods wait: for their node, unless they have none or have ended.
fn grace(object: &Value, options: &Options) -> i64 {
    let ended = matches!(text(object, "/status/phase"), "Succeeded" | "Failed");
    if object["kind"] != "Pod" || text(object, "/spec/nodeName").is_empty() || ended {
        return 0;
    }
    let own = object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64);
    match options.grace.or(own).unwrap_or(30) {
        grace if grace < 0 => 1,
        grace => grace,
    }
}

fn shift(at: Timestamp, seconds: i64) -> Timestamp {
    at.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(at)
}

fn propagate(object: &mut Value, propagation: Option<Propagation>) {
    const ORPHAN: &str = "orphan";
    const FOREGROUND: &str = "foregroundDeletion";
    let Some(propagation) = propagation else { return };
    let fields = metadata(object);
    let list = fields.get("finalizers").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut list: Vec<Value> =
        list.into_iter().filter(|name| *name != ORPHAN && *name != FOREGROUND).collect();
    match propagation {
        Propagation::Background => {}
        Propagation::Foreground => list.push(json!(FOREGROUND)),
        Propagation::Orphan => list.push(json!(ORPHAN)),
    }
    if list.is_empty() {
        fields.remove("finalizers");
    } else {
        fields.insert("finalizers".into(), Value::Array(list));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-01-01T00:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn pod(node: &str) -> Value {
        json!({"kind": "Pod", "metadata": {"name": "p"},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 30}})
    }

    #[test]
    fn a_pod_waits_for_its_node() {
        assert_eq!(decide(&pod(""), &Options::default(), now()), Deletion::Remove);
        let Deletion::Mark(marked) = decide(&pod("n"), &Options::default(), now()) else {
            panic!("removed at once")
        };
        assert_eq!(marked["metadata"]["deletionTimestamp"], "2026-01-01T00:00:30Z");
        assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
        assert!(!is_finished(&marked));
        assert_eq!(decide(&marked, &Options::default(), now()), Deletion::Unchanged);
        let sooner = Options { grace: Some(5), ..Options::default() };
        let Deletion::Mark(sooner) = decide(&marked, &sooner, now()) else { panic!("no change") };
        assert_eq!(sooner["metadata"]["deletionTimestamp"], "2026-01-01T00:00:05Z");
        let force = Options { grace: Some(0), ..Options::default() };
        assert_eq!(decide(&marked, &force, now()), Deletion::Remove);
    }

    #[test]
    fn finalizers_and_foreground_keep_an_object() {
        let plain = json!({"kind": "ConfigMap", "metadata": {"name": "c"}});
        assert_eq!(decide(&plain, &Options::default(), now()), Deletion::Remove);
        let foreground =
            Options { propagation: Some(Propagation::Foreground), ..Options::default() };
        let Deletion::Mark(marked) = decide(&plain, &foreground, now()) else { panic!("removed") };
        assert_eq!(marked["metadata"]["finalizers"], json!(["foregroundDeletion"]));
        assert_eq!(marked["metadata"]["deletionTimestamp"], NOW);
        let background =
            Options { propagation: Some(Propagation::Background), ..Options::default() };
        assert_eq!(decide(&marked, &background, now()), Deletion::Remove);
    }

    #[test]
    fn a_policy_is_one_of_three_and_said_in_one_way() {
        let read = |body: Value| Options::read(&body).map(|options| options.propagation);
        let orphan = Some(Propagation::Orphan);
        assert_eq!(read(json!({})).unwrap(), None);
        assert_eq!(read(json!({"propagationPolicy": "Orphan"})).unwrap(), orphan);
        assert_eq!(read(json!({"orphanDependents": true})).unwrap(), orphan);
        for (body, said) in [
            (
                json!({"propagationPolicy": "Foo"}),
                r#"Unsupported value: "Foo": supported values: "Foreground", "Background", "Orphan", "nil""#,
            ),
            (
                json!({"propagationPolicy": "Orphan", "orphanDependents": true}),
                r#"Invalid value: "Orphan": orphanDependents and deletionPropagation cannot be both set"#,
            ),
        ] {
            let refused = read(body).unwrap_err();
            let start = r#"DeleteOptions.meta.k8s.io "" is invalid: propagationPolicy: "#;
            assert_eq!((refused.code, refused.message), (422, format!("{start}{said}")));
        }
    }

    #[test]
    fn a_namespace_ends_in_two_steps() {
        let namespace = json!({"kind": "Namespace", "metadata": {"name": "n"},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
        let Deletion::Mark(mut marked) = decide(&namespace, &Options::default(), now()) else {
            panic!("removed at once")
        };
        assert_eq!(marked["status"]["phase"], "Terminating");
        assert!(!is_finished(&marked));
        marked["spec"]["finalizers"] = json!([]);
        assert!(is_finished(&marked));
    }
}
