//! Events of connections as people read them: with names, in words, and only those that are wanted.
//!
//! Pure: events and names in, lines out.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ebpf_common::{
    addr::Addr,
    conntrack::FORWARD,
    event::{CLOSED, DROPPED, Event, SOCKET},
    service::Peer,
    verdict::DropReason,
};
use serde_json::{Value, json};

use super::flows::{Want, protocol};
use crate::model::{LocalEndpoint, ObjectKey, ServiceRow};

/// What addresses are called.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pods: BTreeMap<IpAddr, ObjectKey>,
    namespaces: BTreeMap<u64, ObjectKey>,
    /// By address and port; node ports at no address.
    frontends: BTreeMap<(Option<IpAddr>, u16, u8), ObjectKey>,
    /// The node's own network namespace, and its name.
    node: Option<(u64, ObjectKey)>,
}

impl Names {
    /// Names of this node's pods and of services.
    #[must_use]
    pub fn new<'a>(
        pods: impl IntoIterator<Item = &'a Arc<LocalEndpoint>>,
        services: impl IntoIterator<Item = &'a (ObjectKey, Arc<ServiceRow>)>,
    ) -> Self {
        let mut names = Self::default();
        for pod in pods {
            names.pods.insert(pod.ip, pod.pod.clone());
            if pod.netns_cookie != 0 {
                names.namespaces.insert(pod.netns_cookie, pod.pod.clone());
            }
        }
        for (key, row) in services {
            let ips = row.cluster_ips.iter().chain(&row.external_ips).chain(&row.ingress_ips);
            for ip in ips.copied() {
                for port in &row.ports {
                    let at = (Some(ip), port.port, u8_of(port.protocol));
                    names.frontends.entry(at).or_insert_with(|| key.clone());
                }
            }
            for port in row.ports.iter().filter(|port| port.node_port != 0) {
                let at = (None, port.node_port, u8_of(port.protocol));
                names.frontends.entry(at).or_insert_with(|| key.clone());
            }
        }
        names
    }

    /// Says which network namespace is the node's own.
    pub fn set_node(&mut self, netns: u64, node: &str) {
        self.node = Some((netns, ObjectKey::new("", node)));
    }

    fn service(&self, at: Option<SocketAddr>, proto: u8) -> Option<Name> {
        let at = at?;
        let found = self.frontends.get(&(Some(at.ip()), at.port(), proto));
        let found = found.or_else(|| self.frontends.get(&(None, at.port(), proto)));
        found.map(|key| Name { kind: "service", key: key.clone() })
    }

    fn pod(&self, at: Option<SocketAddr>) -> Option<Name> {
        let key = self.pods.get(&at?.ip())?;
        Some(Name { kind: "pod", key: key.clone() })
    }

    fn namespace(&self, cookie: u64) -> Option<Name> {
        if let Some(key) = self.namespaces.get(&cookie) {
            return Some(Name { kind: "pod", key: key.clone() });
        }
        let (_, key) = self.node.as_ref().filter(|(own, _)| *own == cookie)?;
        Some(Name { kind: "node", key: key.clone() })
    }
}

const fn u8_of(protocol: crate::model::Protocol) -> u8 {
    match protocol {
        crate::model::Protocol::Tcp => 6,
        crate::model::Protocol::Udp => 17,
        crate::model::Protocol::Sctp => 132,
    }
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Opened,
    Closed,
    Dropped,
    Refused,
}

impl Verdict {
    const ALL: [Self; 4] = [Self::Opened, Self::Closed, Self::Dropped, Self::Refused];

    /// As it is asked for and printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Closed => "closed",
            Self::Dropped => "dropped",
            Self::Refused => "refused",
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub verdict: Verdict,
    /// Where it was decided: `socket` or `packet`.
    pub path: &'static str,
    pub protocol: &'static str,
    /// Who asks: a socket that connects has no address yet, but a name.
    pub client: End,
    /// Whom it asks; the name is a service's.
    pub asked: End,
    /// Under which source the far end sees it, where that is another.
    pub source: Option<SocketAddr>,
    /// Who answers, where that is somebody else than was asked.
    pub backend: Option<End>,
    pub reason: Option<&'static str>,
}

/// One end of a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    pub address: Option<SocketAddr>,
    pub name: Option<Name>,
}

/// What an end is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `pod`, `service` or `node`.
    pub kind: &'static str,
    pub key: ObjectKey,
}

/// Puts an event into words.
#[must_use]
pub fn line(event: &Event, names: &Names) -> Line {
    let key = &event.key;
    let (ends, others) = if event.direction == FORWARD {
        ([(key.src, key.sport), (key.dst, key.dport)], [event.source, event.to])
    } else {
        // The row of answers says what it turns them back into: it is read the other way round.
        let end = |peer: &Peer| (peer.addr, peer.port);
        let far = |addr, port| Peer { addr, port, reserved: [0; 2] };
        let others = [far(key.dst, key.dport), far(key.src, key.sport)];
        ([end(&event.to), end(&event.source)], others)
    };
    let [client, asked] = ends.map(|(addr, port)| address(&addr, port));
    let [source, backend] = others.map(|peer| address(&peer.addr, peer.port));
    let is_socket = event.path == SOCKET;
    let from = if is_socket { names.namespace(event.netns) } else { names.pod(client) };
    let to = names.service(asked, key.proto).or_else(|| names.pod(asked));
    let reason = DropReason::ALL.get(usize::from(event.reason)).copied();
    let reason = reason.filter(|_| event.kind == DROPPED);
    Line {
        verdict: match (event.kind, reason) {
            (DROPPED, Some(reason)) if is_socket || reason.is_refusal() => Verdict::Refused,
            (DROPPED, _) => Verdict::Dropped,
            (CLOSED, _) => Verdict::Closed,
            _ => Verdict::Opened,
        },
        path: if is_socket { "socket" } else { "packet" },
        protocol: protocol(key.proto),
        client: End { address: client, name: from },
        asked: End { address: asked, name: to },
        source: source.filter(|source| Some(*source) != client),
        backend: backend
            .filter(|backend| Some(*backend) != asked)
            .map(|backend| End { address: Some(backend), name: names.pod(Some(backend)) }),
        reason: reason.map(DropReason::words),
    }
}

