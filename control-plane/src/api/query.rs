//! Query parameters: decoding, and the options that verbs take. Pure.

use serde_json::json;

use crate::{
    api::{
        error,
        route::Verb,
        selector::{FieldSelector, LabelSelector},
    },
    client::ApiError,
    schema::{FieldError, Path, decode::Strictness},
};

const OPTIONS_GROUP: &str = "meta.k8s.io";

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
            // Upstream's numbers have a sign, which it does not heed here.
            Some(text) if key != "resourceVersion" && text.parse::<i64>().is_ok_and(|n| n < 0) => {
                Ok(None)
            }
            Some(text) => text.parse::<u64>().map(Some).map_err(|_parse| {
                error::bad_request(format!("invalid {key}: {text:?} is not a number"))
            }),
        };
        let errors = matching(query);
        if !errors.is_empty() {
            return Err(error::invalid((OPTIONS_GROUP, "ListOptions"), "", &errors));
        }
        let revision_match = match query.first("resourceVersionMatch") {
            Some("Exact") => Some(RevisionMatch::Exact),
            Some("NotOlderThan") => Some(RevisionMatch::NotOlderThan),
            _ => None,
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
    /// Of server-side apply; the others refuse to be told.
    pub force: Option<bool>,
}

impl WriteOptions {
    /// # Errors
    /// 422 with upstream's words for an unsupported value.
    pub fn parse(query: &Query, verb: Verb) -> Result<Self, ApiError> {
        let kind = match verb {
            Verb::Get | Verb::List | Verb::Watch => return Ok(Self::default()),
            Verb::Create => "CreateOptions",
            Verb::Update => "UpdateOptions",
            Verb::Patch => "PatchOptions",
            Verb::Delete | Verb::DeleteCollection => "DeleteOptions",
        };
        let mut errors = Vec::new();
        let field_manager = query.first("fieldManager").unwrap_or("");
        if kind != "DeleteOptions" {
            manager(&mut errors, field_manager);
        }
        if let Some(other) = query.first("dryRun").filter(|word| *word != "All") {
            let path = Path::new("dryRun");
            errors.push(FieldError::not_supported(&path, &json!([other]), &["All"]));
        }
        // Upstream's default is Warn.
        let validation = match query.first("fieldValidation") {
            Some("Strict") => Strictness::Strict,
            Some("Ignore") => Strictness::Ignore,
            Some(other) if !matches!(other, "" | "Warn") && kind != "DeleteOptions" => {
                let (path, words) =
                    (Path::new("fieldValidation"), ["", "Ignore", "Strict", "Warn"]);
                errors.push(FieldError::not_supported(&path, &json!(other), &words));
                Strictness::Warn
            }
            _ => Strictness::Warn,
        };
        if !errors.is_empty() {
            return Err(error::invalid((OPTIONS_GROUP, kind), "", &errors));
        }
        Ok(Self {
            dry_run: query.first("dryRun").is_some(),
            field_manager: field_manager.to_owned(),
            agent: String::new(),
            validation,
            force: query.first("force").map(|_| query.flag("force")),
        })
    }
}

/// The name of who writes; upstream keeps no longer ones.
fn manager(errors: &mut Vec<FieldError>, name: &str) {
    const BYTES: usize = 128;
    let path = Path::new("fieldManager");
    if name.len() > BYTES {
        errors.push(FieldError::too_long(&path, BYTES));
    }
    for (at, strange) in name.char_indices().filter(|(_, c)| c.is_control()) {
        let code = u32::from(strange);
        let why = format!("invalid character U+{code:04X} (at position {at})");
        errors.push(FieldError::invalid(&path, &json!(name), why));
    }
}

/// Whether `resourceVersionMatch` and `sendInitialEvents` go with what else is asked for.
fn matching(query: &Query) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let path = Path::new("resourceVersionMatch");
    let given = |key: &str| query.first(key).filter(|text| !text.is_empty());
    let mut forbid = |path: &Path, why: &str| errors.push(FieldError::forbidden(path, why));
    let (wanted, initial) = (given("resourceVersionMatch"), query.first("sendInitialEvents"));
    let continued = "resourceVersionMatch is forbidden when continue is provided";
    if query.flag("watch") {
        if initial.is_some() && wanted != Some("NotOlderThan") {
            let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
            forbid(&path, why);
        }
        if wanted.is_some() && initial.is_none() {
            let why =
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            forbid(&path, why);
        }
    } else {
        if wanted.is_some() && given("resourceVersion").is_none() {
            let why = "resourceVersionMatch is forbidden unless resourceVersion is provided";
            forbid(&path, why);
        }
        if wanted == Some("Exact") && given("resourceVersion") == Some("0") {
            forbid(&path, "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
        }
        if initial.is_some() {
            let path = Path::new("sendInitialEvents");
            forbid(&path, "sendInitialEvents is forbidden for list");
        }
    }
    if wanted.is_some() && given("continue").is_some() {
        forbid(&path, continued);
    }
    let words: &[&str] =
        if query.flag("watch") { &["NotOlderThan"] } else { &["Exact", "NotOlderThan", ""] };
    if let Some(other) = wanted.filter(|word| !words.contains(word)) {
        errors.push(FieldError::not_supported(&path, &json!(other), words));
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal<T>(result: Result<T, ApiError>) -> String {
        result.err().map(|error| format!("{} {}", error.code, error.message)).unwrap_or_default()
    }

    #[test]
    fn parameters_of_writes() {
        let said = |text: &str, verb| refusal(WriteOptions::parse(&Query::parse(text), verb));
        assert_eq!(said("dryRun=All&fieldValidation=Strict&fieldManager=me", Verb::Create), "");
        assert_eq!(said("fieldValidation=x&dryRun=All", Verb::Delete), "");
        assert_eq!(
            said("dryRun=x", Verb::Update),
            "422 UpdateOptions.meta.k8s.io \"\" is invalid: dryRun: Unsupported value: [\"x\"]: supported values: \"All\""
        );
        assert_eq!(
            said("fieldValidation=x", Verb::Patch),
            "422 PatchOptions.meta.k8s.io \"\" is invalid: fieldValidation: Unsupported value: \"x\": supported values: \"\", \"Ignore\", \"Strict\", \"Warn\""
        );
        let long = format!("fieldManager={}", "x".repeat(129));
        assert!(said(&long, Verb::Create).contains("fieldManager: Too long: may not be more"));
        assert!(said("fieldManager=%01", Verb::Create).contains("invalid character U+0001"));
    }

    #[test]
    fn parameters_of_lists() {
        let said = |text: &str| refusal(ListOptions::parse(&Query::parse(text)));
        for right in
            ["limit=-1", "timeoutSeconds=-1", "resourceVersionMatch=Exact&resourceVersion=1"]
        {
            assert_eq!(said(right), "", "{right}");
        }
        for (wrong, code) in [
            ("limit=x", "400"),
            ("resourceVersion=-1", "400"),
            ("resourceVersionMatch=Exact", "422"),
            ("resourceVersionMatch=Exact&resourceVersion=0", "422"),
            ("resourceVersionMatch=X&resourceVersion=1", "422"),
            ("sendInitialEvents=true", "422"),
            ("watch=1&sendInitialEvents=true", "422"),
            ("watch=1&resourceVersionMatch=NotOlderThan", "422"),
        ] {
            assert!(said(wrong).starts_with(code), "{wrong}: {}", said(wrong));
        }
        assert_eq!(said("watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"), "");
    }
}
