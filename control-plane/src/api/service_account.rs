//! Service account tokens: JWTs signed ES256 (RFC 7518 section 3.4) with the cluster's key.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as B64};
use jiff::Timestamp;
use rcgen::{KeyPair, PublicKeyData as _, SigningKey as _};
use rustls_pki_types::alg_id;
use serde_json::{Value, json};

use crate::api::authn::{AUTHENTICATED, User};

/// Who issues tokens, and the audience of tokens for this server.
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// The key that signs and checks tokens.
pub struct Keys(KeyPair);

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    pub namespace: String,
    pub account: String,
    pub account_uid: String,
    /// Name and uid.
    pub pod: Option<(String, String)>,
    /// The pod's, name and uid.
    pub node: Option<(String, String)>,
    /// Whom the token is for.
    pub audiences: Vec<String>,
    /// Seconds since 1970.
    pub issued: i64,
    pub expires: i64,
}

impl Claims {
    #[must_use]
    pub fn user(&self) -> User {
        let name = format!("system:serviceaccount:{}:{}", self.namespace, self.account);
        let mut user = User { groups: groups(&name), name, ..User::default() };
        user.groups.push(AUTHENTICATED.to_owned());
        user.uid.clone_from(&self.account_uid);
        if let Some((name, uid)) = &self.pod {
            let extra = |key: &str| format!("authentication.kubernetes.io/{key}");
            user.extra.insert(extra("pod-name"), vec![name.clone()]);
            user.extra.insert(extra("pod-uid"), vec![uid.clone()]);
            if let Some((name, uid)) = &self.node {
                user.extra.insert(extra("node-name"), vec![name.clone()]);
                user.extra.insert(extra("node-uid"), vec![uid.clone()]);
            }
        }
        user
    }

    fn to_json(&self) -> Value {
        let mut own = json!({"namespace": self.namespace,
            "serviceaccount": {"name": self.account, "uid": self.account_uid}});
        if let Some((name, uid)) = &self.pod {
            own["pod"] = json!({"name": name, "uid": uid});
        }
        if let Some((name, uid)) = &self.node {
            own["node"] = json!({"name": name, "uid": uid});
        }
        json!({"iss": ISSUER, "aud": self.audiences, "iat": self.issued, "nbf": self.issued,
            "exp": self.expires, "kubernetes.io": own,
            "sub": format!("system:serviceaccount:{}:{}", self.namespace, self.account)})
    }

    fn read(claims: &Value) -> Option<Self> {
        let own = &claims["kubernetes.io"];
        let owned = |value: &Value| value.as_str().map(str::to_owned);
        let pair = |of: &Value| owned(&of["name"]).zip(owned(&of["uid"]));
        let audiences = claims["aud"].as_array()?.iter().filter_map(owned).collect();
        Some(Self {
            namespace: owned(&own["namespace"])?,
            account: owned(&own["serviceaccount"]["name"])?,
            account_uid: owned(&own["serviceaccount"]["uid"])?,
            pod: pair(&own["pod"]),
            node: pair(&own["node"]),
            audiences,
            issued: claims["iat"].as_i64()?,
            expires: claims["exp"].as_i64()?,
        })
    }
}

/// The groups of a service account by its user name; none for another user.
#[must_use]
pub fn groups(user: &str) -> Vec<String> {
    let account = user.strip_prefix("system:serviceaccount:");
    let Some((namespace, _)) = account.and_then(|account| account.split_once(':')) else {
        return Vec::new();
    };
    vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")]
}

impl Keys {
    /// From an EC P-256 private key, PKCS#8 PEM.
    ///
    /// # Errors
    /// When it is none.
    pub fn new(pem: &str) -> Result<Self, rcgen::Error> {
        KeyPair::from_pem(pem).map(Self)
    }

    /// A signed token.
    ///
    /// # Errors
    /// When signing fails; a retry may help (it needs randomness).
    pub fn sign(&self, claims: &Claims) -> Result<String, String> {
        let header = json!({"alg": "ES256", "typ": "JWT"});
        let text = format!(
            "{}.{}",
            B64.encode(header.to_string()),
            B64.encode(claims.to_json().to_string())
        );
        let der = self.0.sign(text.as_bytes()).map_err(|error| error.to_string())?;
        let raw = raw_signature(&der).ok_or("the key is not an EC P-256 key")?;
        Ok(format!("{text}.{}", B64.encode(raw)))
    }

