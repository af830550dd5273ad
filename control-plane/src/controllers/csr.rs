//! Certificate requests of kubelets: approved when they ask for exactly their own identity, then
//! signed. Pure; the signature itself is a step.
//!
//! Checks follow upstream's `pkg/controller/certificates/{approver,signer}` and
//! `pkg/apis/certificates/helpers.go`. Serving certificates, which upstream leaves to an administrator, are
//! approved when their names are exactly addresses of the asking node's own Node object.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::SignedDuration;
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use serde_json::{Value, json};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
};

use super::{
    conditions::find,
    json::{integer, items, rfc3339, text},
    model::{CSRS, Key, NODES, Object},
    sync::{Act, Context, Controller, Step, Sync, own_key},
    world::{Change, World},
};
use crate::{
    client::Write,
    pki::{LEAF_LIFE, Usage, address},
};

const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";
const NODE_USER: &str = "system:node:";
const NODE_GROUP: &str = "system:nodes";
const BOOTSTRAPPERS: &str = "system:bootstrappers";
/// Upstream's lower bound for `spec.expirationSeconds`.
const MIN_LIFE: Duration = Duration::from_secs(600);
/// Upstream's cleaner: answered requests after an hour, unanswered ones after a day.
const ANSWERED_LIFE: SignedDuration = SignedDuration::from_hours(1);
const PENDING_LIFE: SignedDuration = SignedDuration::from_hours(24);

pub(super) const CONTROLLER: Controller =
    Controller { name: "csr", component: "certificate-controller", keys, sync, first: None };

fn keys(world: &World, change: &Change, out: &mut Vec<Key>) {
    own_key(CSRS, change, out);
    // A serving certificate waits for the node's addresses.
    if change.resource == NODES
        && let Some(node) = &change.new
    {
        let user = format!("{NODE_USER}{}", node.meta.key.name);
        let waits = |request: &Object| {
            text(&request.value, "/spec/username") == user
                && text(&request.value, "/status/certificate").is_empty()
        };
        out.extend(world.all(CSRS).filter(|r| waits(r)).map(|r| r.meta.key.clone()));
    }
}

fn sync(world: &World, key: &Key, context: &Context) -> Sync {
    let Some(request) = world.get(CSRS, key) else { return Sync::done() };
    let conditions = items(&request.value, "/status/conditions");
    let told = |kind: &str| find(conditions, kind).is_some();
    let signed = !text(&request.value, "/status/certificate").is_empty();
    let answered = signed || told("Denied") || told("Failed");
    let life = if answered { ANSWERED_LIFE } else { PENDING_LIFE };
    let end = request.meta.created + life;
    if end <= context.now {
        return Sync::one(Step::delete(request));
    }
    let mut answer =
        Sync::after(Duration::try_from(end.duration_since(context.now)).unwrap_or_default());
    if answered {
        return answer;
    }
    let signer = text(&request.value, "/spec/signerName");
    let usage = match signer {
        CLIENT_SIGNER => Usage::Client,
        SERVING_SIGNER => Usage::Server,
        _ => return answer,
    };
    let checked = pem(request)
        .and_then(|pem| check(world, request, &pem, usage).map(|message| (pem, message)));
    match checked {
        Ok((pem, _)) if told("Approved") => answer.steps.push(sign(request, pem, usage)),
        Ok((_, message)) => answer.steps.push(approve(request, message, context)),
        Err(reason) if told("Approved") => {
            answer.steps.push(refuse(request, &reason, context));
        }
        Err(reason) => {
            tracing::debug!(
                request = key.name,
                reason,
                "certificate request left to an administrator"
            );
        }
    }
    answer
}

fn pem(request: &Object) -> Result<String, String> {
    let bytes = STANDARD
        .decode(text(&request.value, "/spec/request"))
        .map_err(|error| format!("spec.request is not base64: {error}"))?;
    String::from_utf8(bytes).map_err(|error| format!("spec.request is not PEM: {error}"))
}

/// What a request asks for.
#[derive(Debug, Default)]
struct Asked {
    common_name: String,
    organizations: Vec<String>,
    dns: Vec<String>,
    ips: Vec<IpAddr>,
    /// Whether it names anything else, such as an e-mail address.
    other_names: bool,
}

