//! Who may do what: administrators, nodes, joining nodes, everybody else. There are no roles yet: a service
//! account may look at discovery and ask about itself, and is refused the rest.

use serde_json::Value;

use crate::{
    api::{
        authn::{AUTHENTICATED, BOOTSTRAPPERS, MASTERS, User},
        core::Api,
        error::qualified,
        prepare::text,
        route::{Target, Verb},
    },
    client::ApiError,
    store::{ListRequest, Scope},
};

/// What is asked for: a resource, or a path that is none.
#[derive(Clone, Copy, Debug)]
pub enum Ask<'a> {
    Resource(&'a Target, Verb),
    Path(&'a str),
}

/// What is known without looking at objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ruling {
    Allow,
    Deny,
    /// A node may, if one of its pods refers to the object.
    IfReferred,
    /// A node may, if the pod is bound to it.
    IfMine,
}

impl Api {
    /// # Errors
    /// 403 in upstream's words.
    pub async fn authorize(&self, user: &User, ask: Ask<'_>) -> Result<(), ApiError> {
        if self.allows(user, ask).await? { Ok(()) } else { Err(forbidden(user, ask)) }
    }

    /// # Errors
    /// When the store fails.
    pub async fn allows(&self, user: &User, ask: Ask<'_>) -> Result<bool, ApiError> {
        let (ruling, target) = match ask {
            Ask::Path(path) => return Ok(path_allowed(user, path)),
            Ask::Resource(target, verb) => (rule(user, target, verb), target),
        };
        let node = user.node().unwrap_or_default();
        match ruling {
            Ruling::Allow => Ok(true),
            Ruling::Deny => Ok(false),
            Ruling::IfMine => {
                let pod = self.peek("core/pods", &target.namespace, &target.name).await?;
                Ok(pod.is_none_or(|pod| text(&pod, "/spec/nodeName") == node))
            }
            Ruling::IfReferred => {
                let namespace = Some(target.namespace.clone());
                let scope = Scope { resource: "core/pods".into(), namespace, name: None };
                let request = ListRequest { scope, at: None, after: None };
                let pods = self.store.list(request).await.map_err(crate::api::error::internal)?;
                Ok(pods.rows.iter().any(|(_, entry)| {
                    entry.attributes.field("spec.nodeName") == node
                        && refers(&entry.value(), &target.plural, &target.name)
                }))
            }
        }
    }
}

/// Paths that anybody may get.
const OPEN: [&str; 4] = ["/healthz", "/livez", "/readyz", "/version"];
/// Paths that whoever is known may get.
const DISCOVERY: [&str; 3] = ["/api", "/apis", "/openapi"];

