//! The RuntimeClass plugin. There are no objects of classes, so a pod can neither name one nor have what only a class
//! gives. Pure.

use serde_json::Value;

use super::{Attempt, about};
use crate::client::ApiError;

/// # Errors
/// 403 for a pod that names a class.
pub(super) fn named(attempt: &Attempt<'_>, pod: &Value) -> Result<(), ApiError> {
    let Some(class) = pod["spec"]["runtimeClassName"].as_str() else { return Ok(()) };
    let why = format!("pod rejected: RuntimeClass {class:?} not found");
    Err(about(attempt, pod).forbidden(&why))
}

/// Upstream asks this of a pod that is valid otherwise.
///
/// # Errors
/// 403 for a pod with overhead.
pub(super) fn overhead(attempt: &Attempt<'_>, pod: &Value) -> Result<(), ApiError> {
    if pod["spec"]["overhead"].as_object().is_none_or(serde_json::Map::is_empty) {
        return Ok(());
    }
    let why = "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead";
    Err(about(attempt, pod).forbidden(why))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        api::{authn::User, prepare::Part, route::Verb},
        schema,
    };

    #[test]
    fn there_is_no_class() {
        let attempt = Attempt {
            served: schema::resource("", "v1", "pods").unwrap(),
            verb: Verb::Create,
            part: Part::Main,
            user: &User::default(),
            old: None,
        };
        let pod = |spec: Value| json!({"metadata": {"name": "p"}, "spec": spec});
        let plain = pod(json!({"overhead": {}}));
        assert!(named(&attempt, &plain).is_ok() && overhead(&attempt, &plain).is_ok());
        let refused = named(&attempt, &pod(json!({"runtimeClassName": "nope"}))).unwrap_err();
        assert_eq!((refused.code, refused.reason), (403, "Forbidden"));
        assert_eq!(
            refused.message,
            "pods \"p\" is forbidden: pod rejected: RuntimeClass \"nope\" not found"
        );
        let refused = overhead(&attempt, &pod(json!({"overhead": {"cpu": "1"}}))).unwrap_err();
        assert!(refused.message.contains("Pod Overhead set without"), "{}", refused.message);
    }
}