fn parse(pem: &str) -> Result<Asked, String> {
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| format!("not a PEM certificate request: {error}"))?;
    let (_, request) = X509CertificationRequest::from_der(&der)
        .map_err(|error| format!("not a certificate request: {error}"))?;
    let subject = &request.certification_request_info.subject;
    let mut asked = Asked::default();
    for name in subject.iter_common_name() {
        asked.common_name = name.as_str().unwrap_or_default().to_owned();
    }
    for name in subject.iter_organization() {
        asked.organizations.push(name.as_str().unwrap_or_default().to_owned());
    }
    for extension in request.requested_extensions().into_iter().flatten() {
        let ParsedExtension::SubjectAlternativeName(names) = extension else { continue };
        for name in &names.general_names {
            if let GeneralName::DNSName(name) = name {
                asked.dns.push((*name).to_owned());
            } else if let GeneralName::IPAddress(bytes) = name {
                asked.ips.extend(address(bytes));
            } else {
                asked.other_names = true;
            }
        }
    }
    Ok(asked)
}

/// Why the request is approved, or why not.
fn check(world: &World, request: &Object, pem: &str, usage: Usage) -> Result<String, String> {
    let asked = parse(pem)?;
    if asked.organizations != [NODE_GROUP] {
        return Err("organization is not system:nodes".to_owned());
    }
    let Some(node) = asked.common_name.strip_prefix(NODE_USER).filter(|node| !node.is_empty())
    else {
        return Err("common name is not system:node:<name>".to_owned());
    };
    if asked.other_names {
        return Err("only DNS names and IP addresses may be asked for".to_owned());
    }
    usages(request, usage)?;
    let user = text(&request.value, "/spec/username");
    let is_self = user == asked.common_name;
    match usage {
        Usage::Client => {
            if !asked.dns.is_empty() || !asked.ips.is_empty() {
                return Err("a client certificate has no alternative names".to_owned());
            }
            let groups = items(&request.value, "/spec/groups");
            if is_self {
                return Ok("Auto approving self kubelet client certificate.".to_owned());
            }
            if groups.iter().any(|group| group == BOOTSTRAPPERS) {
                return Ok("Auto approving kubelet client certificate.".to_owned());
            }
            Err(format!("{user} is neither the node nor in {BOOTSTRAPPERS}"))
        }
        Usage::Server if !is_self => Err(format!("{user} is not {}", asked.common_name)),
        Usage::Server => addresses(world, node, &asked),
    }
}

fn usages(request: &Object, usage: Usage) -> Result<(), String> {
    let own = match usage {
        Usage::Client => "client auth",
        Usage::Server => "server auth",
    };
    let all: BTreeSet<&str> =
        items(&request.value, "/spec/usages").iter().filter_map(Value::as_str).collect();
    let needed = BTreeSet::from(["digital signature", own]);
    let allowed = BTreeSet::from(["digital signature", "key encipherment", own]);
    if all == needed || all == allowed {
        return Ok(());
    }
    Err(format!("usages are not digital signature, key encipherment, {own}"))
}

fn addresses(world: &World, node: &str, asked: &Asked) -> Result<String, String> {
    if asked.dns.is_empty() && asked.ips.is_empty() {
        return Err("a serving certificate needs a DNS name or an IP address".to_owned());
    }
    let Some(node) = world.get(NODES, &Key::new("", node)) else {
        return Err(format!("there is no node {node}"));
    };
    let known: BTreeSet<&str> = items(&node.value, "/status/addresses")
        .iter()
        .map(|address| text(address, "/address"))
        .collect();
    for name in asked.dns.iter().cloned().chain(asked.ips.iter().map(ToString::to_string)) {
        if !known.contains(name.as_str()) {
            return Err(format!("{name} is not an address of node {}", node.meta.key.name));
        }
    }
    Ok("Auto approving kubelet serving certificate for the node's own addresses.".to_owned())
}

fn conditioned(request: &Object, condition: Value) -> Value {
    let mut value = Value::clone(&request.value);
    let mut conditions = items(&value, "/status/conditions").to_vec();
    conditions.push(condition);
    value["status"]["conditions"] = json!(conditions);
    value
}

fn approve(request: &Object, message: String, context: &Context) -> Step {
    let now = rfc3339(context.now);
    let value = conditioned(
        request,
        json!({
            "type": "Approved", "status": "True", "reason": "AutoApproved", "message": message,
            "lastUpdateTime": now, "lastTransitionTime": now,
        }),
    );
    Step::write(Write::UpdateSub { object: request.place(), subresource: "approval", value })
}

fn refuse(request: &Object, reason: &str, context: &Context) -> Step {
    let now = rfc3339(context.now);
    let value = conditioned(
        request,
        json!({
            "type": "Failed", "status": "True", "reason": "SignerValidationFailure", "message": reason,
            "lastUpdateTime": now, "lastTransitionTime": now,
        }),
    );
    Step::write(Write::UpdateSub { object: request.place(), subresource: "status", value })
}