    /// Checks signature, issuer and time, not the audience.
    ///
    /// # Errors
    /// Why the token is refused.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Claims, String> {
        let wrong = || "the bearer token is not valid".to_owned();
        let (text, signature) = token.rsplit_once('.').ok_or_else(wrong)?;
        let (header, claims) = text.split_once('.').ok_or_else(wrong)?;
        let json =
            |part: &str| -> Option<Value> { serde_json::from_slice(&B64.decode(part).ok()?).ok() };
        let signature = B64.decode(signature).ok().and_then(|raw| der_signature(&raw));
        let signature = signature.ok_or_else(wrong)?;
        if json(header).is_none_or(|header| header["alg"] != "ES256") {
            return Err(wrong());
        }
        if !self.signed(text.as_bytes(), &signature) {
            return Err(wrong());
        }
        let claims = json(claims).filter(|claims| claims["iss"] == ISSUER).ok_or_else(wrong)?;
        let claims = Claims::read(&claims).ok_or_else(wrong)?;
        if claims.expires <= now.as_second() {
            return Err("the service account token has expired".to_owned());
        }
        Ok(claims)
    }

    fn signed(&self, text: &[u8], signature: &[u8]) -> bool {
        let provider = rustls::crypto::ring::default_provider();
        provider.signature_verification_algorithms.all.iter().any(|algorithm| {
            algorithm.public_key_alg_id() == alg_id::ECDSA_P256
                && algorithm.signature_alg_id() == alg_id::ECDSA_SHA256
                && algorithm.verify_signature(self.0.der_bytes(), text, signature).is_ok()
        })
    }
}

/// `SEQUENCE { INTEGER r, INTEGER s }` to 32 bytes each.
fn raw_signature(der: &[u8]) -> Option<Vec<u8>> {
    let mut rest = der.get(2..)?;
    let mut raw = Vec::with_capacity(64);
    for _ in 0..2 {
        let length = usize::from(*rest.get(1)?);
        let number = rest.get(2..2 + length)?;
        let digits = number.get(length.saturating_sub(32)..)?;
        raw.resize(raw.len() + 32 - digits.len(), 0);
        raw.extend_from_slice(digits);
        rest = rest.get(2 + length..)?;
    }
    Some(raw)
}

/// The other way round.
fn der_signature(raw: &[u8]) -> Option<Vec<u8>> {
    let (r, s) = raw.split_at_checked(32).filter(|(_, s)| s.len() == 32)?;
    let mut body = Vec::with_capacity(70);
    for number in [r, s] {
        let zeros = number.iter().take_while(|byte| **byte == 0).count().min(31);
        let digits = number.get(zeros..)?;
        let sign = digits.first().is_some_and(|byte| *byte >= 0x80);
        body.push(2);
        body.push(u8::try_from(digits.len() + usize::from(sign)).ok()?);
        if sign {
            body.push(0);
        }
        body.extend_from_slice(digits);
    }
    let mut der = vec![0x30, u8::try_from(body.len()).ok()?];
    der.extend_from_slice(&body);
    Some(der)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_what_was_signed_until_it_expires() {
        let keys = Keys(KeyPair::generate().unwrap());
        let claims = Claims {
            namespace: "default".into(),
            account: "default".into(),
            account_uid: "u".into(),
            pod: Some(("p".into(), "pu".into())),
            node: Some(("n".into(), "nu".into())),
            audiences: vec![ISSUER.into()],
            issued: 1000,
            expires: 2000,
        };
        for _ in 0..64 {
            let token = keys.sign(&claims).unwrap();
            let at = |second| Timestamp::from_second(second).unwrap();
            assert_eq!(keys.verify(&token, at(1500)), Ok(claims.clone()));
            assert!(keys.verify(&token, at(2000)).unwrap_err().contains("expired"));
            let other = Keys(KeyPair::generate().unwrap());
            other.verify(&token, at(1500)).unwrap_err();
        }
    }
}
