//! Server-side apply, and the record of who wrote which field.

use serde_json::{Value, json};

use crate::{
    api::{
        core::{Api, Call, Track, Written},
        error, event_form,
        patch::apply::{self, ApplyError, Force, Writer},
        prepare::{self, Part, text},
    },
    client::ApiError,
    schema::{FieldError, Path, Served, decode},
};

/// Part of a resource, as `managedFields` name it.
fn subresource(part: Part) -> &'static str {
    match part {
        Part::Main => "",
        Part::Status => "status",
        Part::Approval => "approval",
        Part::Finalize => "finalize",
        Part::Binding => "binding",
    }
}

/// The top-level fields that a write to this part does not touch, whatever its body says of them.
fn ignored(served: &Served, part: Part) -> &'static [&'static str] {
    match part {
        Part::Main if served.subresource("status").is_some() => &["status"],
        Part::Main | Part::Binding => &[],
        Part::Status | Part::Approval => &["spec"],
        Part::Finalize => &["status"],
    }
}

/// Records an ordinary write: `new` is what the writer sent, with defaults, before admission and allocation add to
/// it what he does not answer for. A writer that gives no name is recorded only where somebody else is, by its
/// `User-Agent`, so that objects that only controllers write stay small. A binding is nobody's, as upstream.
#[must_use]
pub fn record(call: &Call, part: Part, old: Option<&Value>, new: Value) -> Value {
    let recorded = old.unwrap_or(&new).pointer("/metadata/managedFields").is_some();
    let manager = call.options.field_manager.as_str();
    let traced = part != Part::Binding && (recorded || !manager.is_empty());
    let Some(kind) = call.served.kind().filter(|_| traced) else {
        return new;
    };
    let api_version = call.served.api_version();
    let time = decode::print_time(jiff::Timestamp::now(), false);
    let writer = Writer {
        manager: match (manager, call.options.agent.as_str()) {
            ("", "") => "unknown",
            ("", agent) => agent,
            (manager, _) => manager,
        },
        api_version: &api_version,
        subresource: subresource(part),
        time: &time,
    };
    apply::update(kind.body, (old, new), writer, ignored(call.served, part))
}

/// Whether a write changes nothing, but for the times at which fields are said to have been written.
#[must_use]
pub fn is_idle(new: &Value, old: &Value) -> bool {
    let timeless = |entries: &Value| {
        let mut entries = entries.clone();
        for entry in entries.as_array_mut().into_iter().flatten() {
            entry.as_object_mut().map(|entry| entry.remove("time"));
        }
        entries
    };
    let metadata = |new: &Value, old: &Value| {
        alike(new, old, "managedFields", |new, old| timeless(new) == timeless(old))
    };
    alike(new, old, "metadata", metadata)
}

/// Whether two objects have the same fields, one of which is compared in a way of its own.
fn alike(new: &Value, old: &Value, special: &str, same: impl Fn(&Value, &Value) -> bool) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else {
        return new == old;
    };
    new.len() == old.len()
        && new.iter().zip(old).all(|((key, new), (other, old))| {
            key == other && if key == special { same(new, old) } else { new == old }
        })
}

impl Api {
    /// Server-side apply: creates the object, or merges the configuration into it.
    ///
    /// # Errors
    /// 409 for fields of other managers, 400 and 422 for a configuration that does not fit.
    pub async fn apply(
        &self,
        call: &Call,
        part: Part,
        config: &Value,
    ) -> Result<Written, ApiError> {
        if call.options.field_manager.is_empty() {
            let error =
                FieldError::required(&Path::new("fieldManager"), "is required for apply patch");
            return Err(error::invalid(("meta.k8s.io", "PatchOptions"), "", &[error]));
        }
        let change = |live: Option<&Value>| applied(call, part, live, config);
        for _ in 0..2 {
            let updated =
                self.update_as(call, part, Track::Given, &|live| change(Some(live))).await;
            match updated {
                Err(failure) if failure.code == 404 && part == Part::Main => {}
                outcome => return outcome,
            }
            let object = change(None)?;
            prepare::named(call.about(), &object)?;
            match self.create_as(call, Track::Given, object).await {
                Err(failure) if failure.reason == "AlreadyExists" => {}
                outcome => return outcome,
            }
        }
        Err(call.about().modified())
    }
}

fn applied(
    call: &Call,
    part: Part,
    live: Option<&Value>,
    config: &Value,
) -> Result<Value, ApiError> {
    let kind = super::verbs::kind_of(call.served)?;
    let api_version = call.served.api_version();
    let given = (text(config, "/apiVersion"), text(config, "/kind"));
    if given != (api_version.as_str(), call.served.kind) {
        let given = apply::go_kind(config);
        return Err(error::bad_request(format!("invalid object type: {given}")));
    }
    // Unknown fields are told below, in server-side apply's own words.
    let checked = decode::value(&kind, config.clone(), decode::Strictness::Ignore);
    checked.map_err(|why| error::bad_request(why.message(&kind)))?;
    let shown = live.map(|live| event_form::outward(call.served, live.clone()));
    let time = decode::print_time(jiff::Timestamp::now(), false);
    let writer = Writer {
        manager: &call.options.field_manager,
        api_version: &api_version,
        subresource: subresource(part),
        time: &time,
    };
    let force = if call.options.force == Some(true) { Force::Yes } else { Force::No };
    let ignored = ignored(call.served, part);
    let object = apply::apply(kind.body, shown.as_ref(), config, writer, (force, ignored))
        .map_err(|failure| refused(&failure))?;
    let decoded = decode::value(&kind, object, decode::Strictness::Ignore);
    let (object, _) = decoded.map_err(|why| error::bad_request(why.message(&kind)))?;
    Ok(event_form::inward(call.served, object))
}