fn sign(request: &Object, request_pem: String, usage: Usage) -> Step {
    let asked = integer(&request.value, "/spec/expirationSeconds")
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(LEAF_LIFE, Duration::from_secs);
    Step::new(Act::Sign {
        object: request.place(),
        value: Value::clone(&request.value),
        request_pem,
        usage,
        life: asked.clamp(MIN_LIFE, LEAF_LIFE),
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::super::testing::{context, node, world};
    use super::*;

    struct Ask<'a> {
        common_name: &'a str,
        organization: &'a str,
        names: &'a [&'a str],
        signer: &'a str,
        user: &'a str,
        groups: &'a [&'a str],
    }

    fn request(ask: &Ask<'_>, approved: bool) -> Value {
        let names: Vec<String> = ask.names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, ask.organization);
        params.distinguished_name.push(DnType::CommonName, ask.common_name);
        let key = KeyPair::generate().unwrap();
        let pem = params.serialize_request(&key).unwrap().pem().unwrap();
        let own = if ask.signer == CLIENT_SIGNER { "client auth" } else { "server auth" };
        let mut value = json!({
            "kind": "CertificateSigningRequest",
            "metadata": {"name": "r", "uid": "r", "creationTimestamp": "2025-12-31T23:59:00Z"},
            "spec": {
                "request": STANDARD.encode(pem), "signerName": ask.signer,
                "username": ask.user, "groups": ask.groups, "usages": ["digital signature", own],
            },
        });
        if approved {
            value["status"] = json!({"conditions": [{"type": "Approved", "status": "True"}]});
        }
        value
    }

    const JOIN: Ask<'_> = Ask {
        common_name: "system:node:n1",
        organization: NODE_GROUP,
        names: &[],
        signer: CLIENT_SIGNER,
        user: "system:bootstrap:abcdef",
        groups: &[BOOTSTRAPPERS],
    };
    const SERVE: Ask<'_> = Ask {
        names: &["n1", "192.0.2.11"],
        signer: SERVING_SIGNER,
        user: "system:node:n1",
        groups: &[NODE_GROUP],
        ..JOIN
    };

    fn acts(ask: &Ask<'_>, approved: bool) -> Vec<Act> {
        let objects = vec![request(ask, approved), node("n1")];
        let steps = sync(&world(objects), &Key::new("", "r"), &context()).steps;
        steps.into_iter().map(|step| step.act).collect()
    }

    #[test]
    fn a_joining_node_is_approved_then_signed() {
        for ask in [JOIN, SERVE] {
            let acts_now = acts(&ask, false);
            let [Act::Write(Write::UpdateSub { subresource: "approval", value, .. })] =
                &acts_now[..]
            else {
                unreachable!("{acts_now:?}")
            };
            assert_eq!(value["status"]["conditions"][0]["reason"], "AutoApproved");
            assert!(matches!(acts(&ask, true)[..], [Act::Sign { life: LEAF_LIFE, .. }]));
        }
    }

    #[test]
    fn what_is_not_its_own_is_left_to_an_administrator() {
        let table = [
            Ask { common_name: "admin", ..JOIN },
            Ask { common_name: NODE_USER, ..JOIN },
            Ask { organization: "system:masters", ..JOIN },
            Ask { names: &["n1"], ..JOIN },
            Ask { groups: &["system:authenticated"], ..JOIN },
            Ask { user: "system:node:n2", ..SERVE },
            Ask { names: &[], ..SERVE },
            Ask { names: &["kubernetes"], ..SERVE },
            Ask { names: &["192.0.2.12"], ..SERVE },
            Ask { signer: "example.com/other", ..JOIN },
        ];
        for ask in &table {
            assert!(acts(ask, false).is_empty(), "{} {:?}", ask.common_name, ask.names);
        }
        assert!(
            matches!(&acts(&table[0], true)[..], [Act::Write(Write::UpdateSub { value, .. })]
                if value["status"]["conditions"][1]["type"] == "Failed"),
            "not even an administrator gets the node signer to make an administrator"
        );
    }

    #[test]
    fn the_certificate_says_what_was_asked() {
        let dir = tempfile::tempdir().unwrap();
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let pki = crate::pki::Pki::open(dir.path(), now).unwrap();
        let value = request(&SERVE, true);
        let pem =
            String::from_utf8(STANDARD.decode(text(&value, "/spec/request")).unwrap()).unwrap();
        let signed = pki.sign(&pem, Usage::Server, now, MIN_LIFE).unwrap();
        let der = rustls_pki_types::CertificateDer::from_pem_slice(signed.as_bytes()).unwrap();
        let (_, cert) = x509_parser::certificate::X509Certificate::from_der(&der).unwrap();
        assert_eq!(cert.subject().to_string(), "O=system:nodes, CN=system:node:n1");
        assert!(!cert.is_ca());
        assert_eq!(cert.validity().not_after.timestamp() - jiff::Timestamp::as_second(now), 600);
        let names = cert.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 2);
    }
}
