//! What the dataplane tells about itself, and how that reads.
//!
//! Pure: values in, text and JSON out.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use ebpf_common::{
    addr::Addr,
    maglev, maps as names,
    service::{SCOPE_EXTERNAL, SCOPE_LOOPBACK, ServiceKey},
    verdict::DropReason,
};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{
    load::TcPath,
    look::Fill,
    metrics::Rounds,
    model::Model,
    paths::{Untranslated, tc_name},
    plan::Observed,
    size,
    xdp::XdpPath,
};
use crate::model::{FarEnd, FarPath, LocalEndpoint, ObjectKey};

/// The state of the dataplane at one moment.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The cgroup whose sockets are translated.
    pub sockets: Option<PathBuf>,
    /// The socket programs that run there.
    pub hooks: Vec<&'static str>,
    /// Those for which the kernel has no hook.
    pub missing: Vec<&'static str>,
    /// The device is there by which the node's own packets to services leave.
    pub has_host: bool,
    pub tc: Option<TcPath>,
    /// What carries service traffic from outside, by device.
    pub xdp: BTreeMap<String, XdpPath>,
    /// Devices of the node's that have no programs.
    pub untranslated: BTreeMap<String, Untranslated>,
    pub pins: Option<PathBuf>,
    /// Frontends in the maps.
    pub frontends: usize,
    pub endpoints: BTreeMap<IpAddr, Arc<LocalEndpoint>>,
    pub tunnels: BTreeMap<IpNet, FarEnd>,
    /// Flows that are translated per packet.
    pub flows: usize,
    pub drops: Vec<(DropReason, u64)>,
    /// Services that are not programmed, and the fields that this agent does not implement.
    pub unsupported: Vec<(ObjectKey, Vec<String>)>,
    /// Services that contradict themselves or each other, in words that name the field; all else of
    /// them is programmed.
    pub problems: Vec<(ObjectKey, Vec<String>)>,
    /// Maps without room for what should be in them.
    pub full: Vec<Full>,
    /// Later pieces of packets were dropped lately since their first ones were not known.
    pub loses_pieces: bool,
    /// Maps that are about to forget rows that are in use; filled in by who reads them.
    pub evicting: Vec<Evicting>,
    /// Services whose backends clients outside do not get alike on every node.
    pub by_chance: Vec<ObjectKey>,
    /// How long writing services took so far.
    pub rounds: Rounds,
    /// What went wrong in the last round, by part.
    pub trouble: Vec<(&'static str, String)>,
}

/// A map that forgets the least recently used row for a new one, with few rows left that nobody uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evicting {
    pub map: &'static str,
    /// Rows in use.
    pub rows: u64,
    pub max: u64,
}

impl Evicting {
    /// What that means.
    #[must_use]
    pub fn words(&self) -> String {
        let Self { map, rows, max } = self;
        let what = if *map == names::AFFINITY {
            "clients of services with sessionAffinity may be forgotten early"
        } else {
            "packets in pieces are dropped, since their first pieces are forgotten"
        };
        format!("map {map} has {rows} of its {max} rows in use: {what}")
    }
}

/// Which of these maps forget early: one whose rows in use take more than three quarters of it. Rows of packets in
/// pieces do not tell whether they are in use, so there it takes pieces that were lost.
#[must_use]
pub fn evicting(fill: &[Fill], loses_pieces: bool) -> Vec<Evicting> {
    let is_tight = |fill: &&Fill| size::is_tight(fill.rows, u32::try_from(fill.max).unwrap_or(0));
    let forgets = |fill: &&Fill| match fill.map {
        names::AFFINITY => true,
        names::FRAGMENTS => loses_pieces,
        _ => false,
    };
    let early = fill.iter().filter(forgets).filter(is_tight);
    early.map(|fill| Evicting { map: fill.map, rows: fill.rows, max: fill.max }).collect()
}

/// A map without room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Full {
    pub map: &'static str,
    /// Rows for which it has room.
    pub max: u32,
    /// Rows for which it may get room on this node.
    pub most: u32,
    /// Rows that are not programmed; of the connection table, packets dropped since it was made.
    pub missing: u64,
}

impl Full {
    /// What that means, and what helps.
    #[must_use]
    pub fn words(&self) -> String {
        let Self { map, max, most, missing } = self;
        let lost = if *map == names::CONNTRACK {
            format!("new flows of the packet path are dropped, {missing} packets so far")
        } else {
            format!("{missing} rows are not programmed")
        };
        let remedy = if most > max {
            format!("it is growing, to at most {most} rows")
        } else {
            "it may not grow further: give the node more memory (a full map may take a sixteenth of \
             it), or spread what fills it over more nodes"
                .to_owned()
        };
        format!("map {map} has all its {max} rows taken, {lost}; {remedy}")
    }
}