fn path_allowed(user: &User, path: &str) -> bool {
    let under = |roots: &[&str]| {
        roots.iter().any(|root| {
            path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    };
    user.is_in(MASTERS) || under(&OPEN) || (user.is_in(AUTHENTICATED) && under(&DISCOVERY))
}

fn rule(user: &User, target: &Target, verb: Verb) -> Ruling {
    let what = (target.group.as_str(), target.plural.as_str(), target.subresource.as_str());
    if user.is_in(MASTERS) {
        return Ruling::Allow;
    }
    let about_self = matches!(
        what,
        ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews", "")
            | ("authentication.k8s.io", "selfsubjectreviews", "")
    );
    if about_self && verb == Verb::Create && user.is_in(AUTHENTICATED) {
        return Ruling::Allow;
    }
    let public = what == ("", "configmaps", "")
        && target.namespace == "kube-public"
        && target.name == "cluster-info";
    if public && verb == Verb::Get {
        return Ruling::Allow;
    }
    if user.is_in(BOOTSTRAPPERS) {
        let requests = what == ("certificates.k8s.io", "certificatesigningrequests", "");
        if requests && matches!(verb, Verb::Create | Verb::Get | Verb::List | Verb::Watch) {
            return Ruling::Allow;
        }
    }
    match user.node() {
        Some(node) => node_rule(node, target, verb),
        None => Ruling::Deny,
    }
}

/// `SubjectRulesReviewStatus` of a user: what `kubectl auth can-i --list` prints.
#[must_use]
pub fn rules(user: &User) -> Value {
    use serde_json::json;
    let resource = |verbs: &[&str], group: &str, resources: &[&str], names: &[&str]| {
        let mut rule = json!({"verbs": verbs, "apiGroups": [group], "resources": resources});
        if !names.is_empty() {
            rule["resourceNames"] = json!(names);
        }
        rule
    };
    if user.is_in(MASTERS) {
        return json!({
            "resourceRules": [resource(&["*"], "*", &["*"], &[])],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
            "incomplete": false,
        });
    }
    let mut resources = vec![resource(&["get"], "", &["configmaps"], &["cluster-info"])];
    let mut paths: Vec<String> = spread(&OPEN);
    if user.is_in(AUTHENTICATED) {
        let reviews = ["selfsubjectaccessreviews", "selfsubjectrulesreviews"];
        resources.push(resource(&["create"], "authorization.k8s.io", &reviews, &[]));
        let who = ["selfsubjectreviews"];
        resources.push(resource(&["create"], "authentication.k8s.io", &who, &[]));
        paths.extend(spread(&DISCOVERY));
    }
    let mut status = json!({
        "resourceRules": resources,
        "nonResourceRules": [{"verbs": ["get"], "nonResourceURLs": paths}],
        "incomplete": false,
    });
    if user.node().is_some() || user.is_in(BOOTSTRAPPERS) {
        status["incomplete"] = json!(true);
        status["evaluationError"] = json!("node authorizer does not support user rule resolution");
    }
    status
}

/// Paths and what is below them, in the form of rules.
fn spread(roots: &[&str]) -> Vec<String> {
    roots.iter().flat_map(|root| [(*root).to_owned(), format!("{root}/*")]).collect()
}

/// Upstream's Node authorizer and NodeRestriction, for what kubelets use.
fn node_rule(node: &str, target: &Target, verb: Verb) -> Ruling {
    use Ruling::{Allow, Deny, IfMine, IfReferred};
    let reads = matches!(verb, Verb::Get | Verb::List | Verb::Watch);
    let allow = |yes: bool| if yes { Allow } else { Deny };
    let own = target.name == node;
    match (target.group.as_str(), target.plural.as_str(), target.subresource.as_str()) {
        ("", "nodes", "") => match verb {
            Verb::Get | Verb::List | Verb::Watch | Verb::Create => Allow,
            Verb::Update | Verb::Patch => allow(own),
            Verb::Delete | Verb::DeleteCollection => Deny,
        },
        ("", "nodes", "status") => {
            allow(own && matches!(verb, Verb::Get | Verb::Update | Verb::Patch))
        }
        ("", "pods", "") => match verb {
            Verb::Get | Verb::List | Verb::Watch => Allow,
            Verb::Delete => IfMine,
            Verb::Create | Verb::Update | Verb::Patch | Verb::DeleteCollection => Deny,
        },
        ("", "pods", "status") => match verb {
            Verb::Get | Verb::Update | Verb::Patch => IfMine,
            Verb::List | Verb::Watch | Verb::Create | Verb::Delete | Verb::DeleteCollection => Deny,
        },
        ("", "services" | "namespaces", "") | ("discovery.k8s.io", "endpointslices", "") => {
            allow(reads)
        }
        // The condition that says which field of a Service a node's packet path lacks.
        ("", "services", "status") => allow(verb == Verb::Patch),
        ("", "secrets" | "configmaps", "") => {
            if reads && !target.name.is_empty() {
                IfReferred
            } else {
                Deny
            }
        }
        ("", "serviceaccounts", "") => allow(verb == Verb::Get),
        ("", "serviceaccounts", "token") if verb == Verb::Create => IfReferred,
        ("" | "events.k8s.io", "events", "") => {
            allow(matches!(verb, Verb::Create | Verb::Update | Verb::Patch))
        }
        ("coordination.k8s.io", "leases", "") if target.namespace == "kube-node-lease" => {
            // The name of a new Lease is in the body: the handler looks (`lease_is_mine`).
            allow(own || verb == Verb::Create)
        }
        ("certificates.k8s.io", "certificatesigningrequests", "") => {
            allow(matches!(verb, Verb::Create | Verb::Get | Verb::List | Verb::Watch))
        }
        _ => Deny,
    }
}

/// What NodeRestriction asks of the object that a node creates: its own Node, its own Lease.
#[must_use]
pub fn may_create(user: &User, plural: &str, object: &Value) -> bool {
    let named = matches!(plural, "nodes" | "leases");
    user.node().is_none_or(|node| !named || text(object, "/metadata/name") == node)
}

/// Whether a pod uses an object of its namespace.
fn refers(pod: &Value, plural: &str, name: &str) -> bool {
    let spec = &pod["spec"];
    let is = |value: &Value| value.as_str() == Some(name);
    let items = |value: &Value, key: &str| -> Vec<Value> {
        value.get(key).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let (volume, env_from, key_ref, projected) = match plural {
        "secrets" => (("secret", "secretName"), "secretRef", "secretKeyRef", "secret"),
        "configmaps" => (("configMap", "name"), "configMapRef", "configMapKeyRef", "configMap"),
        _ => return is(&spec["serviceAccountName"]),
    };
    let volumes = items(spec, "volumes");
    let in_volumes = volumes.iter().any(|v| {
        is(&v[volume.0][volume.1])
            || items(&v["projected"], "sources").iter().any(|s| is(&s[projected]["name"]))
    });
    let pulls = plural == "secrets"
        && items(spec, "imagePullSecrets").iter().any(|reference| is(&reference["name"]));
    let containers = ["containers", "initContainers", "ephemeralContainers"];
    let in_containers = containers.iter().flat_map(|list| items(spec, list)).any(|container| {
        items(&container, "envFrom").iter().any(|from| is(&from[env_from]["name"]))
            || items(&container, "env").iter().any(|env| is(&env["valueFrom"][key_ref]["name"]))
    });
    in_volumes || pulls || in_containers
}

fn forbidden(user: &User, ask: Ask<'_>) -> ApiError {
    let (target, verb) = match ask {
        Ask::Path(path) => {
            return ApiError {
                code: 403,
                reason: "Forbidden",
                message: format!("forbidden: User {:?} cannot get path {path:?}", user.name),
                details: serde_json::json!({}),
            };
        }
        Ask::Resource(target, verb) => (target, verb.name()),
    };
    let subresource = match target.subresource.as_str() {
        "" => target.plural.clone(),
        sub => format!("{}/{sub}", target.plural),
    };
    let place = if target.namespace.is_empty() || target.plural == "namespaces" {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", target.namespace)
    };
    let resource = qualified(&target.group, &target.plural);
    let name = if target.name.is_empty() { String::new() } else { format!(" {:?}", target.name) };
    let message = format!(
        "{resource}{name} is forbidden: User {:?} cannot {verb} resource {subresource:?} in API group {:?} {place}",
        user.name, target.group
    );
    let mut details = serde_json::json!({"kind": target.plural});
    for (key, value) in [("name", &target.name), ("group", &target.group)] {
        if !value.is_empty() {
            details[key] = value.clone().into();
        }
    }
    ApiError { code: 403, reason: "Forbidden", message, details }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::authn::NODES;

    fn target(line: &str) -> Target {
        let parts: Vec<&str> = line.split('/').collect();
        let part = |at: usize| parts.get(at).copied().unwrap_or_default().to_owned();
        Target {
            group: part(0),
            version: "v1".into(),
            plural: part(1),
            namespace: part(2),
            name: part(3),
            subresource: part(4),
        }
    }

    #[test]
    fn rules() {
        let node = User::new("system:node:n1", &[NODES, AUTHENTICATED]);
        let joiner = User::new("system:bootstrap:abcdef", &[BOOTSTRAPPERS, AUTHENTICATED]);
        let nobody = User::anonymous();
        let table = [
            (&node, "/nodes//n1/status", Verb::Patch, Ruling::Allow),
            (&node, "/nodes//n2/status", Verb::Patch, Ruling::Deny),
            (&node, "/secrets/a/s", Verb::Get, Ruling::IfReferred),
            (&node, "/secrets/a", Verb::List, Ruling::Deny),
            (&node, "/pods/a/p", Verb::Delete, Ruling::IfMine),
            (&node, "coordination.k8s.io/leases/kube-node-lease/n2", Verb::Update, Ruling::Deny),
            (
                &joiner,
                "certificates.k8s.io/certificatesigningrequests",
                Verb::Create,
                Ruling::Allow,
            ),
            (&joiner, "/nodes", Verb::List, Ruling::Deny),
            (&nobody, "/configmaps/kube-public/cluster-info", Verb::Get, Ruling::Allow),
            (&nobody, "/configmaps/kube-public", Verb::List, Ruling::Deny),
        ];
        for (user, line, verb, want) in table {
            assert_eq!(rule(user, &target(line), verb), want, "{} {verb:?} {line}", user.name);
        }
    }

    #[test]
    fn a_refusal_is_worded_as_upstream() {
        let user = User::new("x", &[AUTHENTICATED]);
        let pods = target("/pods/default");
        assert_eq!(
            forbidden(&user, Ask::Resource(&pods, Verb::List)).message,
            r#"pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "default""#
        );
    }
}
