//! Events about Services and pods' ports, as every task of the dataplane writes them.
//!
//! Pure but for the time of day, and [`write`].

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};

use kube::{Api, Client, api::PostParams};

use crate::model::ObjectKey;

/// After this what could not be told is tried again: a server that starts anew is back by then.
pub(crate) const AGAIN: Duration = Duration::from_secs(30);

/// Writes an Event, unless this node wrote it before it restarted.
pub(crate) async fn write(client: &Client, event: &Event) -> kube::Result<()> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    let events = Api::<Event>::namespaced(client.clone(), namespace);
    match events.create(&PostParams::default(), event).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        other => other.map(drop),
    }
}

/// Whether the server does not answer, so that it would take nothing else either.
pub(crate) const fn is_away(error: &kube::Error) -> bool {
    !matches!(error, kube::Error::Api(_))
}

/// What an Event is about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct About<'a> {
    /// `Service` or `Pod`.
    pub(crate) kind: &'static str,
    pub(crate) key: &'a ObjectKey,
    pub(crate) uid: &'a str,
}

/// A warning. The same `cause` on the same node gets the same name, so that it is told once, also by an agent
/// that was started anew.
pub(crate) fn warning(
    about: About<'_>,
    node: &str,
    reason: &str,
    cause: &str,
    message: String,
) -> Event {
    let About { kind, key, uid } = about;
    let now = Time(jiff::Timestamp::now());
    let mark = fingerprint(&[uid, cause, node]);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{mark:016x}", key.name)),
            namespace: Some(key.namespace.to_string()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(kind.to_owned()),
            name: Some(key.name.to_string()),
            namespace: Some(key.namespace.to_string()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        source: Some(EventSource {
            component: Some("orlop-dataplane".to_owned()),
            host: Some(node.to_owned()),
        }),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        ..Event::default()
    }
}

/// FNV-1a over the parts.
fn fingerprint(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
