//! What the server writes into CertificateSigningRequests: who asked. Pure.

use serde_json::{Value, json};

use crate::api::authn::User;

/// The requester's identity replaces whatever the object says.
pub(super) fn stamp(user: &User, request: &mut Value) {
    let info = user.to_json();
    if let Some(spec) = request.get_mut("spec").and_then(Value::as_object_mut) {
        for field in ["username", "uid", "groups", "extra"] {
            match info.get(field) {
                Some(value) => drop(spec.insert(field.to_owned(), value.clone())),
                None => drop(spec.remove(field)),
            }
        }
    }
    request["status"] = json!({});
}
