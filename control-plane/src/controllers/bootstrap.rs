//! What every namespace and every joining node is given: default ServiceAccounts, the CA's
//! ConfigMaps, and the end of bootstrap tokens and of old Events. Pure.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    json::{text, time},
    model::{CONFIG_MAPS, EVENTS, Key, NAMESPACES, Object, SECRETS, SERVICE_ACCOUNTS},
    sync::{Context, Controller, Step, Sync, own_key},
    world::{Change, World},
};

const DEFAULT_ACCOUNT: &str = "default";
const ROOT_CA: &str = "kube-root-ca.crt";
const CLUSTER_INFO: &str = "cluster-info";
const PUBLIC: &str = "kube-public";
/// `--event-ttl`.
const EVENT_TTL: SignedDuration = SignedDuration::from_hours(1);

pub(super) const SERVICE_ACCOUNT: Controller = Controller {
    name: "serviceaccount",
    component: "serviceaccount-controller",
    keys: |_, change, out| {
        namespace_keys(change, (SERVICE_ACCOUNTS, DEFAULT_ACCOUNT), out);
    },
    sync: default_account,
    first: None,
};

pub(super) const ROOT_CA_PUBLISHER: Controller = Controller {
    name: "root-ca-certificate-publisher",
    component: "root-ca-cert-publisher",
    keys: |_, change, out| namespace_keys(change, (CONFIG_MAPS, ROOT_CA), out),
    sync: root_ca,
    first: None,
};

pub(super) const SIGNER: Controller = Controller {
    name: "bootstrapsigner",
    component: "bootstrap-signer",
    keys: |_, change, out| {
        namespace_keys(change, (CONFIG_MAPS, CLUSTER_INFO), out);
        out.retain(|key| key.name == PUBLIC);
    },
    sync: cluster_info,
    first: None,
};

pub(super) const TOKEN_CLEANER: Controller = Controller {
    name: "tokencleaner",
    component: "token-cleaner",
    keys: |_, change, out| {
        own_key(SECRETS, change, out);
        out.retain(|key| key.namespace == "kube-system");
    },
    sync: expired_token,
    first: None,
};

pub(super) const EVENT_TTL_CONTROLLER: Controller = Controller {
    name: "event-ttl",
    component: "event-ttl-controller",
    keys: |_, change, out| own_key(EVENTS, change, out),
    sync: old_event,
    first: None,
};

/// The namespace's key for a change of the namespace, or of the object of this name in it.
fn namespace_keys(
    change: &Change,
    (resource, name): (crate::client::Resource, &str),
    out: &mut Vec<Key>,
) {
    own_key(NAMESPACES, change, out);
    if change.resource == resource
        && let Some(object) = change.object()
        && object.meta.key.name == name
    {
        out.push(Key::new("", &object.meta.key.namespace));
    }
}

fn lives(world: &World, key: &Key) -> bool {
    world.get(NAMESPACES, key).is_some_and(|namespace| namespace.meta.deleted.is_none())
}

fn default_account(world: &World, key: &Key, _context: &Context) -> Sync {
    let account = Key::new(&key.name, DEFAULT_ACCOUNT);
    if !lives(world, key) || world.get(SERVICE_ACCOUNTS, &account).is_some() {
        return Sync::done();
    }
    let object = json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": DEFAULT_ACCOUNT, "namespace": key.name},
    });
    Sync::one(Step::create(SERVICE_ACCOUNTS, &key.name, object))
}

fn root_ca(world: &World, key: &Key, _context: &Context) -> Sync {
    let data = json!({"ca.crt": world.settings.ca_pem});
    let note = json!({"kubernetes.io/description":
        "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters."});
    config_map(world, key, (ROOT_CA, data, note))
}

fn cluster_info(world: &World, key: &Key, _context: &Context) -> Sync {
    let ca = STANDARD.encode(&world.settings.ca_pem);
    let server = &world.settings.server_url;
    // The shape that `kubeadm join` reads: one nameless cluster, no user.
    let kubeconfig = format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca}\n    server: {server}\n  name: \"\"\ncontexts: null\ncurrent-context: \"\"\nkind: Config\npreferences: {{}}\nusers: null\n"
    );
    config_map(world, key, (CLUSTER_INFO, json!({"kubeconfig": kubeconfig}), Value::Null))
}

fn config_map(
    world: &World,
    namespace: &Key,
    (name, data, annotations): (&str, Value, Value),
) -> Sync {
    if !lives(world, namespace) {
        return Sync::done();
    }
    let Some(found) = world.get(CONFIG_MAPS, &Key::new(&namespace.name, name)) else {
        let mut object = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": namespace.name},
            "data": data,
        });
        if !annotations.is_null() {
            object["metadata"]["annotations"] = annotations;
        }
        return Sync::one(Step::create(CONFIG_MAPS, &namespace.name, object));
    };
    let right =
        data.as_object().into_iter().flatten().all(|(key, value)| {
            found.value.get("data").and_then(|data| data.get(key)) == Some(value)
        });
    if right {
        return Sync::done();
    }
    Sync::one(Step::patch(found.place(), json!({"data": data})))
}

