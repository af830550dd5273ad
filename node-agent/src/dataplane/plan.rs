//! From what is programmed to what should be: the writes, in an order that is safe at every step.
//!
//! Pure. The order is make before break: a backend slot is filled before the count that exposes it
//! grows, and emptied after the count has shrunk; a frontend is withdrawn before its backends. A
//! kernel program that runs between any two writes finds every slot that it may choose.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::service::{Backend, BackendKey, Service, ServiceKey};

/// One write to a map. Carries everything; nothing is left to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOp {
    PutBackend { key: BackendKey, backend: Backend },
    PutService { key: ServiceKey, service: Service },
    DelService { key: ServiceKey },
    DelBackend { key: BackendKey },
}

/// What the maps hold for one frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Programmed {
    pub id: u32,
    /// By slot.
    pub backends: Vec<Backend>,
}

/// What the service maps hold, as far as it is sound; the rest is in `orphans`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    pub frontends: BTreeMap<ServiceKey, Programmed>,
    /// Backend rows that no frontend can choose: left over from a writer that died.
    pub orphans: BTreeSet<BackendKey>,
    /// The identifier given out last.
    pub last_id: u32,
}

impl Observed {
    /// Makes sense of dumped rows. A frontend with a slot missing counts only the slots before it,
    /// so that the plan fills the hole.
    #[must_use]
    pub fn from_rows(
        services: BTreeMap<ServiceKey, Service>,
        mut backends: BTreeMap<BackendKey, Backend>,
    ) -> Self {
        let mut observed = Self::default();
        for (key, service) in services {
            observed.last_id = observed.last_id.max(service.set);
            let found = (0..service.count)
                .map_while(|slot| backends.remove(&BackendKey { set: service.set, slot }))
                .collect();
            observed.frontends.insert(key, Programmed { id: service.set, backends: found });
        }
        observed.last_id =
            backends.keys().map(|key| key.set).max().unwrap_or(0).max(observed.last_id);
        observed.orphans = backends.into_keys().collect();
        observed
    }

    /// Plans one frontend and records the outcome as observed. `None` withdraws it.
    pub fn plan(&mut self, key: ServiceKey, desired: Option<&BTreeSet<Backend>>) -> Vec<MapOp> {
        let old = self.frontends.get(&key).cloned();
        let Some(desired) = desired else {
            self.frontends.remove(&key);
            return old.map(|old| withdraw(key, &old)).unwrap_or_default();
        };
        let id = old.as_ref().map_or_else(|| self.fresh_id(), |old| old.id);
        let current = old.as_ref().map_or(&[][..], |old| &old.backends);
        let backends = arrange(current, desired);
        let ops = fill(key, id, old.as_ref(), &backends);
        for op in &ops {
            // A slot that a dead writer left behind and that is used again is no orphan any more.
            if let MapOp::PutBackend { key, .. } = op {
                self.orphans.remove(key);
            }
        }
        self.frontends.insert(key, Programmed { id, backends });
        ops
    }

    /// Deletes rows that nothing can reach.
    pub fn sweep(&mut self) -> Vec<MapOp> {
        std::mem::take(&mut self.orphans).into_iter().map(|key| MapOp::DelBackend { key }).collect()
    }

    /// Forgets what is known of a frontend after a failed write, so that the next dump decides.
    pub fn forget(&mut self, key: &ServiceKey) {
        self.frontends.remove(key);
    }

    fn fresh_id(&mut self) -> u32 {
        // 2^32 frontends would have to be made during one life of the maps for this to come around.
        self.last_id = self.last_id.checked_add(1).unwrap_or(1);
        self.last_id
    }
}

/// Puts the desired backends into slots: those that stay keep theirs, newcomers fill the holes, and
/// what is left of the holes is filled from the end.
#[must_use]
pub fn arrange(current: &[Backend], desired: &BTreeSet<Backend>) -> Vec<Backend> {
    let mut placed = BTreeSet::new();
    let mut slots: Vec<Option<Backend>> = current
        .iter()
        .map(|backend| (desired.contains(backend) && placed.insert(*backend)).then_some(*backend))
        .collect();
    let mut newcomers = desired.iter().filter(|backend| !placed.contains(*backend)).copied();
    for slot in slots.iter_mut().filter(|slot| slot.is_none()) {
        *slot = newcomers.next();
    }
    slots.extend(newcomers.map(Some));
    let mut index = 0;
    while index < slots.len() {
        if slots[index].is_none() {
            slots.swap_remove(index);
        } else {
            index += 1;
        }
    }
    slots.into_iter().flatten().collect()
}

fn fill(key: ServiceKey, id: u32, old: Option<&Programmed>, new: &[Backend]) -> Vec<MapOp> {
    let current = old.map_or(&[][..], |old| &old.backends);
    let slots = |range: std::ops::Range<usize>| range.map(slot);
    let mut ops: Vec<MapOp> = new
        .iter()
        .zip(slots(0..new.len()))
        .filter(|(backend, slot)| current.get(index(*slot)) != Some(*backend))
        .map(|(backend, slot)| MapOp::PutBackend {
            key: BackendKey { set: id, slot },
            backend: *backend,
        })
        .collect();
    if old.is_none() || current.len() != new.len() {
        let service =
            Service { set: id, count: slot(new.len()), service: id, ..Service::default() };
        ops.push(MapOp::PutService { key, service });
    }
    let surplus = slots(new.len()..current.len().max(new.len()));
    ops.extend(surplus.map(|slot| MapOp::DelBackend { key: BackendKey { set: id, slot } }));
    ops
}

