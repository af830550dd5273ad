//! LIST: selection, pages, and the list object made of shared bytes.

use std::{sync::Arc, time::Duration};

use base64::Engine as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::{Value, json};

use crate::{
    api::{
        attributes::selectable,
        core::{Api, Call},
        error,
        query::{ListOptions, RevisionMatch},
    },
    client::ApiError,
    store::{Entry, ListRequest, Listing, Scope},
};

/// How long a request waits for a revision that does not exist yet (upstream's `blockTimeout`).
const FUTURE: Duration = Duration::from_secs(3);

/// The selected objects.
#[derive(Clone, Debug)]
pub struct Page {
    pub revision: u64,
    pub entries: Vec<Arc<Entry>>,
    pub continued: Option<String>,
    /// Only without selectors, as upstream.
    pub remaining: Option<usize>,
}

impl Page {
    /// `ListMeta`.
    #[must_use]
    pub fn metadata(&self) -> Value {
        let mut metadata = json!({"resourceVersion": self.revision.to_string()});
        if let Some(token) = &self.continued {
            metadata["continue"] = json!(token);
        }
        if let Some(remaining) = self.remaining {
            metadata["remainingItemCount"] = json!(remaining);
        }
        metadata
    }
}

/// A list object; items are taken as they are.
#[must_use]
pub fn body(kind: &str, api_version: &str, page: &Page, items: &[Bytes]) -> Bytes {
    let size: usize = items.iter().map(|item| item.len() + 1).sum();
    let head = format!(
        r#"{{"kind":"{kind}","apiVersion":"{api_version}","metadata":{},"items":["#,
        page.metadata()
    );
    let mut out = BytesMut::with_capacity(head.len() + size + 2);
    out.put(head.as_bytes());
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.put_u8(b',');
        }
        out.put(&**item);
    }
    out.put(&b"]}"[..]);
    out.freeze()
}

#[must_use]
pub fn scope(call: &Call, options: &ListOptions) -> Scope {
    let required = options.fields.required("metadata.name");
    let name = if call.name.is_empty() { required } else { Some(call.name.as_str()) };
    let namespace = if call.served.namespaced {
        let required = options.fields.required("metadata.namespace");
        let all = call.namespace.is_empty();
        if all { required } else { Some(call.namespace.as_str()) }
    } else {
        Some("")
    };
    Scope {
        resource: call.resource(),
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
    }
}

/// Refuses field selectors that the resource does not have.
///
/// # Errors
/// 400 in upstream's words.
pub fn check_fields(call: &Call, options: &ListOptions) -> Result<(), ApiError> {
    let mut known = vec!["metadata.name", "metadata.namespace"];
    known.extend_from_slice(selectable(&call.resource()));
    match options.fields.unknown(&known) {
        None => Ok(()),
        Some(field) => Err(error::bad_request(format!("field label not supported: {field}"))),
    }
}

impl Api {
    /// # Errors
    /// 400 for selectors, 410 for an expired revision or token, 504 for a revision of the future.
    pub async fn list(&self, call: &Call, options: &ListOptions) -> Result<Page, ApiError> {
        check_fields(call, options)?;
        let (mut at, mut after) = (None, None);
        if let Some(token) = &options.continued {
            let (revision, path) = read_token(token)?;
            at = revision;
            after = Some(path);
        } else if let Some(revision) = options.revision.filter(|revision| *revision > 0) {
            self.reach(revision).await?;
            if options.revision_match == Some(RevisionMatch::Exact) {
                at = Some(revision);
            }
        }
        let request = ListRequest { scope: scope(call, options), at, after: after.clone() };
        let listing = match self.store.list(request).await {
            Ok(listing) => listing,
            Err(_) if after.is_some() => return Err(self.token_expired(after)),
            Err(expired) => {
                return Err(error::expired(format!(
                    "The resourceVersion for the provided list is too old. ({expired})"
                )));
            }
        };
        Ok(cut(listing, options))
    }

    /// Upstream's answer carries a token with which the client may go on, on newer data.
    fn token_expired(&self, after: Option<String>) -> ApiError {
        let mut expired = error::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.",
        );
        let path = after.unwrap_or_default();
        expired.details = json!({"continue": token(None, &path)});
        expired
    }

    /// Waits a moment for a revision that a client has seen and the server has not.
    ///
    /// # Errors
    /// 504 when it does not come.
    pub async fn reach(&self, revision: u64) -> Result<(), ApiError> {
        let end = tokio::time::Instant::now() + FUTURE;
        while self.store.revision() < revision {
            if tokio::time::Instant::now() >= end {
                return Err(error::too_large_revision(revision, self.store.revision()));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn cut(listing: Listing, options: &ListOptions) -> Page {
    let revision = listing.revision;
    let limit = if options.limit == 0 { usize::MAX } else { options.limit };
    let total = listing.rows.len();
    let mut entries = Vec::new();
    let mut last = None;
    for (index, (path, entry)) in listing.rows.into_iter().enumerate() {
        let fits = options.labels.matches(&entry.attributes)
            && options.fields.matches(&path, &entry.attributes);
        if !fits {
            continue;
        }
        if entries.len() == limit {
            let plain = options.labels.is_empty() && options.fields.is_empty();
            let continued = last.map(|path: Arc<str>| token(Some(revision), &path));
            let remaining = plain.then_some(total - index);
            return Page { revision, entries, continued, remaining };
        }
        last = Some(path);
        entries.push(entry);
    }
    Page { revision, entries, continued: None, remaining: None }
}

/// The token behind a page: the revision of the first page (`None`: whatever is now) and the last path.
fn token(revision: Option<u64>, path: &str) -> String {
    let token = json!({"v": "meta.k8s.io/v1", "rv": revision.unwrap_or(0), "start": path});
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token.to_string())
}

fn read_token(text: &str) -> Result<(Option<u64>, String), ApiError> {
    let read = || {
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).ok()?;
        let token: Value = serde_json::from_slice(&bytes).ok()?;
        let revision = token["rv"].as_u64()?;
        Some((Some(revision).filter(|rv| *rv > 0), token["start"].as_str()?.to_owned()))
    };
    read().ok_or_else(|| error::bad_request("continue key is not valid: illegal base64 or JSON"))
}
