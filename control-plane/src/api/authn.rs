//! Who calls: client certificates and bearer tokens.

use std::{collections::BTreeMap, sync::Arc};

use base64::Engine as _;
use jiff::Timestamp;
use serde_json::Value;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    api::{core::Api, error, prepare::text, service_account},
    client::ApiError,
};

pub const AUTHENTICATED: &str = "system:authenticated";
pub const MASTERS: &str = "system:masters";
pub const NODES: &str = "system:nodes";
pub const BOOTSTRAPPERS: &str = "system:bootstrappers";

/// `authentication/v1` `UserInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    #[must_use]
    pub fn new(name: &str, groups: &[&str]) -> Self {
        let groups = groups.iter().copied().map(str::to_owned).collect();
        Self { name: name.to_owned(), groups, ..Self::default() }
    }

    #[must_use]
    pub fn anonymous() -> Self {
        Self::new("system:anonymous", &["system:unauthenticated"])
    }

    #[must_use]
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// The node's name, if the user is a kubelet.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.name.strip_prefix("system:node:").filter(|_| self.is_in(NODES))
    }

    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut info = serde_json::json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            info["uid"] = self.uid.clone().into();
        }
        if !self.extra.is_empty() {
            info["extra"] = serde_json::json!(self.extra);
        }
        info
    }
}

/// The user of a verified client certificate: common name and organizations.
#[must_use]
pub fn of_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> = subject
        .iter_organization()
        .filter_map(|organization| organization.as_str().ok().map(str::to_owned))
        .collect();
    groups.push(AUTHENTICATED.to_owned());
    Some(User { name, groups, ..User::default() })
}

impl Api {
    /// The caller, by bearer token if there is one, else by certificate, else anonymous.
    ///
    /// # Errors
    /// 401 for a token that is not (or no longer) valid.
    pub async fn authenticate(
        &self,
        authorization: Option<&str>,
        certificate: Option<&Arc<User>>,
    ) -> Result<Arc<User>, ApiError> {
        if let Some(user) = certificate {
            return Ok(Arc::clone(user));
        }
        let Some(header) = authorization else { return Ok(Arc::new(User::anonymous())) };
        let token = header.split_once(' ').filter(|(kind, _)| kind.eq_ignore_ascii_case("bearer"));
        let Some((_, token)) = token else { return Ok(Arc::new(User::anonymous())) };
        let own = [service_account::ISSUER.to_owned()];
        self.token_user(token.trim(), &own).await.map(|(user, _)| Arc::new(user))
    }

    /// The user of a bearer token, and for which of the audiences the token is.
    ///
    /// # Errors
    /// 401, saying why; also for a token that is for none of the audiences.
    pub async fn token_user(
        &self,
        token: &str,
        audiences: &[String],
    ) -> Result<(User, Vec<String>), ApiError> {
        if let Some((id, secret)) = split_bootstrap(token) {
            let name = format!("bootstrap-token-{id}");
            let stored = self.peek("core/secrets", "kube-system", &name).await?;
            let user = bootstrap(stored.as_deref(), (id, secret), Timestamp::now());
            return user.map(|user| (user, audiences.to_vec())).map_err(refused);
        }
        let Some(keys) = &self.service_accounts else {
            return Err(refused("the bearer token is of no known kind".to_owned()));
        };
        let claims = keys.verify(token, Timestamp::now()).map_err(refused)?;
        let meant: Vec<String> =
            audiences.iter().filter(|one| claims.audiences.contains(one)).cloned().collect();
        if meant.is_empty() {
            return Err(refused(format!("the token is for the audiences {:?}", claims.audiences)));
        }
        self.check_bound(&claims).await?;
        Ok((claims.user(), meant))
    }

    /// A token ends with what it is bound to.
    async fn check_bound(&self, claims: &service_account::Claims) -> Result<(), ApiError> {
        let bound = [
            ("core/serviceaccounts", Some((&claims.account, &claims.account_uid))),
            ("core/pods", claims.pod.as_ref().map(|(name, uid)| (name, uid))),
        ];
        for (resource, object) in bound {
            let Some((name, uid)) = object else { continue };
            let found = self.peek(resource, &claims.namespace, name).await?;
            if found.is_none_or(|found| text(&found, "/metadata/uid") != *uid) {
                return Err(refused(format!("the service account token's {name:?} is gone")));
            }
        }
        Ok(())
    }
}

fn refused(why: String) -> ApiError {
    let mut error = error::unauthorized();
    error.message = format!("Unauthorized: {why}");
    error
}

/// `id.secret`: 6 and 16 characters of a-z and 0-9.
fn split_bootstrap(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (id.len() == 6 && secret.len() == 16 && plain(id) && plain(secret)).then_some((id, secret))
}

/// Checks a bootstrap token against its Secret. Pure.
fn bootstrap(
    stored: Option<&Value>,
    (id, secret): (&str, &str),
    now: Timestamp,
) -> Result<User, String> {
    let unknown = || format!("bootstrap token {id:?} is not known or its secret is wrong");
    let stored = stored.ok_or_else(unknown)?;
    let data = |key: &str| {
        let encoded = stored["data"][key].as_str()?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
        String::from_utf8(bytes).ok()
    };
    let same = data("token-secret").is_some_and(|known| equal(known.as_bytes(), secret.as_bytes()));
    let kind = stored["type"] == "bootstrap.kubernetes.io/token";
    if !kind || !same || data("token-id").as_deref() != Some(id) {
        return Err(unknown());
    }
    if !text(stored, "/metadata/deletionTimestamp").is_empty() {
        return Err(unknown());
    }
    if let Some(end) = data("expiration") {
        let ended = end.parse::<Timestamp>().ok().is_none_or(|end| end <= now);
        if ended {
            return Err(format!("bootstrap token {id:?} expired at {end}"));
        }
    }
    if data("usage-bootstrap-authentication").as_deref() != Some("true") {
        return Err(format!("bootstrap token {id:?} is not for authentication"));
    }
    let extra = data("auth-extra-groups").unwrap_or_default();
    let mut groups = vec![BOOTSTRAPPERS.to_owned(), AUTHENTICATED.to_owned()];
    groups.extend(
        extra.split(',').filter(|g| g.starts_with("system:bootstrappers:")).map(str::to_owned),
    );
    Ok(User { name: format!("system:bootstrap:{id}"), groups, ..User::default() })
}

/// Compares in a time that tells nothing about where they differ.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |bits, (a, b)| bits | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bootstrap_tokens_expire_and_wrong_ones_are_refused() {
        let b64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let secret = |expiration: &str| {
            json!({"type": "bootstrap.kubernetes.io/token", "data": {
                "token-id": b64("abcdef"), "token-secret": b64("0123456789abcdef"),
                "expiration": b64(expiration), "usage-bootstrap-authentication": b64("true"),
                "auth-extra-groups": b64("system:bootstrappers:x,system:masters")}})
        };
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let good = secret("2026-01-02T00:00:00Z");
        let right = ("abcdef", "0123456789abcdef");
        let user = bootstrap(Some(&good), right, now).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert!(user.is_in("system:bootstrappers:x") && !user.is_in(MASTERS));
        let old = secret("2025-12-31T00:00:00Z");
        assert!(bootstrap(Some(&old), right, now).unwrap_err().contains("expired"));
        bootstrap(Some(&good), ("abcdef", "0123456789abcdeX"), now).unwrap_err();
        bootstrap(None, right, now).unwrap_err();
        assert_eq!(split_bootstrap("abcdef.0123456789abcde"), None);
    }
}
