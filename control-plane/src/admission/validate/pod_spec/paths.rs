//! Paths within something, which must not lead out of it. Pure.

use serde_json::Value;

use crate::schema::{FieldError, Path};

/// Upstream's `validateLocalDescendingPath`.
pub(super) fn descending(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if value.as_str().is_some_and(|text| text.starts_with('/')) {
        errors.push(FieldError::invalid(path, value, "must be a relative path"));
    }
    no_backsteps(errors, path, value);
}

/// Upstream's `ValidateLocalNonReservedPath`: names that begin with two dots are the kubelet's.
pub(super) fn not_reserved(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    descending(errors, path, value);
    let text = value.as_str().unwrap_or("");
    if text.starts_with("..") && !text.starts_with("../") {
        errors.push(FieldError::invalid(path, value, "must not start with '..'"));
    }
}

pub(super) fn no_backsteps(errors: &mut Vec<FieldError>, path: &Path, value: &Value) {
    if has_backsteps(value.as_str().unwrap_or("")) {
        errors.push(FieldError::invalid(path, value, "must not contain '..'"));
    }
}

pub(super) fn has_backsteps(text: &str) -> bool {
    text.split('/').any(|part| part == "..")
}
