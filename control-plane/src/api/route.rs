//! What a request line asks for. Pure.

use crate::api::query::Query;

/// A resource's place in a path, nothing of it checked against what is served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub group: String,
    pub version: String,
    pub plural: String,
    /// Empty: all namespaces, or cluster-scoped.
    pub namespace: String,
    /// Empty: the collection.
    pub name: String,
    pub subresource: String,
}

/// Upstream's request verbs, as authorization names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
    Patch,
    Delete,
    DeleteCollection,
}

impl Verb {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::List => "list",
            Self::Watch => "watch",
            Self::Create => "create",
            Self::Update => "update",
            Self::Patch => "patch",
            Self::Delete => "delete",
            Self::DeleteCollection => "deletecollection",
        }
    }

    #[must_use]
    pub fn mutates(self) -> bool {
        match self {
            Self::Get | Self::List | Self::Watch => false,
            Self::Create | Self::Update | Self::Patch | Self::Delete | Self::DeleteCollection => {
                true
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/readyz`, `/livez`, `/healthz`, perhaps with a check's name behind.
    Health,
    Version,
    Metrics,
    /// `/api`, `/apis`, `/api/v1`, `/apis/GROUP[/VERSION]`.
    Discovery,
    /// `/openapi/v2`, `/openapi/v3…`.
    OpenApi,
    /// `/.well-known/openid-configuration`, `/openid/v1/jwks`.
    OpenId,
    Resource(Target, Verb),
    /// Known path, unknown method.
    Method,
    Unknown,
}

/// Reads method and (decoded) path.
#[must_use]
pub fn route(method: &str, path: &str, query: &Query) -> Route {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        ["readyz" | "livez" | "healthz", ..] => Route::Health,
        ["version"] => Route::Version,
        ["metrics"] => Route::Metrics,
        ["openapi", ..] => Route::OpenApi,
        [".well-known", "openid-configuration"] | ["openid", "v1", "jwks"] => Route::OpenId,
        ["api" | "apis"] | ["api", _] | ["apis", _] | ["apis", _, _] => Route::Discovery,
        ["api", version, rest @ ..] => resource(method, target("", version, rest), query),
        ["apis", group, version, rest @ ..] => {
            resource(method, target(group, version, rest), query)
        }
        _ => Route::Unknown,
    }
}

fn target(group: &str, version: &str, rest: &[&str]) -> Option<Target> {
    let (namespace, plural, rest) = match rest {
        // A namespace's own subresources look like a resource in it.
        ["namespaces", _, "status" | "finalize"] => ("", "namespaces", rest.get(1..)?),
        ["namespaces", namespace, plural, rest @ ..] => (*namespace, *plural, rest),
        [plural, rest @ ..] => ("", *plural, rest),
        [] => return None,
    };
    let (name, subresource) = match rest {
        [] => ("", String::new()),
        [name, sub @ ..] => (*name, sub.join("/")),
    };
    Some(Target {
        group: group.to_owned(),
        version: version.to_owned(),
        plural: plural.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        subresource,
    })
}

fn resource(method: &str, target: Option<Target>, query: &Query) -> Route {
    let Some(target) = target else { return Route::Unknown };
    let collection = target.name.is_empty();
    let watch = matches!(query.first("watch"), Some("true" | "1" | ""));
    let verb = match method {
        "GET" | "HEAD" if watch && target.subresource.is_empty() => Verb::Watch,
        "GET" | "HEAD" if collection => Verb::List,
        "GET" | "HEAD" => Verb::Get,
        "POST" => Verb::Create,
        "PUT" if !collection => Verb::Update,
        "PATCH" if !collection => Verb::Patch,
        "DELETE" if collection => Verb::DeleteCollection,
        "DELETE" => Verb::Delete,
        _ => return Route::Method,
    };
    Route::Resource(target, verb)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> String {
        let (method, url) = line.split_once(' ').unwrap();
        let (path, query) = url.split_once('?').unwrap_or((url, ""));
        match route(method, path, &Query::parse(query)) {
            Route::Resource(t, verb) => format!(
                "{} {}/{}/{} ns={} name={} sub={}",
                verb.name(),
                t.group,
                t.version,
                t.plural,
                t.namespace,
                t.name,
                t.subresource
            ),
            other @ (Route::Health
            | Route::Version
            | Route::Metrics
            | Route::Discovery
            | Route::OpenApi
            | Route::OpenId
            | Route::Method
            | Route::Unknown) => format!("{other:?}"),
        }
    }

    #[test]
    fn request_lines() {
        let table = [
            ("GET /api/v1/pods", "list /v1/pods ns= name= sub="),
            ("GET /api/v1/namespaces/a/pods/p/log?container=c", "get /v1/pods ns=a name=p sub=log"),
            ("GET /api/v1/namespaces/a/pods?watch=true", "watch /v1/pods ns=a name= sub="),
            ("GET /api/v1/namespaces/a/pods?watch=false", "list /v1/pods ns=a name= sub="),
            ("PUT /api/v1/namespaces/a/finalize", "update /v1/namespaces ns= name=a sub=finalize"),
            ("DELETE /api/v1/namespaces/a", "delete /v1/namespaces ns= name=a sub="),
            (
                "PATCH /apis/apps/v1/namespaces/a/deployments/d/scale",
                "patch apps/v1/deployments ns=a name=d sub=scale",
            ),
            ("DELETE /api/v1/namespaces/a/pods", "deletecollection /v1/pods ns=a name= sub="),
            ("PUT /api/v1/namespaces/a/pods", "Method"),
            ("GET /apis/apps/v1", "Discovery"),
            ("GET /readyz/ping", "Health"),
            ("GET /x", "Unknown"),
        ];
        for (line, want) in table {
            assert_eq!(of(line), want, "{line}");
        }
    }
}
