//! Questions to what is programmed.
//!
//! Pure.

use ebpf_common::service::{Backend, Service, ServiceKey};
use ipnet::IpNet;

use super::{Observed, Programmed};
use crate::{dataplane::maps::net, model::ObjectKey};

/// Bits of a range's key before those of its address: the service's.
pub(super) const SERVICE_BITS: u32 = 32;

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
        ranges.filter_map(|(bits, addr)| net(addr, bits.checked_sub(SERVICE_BITS)?)).collect()
    }
}
