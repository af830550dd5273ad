//! Which form the client wants an answer in, and objects in that form. Pure.

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{
    api::{
        error, event_form,
        table::{self, IncludeObject, TableOptions},
    },
    client::ApiError,
    schema::Served,
    store::Entry,
};

/// What the server can produce, as a 406 lists it.
const OFFERED: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// A Table as it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableView {
    pub include: IncludeObject,
}

impl TableView {
    /// The Table of one object.
    #[must_use]
    pub fn one(&self, served: &Served, object: &Value, now: Timestamp) -> Value {
        let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
        table::table(served, &[object], metadata, self.options(now))
    }

    /// The Table of a list.
    #[must_use]
    pub fn many(
        &self,
        served: &Served,
        metadata: Value,
        objects: &[Value],
        now: Timestamp,
    ) -> Value {
        let objects: Vec<&Value> = objects.iter().collect();
        table::table(served, &objects, metadata, self.options(now))
    }

    fn options(self, now: Timestamp) -> TableOptions<'static> {
        TableOptions { version: "v1", include: self.include, headers: true, now }
    }
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    Json,
    Yaml,
    Protobuf,
    Table(TableView),
    /// `PartialObjectMetadata`.
    Metadata,
}

impl Media {
    /// The first acceptable form of an `Accept` header that can be produced.
    ///
    /// # Errors
    /// 406 when there is none.
    pub fn negotiate(accept: Option<&str>, include: Option<&str>) -> Result<Self, ApiError> {
        let Some(accept) = accept.filter(|accept| !accept.trim().is_empty()) else {
            return Ok(Self::Json);
        };
        let include = IncludeObject::parse(include.unwrap_or("")).ok_or_else(|| {
            error::bad_request("includeObject must be one of: None, Metadata, Object")
        })?;
        let clauses = || accept.split(',').map(str::trim);
        // JSON is what objects are kept in: who takes it too gets it.
        let json_too = clauses().any(|clause| clause == "application/json" || clause == "*/*");
        for clause in clauses() {
            let mut parts = clause.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let shape = parts.find_map(|part| part.strip_prefix("as="));
            match (media, shape) {
                ("application/json", Some("Table")) => {
                    return Ok(Self::Table(TableView { include }));
                }
                (
                    "application/json",
                    Some("PartialObjectMetadata" | "PartialObjectMetadataList"),
                ) => {
                    return Ok(Self::Metadata);
                }
                ("application/json" | "*/*" | "application/*", None) => return Ok(Self::Json),
                ("application/yaml", None) => return Ok(Self::Yaml),
                ("application/vnd.kubernetes.protobuf", None) if !json_too => {
                    return Ok(Self::Protobuf);
                }
                _ => {}
            }
        }
        Err(error::not_acceptable(OFFERED))
    }
}

/// A stored object as a resource of the API shows it.
#[must_use]
pub fn outward(served: &Served, entry: &Entry) -> Bytes {
    if served.storage.is_none() {
        return entry.bytes.clone();
    }
    Bytes::from(outward_value(served, &entry.value()).to_string())
}

/// The same as a value.
#[must_use]
pub fn outward_value(served: &Served, value: &Value) -> Value {
    event_form::outward(served, value.clone())
}

/// `PartialObjectMetadata` of an object.
#[must_use]
pub fn only_metadata(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_headers_of_real_clients() {
        let table = TableView { include: IncludeObject::Metadata };
        let cases = [
            ("application/json, */*", Media::Json),
            (
                "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
                Media::Table(table),
            ),
            ("application/vnd.kubernetes.protobuf,application/json", Media::Json),
            ("application/vnd.kubernetes.protobuf", Media::Protobuf),
            ("application/yaml", Media::Yaml),
            ("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io", Media::Metadata),
        ];
        for (accept, want) in cases {
            assert_eq!(Media::negotiate(Some(accept), None), Ok(want), "{accept}");
        }
        assert_eq!(Media::negotiate(Some("text/html"), None).unwrap_err().code, 406);
    }
}
