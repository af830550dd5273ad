//! A request from its line to its answer: route, who, may they, limits, then the resource handlers.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    api::{
        authn::User,
        authz::Ask,
        core::Api,
        discovery_paths, error, impersonate,
        proxy::Kubelets,
        query::{Query, decode_path},
        route::{Route, route},
    },
    client::ApiError,
};

/// Upstream's `MaxRequestBodyBytes`.
const BODY_BYTES: usize = 3 << 20;
/// Upstream's `--max-requests-inflight` and `--max-mutating-requests-inflight`.
const READS: usize = 400;
const WRITES: usize = 200;
/// Upstream's `--request-timeout`.
const TIMEOUT: Duration = Duration::from_secs(60);

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What answers requests; one a server.
#[derive(Debug)]
pub struct Handler {
    pub(super) api: Arc<Api>,
    pub(super) kubelets: Option<Kubelets>,
    pub(super) shutdown: CancellationToken,
    reads: Semaphore,
    writes: Semaphore,
}

/// How long a reader may keep an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Keep {
    #[default]
    No,
    /// Has to ask with this tag whether it is the same still.
    Ask(String),
    /// The address names the content, as does this tag: for good.
    Forever(String),
}

/// An answer before it has a body type.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) content_type: &'static str,
    pub(super) body: Body,
    /// For `Warning` headers.
    pub(super) warnings: Vec<String>,
    /// For the reader's cache.
    pub(super) keep: Keep,
}

impl Reply {
    pub(super) fn bytes(status: StatusCode, content_type: &'static str, bytes: Bytes) -> Self {
        let body = Full::new(bytes).map_err(|never| match never {}).boxed_unsync();
        Self { status, content_type, body, warnings: Vec::new(), keep: Keep::No }
    }

    pub(super) fn json(value: &Value) -> Self {
        Self::bytes(StatusCode::OK, "application/json", Bytes::from(value.to_string()))
    }

    pub(super) fn text(text: &'static str) -> Self {
        Self::bytes(
            StatusCode::OK,
            "text/plain; charset=utf-8",
            Bytes::from_static(text.as_bytes()),
        )
    }

    pub(super) fn lines(
        content_type: &'static str,
        lines: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Self {
        let frames = lines.map(|line| Ok(Frame::data(line)));
        let body = StreamBody::new(frames).boxed_unsync();
        let (status, warnings, keep) = (StatusCode::OK, Vec::new(), Keep::No);
        Self { status, content_type, body, warnings, keep }
    }

    pub(super) fn warned(self, warnings: Vec<String>) -> Self {
        Self { warnings, ..self }
    }
}

/// The parts of a request that handlers look at.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) user: Arc<User>,
    pub(super) query: Query,
    pub(super) headers: HeaderMap,
}

impl Asked {
    pub(super) fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

impl Handler {
    #[must_use]
    pub fn new(api: Arc<Api>, kubelets: Option<Kubelets>, shutdown: CancellationToken) -> Self {
        let (reads, writes) = (Semaphore::new(READS), Semaphore::new(WRITES));
        Self { api, kubelets, shutdown, reads, writes }
    }

    /// Answers one request; failures are `Status` objects.
    pub async fn handle(
        &self,
        certificate: Option<Arc<User>>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let deprecated = deprecation(&request);
        let mut response = match self.answer(certificate, request).await {
            Ok(response) => response,
            Err(failure) => refuse(&failure),
        };
        if let Some(warning) = deprecated {
            warn(&mut response, warning);
        }
        response
    }

