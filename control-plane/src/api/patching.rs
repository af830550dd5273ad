//! The four kinds of PATCH, as changes of a stored object. Pure.

use serde_json::{Value, json};

use crate::{
    api::{
        error,
        patch::{self, PatchError},
    },
    client::ApiError,
    schema::{
        Kind,
        decode::{self, Strictness, Warning},
    },
};

const ACCEPTED: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";

#[derive(Clone, Debug, PartialEq)]
pub enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

impl Patch {
    /// Reads a patch by its `Content-Type`.
    ///
    /// # Errors
    /// 415 for another type, 400 for what does not parse.
    pub fn parse(content_type: Option<&str>, bytes: &[u8]) -> Result<Self, ApiError> {
        let json = || {
            serde_json::from_slice(bytes)
                .map_err(|failure| error::bad_request(format!("error decoding patch: {failure}")))
        };
        let media = content_type.unwrap_or_default().split(';').next().unwrap_or_default();
        match media.trim() {
            "application/json-patch+json" => json().map(Self::Json),
            "application/merge-patch+json" => json().map(Self::Merge),
            "application/strategic-merge-patch+json" => json().map(Self::Strategic),
            "application/apply-patch+yaml" | "application/apply-patch+json" => {
                let (value, _) = decode::parse_yaml(bytes).map_err(|failure| {
                    error::bad_request(format!("error decoding YAML: {failure}"))
                })?;
                Ok(Self::Apply(value))
            }
            _ => Err(error::unsupported_media_type(ACCEPTED)),
        }
    }

    /// The patched object, checked against its kind.
    ///
    /// # Errors
    /// 400 or 422, as upstream.
    pub fn onto(
        &self,
        kind: &Kind,
        current: &Value,
        strictness: Strictness,
    ) -> Result<(Value, Vec<Warning>), ApiError> {
        let refused = |failure: PatchError| match failure {
            PatchError::Malformed(text) => error::bad_request(text),
            PatchError::Unfit(text) => ApiError {
                code: 422,
                reason: "Invalid",
                message: format!(
                    "the server rejected our request due to an error in our request: {text}"
                ),
                details: Value::Null,
            },
        };
        let patched = match self {
            Self::Json(patch) => patch::json::patch(current.clone(), patch).map_err(refused)?,
            Self::Merge(patch) => patch::merge::patch(current.clone(), patch),
            Self::Strategic(patch) => {
                patch::strategic::patch(kind.body, current.clone(), patch).map_err(refused)?
            }
            Self::Apply(_) => {
                return Err(error::unsupported_media_type(
                    "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json",
                ));
            }
        };
        decode::value(kind, patched, strictness).map_err(|failure| {
            // Upstream answers a patched object that does not decode with 422.
            let cause = format!("Invalid value: {failure}");
            ApiError {
                code: 422,
                reason: "Invalid",
                message: format!(" \"\" is invalid: patch: {cause}"),
                details: json!({"causes": [
                    {"reason": "FieldValueInvalid", "message": cause, "field": "patch"}]}),
            }
        })
    }
}