/// `None` for what is not known: an address that is all zero.
fn address(addr: &Addr, port: [u8; 2]) -> Option<SocketAddr> {
    (*addr != Addr::ANY_V6).then(|| SocketAddr::new(addr.ip(), u16::from_be_bytes(port)))
}

impl End {
    fn json(&self) -> Value {
        json!({
            "address": self.address.map(|address| address.to_string()),
            "kind": self.name.as_ref().map(|name| name.kind),
            "name": self.name.as_ref().map(|name| name.key.to_string()),
        })
    }

    fn text(&self) -> String {
        match (&self.name, &self.address) {
            (Some(Name { kind, key }), Some(address)) => format!("{kind} {key} ({address})"),
            (Some(Name { kind, key }), None) => format!("{kind} {key}"),
            (None, Some(address)) => address.to_string(),
            (None, None) => "?".to_owned(),
        }
    }
}

impl Line {
    /// The line for `-o json`; `time` is when it happened.
    #[must_use]
    pub fn json(&self, time: &str) -> Value {
        json!({
            "time": time,
            "verdict": self.verdict.name(),
            "path": self.path,
            "protocol": self.protocol,
            "client": self.client.json(),
            "asked": self.asked.json(),
            "source": self.source.map(|source| source.to_string()),
            "backend": self.backend.as_ref().map(End::json),
            "reason": self.reason,
            "text": self.text(),
        })
    }

    /// The line for people, without its time.
    #[must_use]
    pub fn text(&self) -> String {
        let (verdict, protocol, path) = (self.verdict.name(), self.protocol, self.path);
        let mut text = format!("{verdict:<7} {protocol:<6} {path}  {}", self.client.text());
        if let Some(source) = &self.source {
            text += &format!(" as {source}");
        }
        text += &format!(" -> {}", self.asked.text());
        if let Some(backend) = &self.backend {
            text += &format!(" -> {}", backend.text());
        }
        if let Some(reason) = self.reason {
            text += &format!("  ({reason})");
        }
        text
    }
}

/// Which lines are wanted; all of what is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    from: Option<Party>,
    to: Option<Party>,
    service: Option<ObjectKey>,
    verdict: Option<Verdict>,
}

/// An end by its address, or by a pod's, a service's or a node's name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Party {
    Address(Want),
    Name(ObjectKey),
}

impl Party {
    fn parse(text: &str) -> Self {
        Want::parse(text).map_or_else(|_no_address| Self::Name(key(text)), Self::Address)
    }

    fn is(&self, end: &End) -> bool {
        match self {
            Self::Address(want) => end.address.is_some_and(|address| want.is(&address)),
            // A node has no namespace.
            Self::Name(name) => end.name.as_ref().is_some_and(|Name { kind, key }| {
                key == name || (*kind == "node" && key.name == name.name)
            }),
        }
    }
}

/// `NAME` or `NAMESPACE/NAME`.
fn key(text: &str) -> ObjectKey {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    ObjectKey::new(namespace, name)
}

impl Filter {
    /// Reads `from`, `to`, `service` and `verdict`.
    ///
    /// # Errors
    ///
    /// Words that say what is wanted.
    pub fn parse(arguments: &BTreeMap<&str, &str>) -> Result<Self, String> {
        let verdict = arguments.get("verdict").map(|name| {
            let known = Verdict::ALL.map(Verdict::name).join(", ");
            let found = Verdict::ALL.into_iter().find(|verdict| verdict.name() == *name);
            found.ok_or_else(|| format!("unknown verdict {name:?}; there are {known}"))
        });
        Ok(Self {
            from: arguments.get("from").map(|text| Party::parse(text)),
            to: arguments.get("to").map(|text| Party::parse(text)),
            service: arguments.get("service").map(|text| key(text)),
            verdict: verdict.transpose()?,
        })
    }

    /// Whether a line is wanted.
    #[must_use]
    pub fn takes(&self, line: &Line) -> bool {
        let source = End { address: line.source, name: None };
        let from = |party: &Party| party.is(&line.client) || party.is(&source);
        let backend = |party: &Party| line.backend.as_ref().is_some_and(|end| party.is(end));
        self.verdict.is_none_or(|verdict| verdict == line.verdict)
            && self.from.as_ref().is_none_or(from)
            && self.to.as_ref().is_none_or(|party| party.is(&line.asked) || backend(party))
            && self.service.as_ref().is_none_or(|wanted| {
                let asked = line.asked.name.as_ref();
                asked.is_some_and(|name| name.kind == "service" && name.key == *wanted)
            })
    }
}

#[cfg(test)]
#[path = "flow_log_tests.rs"]
mod tests;