    async fn answer(
        &self,
        certificate: Option<Arc<User>>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, ApiError> {
        let path = decode_path(request.uri().path());
        let query = Query::parse(request.uri().query().unwrap_or(""));
        let route = route(request.method().as_str(), &path, &query);
        match &route {
            Route::Health => return Ok(respond(Reply::text("ok"))),
            Route::Version => return Ok(respond(Reply::json(&discovery_paths::version()))),
            Route::Metrics
            | Route::Discovery
            | Route::OpenApi
            | Route::OpenId
            | Route::Resource(..)
            | Route::Method
            | Route::Unknown => {}
        }
        let authorization = request.headers().get(header::AUTHORIZATION);
        let authorization = authorization.and_then(|value| value.to_str().ok());
        let user = self.api.authenticate(authorization, certificate.as_ref()).await?;
        let user = impersonate::acting(&user, request.headers())?.map_or(user, Arc::new);
        let ask = match &route {
            Route::Resource(target, verb) => Ask::Resource(target, *verb),
            Route::Health
            | Route::Version
            | Route::Metrics
            | Route::Discovery
            | Route::OpenApi
            | Route::OpenId
            | Route::Method
            | Route::Unknown => Ask::Path(&path),
        };
        self.api.authorize(&user, ask).await?;
        let headers = request.headers().clone();
        let asked = Asked { user, query, headers };
        match route {
            Route::Resource(target, verb) => {
                if super::proxy::is_stream(&target) {
                    return self.stream(&asked, &target, request).await;
                }
                let slots = if verb.mutates() { &self.writes } else { &self.reads };
                let slot = slots.try_acquire().map_err(|_full| error::too_many_requests())?;
                let bytes = read_body(request.into_body());
                let work = async { self.resource(&asked, &target, verb, bytes.await?).await };
                let reply = tokio::time::timeout(TIMEOUT, work).await;
                drop(slot);
                reply.map_err(|_elapsed| error::timed_out())?.map(respond)
            }
            Route::Metrics => Ok(respond(Reply::bytes(
                StatusCode::OK,
                "text/plain; version=0.0.4",
                Bytes::from(self.metrics()),
            ))),
            Route::Discovery | Route::OpenApi => {
                discovery_paths::answer(&path, &asked).map(respond)
            }
            Route::Method => Err(error::method_not_allowed()),
            Route::OpenId | Route::Health | Route::Version | Route::Unknown => {
                Err(error::no_resource())
            }
        }
    }

    /// Few numbers, all read when asked for.
    fn metrics(&self) -> String {
        let flying = |slots: &Semaphore, all: usize| all.saturating_sub(slots.available_permits());
        format!(
            "# TYPE apiserver_current_inflight_requests gauge\n\
             apiserver_current_inflight_requests{{request_kind=\"readOnly\"}} {}\n\
             apiserver_current_inflight_requests{{request_kind=\"mutating\"}} {}\n\
             # TYPE orlop_store_revision counter\norlop_store_revision {}\n",
            flying(&self.reads, READS),
            flying(&self.writes, WRITES),
            self.api.store.revision()
        )
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, ApiError> {
    match Limited::new(body, BODY_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(failure) if failure.is::<http_body_util::LengthLimitError>() => {
            Err(error::too_large(BODY_BYTES))
        }
        Err(failure) => Err(error::bad_request(format!("cannot read the body: {failure}"))),
    }
}

pub(super) fn respond(reply: Reply) -> Response<Body> {
    let mut response = Response::new(reply.body);
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    let (control, tag) = match reply.keep {
        Keep::No => ("no-cache, private", None),
        Keep::Ask(tag) => ("no-cache, private", Some(tag)),
        Keep::Forever(tag) => ("public, immutable, max-age=31536000", Some(tag)),
    };
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(control));
    if let Some(tag) = tag.and_then(|tag| HeaderValue::from_str(&format!("\"{tag}\"")).ok()) {
        headers.insert(header::ETAG, tag);
        headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    }
    for warning in told(reply.warnings) {
        warn(&mut response, &warning);
    }
    response
}

/// Characters of an answer's warnings: of each, and of all that are shortened. As upstream's
/// (`WithWarningRecorder`, staging/src/k8s.io/apiserver/pkg/endpoints/filters/warning.go): clients bound the headers
/// that they take.
const WARNING_CHARS: usize = 256;
const WARNINGS_CHARS: usize = 4_096;

/// Each once; where there is more than clients take each is shortened, and then no more are told.
fn told(warnings: Vec<String>) -> Vec<String> {
    let mut known = BTreeSet::new();
    let once: Vec<String> =
        warnings.into_iter().filter(|warning| known.insert(warning.clone())).collect();
    let all: usize = once.iter().map(|warning| warning.chars().count()).sum();
    if all <= WARNINGS_CHARS {
        return once;
    }
    let mut left = WARNINGS_CHARS;
    once.into_iter()
        .map(|warning| warning.chars().take(WARNING_CHARS).collect::<String>())
        .take_while(|warning| {
            let count = warning.chars().count();
            let fits = count <= left;
            left = left.saturating_sub(count);
            fits
        })
        .collect()
}

fn warn(response: &mut Response<Body>, warning: &str) {
    let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
    if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
        response.headers_mut().append(header::WARNING, value);
    }
}

/// What is told to whoever asks for a resource that upstream advises against, whatever the answer.
fn deprecation<B>(request: &Request<B>) -> Option<&'static str> {
    let path = request.uri().path();
    // Few requests are for these, and few paths are encoded.
    if !path.contains("/endpoints") && !path.contains('%') {
        return None;
    }
    let path = decode_path(path);
    let Route::Resource(target, _) = route(request.method().as_str(), &path, &Query::default())
    else {
        return None;
    };
    let warning = "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice";
    (target.group.is_empty() && target.plural == "endpoints").then_some(warning)
}

/// The answer to a failure.
#[must_use]
pub fn refuse(failure: &ApiError) -> Response<Body> {
    let status = StatusCode::from_u16(failure.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = Bytes::from(error::status(failure).to_string());
    let mut response = respond(Reply::bytes(status, "application/json", body));
    if failure.details.get("retryAfterSeconds").is_some() {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if failure.code == 401 {
        let challenge = HeaderValue::from_static("Bearer realm=\"kubernetes\"");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    }
    response
}

/// `Status` of a deletion that is done.
pub(super) fn success(details: &Value) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": details})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_told_once_and_no_more_of_them_than_clients_take() {
        let some = || vec!["a".to_owned(), "b".to_owned(), "a".to_owned()];
        assert_eq!(told(some()), ["a", "b"]);
        let long = "é".repeat(1_000);
        assert_eq!(told(vec![long.clone()])[0], long, "whole while there is room");
        let many: Vec<_> = (0..1_000).map(|number| format!("{number} {long}")).collect();
        let told = told(many);
        assert_eq!(told.len(), WARNINGS_CHARS / WARNING_CHARS);
        assert!(told.iter().all(|warning| warning.chars().count() == WARNING_CHARS));
    }

    #[test]
    fn whoever_asks_for_endpoints_is_told_of_slices() {
        let told = |path: &str| deprecation(&Request::get(path).body(()).unwrap()).is_some();
        assert!(told("/api/v1/namespaces/default/endpoints/a"));
        assert!(told("/api/v1/endpoints"));
        assert!(!told("/api/v1/namespaces/endpoints/pods"));
        assert!(!told("/apis/discovery.k8s.io/v1/endpointslices"));
    }
}