/// Deletes at `end`, or looks again then.
fn delete_at(object: &Object, end: Timestamp, now: Timestamp) -> Sync {
    if end <= now {
        return Sync::one(Step::delete(object));
    }
    Sync::after(Duration::try_from(end.duration_since(now)).unwrap_or_default())
}

fn expired_token(world: &World, key: &Key, context: &Context) -> Sync {
    let Some(secret) = world.get(SECRETS, key) else { return Sync::done() };
    let end = STANDARD
        .decode(text(&secret.value, "/data/expiration"))
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| text.parse::<Timestamp>().ok());
    match end {
        Some(end) if text(&secret.value, "/type") == "bootstrap.kubernetes.io/token" => {
            delete_at(secret, end, context.now)
        }
        Some(_) | None => Sync::done(),
    }
}

fn old_event(world: &World, key: &Key, context: &Context) -> Sync {
    let Some(event) = world.get(EVENTS, key) else { return Sync::done() };
    let last = ["/series/lastObservedTime", "/lastTimestamp", "/eventTime"]
        .iter()
        .filter_map(|pointer| time(&event.value, pointer))
        .max()
        .unwrap_or(event.meta.created);
    delete_at(event, last.saturating_add(EVENT_TTL).unwrap_or(Timestamp::MAX), context.now)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, world};
    use super::*;
    use crate::client::Write;

    fn namespace(name: &str) -> Value {
        json!({"kind": "Namespace", "metadata": {"name": name, "uid": name}})
    }

    fn created(controller: &Controller, objects: Vec<Value>, name: &str) -> Vec<Write> {
        (controller.sync)(&world(objects), &Key::new("", name), &context()).writes()
    }

    #[test]
    fn each_namespace_gets_its_account_and_ca_once() {
        for (controller, kind) in
            [(SERVICE_ACCOUNT, "ServiceAccount"), (ROOT_CA_PUBLISHER, "ConfigMap")]
        {
            let writes = created(&controller, vec![namespace("ns")], "ns");
            let [Write::Create { namespace: place, object, .. }] = &writes[..] else {
                unreachable!()
            };
            assert_eq!((place.as_str(), object["kind"].as_str()), ("ns", Some(kind)));
            let all = vec![namespace("ns"), object.clone()];
            assert_eq!(created(&controller, all, "ns"), []);
            let mut going = namespace("ns");
            going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            assert_eq!(created(&controller, vec![going], "ns"), []);
        }
    }

    #[test]
    fn a_changed_ca_is_put_back() {
        let mut wrong = json!({"kind": "ConfigMap", "metadata": {"name": ROOT_CA, "namespace": "ns", "uid": "c"}});
        wrong["data"] = json!({"ca.crt": "other"});
        let writes = created(&ROOT_CA_PUBLISHER, vec![namespace("ns"), wrong], "ns");
        let [Write::Patch { patch, .. }] = &writes[..] else { unreachable!() };
        assert_eq!(patch["data"]["ca.crt"], "CA");
    }

    #[test]
    fn cluster_info_is_a_kubeconfig() {
        let writes = created(&SIGNER, vec![namespace(PUBLIC)], PUBLIC);
        let [Write::Create { object, .. }] = &writes[..] else { unreachable!() };
        let parsed: Value =
            serde_yaml_ng::from_str(object["data"]["kubeconfig"].as_str().unwrap()).unwrap();
        assert_eq!(parsed["clusters"][0]["cluster"]["server"], "https://192.0.2.1:6443");
        assert_eq!(
            parsed["clusters"][0]["cluster"]["certificate-authority-data"],
            STANDARD.encode("CA")
        );
    }

    #[test]
    fn tokens_and_events_end_at_their_time() {
        let token = |end: &str| {
            json!({
                "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
                "metadata": {"name": "t", "namespace": "kube-system", "uid": "t"},
                "data": {"expiration": STANDARD.encode(end)},
            })
        };
        let sync = |end: &str| {
            expired_token(&world(vec![token(end)]), &Key::new("kube-system", "t"), &context())
        };
        assert_eq!(sync("2025-12-31T23:59:59Z").steps.len(), 1);
        assert_eq!(sync("2026-01-01T00:00:10Z").requeue, Some(Duration::from_secs(10)));
        let event = json!({
            "kind": "Event", "metadata": {"name": "e", "namespace": "ns", "uid": "e"},
            "lastTimestamp": "2025-12-31T23:30:00Z",
        });
        let answer = old_event(&world(vec![event]), &Key::new("ns", "e"), &context());
        assert_eq!((answer.steps.len(), answer.requeue), (0, Some(Duration::from_secs(1800))));
    }
}
