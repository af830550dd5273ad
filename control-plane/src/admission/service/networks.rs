//! The ranges of cluster addresses and node ports, and what of them is in use. Pure.
//!
//! What a Service holds is kept as a short text beside the stored object ([`Allocated::print`]), so that nobody parses
//! objects for it.

use std::{
    collections::HashMap,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
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

/// The number of an address that a range gives out, as [`nth`] counts.
fn index_of(range: IpNet, address: &IpAddr) -> Option<u128> {
    let offset = match (range.network(), address) {
        (IpAddr::V4(base), IpAddr::V4(ip)) => u128::from(u32::from(*ip).checked_sub(base.into())?),
        (IpAddr::V6(base), IpAddr::V6(ip)) => u128::from(*ip).checked_sub(base.into())?,
        _ => return None,
    };
    offset.checked_sub(1).filter(|index| *index < size(range))
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

/// The next free address behind the one taken last: of the upper part, or of the lower when that is full. What was given
/// back is given out again last, and a search does not go through all that is taken.
pub(super) fn free(range: IpNet, taken: &Taken<'_>) -> Option<IpAddr> {
    let end = size(range);
    let start = dynamic_start(range).min(end);
    let last = taken.last(Family::of(&range.addr())).and_then(|last| index_of(range, &last));
    let next = last.map_or(start, |last| last + 1).clamp(start, end);
    (next..end)
        .chain(start..next)
        .chain(0..start)
        .map_while(|index| nth(range, index))
        .find(|address| !taken.has_address(*address))
}

/// The first free node port; those from the low part come last (KEP-3668).
pub(super) fn free_port((low, high): (u16, u16), used: impl Fn(u16) -> bool) -> Option<u16> {
    let count = high.saturating_sub(low).saturating_add(1);
    let offset = if count <= 16 { 0 } else { (count / 32).clamp(16, 128) };
    let start = low.saturating_add(offset);
    (start..=high).chain(low..start).find(|port| !used(*port))
}

/// An address, or a node port whatever its protocol, as upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Held {
    Address(IpAddr),
    Port(u16),
}

/// Addresses and node ports in use.
#[derive(Debug, Default)]
pub struct Allocated {
    /// What each Service holds, by its path in the store; sorted, each once.
    by_service: HashMap<Arc<str>, Box<[Held]>>,
    /// By how many Services: what ranges and versions before this one gave out may be held by several.
    holders: HashMap<Held, usize>,
    /// The address of each family that was taken last.
    last: [Option<IpAddr>; 2],
}

impl Allocated {
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

    /// Says what a Service holds now, as [`Self::print`] printed it; nothing once it is gone.
    pub fn set(&mut self, service: &Arc<str>, printed: &str) {
        let before = self.by_service.remove(service).unwrap_or_default();
        for held in &before {
            if let Some(count) = self.holders.get_mut(held) {
                *count -= 1;
                if *count == 0 {
                    self.holders.remove(held);
                }
            }
        }
        let mut held: Vec<Held> = printed.split(' ').filter_map(parse).collect();
        held.sort_unstable();
        held.dedup();
        for one in &held {
            *self.holders.entry(*one).or_default() += 1;
            if let Held::Address(address) = one
                && !before.contains(one)
            {
                self.last[place(Family::of(address))] = Some(*address);
            }
        }
        if !held.is_empty() {
            self.by_service.insert(Arc::clone(service), held.into());
        }
    }

    /// What all Services hold but the one at this path.
    #[must_use]
    pub fn others(&self, own: Option<&str>) -> Taken<'_> {
        let own = own.and_then(|path| self.by_service.get(path)).map_or(&[][..], |held| held);
        Taken { all: self, own }
    }
}

const fn place(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

fn parse(part: &str) -> Option<Held> {
    part.parse().map(Held::Port).or_else(|_| part.parse().map(Held::Address)).ok()
}

/// What Services other than one hold.
#[derive(Clone, Copy, Debug)]
pub struct Taken<'a> {
    all: &'a Allocated,
    own: &'a [Held],
}

impl Taken<'_> {
    pub(super) fn has_address(&self, address: IpAddr) -> bool {
        self.has(Held::Address(address))
    }

    pub(super) fn has_port(&self, port: u16) -> bool {
        self.has(Held::Port(port))
    }

    fn has(&self, held: Held) -> bool {
        let holders = self.all.holders.get(&held).copied().unwrap_or(0);
        holders > usize::from(self.own.contains(&held))
    }

    const fn last(&self, family: Family) -> Option<IpAddr> {
        self.all.last[place(family)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(taken: &[impl AsRef<str>]) -> Allocated {
        let mut used = Allocated::default();
        for (number, text) in taken.iter().enumerate() {
            used.set(&format!("a/{number}").into(), text.as_ref());
        }
        used
    }

    fn first(cidr: &str, taken: &[&str]) -> Option<String> {
        free(cidr.parse().unwrap(), &holding(taken).others(None)).map(|address| address.to_string())
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
        let upper: Vec<String> = (17..=254).map(|last| format!("10.96.0.{last}")).collect();
        let low = free("10.96.0.0/24".parse().unwrap(), &holding(&upper).others(None)).unwrap();
        assert_eq!(low.to_string(), "10.96.0.1");
    }

    #[test]
    fn an_address_that_is_given_back_comes_last() {
        let range = "10.96.0.0/28".parse().unwrap();
        let mut all = Allocated::default();
        let next = |all: &Allocated| free(range, &all.others(None)).map(|ip| ip.to_string());
        for last in 1..=14 {
            assert_eq!(next(&all), Some(format!("10.96.0.{last}")));
            all.set(&format!("a/{last}").into(), &format!("10.96.0.{last}"));
            if last == 5 {
                all.set(&"a/1".into(), "");
                all.set(&"a/4".into(), "");
                // A change of what is there takes nothing.
                all.set(&"a/2".into(), "10.96.0.2");
            }
        }
        for back in ["10.96.0.1", "10.96.0.4"] {
            assert_eq!(next(&all).as_deref(), Some(back));
            all.set(&format!("a/again {back}").into(), back);
        }
        assert_eq!(next(&all), None);
        all.set(&"a/again".into(), "10.96.0.1");
        all.set(&"a/again 10.96.0.1".into(), "");
        assert!(!all.others(Some("a/again")).has_address("10.96.0.1".parse().unwrap()));
        // One that two hold, as a version before this one may have left it.
        all.set(&"a/twice".into(), "10.96.0.1 30001 30001");
        assert!(all.others(Some("a/again")).has_address("10.96.0.1".parse().unwrap()));
        all.set(&"a/again".into(), "");
        assert!(all.others(None).has_address("10.96.0.1".parse().unwrap()));
        assert!(!all.others(Some("a/twice")).has_port(30001));
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
        assert_eq!(Allocated::print(&service), "10.96.0.7 fd00::7 30001 31000");
        let all = holding(&[Allocated::print(&service)]);
        let taken = all.others(None);
        assert!(["10.96.0.7", "fd00::7"].iter().all(|ip| taken.has_address(ip.parse().unwrap())));
        assert!([30001, 31000].iter().all(|port| taken.has_port(*port)));
        let headless = serde_json::json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}});
        assert_eq!(Allocated::print(&headless), "");
    }
}
