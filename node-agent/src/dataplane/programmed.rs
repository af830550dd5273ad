//! Questions to what is programmed.
//!
//! Pure.

use std::net::IpAddr;

use ebpf_common::{
    addr::Addr,
    service::{Backend, Service, ServiceKey},
};
use ipnet::IpNet;

use super::{Observed, Programmed};
use crate::model::ObjectKey;

/// Bits of a range's key before those of its address: the service's.
const SERVICE_BITS: u32 = 32;
/// Bits before an IPv4 address in the form that both families share.
const V4_PREFIX: u32 = 96;

impl Observed {
    /// Every port that is programmed.
    pub fn ports(&self) -> impl Iterator<Item = (&ObjectKey, &Programmed)> {
        self.ports.iter().flat_map(|(key, ports)| ports.iter().map(move |port| (key, port)))
    }

    /// The ports of one service.
    #[must_use]
    pub fn ports_of(&self, service: &ObjectKey) -> &[Programmed] {
        self.ports.get(service).map_or(&[], Vec::as_slice)
    }

    /// The row of a frontend that an earlier agent wrote and no service was planned for yet.
    #[must_use]
    pub fn unclaimed(&self, key: &ServiceKey) -> Option<&Service> {
        self.unclaimed.get(key)
    }

    /// The backends of a set, by slot.
    #[must_use]
    pub fn slots(&self, set: u32) -> &[Backend] {
        self.sets.get(&set).map_or(&[], |set| &set.slots)
    }

    /// From where clients are let in, of a service port ([`Service::service`]) that asks.
    #[must_use]
    pub fn ranges_of(&self, service: u32) -> Vec<IpNet> {
        let ranges = self.ranges.get(&service).into_iter().flatten();
        ranges.filter_map(|(bits, addr)| range(*bits, addr)).collect()
    }
}

fn range(bits: u32, addr: &Addr) -> Option<IpNet> {
    let ip = addr.ip();
    let before = match ip {
        IpAddr::V4(_) => SERVICE_BITS + V4_PREFIX,
        IpAddr::V6(_) => SERVICE_BITS,
    };
    IpNet::new(ip, u8::try_from(bits.checked_sub(before)?).ok()?).ok()
}
