//! Requests for certificates. Pure.
//!
//! Follows upstream's `validateCertificateSigningRequest`; whether the request is well signed is the signer's to find.

use std::collections::BTreeSet;

use api::names;
use base64::Engine as _;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use serde_json::{Value, json};

use super::{invalid, list};
use crate::{
    api::prepare::text,
    schema::{FieldError, Path},
};

const USAGES: &[&str] = &[
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];
/// Seconds: what shorter wishes are refused for.
const SHORTEST: i64 = 600;

pub(super) fn request(object: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let (mut errors, path, spec) = (Vec::new(), Path::new("spec"), &object["spec"]);
    if let Some(old) = old {
        if old["spec"] != *spec {
            errors.push(FieldError::invalid(&path, spec, "field is immutable"));
        }
        return errors;
    }
    let engine = base64::engine::general_purpose::STANDARD;
    let pem = engine.decode(text(spec, "/request")).unwrap_or_default();
    if CertificateSigningRequestDer::from_pem_slice(&pem).is_err() {
        let why = "PEM block type must be CERTIFICATE REQUEST";
        errors.push(FieldError::invalid(&path.child("request"), &spec["request"], why));
    }
    let place = path.child("usages");
    if list(spec, "usages").next().is_none() {
        errors.push(FieldError::required(&place, ""));
    }
    let mut seen = BTreeSet::new();
    for (index, usage) in list(spec, "usages") {
        let (place, word) = (place.index(index), usage.as_str().unwrap_or(""));
        if !USAGES.contains(&word) {
            errors.push(FieldError::not_supported(&place, usage, USAGES));
        }
        if !seen.insert(word) {
            errors.push(FieldError::duplicate(&place, usage));
        }
    }
    signer(&mut errors, &path.child("signerName"), text(spec, "/signerName"));
    let seconds = &spec["expirationSeconds"];
    if seconds.as_i64().is_some_and(|seconds| seconds < SHORTEST) {
        let why = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.push(FieldError::invalid(&path.child("expirationSeconds"), seconds, why));
    }
    errors
}

fn signer(errors: &mut Vec<FieldError>, path: &Path, name: &str) {
    let value = json!(name);
    if name == "kubernetes.io/legacy-unknown" {
        let why = "the legacy signerName is not allowed via this API version";
        return errors.push(FieldError::invalid(path, &value, why));
    }
    let Some((domain, rest)) = name.split_once('/') else {
        errors.push(match name {
            "" => FieldError::required(path, ""),
            _ => {
                let why =
                    "must be a fully qualified domain and path of the form 'example.com/signer-name'";
                FieldError::invalid(path, &value, why)
            }
        });
        return;
    };
    invalid(errors, path, &json!(domain), names::dns1123_subdomain(domain));
    if !domain.contains('.') {
        let why = "should be a domain with at least two segments separated by dots";
        errors.push(FieldError::invalid(path, &json!(domain), why));
    }
    invalid(errors, path, &json!(rest), names::dns1123_subdomain(rest));
}

#[cfg(test)]
mod tests {
    use super::{super::lines, *};

    #[test]
    fn what_is_asked_for() {
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let engine = base64::engine::general_purpose::STANDARD;
        let whole = json!({"request": engine.encode(pem.pem().unwrap()),
            "signerName": "a.b/c", "usages": ["client auth"]});
        let said = |field: &str, value: Value| {
            let mut spec = whole.clone();
            spec[field] = value;
            lines(&request(&json!({ "spec": spec }), None))
        };
        let table = [
            ("expirationSeconds", json!(600), String::new()),
            (
                "request",
                json!("eA=="),
                "spec.request: Invalid value: \"eA==\": PEM block type must be CERTIFICATE REQUEST"
                    .to_owned(),
            ),
            (
                "usages",
                json!(["signing", "signing"]),
                "spec.usages[1]: Duplicate value: \"signing\"".to_owned(),
            ),
            (
                "signerName",
                json!("x"),
                "spec.signerName: Invalid value: \"x\": must be a fully qualified domain and path of the form 'example.com/signer-name'".to_owned(),
            ),
            (
                "signerName",
                json!("kubernetes.io/legacy-unknown"),
                "spec.signerName: Invalid value: \"kubernetes.io/legacy-unknown\": the legacy signerName is not allowed via this API version".to_owned(),
            ),
            (
                "expirationSeconds",
                json!(5),
                "spec.expirationSeconds: Invalid value: 5: may not specify a duration less than 600 seconds (10 minutes)".to_owned(),
            ),
        ];
        for (field, value, want) in table {
            assert_eq!(said(field, value), want);
        }
        assert!(said("usages", json!(["x"])).starts_with("spec.usages[0]: Unsupported value"));
    }
}
