//! The ranges of cluster addresses and node ports, and what of them is in use. Pure.
//!
//! What Services hold is kept as a short text beside each stored object ([`Taken::print`]), so that a write looks
//! at all Services without parsing them.

use std::{
    collections::HashSet,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use serde_json::Value;

use super::fields;

/// An address family, as `spec.ipFamilies` spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }

    #[must_use]
    pub const fn of(address: &IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// The ranges that Services are given addresses and ports from.
#[derive(Clone, Debug)]
pub struct Networks {
    /// One, or one of each family; the first is the default.
    pub service_cidrs: Vec<IpNet>,
    /// First and last node port.
    pub node_ports: (u16, u16),
}

impl Networks {
    /// With upstream's node ports, 30000 to 32767.
    #[must_use]
    pub fn new(service_cidrs: Vec<IpNet>) -> Self {
        Self { service_cidrs, node_ports: (30000, 32767) }
    }

    /// The family of a Service that asks for none.
    pub(super) fn default_family(&self) -> Family {
        self.service_cidrs.first().map_or(Family::V4, |net| Family::of(&net.addr()))
    }

    pub(super) fn range(&self, family: Family) -> Option<IpNet> {
        self.service_cidrs.iter().copied().find(|net| Family::of(&net.addr()) == family)
    }

    pub(super) fn has(&self, family: Family) -> bool {
        self.range(family).is_some()
    }

    pub(super) fn is_dual(&self) -> bool {
        self.has(Family::V4) && self.has(Family::V6)
    }
}

/// The `index`th address that a range gives out. Its own address is not among them, nor is an IPv4 range's broadcast.
#[must_use]
pub fn nth(range: IpNet, index: u128) -> Option<IpAddr> {
    if index >= size(range) {
        return None;
    }
    let offset = index.checked_add(1)?;
    match range.network() {
        IpAddr::V4(base) => {
            let sum = u32::from(base).checked_add(u32::try_from(offset).ok()?)?;
            Some(IpAddr::V4(Ipv4Addr::from(sum)))
        }
        IpAddr::V6(base) => Some(IpAddr::V6(Ipv6Addr::from(u128::from(base).checked_add(offset)?))),
    }
}

/// How many addresses a range gives out.
fn size(range: IpNet) -> u128 {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let all = 1_u128.checked_shl(bits).unwrap_or(u128::MAX);
    let reserved = if range.addr().is_ipv4() { 2 } else { 1 };
    all.saturating_sub(reserved)
}

/// Where dynamic addresses begin; what is below stays free for those asked for by number (KEP-3070).
fn dynamic_start(range: IpNet) -> u128 {
    let all = size(range).saturating_add(1);
    if all <= 16 { 0 } else { (all / 16).clamp(16, 256) }
}

/// The first free address: of the upper part, or of the lower when that is full.
pub(super) fn free(range: IpNet, taken: &Taken) -> Option<IpAddr> {
    let (start, end) = (dynamic_start(range), size(range));
    (start..end)
        .chain(0..start.min(end))
        .map_while(|index| nth(range, index))
        .find(|address| !taken.addresses.contains(address))
}

/// The first free node port; those from the low part come last (KEP-3668).
pub(super) fn free_port((low, high): (u16, u16), used: impl Fn(u16) -> bool) -> Option<u16> {
    let count = high.saturating_sub(low).saturating_add(1);
    let offset = if count <= 16 { 0 } else { (count / 32).clamp(16, 128) };
    let start = low.saturating_add(offset);
    (start..=high).chain(low..start).find(|port| !used(*port))
}

/// Addresses and node ports in use.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    pub(super) addresses: HashSet<IpAddr>,
    /// Whatever the protocol, as upstream.
    pub(super) ports: HashSet<u16>,
}

impl Taken {
    /// What a Service holds: its addresses and node ports, separated by blanks.
    #[must_use]
    pub fn print(service: &Value) -> String {
        let mut text = String::new();
        let mut add = |part: &dyn std::fmt::Display| {
            let blank = if text.is_empty() { "" } else { " " };
            // Writing into a String cannot fail.
            let _written = write!(text, "{blank}{part}");
        };
        for address in fields::ips(service).iter().filter_map(|ip| fields::parse_ip(ip)) {
            add(&address);
        }
        for port in fields::node_ports(service).chain(fields::health_port(service)) {
            add(&port);
        }
        text
    }

    /// Adds what [`Taken::print`] printed.
    pub fn add(&mut self, printed: &str) {
        for part in printed.split(' ') {
            if let Ok(port) = part.parse() {
                self.ports.insert(port);
            } else if let Ok(address) = part.parse() {
                self.addresses.insert(address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(cidr: &str, taken: &[&str]) -> Option<String> {
        let mut used = Taken::default();
        taken.iter().for_each(|text| used.add(text));
        free(cidr.parse().unwrap(), &used).map(|address| address.to_string())
    }

    #[test]
    fn dynamic_addresses_come_from_above_the_static_part() {
        let cases: [(&str, &[&str], Option<&str>); 7] = [
            ("10.96.0.0/16", &[], Some("10.96.1.1")),
            ("10.96.0.0/24", &[], Some("10.96.0.17")),
            ("10.96.0.0/28", &[], Some("10.96.0.1")),
            ("fd00:10:96::/108", &[], Some("fd00:10:96::101")),
            ("fd00:10:96::/108", &["fd00:10:96::101 30080"], Some("fd00:10:96::102")),
            ("10.96.0.0/30", &["10.96.0.1", "10.96.0.2"], None),
            ("fd00::/127", &["fd00::1"], None),
        ];
        for (cidr, taken, want) in cases {
            assert_eq!(first(cidr, taken).as_deref(), want, "{cidr} {taken:?}");
        }
        let mut upper = Taken::default();
        (17..=254).for_each(|last| upper.add(&format!("10.96.0.{last}")));
        let low = free("10.96.0.0/24".parse().unwrap(), &upper).unwrap();
        assert_eq!(low.to_string(), "10.96.0.1");
    }

    #[test]
    fn node_ports_begin_above_the_static_part() {
        assert_eq!(free_port((30000, 32767), |_| false), Some(30086));
        assert_eq!(free_port((30000, 32767), |port| port >= 30086), Some(30000));
        assert_eq!(free_port((30000, 30003), |port| port != 30002), Some(30002));
        assert_eq!(free_port((30000, 30003), |_| true), None);
    }

    #[test]
    fn what_a_service_holds_is_read_back() {
        let service = serde_json::json!({"spec": {
            "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000,
            "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"],
            "ports": [{"nodePort": 30001}, {"port": 2}]}});
        assert_eq!(Taken::print(&service), "10.96.0.7 fd00::7 30001 31000");
        let mut taken = Taken::default();
        taken.add(&Taken::print(&service));
        assert_eq!((taken.addresses.len(), taken.ports.len()), (2, 2));
        let headless = serde_json::json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}});
        assert_eq!(Taken::print(&headless), "");
    }
}