fn refused(failure: &ApplyError) -> ApiError {
    match failure {
        ApplyError::Malformed(text) => error::bad_request(text.clone()),
        ApplyError::Conflicts(_) => ApiError {
            code: 409,
            reason: "Conflict",
            message: failure.to_string(),
            details: json!({"causes": failure.causes()}),
        },
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        admission::Networks,
        api::{
            attributes,
            authn::{MASTERS, User},
            bootstrap::bootstrap,
            local::Local,
            query::WriteOptions,
        },
        client::{Client as _, ObjectRef, Resource, Write},
        schema,
        store::{Options, embedded::Embedded},
    };

    pub(in crate::api) async fn api() -> (tempfile::TempDir, Arc<Api>) {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { class: attributes::class, attributes: attributes::attributes };
        let store = Embedded::open(&dir.path().join("state.db"), options).unwrap();
        let networks = Networks::new(vec!["10.96.0.0/16".parse().unwrap()]);
        let api = Arc::new(Api::new(Arc::new(store), networks, None));
        bootstrap(&api, "127.0.0.1".parse().unwrap(), 6443).await.unwrap();
        (dir, api)
    }

    /// By the manager `me`, of the ConfigMap `c`.
    fn call() -> Call {
        Call {
            served: schema::resource("", "v1", "configmaps").unwrap(),
            namespace: "default".to_owned(),
            name: "c".to_owned(),
            user: Arc::new(User::new("admin", &[MASTERS])),
            options: WriteOptions { field_manager: "me".to_owned(), ..WriteOptions::default() },
        }
    }

    fn config_map(name: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name},
            "data": {"b": "1"}})
    }

    #[tokio::test]
    async fn a_configuration_of_something_else_is_refused() {
        let (_dir, api) = api().await;
        let wrong = [
            (config_map("d"), "the name of the object (d) does not match the name on the URL (c)"),
            (
                json!({"apiVersion": "v1", "kind": "ConfigMap"}),
                "the name of the object (c based on URL) was undeterminable: name must be provided",
            ),
            (json!({"metadata": {"name": "c"}}), "invalid object type: /, Kind="),
            (
                json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "c"}}),
                "invalid object type: /v1, Kind=Secret",
            ),
        ];
        for (config, said) in &wrong {
            let refused = api.apply(&call(), Part::Main, config).await.unwrap_err();
            assert_eq!((refused.code, refused.message.as_str()), (400, *said));
        }
        api.apply(&call(), Part::Main, &config_map("c")).await.unwrap();
        // Once it is there the name may be left out.
        api.apply(&call(), Part::Main, &wrong[1].0).await.unwrap();
        let refused = api.apply(&call(), Part::Main, &wrong[0].0).await.unwrap_err();
        assert_eq!((refused.code, refused.message.as_str()), (400, wrong[0].1));
    }

    #[tokio::test]
    async fn what_writes_in_process_is_known_by_its_name() {
        let (_dir, api) = api().await;
        api.apply(&call(), Part::Main, &config_map("c")).await.unwrap();
        let local = Local::new(Arc::clone(&api), "kube-scheduler");
        let resource = Resource { group: "", version: "v1", plural: "configmaps" };
        let object = ObjectRef { resource, namespace: "default".into(), name: "c".into() };
        let patch = json!({"data": {"a": "1"}});
        let written = local.write(Write::Patch { object, subresource: "", patch }).await.unwrap();
        let managers: Vec<&str> = written["metadata"]["managedFields"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| text(entry, "/manager"))
            .collect();
        assert_eq!(managers, ["me", "kube-scheduler"]);
    }

    #[test]
    fn only_the_times_of_the_record_are_idle() {
        let old = json!({"metadata": {"name": "a", "managedFields": [{"manager": "m", "time": "1"}]},
            "spec": {"a": 1}});
        let changed = |pointer: &str, value: Value| {
            let mut new = old.clone();
            *new.pointer_mut(pointer).unwrap() = value;
            new
        };
        assert!(is_idle(&changed("/metadata/managedFields/0/time", json!("2")), &old));
        for (pointer, value) in [
            ("/metadata/managedFields/0/manager", json!("n")),
            ("/metadata/managedFields", json!([])),
            ("/metadata/name", json!("b")),
            ("/spec", json!({"a": 2})),
            ("", json!({"metadata": {"name": "a"}})),
        ] {
            assert!(!is_idle(&changed(pointer, value), &old), "{pointer}");
        }
    }
}
