//! What happens to an object between decoding and storing. Pure: what has to be known of other objects is passed in.
//!
//! Order: namespace lifecycle, defaults, service account, priority, tolerations, node restriction, addresses and
//! ports of a Service (the caller holds a lock meanwhile), validation.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    api::{
        authn::User,
        authz::may_create,
        error::{self, About},
        prepare::{Part, text},
        route::Verb,
    },
    client::ApiError,
    schema::{FieldError, Served},
};

pub mod defaults;
mod pod_status;
mod priority;
mod runtime_class;
pub mod service;
mod service_account;
pub mod validate;
pub mod warnings;

pub use service::{Allocated, Family, Networks, Taken};

/// A write that is to be admitted.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    pub served: &'a Served,
    pub verb: Verb,
    pub part: Part,
    pub user: &'a User,
    pub old: Option<&'a Value>,
}

/// What admission looks at besides the object.
#[derive(Clone, Debug, Default)]
pub struct View<'a> {
    /// The object's namespace.
    pub namespace: Option<Arc<Value>>,
    /// A Pod's.
    pub service_account: Option<Arc<Value>>,
    /// The end of the name of a Pod's token volume.
    pub suffix: String,
    /// For a Service: what the ranges are, and what of them all others hold.
    pub services: Option<(Arc<Networks>, Taken<'a>)>,
}

/// Namespaces that cannot be deleted.
#[must_use]
pub fn is_immortal(namespace: &str) -> bool {
    matches!(namespace, "default" | "kube-system" | "kube-public")
}

/// Admits, completes and validates; the errors are all there are.
///
/// # Errors
/// 403 and 404 of plugins that refuse for another reason than the object's fields.
pub fn admit(
    attempt: &Attempt<'_>,
    view: &View<'_>,
    object: &mut Value,
) -> Result<Vec<FieldError>, ApiError> {
    namespace_lifecycle(attempt, view, object)?;
    if attempt.part != Part::Main {
        defaults::status(attempt.served, object);
        return Ok(validate::part(attempt, object));
    }
    defaults::apply(attempt.served, object);
    if attempt.served.plural == "pods" {
        match attempt.old {
            None => {
                service_account::assign(attempt, view, object)?;
                priority::resolve(attempt, object)?;
                runtime_class::named(attempt, object)?;
                pod_status::initial(object);
            }
            Some(old) => priority::keep(object, old),
        }
        // On updates too, as upstream: `kubectl apply` of a manifest with tolerations sends its own list.
        default_tolerations(object);
    }
    if attempt.verb == Verb::Create && !may_create(attempt.user, attempt.served.plural, object) {
        let name = text(object, "/metadata/name");
        let node = attempt.user.node().unwrap_or_default();
        let why =
            format!("node {node:?} is not allowed to create {} {name:?}", attempt.served.plural);
        return Err(about(attempt, object).forbidden(&why));
    }
    if let Some((networks, taken)) = &view.services {
        match service::complete(networks, taken, object, attempt.old) {
            Err(service::Refusal::Fields(errors)) => return Ok(errors),
            Err(service::Refusal::Internal(why)) => return Err(error::internal(why)),
            Ok(()) => {}
        }
    }
    let errors = validate::object(attempt, object);
    if errors.is_empty() && attempt.served.plural == "pods" && attempt.old.is_none() {
        runtime_class::overhead(attempt, object)?;
    }
    Ok(errors)
}

fn about<'a>(attempt: &Attempt<'a>, object: &'a Value) -> About<'a> {
    About {
        group: attempt.served.group,
        plural: attempt.served.plural,
        name: text(object, "/metadata/name"),
    }
}

fn namespace_lifecycle(
    attempt: &Attempt<'_>,
    view: &View<'_>,
    object: &Value,
) -> Result<(), ApiError> {
    if !attempt.served.namespaced || attempt.verb != Verb::Create {
        return Ok(());
    }
    let name = text(object, "/metadata/namespace");
    let Some(namespace) = &view.namespace else {
        return Err(About { group: "", plural: "namespaces", name }.not_found());
    };
    if text(namespace, "/metadata/deletionTimestamp").is_empty() {
        return Ok(());
    }
    let why =
        format!("unable to create new content in namespace {name} because it is being terminated");
    let mut error = about(attempt, object).forbidden(&why);
    error.details["causes"] = json!([{"reason": "NamespaceTerminating",
        "message": format!("namespace {name} is being terminated"), "field": "metadata.namespace"}]);
    Err(error)
}

/// `DefaultTolerationSeconds`: 300 s on nodes that are not ready or not reachable.
fn default_tolerations(pod: &mut Value) {
    let list = pod["spec"].get("tolerations").and_then(Value::as_array);
    let mut list = list.cloned().unwrap_or_default();
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = list.iter().any(|toleration| {
            let own = text(toleration, "/key");
            let effect = text(toleration, "/effect");
            (own == key || own.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !covered {
            list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": 300}));
        }
    }
    pod["spec"]["tolerations"] = Value::Array(list);
}
