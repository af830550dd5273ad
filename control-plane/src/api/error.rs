//! Failures as upstream words them, and the `Status` object that carries them. Pure.

use serde_json::{Value, json};

use crate::{
    client::ApiError,
    schema::{FieldError, field},
};

/// `plural` or `plural.group`, as messages name resources.
#[must_use]
pub fn qualified(group: &str, plural: &str) -> String {
    if group.is_empty() { plural.to_owned() } else { format!("{plural}.{group}") }
}

/// The resource and object that an error is about.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    pub group: &'a str,
    pub plural: &'a str,
    pub name: &'a str,
}

impl About<'_> {
    fn details(self) -> Value {
        let mut details = json!({"kind": self.plural});
        if !self.name.is_empty() {
            details["name"] = json!(self.name);
        }
        if !self.group.is_empty() {
            details["group"] = json!(self.group);
        }
        details
    }

    fn error(self, code: u16, reason: &'static str, message: String) -> ApiError {
        ApiError { code, reason, message, details: self.details() }
    }

    #[must_use]
    pub fn not_found(self) -> ApiError {
        let message = format!("{} {:?} not found", qualified(self.group, self.plural), self.name);
        self.error(404, "NotFound", message)
    }

    #[must_use]
    pub fn already_exists(self) -> ApiError {
        let message =
            format!("{} {:?} already exists", qualified(self.group, self.plural), self.name);
        self.error(409, "AlreadyExists", message)
    }

    #[must_use]
    pub fn conflict(self, why: &str) -> ApiError {
        let message = format!(
            "Operation cannot be fulfilled on {} {:?}: {why}",
            qualified(self.group, self.plural),
            self.name
        );
        self.error(409, "Conflict", message)
    }

    /// The conflict of a stale `resourceVersion`.
    #[must_use]
    pub fn modified(self) -> ApiError {
        self.conflict(
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    #[must_use]
    pub fn forbidden(self, why: &str) -> ApiError {
        let resource = qualified(self.group, self.plural);
        let message = if self.name.is_empty() {
            format!("{resource} is forbidden: {why}")
        } else {
            format!("{resource} {:?} is forbidden: {why}", self.name)
        };
        self.error(403, "Forbidden", message)
    }
}

fn plain(code: u16, reason: &'static str, message: impl Into<String>) -> ApiError {
    ApiError { code, reason, message: message.into(), details: Value::Null }
}

#[must_use]
pub fn bad_request(message: impl Into<String>) -> ApiError {
    plain(400, "BadRequest", message)
}

#[must_use]
pub fn unauthorized() -> ApiError {
    plain(401, "Unauthorized", "Unauthorized")
}

/// No such path or resource. Clients tell it by its empty details from an object that is not there: `kubectl debug`
/// reads the name in them.
#[must_use]
pub fn no_resource() -> ApiError {
    let message = "the server could not find the requested resource";
    ApiError { details: json!({}), ..plain(404, "NotFound", message) }
}

#[must_use]
pub fn method_not_allowed() -> ApiError {
    let message = "the server does not allow this method on the requested resource";
    ApiError { details: json!({}), ..plain(405, "MethodNotAllowed", message) }
}

/// The 422 of refused fields of an object, or of a request's options.
#[must_use]
pub fn invalid((group, kind): (&str, &str), name: &str, errors: &[FieldError]) -> ApiError {
    let status = field::invalid_status(group, kind, name, errors);
    ApiError {
        code: 422,
        reason: "Invalid",
        message: status["message"].as_str().unwrap_or_default().to_owned(),
        details: status["details"].clone(),
    }
}

#[must_use]
pub fn not_acceptable(accepted: &str) -> ApiError {
    plain(406, "NotAcceptable", format!("only the following media types are accepted: {accepted}"))
}

#[must_use]
pub fn unsupported_media_type(accepted: &str) -> ApiError {
    plain(
        415,
        "UnsupportedMediaType",
        format!(
            "the body of the request was in an unknown format - accepted media types include: {accepted}"
        ),
    )
}

#[must_use]
pub fn too_large(limit: usize) -> ApiError {
    plain(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {limit}"))
}

/// The in-flight bound is reached.
#[must_use]
pub fn too_many_requests() -> ApiError {
    let mut error =
        plain(429, "TooManyRequests", "Too many requests, please try again later.".to_owned());
    error.details = json!({"retryAfterSeconds": 1});
    error
}

#[must_use]
pub fn internal(message: impl std::fmt::Display) -> ApiError {
    plain(500, "InternalError", format!("Internal error occurred: {message}"))
}

#[must_use]
pub fn unavailable(message: impl Into<String>) -> ApiError {
    plain(503, "ServiceUnavailable", message)
}

#[must_use]
pub fn expired(message: impl Into<String>) -> ApiError {
    plain(410, "Expired", message)
}

/// The request took longer than it may.
#[must_use]
pub fn timed_out() -> ApiError {
    plain(504, "Timeout", "request did not complete within the allotted timeout")
}

/// A revision that does not exist yet.
#[must_use]
pub fn too_large_revision(asked: u64, current: u64) -> ApiError {
    let mut error = plain(
        504,
        "Timeout",
        format!("Timeout: Too large resource version: {asked}, current: {current}"),
    );
    error.details = json!({"retryAfterSeconds": 1,
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]});
    error
}

/// The `Status` object of a failure.
#[must_use]
pub fn status(error: &ApiError) -> Value {
    let mut status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": error.message, "reason": error.reason, "code": error.code,
    });
    if !error.details.is_null() {
        status["details"] = error.details.clone();
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_upstreams() {
        let web = About { group: "apps", plural: "deployments", name: "web" };
        let pod = About { group: "", plural: "pods", name: "p" };
        assert_eq!(web.not_found().message, r#"deployments.apps "web" not found"#);
        assert_eq!(pod.already_exists().message, r#"pods "p" already exists"#);
        assert_eq!(
            web.modified().message,
            "Operation cannot be fulfilled on deployments.apps \"web\": the object has been modified; \
             please apply your changes to the latest version and try again"
        );
        assert_eq!(status(&no_resource())["details"], json!({}));
        assert_eq!(
            status(&web.not_found())["details"],
            json!({"kind": "deployments", "name": "web", "group": "apps"})
        );
    }
}
