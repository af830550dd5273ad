//! Query parameters: decoding, and the options that verbs take. Pure.

use crate::{
    api::{
        error,
        selector::{FieldSelector, LabelSelector},
    },
    client::ApiError,
    schema::decode::Strictness,
};

/// Decoded `key=value` pairs in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let pair = |pair: &str| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key, Plus::IsSpace), decode(value, Plus::IsSpace))
        };
        Self(text.split('&').filter(|part| !part.is_empty()).map(pair).collect())
    }

    #[must_use]
    pub fn first(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    fn flag(&self, key: &str) -> bool {
        matches!(self.first(key), Some("true" | "1" | "True" | "t" | "T" | "TRUE"))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plus {
    IsSpace,
    IsPlus,
}

/// Percent-decodes a path.
#[must_use]
pub fn decode_path(text: &str) -> String {
    decode(text, Plus::IsPlus)
}

fn decode(text: &str, plus: Plus) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let hex = bytes.get(at + 1..at + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match (byte, hex.and_then(|pair| u8::from_str_radix(pair, 16).ok())) {
            (b'%', Some(decoded)) => {
                out.push(decoded);
                at += 3;
                continue;
            }
            (b'+', _) if plus == Plus::IsSpace => out.push(b' '),
            _ => out.push(*byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RevisionMatch {
    Exact,
    NotOlderThan,
}

/// `meta/v1` `ListOptions`.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    /// 0: no limit.
    pub limit: usize,
    pub continued: Option<String>,
    pub revision: Option<u64>,
    pub revision_match: Option<RevisionMatch>,
    pub bookmarks: bool,
    pub initial_events: bool,
    /// Seconds.
    pub timeout: Option<u64>,
}

impl ListOptions {
    /// # Errors
    /// 400 for a parameter that does not parse or does not go with another.
    pub fn parse(query: &Query) -> Result<Self, ApiError> {
        let number = |key: &str| match query.first(key) {
            None | Some("") => Ok(None),
            Some(text) => text.parse::<u64>().map(Some).map_err(|_parse| {
                error::bad_request(format!("invalid {key}: {text:?} is not a number"))
            }),
        };
        let revision_match = match query.first("resourceVersionMatch") {
            None | Some("") => None,
            Some("Exact") => Some(RevisionMatch::Exact),
            Some("NotOlderThan") => Some(RevisionMatch::NotOlderThan),
            Some(other) => {
                return Err(error::bad_request(format!(
                    "resourceVersionMatch: Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\", \"\""
                )));
            }
        };
        let limit = number("limit")?.unwrap_or(0);
        Ok(Self {
            labels: LabelSelector::parse(query.first("labelSelector").unwrap_or(""))
                .map_err(|why| error::bad_request(format!("unable to parse requirement: {why}")))?,
            fields: FieldSelector::parse(query.first("fieldSelector").unwrap_or(""))
                .map_err(error::bad_request)?,
            limit: usize::try_from(limit).unwrap_or(usize::MAX),
            continued: query.first("continue").filter(|t| !t.is_empty()).map(str::to_owned),
            revision: number("resourceVersion")?,
            revision_match,
            bookmarks: query.flag("allowWatchBookmarks"),
            initial_events: query.flag("sendInitialEvents"),
            timeout: number("timeoutSeconds")?,
        })
    }
}

/// The parameters of writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    pub dry_run: bool,
    pub field_manager: String,
    /// What stands for the manager where none is given: the program's name in `User-Agent`.
    pub agent: String,
    pub validation: Strictness,
    /// Of server-side apply.
    pub force: bool,
}

impl WriteOptions {
    /// # Errors
    /// 422 with upstream's words for an unsupported value.
    pub fn parse(query: &Query) -> Result<Self, ApiError> {
        let unsupported = |field: &str, value: &str, supported: &str| ApiError {
            code: 422,
            reason: "Invalid",
            message: format!(
                "CreateOptions.meta.k8s.io \"\" is invalid: {field}: Unsupported value: {value:?}: supported values: {supported}"
            ),
            details: serde_json::Value::Null,
        };
        let dry_run = match query.first("dryRun") {
            None | Some("") => false,
            Some("All") => true,
            Some(other) => return Err(unsupported("dryRun", other, "\"All\"")),
        };
        // Upstream's default is Warn.
        let validation = match query.first("fieldValidation") {
            None | Some("" | "Warn") => Strictness::Warn,
            Some("Strict") => Strictness::Strict,
            Some("Ignore") => Strictness::Ignore,
            Some(other) => {
                return Err(unsupported(
                    "fieldValidation",
                    other,
                    "\"Ignore\", \"Strict\", \"Warn\"",
                ));
            }
        };
        Ok(Self {
            dry_run,
            field_manager: query.first("fieldManager").unwrap_or("").to_owned(),
            agent: String::new(),
            validation,
            force: query.flag("force"),
        })
    }
}