fn withdraw(key: ServiceKey, old: &Programmed) -> Vec<MapOp> {
    let slots = (0..old.backends.len()).map(slot);
    let backends = slots.map(|slot| MapOp::DelBackend { key: BackendKey { set: old.id, slot } });
    std::iter::once(MapOp::DelService { key }).chain(backends).collect()
}

fn slot(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn index(slot: u32) -> usize {
    usize::try_from(slot).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use ebpf_common::addr::Addr;

    use super::*;

    #[derive(Clone, Debug, Default, PartialEq)]
    struct Rows {
        services: BTreeMap<ServiceKey, Service>,
        backends: BTreeMap<BackendKey, Backend>,
    }

    impl Rows {
        /// Applies one write and checks that no program could miss a slot.
        fn apply(&mut self, op: MapOp) -> Result<(), TestCaseError> {
            match op {
                MapOp::PutBackend { key, backend } => drop(self.backends.insert(key, backend)),
                MapOp::PutService { key, service } => drop(self.services.insert(key, service)),
                MapOp::DelService { key } => drop(self.services.remove(&key)),
                MapOp::DelBackend { key } => drop(self.backends.remove(&key)),
            }
            for service in self.services.values() {
                for slot in 0..service.count {
                    let key = BackendKey { set: service.set, slot };
                    prop_assert!(self.backends.contains_key(&key), "dangling after {:?}", op);
                }
            }
            Ok(())
        }

        fn observed(&self) -> Observed {
            Observed::from_rows(self.services.clone(), self.backends.clone())
        }
    }

    fn backend(last: u8) -> Backend {
        Backend { addr: Addr::v4([10, 0, 0, last]), port: [0, 80], reserved: [0; 2] }
    }

    fn frontend(port: u8) -> ServiceKey {
        ServiceKey { addr: Addr::v4([10, 96, 0, 1]), port: [0, port], proto: 6, scope: 0 }
    }

    type Desired = BTreeMap<u8, BTreeSet<u8>>;

    fn desired() -> impl Strategy<Value = Desired> {
        prop::collection::btree_map(0..4_u8, prop::collection::btree_set(0..8_u8, 0..6), 0..4)
    }

    /// One full round: every frontend of either side, then the sweep.
    fn round(observed: &mut Observed, desired: &Desired) -> Vec<MapOp> {
        let keys: BTreeSet<ServiceKey> = observed
            .frontends
            .keys()
            .copied()
            .chain(desired.keys().map(|port| frontend(*port)))
            .collect();
        let mut ops = Vec::new();
        for key in keys {
            let wanted: Option<BTreeSet<Backend>> = desired
                .get(&key.port[1])
                .map(|lasts| lasts.iter().map(|last| backend(*last)).collect());
            ops.extend(observed.plan(key, wanted.as_ref()));
        }
        ops.extend(observed.sweep());
        ops
    }

    proptest! {
        /// Whatever the states, and wherever the writer dies: safe at every step, complete,
        /// idempotent, and the memory of the maps equals the maps.
        #[test]
        fn laws(states in prop::collection::vec(desired(), 1..5), die_at in 0_usize..30) {
            let mut rows = Rows::default();
            for (number, state) in states.iter().enumerate() {
                let mut observed = rows.observed();
                let ops = round(&mut observed, state);
                let dies = number == 1;
                let count = if dies { die_at.min(ops.len()) } else { ops.len() };
                for op in &ops[..count] {
                    rows.apply(*op)?;
                }
                if dies {
                    continue;
                }
                let after = rows.observed();
                prop_assert_eq!(&after.frontends, &observed.frontends);
                for (port, lasts) in state {
                    let programmed = &after.frontends[&frontend(*port)];
                    let set: BTreeSet<u8> = programmed.backends.iter().map(|b| b.addr.v4_octets()[3]).collect();
                    prop_assert_eq!(&set, lasts);
                    prop_assert_eq!(programmed.backends.len(), lasts.len());
                }
                prop_assert_eq!(after.frontends.len(), state.len());
                prop_assert!(after.orphans.is_empty());
                prop_assert_eq!(round(&mut rows.observed(), state), vec![]);
            }
        }

        /// Minimal: as many backend writes as backends that came or had to move into a hole.
        #[test]
        fn what_stays_is_untouched(
            old in prop::collection::btree_set(0..20_u8, 0..20),
            new in prop::collection::btree_set(0..20_u8, 0..20),
        ) {
            let old_slots: Vec<Backend> = old.iter().map(|last| backend(*last)).collect();
            let wanted = new.iter().map(|last| backend(*last)).collect();
            let slots = arrange(&old_slots, &wanted);
            let written = slots.iter().zip(0..).filter(|(b, i)| old_slots.get(*i) != Some(*b)).count();
            let came = new.difference(&old).count();
            let went = old.difference(&new).count();
            prop_assert!(written <= came + went.saturating_sub(came));
        }
    }

    #[test]
    fn a_duplicate_row_of_a_dead_writer_is_repaired() {
        let wanted = BTreeSet::from([backend(1), backend(2)]);
        assert_eq!(arrange(&[backend(1), backend(1)], &wanted), [backend(1), backend(2)]);
    }
}
