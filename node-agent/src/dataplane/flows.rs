//! The connection table as people read it: both halves of a flow in one row.
//!
//! Pure: rows of the kernel's map in, rows for reading out.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ebpf_common::{
    SCTP, TCP, UDP,
    addr::Addr,
    conntrack::{FORWARD, Flow, FlowKey, SEEN_FIN, SEEN_REPLY, SEEN_RST, idle_limit_s},
};
use serde_json::{Value, json};

/// One flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRow {
    pub protocol: &'static str,
    /// Who asks, as its packets come.
    pub client: SocketAddr,
    /// Whom it asks.
    pub asked: SocketAddr,
    /// Who asks, as the backend sees it.
    pub source: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    pub state: &'static str,
    /// Seconds since the last packet of either direction.
    pub idle_s: u32,
    /// Seconds after which the flow is over if no packet comes.
    pub expires_s: u32,
    /// Whether both rows are there; a flow with one of them is being made or removed.
    pub whole: bool,
}

/// Which flows are wanted; all of what is given must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// The client, also as the backend sees it.
    pub src: Option<Want>,
    /// Whom it asks, or the backend.
    pub dst: Option<Want>,
    /// Frontends of one service.
    pub frontends: Option<Vec<Want>>,
}

/// An address, a port, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    pub ip: Option<IpAddr>,
    pub port: Option<u16>,
}

impl Want {
    /// Reads `10.0.0.1`, `10.0.0.1:80`, `fd00::1` or `[fd00::1]:80`.
    ///
    /// # Errors
    ///
    /// Words that say what is wanted.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Ok(ip) = text.trim_matches(['[', ']']).parse() {
            return Ok(Self { ip: Some(ip), port: None });
        }
        let both: SocketAddr = text
            .parse()
            .map_err(|_not| format!("{text:?} is neither an address nor an address and port"))?;
        Ok(Self { ip: Some(both.ip()), port: Some(both.port()) })
    }

    /// Whether an address is the wanted one.
    #[must_use]
    pub fn is(&self, address: &SocketAddr) -> bool {
        self.ip.is_none_or(|ip| ip == address.ip())
            && self.port.is_none_or(|port| port == address.port())
    }
}

impl Filter {
    /// Whether a row is wanted.
    #[must_use]
    pub fn takes(&self, row: &FlowRow) -> bool {
        let any = |want: &Want, of: [&SocketAddr; 2]| of.iter().any(|address| want.is(address));
        self.src.as_ref().is_none_or(|want| any(want, [&row.client, &row.source]))
            && self.dst.as_ref().is_none_or(|want| any(want, [&row.asked, &row.backend]))
            && self.frontends.as_ref().is_none_or(|all| all.iter().any(|want| want.is(&row.asked)))
    }
}

/// Joins the halves of every flow at `now_s`, seconds of the monotonic clock.
#[must_use]
pub fn join(flows: &BTreeMap<FlowKey, Flow>, now_s: u32) -> Vec<FlowRow> {
    let mut rows: Vec<FlowRow> = flows
        .iter()
        .filter(|(_, flow)| flow.direction == FORWARD)
        .map(|(key, forward)| row(key, forward, flows.get(&forward.opposite(key.proto)), now_s))
        .collect();
    let reverse = flows.iter().filter(|(_, flow)| flow.direction != FORWARD);
    // A reverse row whose other half is gone is shown as the flow that it belonged to.
    let orphans = reverse.filter_map(|(key, flow)| {
        let forward = flow.opposite(key.proto);
        let missing = flows.get(&forward).is_none_or(|other| other.direction != FORWARD);
        missing.then(|| FlowRow {
            client: address(&flow.dst, flow.dport),
            asked: address(&flow.src, flow.sport),
            source: address(&key.dst, key.dport),
            backend: address(&key.src, key.sport),
            ..row(key, flow, None, now_s)
        })
    });
    rows.extend(orphans);
    rows
}

fn row(key: &FlowKey, forward: &Flow, reverse: Option<&Flow>, now_s: u32) -> FlowRow {
    let seen = (forward.seen, reverse.map_or(0, |flow| flow.seen));
    let age = |flow: &Flow| {
        let age = now_s.wrapping_sub(flow.last_seen);
        // A packet that came after the clock was read.
        if age > u32::MAX / 2 { 0 } else { age }
    };
    let idle_s = reverse.map_or_else(|| age(forward), |flow| age(flow).min(age(forward)));
    FlowRow {
        protocol: protocol(key.proto),
        client: address(&key.src, key.sport),
        asked: address(&key.dst, key.dport),
        source: address(&forward.src, forward.sport),
        backend: address(&forward.dst, forward.dport),
        state: state(key.proto, seen.0, seen.1),
        idle_s,
        expires_s: idle_limit_s(key.proto, seen.0, seen.1).saturating_sub(idle_s),
        whole: reverse.is_some(),
    }
}

const fn state(proto: u8, forward: u8, reverse: u8) -> &'static str {
    let either = forward | reverse;
    match proto {
        TCP if either & SEEN_RST != 0 => "reset",
        TCP if forward & reverse & SEEN_FIN != 0 => "closed",
        TCP if either & SEEN_FIN != 0 => "closing",
        TCP if forward & reverse & SEEN_REPLY == 0 => "half-open",
        TCP => "established",
        SCTP if forward & reverse & SEEN_REPLY == 0 => "half-open",
        _ if reverse & SEEN_REPLY == 0 => "unanswered",
        _ => "answered",
    }
}

