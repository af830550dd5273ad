//! Paths that describe the API: discovery, OpenAPI, version. Pure.

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    api::{
        discovery::{self, Aggregated},
        error,
        http::Reply,
        openapi,
        query::Query,
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
pub(super) fn answer(path: &str, accept: Option<&str>, _query: &Query) -> Result<Reply, ApiError> {
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
        ["openapi", "v3", "api", version] => return document("", version),
        ["openapi", "v3", "apis", group, version] => return document(group, version),
        _ => None,
    };
    found.map(|value| Reply::json(&value)).ok_or_else(error::no_resource)
}

fn document(group: &str, version: &str) -> Result<Reply, ApiError> {
    let text = openapi::document(group, version, VERSION).ok_or_else(error::no_resource)?;
    Ok(Reply::bytes(StatusCode::OK, "application/json", text.into()))
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
