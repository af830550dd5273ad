//! Paths that describe the API: discovery, OpenAPI, version. Pure.

use bytes::Bytes;
use http::{StatusCode, header};
use serde_json::{Value, json};

use crate::{
    api::{
        discovery::{self, Aggregated},
        error,
        http::{Asked, Keep, Reply},
        openapi,
    },
    client::ApiError,
};

/// The API level: that of the field table.
pub(super) const VERSION: &str = "v1.36.0";

/// `/version`.
#[must_use]
pub(super) fn version() -> Value {
    json!({"major": "1", "minor": "36", "gitVersion": format!("{VERSION}+orlop.{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "", "compiler": "rustc", "platform": format!("linux/{}", std::env::consts::ARCH)})
}

/// # Errors
/// 404 for a group or version that is not served.
pub(super) fn answer(path: &str, asked: &Asked) -> Result<Reply, ApiError> {
    let accept = asked.header(header::ACCEPT);
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let found = match parts.as_slice() {
        [root @ ("api" | "apis")] => {
            if let Some(form) = aggregated(accept) {
                let groups = discovery::aggregated(*root == "api", form);
                let bytes = groups.to_string().into();
                return Ok(Reply::bytes(StatusCode::OK, form.content_type(), bytes));
            }
            Some(if *root == "api" { discovery::api_versions("") } else { discovery::group_list() })
        }
        ["api", version] => discovery::resource_list("", version),
        ["apis", group] => discovery::group(group),
        ["apis", group, version] => discovery::resource_list(group, version),
        ["openapi", "v3"] => Some(openapi::index(VERSION)),
        ["openapi", "v3", "api", version] => return document(("", version), asked),
        ["openapi", "v3", "apis", group, version] => return document((group, version), asked),
        ["openapi", "v2"] => return Ok(version_2(accept)),
        _ => None,
    };
    found.map(|value| Reply::json(&value)).ok_or_else(error::no_resource)
}

/// A document may be kept for good if its address names the hash of what it is.
fn document((group, version): (&str, &str), asked: &Asked) -> Result<Reply, ApiError> {
    if !discovery::versions(group).contains(&version) {
        return Err(error::no_resource());
    }
    let hash = openapi::hash(group, version, VERSION);
    let known = asked.header(header::IF_NONE_MATCH).unwrap_or_default();
    let mut reply = if known.split(',').any(|tag| tag.trim().trim_matches('"') == hash) {
        Reply::bytes(StatusCode::NOT_MODIFIED, "application/json", Bytes::new())
    } else {
        let text = openapi::document(group, version, VERSION).ok_or_else(error::no_resource)?;
        Reply::bytes(StatusCode::OK, "application/json", text.into())
    };
    let named = asked.query.first("hash") == Some(hash.as_str());
    reply.keep = if named { Keep::Forever(hash) } else { Keep::Ask(hash) };
    Ok(reply)
}

/// OpenAPI v2 without a definition: types are described in v3 only. `kubectl` asks here about kinds that
/// v3 does not have, and goes on to say so.
fn version_2(accept: Option<&str>) -> Reply {
    const PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
    if !accept.unwrap_or_default().contains("com.github.proto-openapi.spec.v2") {
        return Reply::json(&json!({"swagger": "2.0", "paths": {},
            "info": {"title": "Kubernetes", "version": VERSION}}));
    }
    // gnostic's `openapi.v2.Document`: swagger is field 1, info 2 (title 1, version 2), paths 8; all shorter
    // than 128 bytes, so that a length is one byte.
    let field = |number: u8, content: &[u8]| {
        let length = u8::try_from(content.len()).unwrap_or(0);
        [&[number << 3 | 2, length], content].concat()
    };
    let info = [field(1, b"Kubernetes"), field(2, VERSION.as_bytes())].concat();
    let bytes = [field(1, b"2.0"), field(2, &info), field(8, b"")].concat();
    Reply::bytes(StatusCode::OK, PROTOBUF, bytes.into())
}

fn aggregated(accept: Option<&str>) -> Option<Aggregated> {
    accept?.split(',').map(str::trim).find_map(|clause| {
        let wanted = clause.contains("g=apidiscovery.k8s.io");
        if !wanted {
            None
        } else if clause.contains("v=v2;") || clause.ends_with("v=v2") {
            Some(Aggregated::V2)
        } else {
            Some(Aggregated::V2Beta1)
        }
    })
}