/// A protocol's name.
#[must_use]
pub const fn protocol(number: u8) -> &'static str {
    match number {
        TCP => "TCP",
        UDP => "UDP",
        SCTP => "SCTP",
        ebpf_common::ICMP => "ICMP",
        ebpf_common::ICMPV6 => "ICMPv6",
        _ => "other",
    }
}

fn address(addr: &Addr, port: [u8; 2]) -> SocketAddr {
    SocketAddr::new(addr.ip(), u16::from_be_bytes(port))
}

impl FlowRow {
    /// The row for `-o json`.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "protocol": self.protocol,
            "client": self.client.to_string(),
            "asked": self.asked.to_string(),
            "source": self.source.to_string(),
            "backend": self.backend.to_string(),
            "state": self.state,
            "idle_s": self.idle_s,
            "expires_s": self.expires_s,
            "whole": self.whole,
        })
    }
}

#[cfg(test)]
mod tests {
    use ebpf_common::conntrack::REVERSE;

    use super::*;

    fn want(text: &str) -> Option<Want> {
        Some(Want::parse(text).unwrap())
    }

    fn flow(proto: u8, seen: (u8, u8)) -> BTreeMap<FlowKey, Flow> {
        let key = FlowKey {
            src: Addr::v4([192, 0, 2, 9]),
            dst: Addr::v4([10, 96, 0, 1]),
            sport: 40_000_u16.to_be_bytes(),
            dport: [0, 80],
            proto,
            ..FlowKey::default()
        };
        let forward = Flow {
            src: Addr::v4([10, 244, 1, 1]),
            dst: Addr::v4([10, 244, 2, 7]),
            sport: [4, 0],
            dport: [31, 144],
            seen: seen.0,
            last_seen: 90,
            direction: FORWARD,
            ..Flow::default()
        };
        let reverse = Flow {
            src: key.dst,
            dst: key.src,
            sport: key.dport,
            dport: key.sport,
            seen: seen.1,
            last_seen: 95,
            direction: REVERSE,
            ..Flow::default()
        };
        BTreeMap::from([(key, forward), (forward.opposite(proto), reverse)])
    }

    #[test]
    fn both_halves_are_one_row() {
        let rows = join(&flow(TCP, (SEEN_REPLY, SEEN_REPLY)), 100);
        let [row] = rows.as_slice() else { panic!("{rows:?}") };
        assert_eq!(row.client.to_string(), "192.0.2.9:40000");
        assert_eq!(row.asked.to_string(), "10.96.0.1:80");
        assert_eq!(row.source.to_string(), "10.244.1.1:1024");
        assert_eq!(row.backend.to_string(), "10.244.2.7:8080");
        assert_eq!((row.state, row.idle_s, row.expires_s), ("established", 5, 7_435));
        assert!(row.whole);
    }

    #[test]
    fn a_half_alone_shows_the_same_flow_and_says_so() {
        let flows = flow(TCP, (0, SEEN_REPLY));
        let whole = join(&flows, 100).remove(0);
        for (key, half) in flows {
            let row = join(&BTreeMap::from([(key, half)]), 100).remove(0);
            assert!(!row.whole);
            let ends = |row: &FlowRow| (row.client, row.asked, row.source, row.backend);
            assert_eq!(ends(&row), ends(&whole));
        }
    }

    #[test]
    fn states_have_words() {
        let cases = [
            (TCP, (0, 0), "half-open"),
            (TCP, (0, SEEN_REPLY), "half-open"),
            (TCP, (SEEN_REPLY, SEEN_REPLY), "established"),
            (SCTP, (0, SEEN_REPLY), "half-open"),
            (SCTP, (SEEN_REPLY, SEEN_REPLY), "answered"),
            (TCP, (SEEN_FIN, SEEN_REPLY), "closing"),
            (TCP, (SEEN_FIN, SEEN_FIN), "closed"),
            (TCP, (0, SEEN_RST), "reset"),
            (UDP, (0, 0), "unanswered"),
            (UDP, (0, SEEN_REPLY), "answered"),
        ];
        for (proto, seen, words) in cases {
            assert_eq!(join(&flow(proto, seen), 100)[0].state, words);
        }
    }

    #[test]
    fn filters_take_what_they_name() {
        let row = join(&flow(TCP, (0, 0)), 100).remove(0);
        let takes =
            |src: Option<Want>, dst: Option<Want>| Filter { src, dst, frontends: None }.takes(&row);
        assert!(takes(None, None));
        assert!(takes(want("192.0.2.9"), None) && takes(want("10.244.1.1:1024"), None));
        assert!(takes(None, want("10.96.0.1:80")) && takes(None, want("10.244.2.7")));
        assert!(!takes(None, want("10.96.0.1:81")) && !takes(want("10.96.0.1"), None));
        let of = |frontends| Filter { frontends, ..Filter::default() }.takes(&row);
        assert!(of(Some(vec![Want::parse("10.96.0.1:80").unwrap()])) && !of(Some(Vec::new())));
        Want::parse("web").unwrap_err();
        assert_eq!(Want::parse("[fd00::1]:80").unwrap().port, Some(80));
        assert_eq!(Want::parse("fd00::1").unwrap().port, None);
    }
}