/// Services without consistent hashing for clients outside.
#[must_use]
pub fn by_chance(observed: Option<&Observed>) -> Vec<ObjectKey> {
    let mut services: Vec<ObjectKey> =
        observed.into_iter().flat_map(Observed::by_chance).cloned().collect();
    services.dedup();
    services
}

/// Services that are not programmed.
#[must_use]
pub fn unsupported(model: &Model) -> Vec<(ObjectKey, Vec<String>)> {
    let fields = |fields: &[Box<str>]| fields.iter().map(ToString::to_string).collect();
    model.unsupported().map(|(key, list)| (key.clone(), fields(list))).collect()
}

/// A frontend in words.
#[must_use]
pub fn frontend(key: &ServiceKey) -> String {
    let protocol = match key.proto {
        6 => "TCP",
        17 => "UDP",
        132 => "SCTP",
        _ => "?",
    };
    let port = u16::from_be_bytes(key.port);
    let from = match key.scope {
        SCOPE_EXTERNAL => " from outside",
        SCOPE_LOOPBACK => " at loopback",
        _ => "",
    };
    if key.addr == Addr::ANY_V4 {
        return format!("node:{port}/{protocol}{from}");
    }
    if key.addr == Addr::ANY_V6 {
        return format!("node:{port}/{protocol} IPv6{from}");
    }
    format!("{}/{protocol}{from}", SocketAddr::new(key.addr.ip(), port))
}

impl Report {
    /// The programs that run and the path that each serves, for metrics.
    #[must_use]
    pub fn programs(&self) -> Vec<(&'static str, String)> {
        let sockets = if self.sockets.is_some() { self.hooks.as_slice() } else { &[] };
        let sockets = sockets.iter().map(|name| ("socket", (*name).to_owned()));
        let tc = self.tc.map(|path| ("packet", tc_name(path).to_owned()));
        sockets.chain(tc).collect()
    }

    /// `node-agent status`: which path each kind of traffic takes, how much is programmed, and what
    /// is wrong.
    #[must_use]
    pub fn status_text(&self) -> String {
        let mut lines = self.path_lines();
        lines.push(format!(
            "programmed                {} frontends, {} pods, {} tunnels, {} flows",
            self.frontends,
            self.endpoints.len(),
            self.far_ends().count(),
            self.flows
        ));
        lines.extend(self.drops.iter().filter(|(_, count)| *count > 0).map(|(reason, count)| {
            format!("dropped                   {count} × {}", reason.words())
        }));
        lines.extend(self.unsupported.iter().map(|(service, fields)| {
            format!(
                "not programmed            service {service}: {} is not supported",
                fields.join(", ")
            )
        }));
        let problems = self.problems.iter().flat_map(|(service, all)| {
            all.iter()
                .map(move |words| format!("problem                   service {service}: {words}"))
        });
        lines.extend(problems);
        let full = self.full.iter().map(Full::words);
        lines.extend(full.map(|words| format!("full                      {words}")));
        let evicting = self.evicting.iter().map(Evicting::words);
        lines.extend(evicting.map(|words| format!("nearly full               {words}")));
        if let [first, others @ ..] = self.by_chance.as_slice() {
            let more = match others.len() {
                0 => String::new(),
                count => format!(" and {count} more"),
            };
            lines.push(format!(
                "chosen by chance          service {first}{more}: no room in map MAGLEV, or more than \
                 {} endpoints; nodes give a client different backends",
                maglev::BACKENDS_MAX
            ));
        }
        lines.extend(
            self.trouble
                .iter()
                .map(|(part, words)| format!("trouble                   {part}: {words}")),
        );
        lines.join("\n") + "\n"
    }

    /// Without this node's own range.
    fn far_ends(&self) -> impl Iterator<Item = (&IpNet, &FarEnd)> {
        self.tunnels.iter().filter(|(_, far)| far.path != FarPath::Here)
    }

