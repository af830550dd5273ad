//! Errors about one field, in upstream's words, and the `Status` that carries them. Pure.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "JSON has six kinds of values and gets no more"
)]

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
};

use serde_json::{Value, json};

/// The place of a value in an object, such as `spec.containers[0].image`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path(String);

impl Path {
    /// The path of the object itself; it prints as nothing.
    pub fn root() -> Self {
        Self::default()
    }

    /// A path that begins at a field of the object; may have dots (`spec.template.spec`).
    pub fn new(field: &str) -> Self {
        Self(field.to_owned())
    }

    #[must_use]
    pub fn child(&self, field: &str) -> Self {
        if self.0.is_empty() { Self::new(field) } else { Self(format!("{}.{field}", self.0)) }
    }

    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    /// An entry of a map.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self(format!("{}[{key}]", self.0))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a value is refused; the names are upstream's `CauseType`s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorType {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    Internal,
    TypeInvalid,
}

impl ErrorType {
    /// The `reason` of a cause in `Status.details`.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::Internal => "InternalError",
            Self::TypeInvalid => "FieldValueTypeInvalid",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Internal => "Internal error",
        }
    }
}

/// One refused value.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    pub path: Path,
    pub kind: ErrorType,
    /// As it stands in the message, already printed the way Go's `%#v` or JSON would; empty for kinds
    /// that show no value.
    value: String,
    pub detail: String,
}

impl FieldError {
    fn build(path: &Path, kind: ErrorType, value: String, detail: impl Into<String>) -> Self {
        Self { path: path.clone(), kind, value, detail: detail.into() }
    }

    pub fn required(path: &Path, detail: impl Into<String>) -> Self {
        Self::build(path, ErrorType::Required, String::new(), detail)
    }

    pub fn invalid(path: &Path, value: &Value, detail: impl Into<String>) -> Self {
        Self::build(path, ErrorType::Invalid, show(value), detail)
    }

    pub fn type_invalid(path: &Path, value: &Value, detail: impl Into<String>) -> Self {
        Self::build(path, ErrorType::TypeInvalid, show(value), detail)
    }

    pub fn duplicate(path: &Path, value: &Value) -> Self {
        Self::build(path, ErrorType::Duplicate, show(value), "")
    }

    pub fn not_found(path: &Path, value: &Value) -> Self {
        Self::build(path, ErrorType::NotFound, show(value), "")
    }

    pub fn forbidden(path: &Path, detail: impl Into<String>) -> Self {
        Self::build(path, ErrorType::Forbidden, String::new(), detail)
    }

    /// `supported` in the order in which they are to be listed.
    pub fn not_supported(path: &Path, value: &Value, supported: &[&str]) -> Self {
        let quoted: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = if quoted.is_empty() {
            String::new()
        } else {
            format!("supported values: {}", quoted.join(", "))
        };
        Self::build(path, ErrorType::NotSupported, show(value), detail)
    }

    /// `limit` in bytes.
    pub fn too_long(path: &Path, limit: usize) -> Self {
        let unit = if limit == 1 { "byte" } else { "bytes" };
        Self::build(
            path,
            ErrorType::TooLong,
            String::new(),
            format!("may not be more than {limit} {unit}"),
        )
    }

    pub fn too_many(path: &Path, actual: usize, limit: usize) -> Self {
        let unit = if limit == 1 { "item" } else { "items" };
        Self::build(
            path,
            ErrorType::TooMany,
            actual.to_string(),
            format!("must have at most {limit} {unit}"),
        )
    }

    pub fn internal(path: &Path, detail: impl Into<String>) -> Self {
        Self::build(path, ErrorType::Internal, String::new(), detail)
    }

    /// The message without the path, as causes have it.
    pub fn body(&self) -> String {
        let mut body = self.kind.words().to_owned();
        if !self.value.is_empty() {
            body.push_str(": ");
            body.push_str(&self.value);
        }
        if !self.detail.is_empty() {
            body.push_str(": ");
            body.push_str(&self.detail);
        }
        body
    }

    /// An entry of `Status.details.causes`.
    pub fn cause(&self) -> Value {
        let path: Cow<'_, str> =
            if self.path.0.is_empty() { "<nil>".into() } else { (&self.path.0).into() };
        json!({"reason": self.kind.reason(), "message": self.body(), "field": path})
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = if self.path.0.is_empty() { "<nil>" } else { &self.path.0 };
        write!(f, "{path}: {}", self.body())
    }
}

impl std::error::Error for FieldError {}

/// Several errors as one message: alone as it is, otherwise in brackets.
pub fn aggregate(errors: &[FieldError]) -> String {
    let mut lines: Vec<String> = Vec::new();
    for error in errors.iter().map(ToString::to_string) {
        if !lines.contains(&error) {
            lines.push(error);
        }
    }
    match lines.as_slice() {
        [one] => one.clone(),
        _ => format!("[{}]", lines.join(", ")),
    }
}

/// The `Status` of a refused object: code 422, reason `Invalid`.
pub fn invalid_status(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Value {
    let mut qualified = kind.to_owned();
    if !group.is_empty() {
        qualified.push('.');
        qualified.push_str(group);
    }
    let mut details = json!({"name": name, "group": group, "kind": kind});
    if let Some(map) = details.as_object_mut() {
        for (field, text) in [("name", name), ("group", group)] {
            if text.is_empty() {
                map.remove(field);
            }
        }
        map.insert("causes".into(), errors.iter().map(FieldError::cause).collect());
    }
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("{qualified} {name:?} is invalid: {}", aggregate(errors)),
        "reason": "Invalid", "details": details, "code": 422,
    })
}

/// As upstream prints refused values: strings quoted, the rest as JSON; null is the string `null`.
fn show(value: &Value) -> String {
    match value {
        Value::String(text) => {
            let mut out = String::with_capacity(text.len() + 2);
            // Writing into a String cannot fail.
            let _written = write!(out, "{text:?}");
            out
        }
        Value::Null => "null".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_upstreams() {
        let spec = Path::new("spec");
        let cases = [
            (
                FieldError::invalid(
                    &spec.child("replicas"),
                    &json!(-1),
                    "must be greater than or equal to 0",
                ),
                "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
            ),
            (
                FieldError::required(&spec.child("containers").index(0).child("image"), ""),
                "spec.containers[0].image: Required value",
            ),
            (
                FieldError::not_supported(
                    &spec.child("type"),
                    &json!("X"),
                    &["ClusterIP", "NodePort"],
                ),
                r#"spec.type: Unsupported value: "X": supported values: "ClusterIP", "NodePort""#,
            ),
            (
                FieldError::duplicate(&spec.child("ports").index(1).child("name"), &json!("http")),
                r#"spec.ports[1].name: Duplicate value: "http""#,
            ),
            (FieldError::forbidden(&spec, "may not be set"), "spec: Forbidden: may not be set"),
            (
                FieldError::too_long(&Path::new("metadata").child("labels").key("a"), 63),
                "metadata.labels[a]: Too long: may not be more than 63 bytes",
            ),
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn status_carries_causes() {
        let errors = [FieldError::required(&Path::new("spec.selector"), "")];
        let status = invalid_status("apps", "Deployment", "web", &errors);
        assert_eq!(
            status["message"],
            r#"Deployment.apps "web" is invalid: spec.selector: Required value"#
        );
        assert_eq!(status["details"]["causes"][0]["reason"], "FieldValueRequired");
        assert_eq!(status["details"]["causes"][0]["message"], "Required value");
        assert_eq!(status["details"]["causes"][0]["field"], "spec.selector");
    }
}
