//! Request bodies into objects of the kind that the path names. Pure.

use serde_json::Value;

use crate::{
    api::{error, prepare::text},
    client::ApiError,
    schema::{
        Kind,
        decode::{self, DecodeError, Strictness, Warning},
        proto::{self, ProtoError},
    },
};

const ACCEPTED: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
    Protobuf,
}

/// Reads a `Content-Type`.
///
/// # Errors
/// 415 for another one.
pub fn format(content_type: Option<&str>) -> Result<Format, ApiError> {
    let media = content_type.unwrap_or("application/json").split(';').next().unwrap_or_default();
    match media.trim() {
        "" | "application/json" => Ok(Format::Json),
        "application/yaml" => Ok(Format::Yaml),
        "application/vnd.kubernetes.protobuf" => Ok(Format::Protobuf),
        _ => Err(error::unsupported_media_type(ACCEPTED)),
    }
}

/// Refuses an object that says it is of another kind, or of another group.
///
/// # Errors
/// 400.
pub fn is_of(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    let (given, version) = (text(object, "/kind"), text(object, "/apiVersion"));
    let group = |version: &str| match version.split_once('/') {
        Some((group, _)) => group.to_owned(),
        None => String::new(),
    };
    let fits = (given.is_empty() || given == kind.kind)
        && (version.is_empty() || group(version) == kind.group);
    if fits {
        return Ok(());
    }
    Err(error::bad_request(format!(
        "{given} in version {:?} cannot be handled as a {}: no kind {given:?} is registered for version {version:?}",
        kind.version, kind.kind
    )))
}

/// # Errors
/// 400 with the decoder's words.
pub fn decode(
    kind: &Kind,
    format: Format,
    bytes: &[u8],
    strictness: Strictness,
) -> Result<(Value, Vec<Warning>), ApiError> {
    let refused = |failure: DecodeError| error::bad_request(failure.message(kind));
    match format {
        Format::Json => {
            if bytes.is_empty() {
                return Err(error::bad_request("no body was sent"));
            }
            decode::json(kind, bytes, strictness).map_err(refused)
        }
        Format::Yaml => decode::yaml(kind, bytes, strictness).map_err(refused),
        Format::Protobuf => {
            let (_, object) = proto::decode(bytes).map_err(|failure: ProtoError| {
                error::bad_request(format!("the object provided is unrecognized: {failure}"))
            })?;
            Ok((object, Vec::new()))
        }
    }
}
