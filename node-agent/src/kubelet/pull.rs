//! How a container's image is asked for: the policy, and the registry's credentials. Pure.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use k8s_openapi::api::core::v1::Container;
use serde_json::Value;

use super::images::{Auth, PullPolicy};

/// `imagePullPolicy`, with the API's default where nothing is said.
pub(super) fn pull_policy(container: &Container, image: &str) -> PullPolicy {
    match container.image_pull_policy.as_deref() {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        Some(_) | None => {
            let tagged = image.rsplit('/').next().is_some_and(|last| last.contains(':'));
            if image.ends_with(":latest") || !tagged {
                PullPolicy::Always
            } else {
                PullPolicy::IfNotPresent
            }
        }
    }
}

/// The credentials for an image's registry in a `.dockerconfigjson`.
pub(super) fn docker_auth(config: &[u8], image: &str) -> Option<Auth> {
    let config: Value = serde_json::from_slice(config).ok()?;
    let first = image.split('/').next()?;
    let named = image.contains('/') && (first.contains(['.', ':']) || first == "localhost");
    let registry = if named { first } else { "index.docker.io" };
    let entry = config.get("auths")?.as_object()?.iter().find(|(server, _)| {
        let server = server.split_once("://").map_or(server.as_str(), |(_, rest)| rest);
        server.split('/').next() == Some(registry)
    })?;
    let text = |name: &str| entry.1.get(name).and_then(Value::as_str).map(str::to_owned);
    if let (Some(username), Some(password)) = (text("username"), text("password")) {
        return Some(Auth::Basic { username, password });
    }
    let decoded = BASE64_STANDARD.decode(text("auth")?).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (username, password) = decoded.split_once(':')?;
    Some(Auth::Basic { username: username.to_owned(), password: password.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untagged_and_latest_images_are_always_asked_for() {
        let container = Container::default();
        let table = [
            ("nginx", PullPolicy::Always),
            ("nginx:latest", PullPolicy::Always),
            ("host:5000/nginx", PullPolicy::Always),
            ("host:5000/nginx:1.2", PullPolicy::IfNotPresent),
        ];
        for (image, policy) in table {
            assert_eq!(pull_policy(&container, image), policy, "{image}");
        }
    }

    #[test]
    fn credentials_are_found_by_registry() {
        let config = br#"{"auths": {"https://host:5000/v1/": {"auth": "dTpw"},
            "other.io": {"username": "a", "password": "b"}}}"#;
        let auth = |image| docker_auth(config, image);
        let basic = |username: &str, password: &str| {
            Some(Auth::Basic { username: username.to_owned(), password: password.to_owned() })
        };
        assert_eq!(auth("host:5000/x:1"), basic("u", "p"));
        assert_eq!(auth("other.io/x"), basic("a", "b"));
        assert_eq!(auth("nginx"), None);
    }
}