    /// All of it, for `-o json`.
    #[must_use]
    pub fn json(&self) -> Value {
        let endpoints: Vec<Value> = self
            .endpoints
            .values()
            .map(|row| json!({"pod": row.pod.to_string(), "ip": row.ip, "ifindex": row.host_ifindex}))
            .collect();
        let drops: BTreeMap<&str, u64> =
            self.drops.iter().map(|(reason, count)| (reason.words(), *count)).collect();
        let tunnels: BTreeMap<String, IpAddr> =
            self.far_ends().map(|(net, far)| (net.to_string(), far.node)).collect();
        json!({
            "paths": {
                "sockets": self.sockets, "tc": self.tc.map(tc_name), "pins": self.pins,
                "xdp": self.xdp.iter().map(|(name, path)| (name.clone(), path.to_string()))
                    .collect::<BTreeMap<_, _>>(),
                "missing_hooks": self.missing, "host_device": self.has_host,
                "untranslated": self.untranslated.iter().map(|(name, why)| (name.clone(), why.words()))
                    .collect::<BTreeMap<_, _>>(),
            },
            "frontends": self.frontends,
            "endpoints": endpoints,
            "tunnels": tunnels,
            "flows": self.flows,
            "drops": drops,
            "unsupported": self.unsupported.iter()
                .map(|(key, fields)| json!({"service": key.to_string(), "fields": fields}))
                .collect::<Vec<_>>(),
            "problems": self.problems.iter()
                .map(|(service, words)| json!({"service": service.to_string(), "problems": words}))
                .collect::<Vec<_>>(),
            "full": self.full.iter()
                .map(|one| json!({
                    "map": one.map, "max_rows": one.max, "most_rows": one.most,
                    "missing": one.missing, "message": one.words(),
                }))
                .collect::<Vec<_>>(),
            "evicting": self.evicting.iter()
                .map(|one| json!({
                    "map": one.map, "rows": one.rows, "max_rows": one.max, "message": one.words(),
                }))
                .collect::<Vec<_>>(),
            "by_chance": self.by_chance.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "trouble": self.trouble.iter()
                .map(|(part, words)| json!({"part": part, "message": words}))
                .collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            sockets: Some("/sys/fs/cgroup".into()),
            hooks: vec!["cg_connect4"],
            tc: Some(TcPath::Clsact),
            xdp: BTreeMap::from([("eth0".to_owned(), XdpPath::Native)]),
            pins: None,
            frontends: 1,
            endpoints: BTreeMap::new(),
            tunnels: BTreeMap::from([(
                "10.244.2.0/24".parse().unwrap(),
                FarEnd { node: IpAddr::from([192, 168, 0, 2]), path: FarPath::Tunnel },
            )]),
            flows: 3,
            drops: vec![(DropReason::NoBackend, 2), (DropReason::NoTunnel, 0)],
            unsupported: vec![(ObjectKey::new("a", "b"), vec!["spec.sessionAffinity".into()])],
            problems: vec![(ObjectKey::new("a", "c"), vec!["spec.ports[0]: bad".into()])],
            rounds: Rounds::default(),
            full: vec![
                Full { map: names::SERVICES, max: 65_536, most: 65_536, missing: 12 },
                Full { map: names::CONNTRACK, max: 64, most: 128, missing: 3 },
            ],
            evicting: vec![Evicting { map: names::AFFINITY, rows: 60_000, max: 65_536 }],
            by_chance: vec![ObjectKey::new("a", "d"), ObjectKey::new("a", "e")],
            trouble: vec![("pods", "10.244.0.3: File exists".into())],
            ..Report::default()
        }
    }

    #[test]
    fn maps_that_forget_are_named_when_rows_in_use_take_most_of_them() {
        let fill = |map, rows| Fill { map, rows, max: 100 };
        let named = |rows, loses_pieces| {
            let fills =
                [names::SERVICES, names::AFFINITY, names::FRAGMENTS].map(|map| fill(map, rows));
            evicting(&fills, loses_pieces).iter().map(|one| one.map).collect::<Vec<_>>()
        };
        assert_eq!(named(75, true), [""; 0]);
        assert_eq!(named(76, false), [names::AFFINITY]);
        assert_eq!(named(76, true), [names::AFFINITY, names::FRAGMENTS]);
        let pieces = Evicting { map: names::FRAGMENTS, rows: 8, max: 8 };
        assert!(pieces.words().ends_with(
            "8 rows in use: packets in pieces are dropped, since their first pieces are forgotten"
        ));
    }

    #[test]
    fn the_status_names_paths_drops_and_what_is_wrong() {
        let text = report().status_text();
        for words in [
            "clsact filters (this kernel has no tcx)",
            "2 × service has no ready endpoint",
            "service a/b: spec.sessionAffinity is not supported",
            "pods: 10.244.0.3: File exists",
            "service a/c: spec.ports[0]: bad",
            "map SERVICES has all its 65536 rows taken, 12 rows are not programmed; it may not grow",
            "give the node more memory",
            "map CONNTRACK has all its 64 rows taken, new flows",
            "are dropped, 3 packets so far; it is growing, to at most 128 rows",
            "service a/d and 1 more: no room in map MAGLEV",
            "map AFFINITY has 60000 of its 65536 rows in use: clients of services with sessionAffinity may be",
            "nothing is pinned",
            "services from outside     eth0: XDP in the driver",
        ] {
            assert!(text.contains(words), "{words} not in\n{text}");
        }
        assert!(!text.contains("no node is known"), "a reason that never happened is not shown");
        assert_eq!(report().json()["drops"]["service has no ready endpoint"], 2);
    }
}
