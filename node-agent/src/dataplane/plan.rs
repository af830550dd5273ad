//! From what is programmed to what should be: the writes, in an order that is safe at every step.
//!
//! Pure. The order is make before break, over all services of a round together, since a frontend may
//! pass from one service to another: first every backend, member, range and table block that is new,
//! then the frontends that expose them, then frontends that nobody has any more, and last what only
//! those led to. A kernel program that runs between any two writes finds every slot that it may
//! choose, and whoever dies between two leaves rows that the next start makes sense of.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::{
    addr::Addr,
    affinity::MemberKey,
    maglev::{self, MaglevBlock, MaglevKey},
    service::{Backend, BackendKey, Peer, Service, ServiceKey, SourceRange},
};

pub use super::batch::{Batch, Gone, Plan, RangeKey};
use super::frontends::{Frontend, Port, PortId, Which};
use crate::{
    model::{Family, ObjectKey, Protocol},
    table::compact,
};

/// Slots beyond this are no set of ours: a set has at most [`super::frontends::BACKENDS`].
const SLOTS: u32 = 1 << 16;
/// Blocks of the longest table that there is.
const BLOCKS: usize = maglev::BACKENDS_MAX;

/// What the service maps hold, row by row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    pub services: Vec<(ServiceKey, Service)>,
    pub backends: Vec<(BackendKey, Backend)>,
    pub members: Vec<(MemberKey, u32)>,
    pub ranges: Vec<RangeKey>,
    pub blocks: Vec<(MaglevKey, MaglevBlock)>,
}

/// What the service maps hold, by who it belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    ports: BTreeMap<ObjectKey, Vec<Programmed>>,
    sets: BTreeMap<u32, Set>,
    /// By service port.
    ranges: BTreeMap<u32, BTreeSet<(u32, Addr)>>,
    /// Rows of an earlier agent that no service was planned for yet.
    unclaimed: BTreeMap<ServiceKey, Service>,
    /// Service ports of an earlier agent whose identifier somebody has taken over.
    adopted: BTreeSet<u32>,
    /// Rows of Maglev tables, of all sets together.
    blocks: usize,
    /// Sets of frontends for clients outside whose choice is by chance.
    by_chance: BTreeSet<u32>,
    last_set: u32,
    last_service: u32,
}

/// One port of a service as it is programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programmed {
    pub id: PortId,
    /// [`Service::service`].
    pub service: u32,
    /// By [`Which`]; 0 when nothing leads there.
    pub sets: [u32; 2],
    pub frontends: Vec<(ServiceKey, Service)>,
}

/// One set of backends as it is programmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Set {
    /// By slot; a hole is [`Backend::default`].
    slots: Vec<Backend>,
    /// What few sets have.
    extra: Option<Box<Extra>>,
    /// A port has it.
    is_taken: bool,
    /// The table is the one that follows from the slots.
    is_filled: bool,
}

/// What a set has beside its slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Extra {
    /// Sorted; only where [`has_members`] says so.
    members: Vec<(Peer, u32)>,
    /// The table, as far as there is one.
    blocks: Vec<MaglevBlock>,
}

impl Observed {
    /// Makes sense of dumped rows. What no frontend can reach comes second: it may go at once.
    #[must_use]
    pub fn from_rows(rows: Rows) -> (Self, Gone) {
        let (mut observed, mut orphans) = (Self::default(), Gone::default());
        let mut counts = BTreeMap::<u32, u32>::new();
        for (key, service) in rows.services {
            let count = counts.entry(service.set).or_default();
            *count = service.count.max(*count);
            observed.last_service = observed.last_service.max(service.service);
            observed.sets.entry(service.set).or_default();
            observed.ranges.entry(service.service).or_default();
            observed.unclaimed.insert(key, service);
        }
        for (key, backend) in rows.backends {
            observed.last_set = observed.last_set.max(key.set);
            let reach = counts.get(&key.set).copied().unwrap_or(0).min(SLOTS);
            match observed.sets.get_mut(&key.set) {
                Some(set) if key.slot < reach => {
                    place(&mut set.slots, index(key.slot), backend, Backend::default());
                }
                _ => orphans.backends.push(key),
            }
        }
        for (key, slot) in rows.members {
            match observed.sets.get_mut(&key.set) {
                Some(set) => set.extra().members.push((key.backend, slot)),
                None => orphans.members.push(key),
            }
        }
        for (key, block) in rows.blocks {
            match observed.sets.get_mut(&key.set) {
                Some(set) if index(key.block) < BLOCKS => {
                    place(&mut set.extra().blocks, index(key.block), block, HOLE);
                }
                _ => orphans.blocks.push(key),
            }
        }
        for (bits, range) in rows.ranges {
            match observed.ranges.get_mut(&range.service) {
                Some(ranges) => drop(ranges.insert((bits, range.addr))),
                None => orphans.ranges.push((bits, range)),
            }
        }
        observed.ranges.retain(|_, ranges| !ranges.is_empty());
        let extras = observed.sets.values_mut().filter_map(|set| set.extra.as_mut());
        extras.for_each(|extra| extra.members.sort_unstable());
        observed.blocks = observed.sets.values().map(Set::blocks).sum();
        let known = observed.sets.keys().last().copied().unwrap_or(0);
        observed.last_set = observed.last_set.max(known);
        (observed, orphans)
    }

    /// Plans one service and records the outcome as observed. Without ports it is withdrawn.
    pub fn plan_service(&mut self, key: &ObjectKey, desired: &[Port], plan: &mut Plan) {
        let mut old = self.ports.remove(key).unwrap_or_default();
        let mut new = Vec::with_capacity(desired.len());
        for port in desired {
            let prior = old.iter().position(|one| one.id == port.id).map(|at| old.swap_remove(at));
            let prior = prior.unwrap_or_else(|| self.adopt(port));
            new.push(self.plan_port(port, prior, plan));
        }
        for port in old {
            self.withdraw(port, plan);
        }
        if !new.is_empty() {
            self.ports.insert(key.clone(), new);
        }
    }

    /// Plans one frontend that has a set to itself, without a service; `None` withdraws it. Packet
    /// tables and tools put single rows this way.
    pub fn plan(&mut self, key: ServiceKey, desired: Option<&BTreeSet<Backend>>) -> Vec<Batch> {
        let frontend = Frontend { key, which: Which::Cluster, flags: 0, is_consistent: false };
        let id = PortId { name: "".into(), protocol: Protocol::Tcp, family: Family::V4 };
        let backends = desired.into_iter().flatten().copied().collect();
        let (backends, frontends) = ([backends, Vec::new()], vec![frontend]);
        let port = Port { id, backends, frontends, affinity_s: 0, ranges: Vec::new() };
        let mut plan = Plan::default();
        let owner = ObjectKey::new("", &format!("{key:?}"));
        if desired.is_some() {
            self.plan_service(&owner, &[port], &mut plan);
        } else {
            let alone = self.adopt(&port);
            self.withdraw(alone, &mut plan);
            self.plan_service(&owner, &[], &mut plan);
        }
        plan.into_batches()
    }

    /// Whether rows of an earlier agent stand for any of these ports.
    #[must_use]
    pub fn has_unclaimed(&self, ports: &[Port]) -> bool {
        let mut frontends = ports.iter().flat_map(|port| &port.frontends);
        frontends.any(|frontend| self.unclaimed.contains_key(&frontend.key))
    }

    /// Withdraws what an earlier agent programmed and nobody asked for: to be called when every
    /// service was planned.
    pub fn sweep(&mut self, plan: &mut Plan) {
        let unclaimed = std::mem::take(&mut self.unclaimed);
        plan.gone.services.extend(unclaimed.keys());
        for service in unclaimed.values() {
            if self.sets.get(&service.set).is_some_and(|set| !set.is_taken) {
                self.drop_set(service.set, plan);
            }
            if !self.adopted.contains(&service.service) {
                self.drop_ranges(service.service, plan);
            }
        }
        self.adopted.clear();
        // Frontends that were adopted but led to a set that another port has taken, or to two.
        let left: Vec<u32> =
            self.sets.iter().filter(|(_, set)| !set.is_taken).map(|(id, _)| *id).collect();
        for set in left {
            self.drop_set(set, plan);
        }
    }

    /// Takes less memory from now on; worth it after many changes.
    pub fn compact(&mut self) {
        compact(&mut self.ports);
        compact(&mut self.sets);
    }

    /// Takes over what an earlier agent had for a port, told by its frontends.
    fn adopt(&mut self, port: &Port) -> Programmed {
        let mut prior =
            Programmed { id: port.id.clone(), service: 0, sets: [0; 2], frontends: Vec::new() };
        if self.unclaimed.is_empty() {
            return prior;
        }
        for frontend in &port.frontends {
            let Some(row) = self.unclaimed.remove(&frontend.key) else { continue };
            prior.frontends.push((frontend.key, row));
            if prior.service == 0 && row.service != 0 && self.adopted.insert(row.service) {
                prior.service = row.service;
            }
            let [cluster, local] = &mut prior.sets;
            let mine = match frontend.which {
                Which::Cluster => cluster,
                Which::Local => local,
            };
            let set = self.sets.get_mut(&row.set).filter(|set| *mine == 0 && !set.is_taken);
            if let Some(set) = set.filter(|_| row.set != 0) {
                set.is_taken = true;
                *mine = row.set;
            }
        }
        prior
    }

    fn plan_port(&mut self, port: &Port, prior: Programmed, plan: &mut Plan) -> Programmed {
        let mut service = prior.service;
        if service == 0 {
            self.last_service += 1;
            service = self.last_service;
        }
        self.plan_ranges(service, &port.ranges, plan);
        let mut sets = [0; 2];
        for which in [Which::Cluster, Which::Local] {
            let at = usize::from(which == Which::Local);
            let leads_here = port.frontends.iter().filter(|frontend| frontend.which == which);
            let is_consistent = leads_here.clone().any(|frontend| frontend.is_consistent);
            if leads_here.count() == 0 {
                self.drop_set(prior.sets[at], plan);
                continue;
            }
            sets[at] = match prior.sets[at] {
                0 => self.fresh_set(),
                id => id,
            };
            let set = self.sets.entry(sets[at]).or_default();
            set.is_taken = true;
            let slots = arrange(&set.slots, &port.backends[at]);
            set.fill_slots(sets[at], slots, plan);
            set.fill_members(sets[at], has_members(port), plan);
            self.fill_table(sets[at], is_consistent, plan);
        }
        let frontends = self.plan_frontends(port, service, sets);
        for (key, row) in &frontends {
            let old = prior.frontends.iter().find(|(old, _)| old == key);
            plan.put_frontend((*key, *row), old.map(|(_, old)| *old));
        }
        let gone = prior.frontends.iter().map(|(key, _)| *key);
        plan.gone
            .services
            .extend(gone.filter(|key| !frontends.iter().any(|(other, _)| other == key)));
        Programmed { id: prior.id, service, sets, frontends }
    }

    fn plan_frontends(
        &self,
        port: &Port,
        service: u32,
        sets: [u32; 2],
    ) -> Vec<(ServiceKey, Service)> {
        let row = |frontend: &Frontend| {
            let set = sets[usize::from(frontend.which == Which::Local)];
            let count = self.slots(set).len();
            let service = Service {
                set,
                count: slot(count),
                service,
                affinity_s: port.affinity_s,
                flags: frontend.flags,
                maglev_bits: if frontend.is_consistent && !self.by_chance.contains(&set) {
                    maglev::bits_for(count)
                } else {
                    0
                },
                reserved: 0,
            };
            (frontend.key, service)
        };
        port.frontends.iter().map(row).collect()
    }

    fn plan_ranges(&mut self, service: u32, desired: &[(u32, Addr)], plan: &mut Plan) {
        if desired.is_empty() {
            self.drop_ranges(service, plan);
            return;
        }
        let desired: BTreeSet<(u32, Addr)> =
            desired.iter().map(|(bits, addr)| (bits + programmed::SERVICE_BITS, *addr)).collect();
        let observed = self.ranges.entry(service).or_default();
        let key = |(bits, addr): &(u32, Addr)| (*bits, SourceRange { service, addr: *addr });
        plan.ranges.extend(desired.difference(observed).map(key));
        plan.gone.ranges.extend(observed.difference(&desired).map(key));
        *observed = desired;
    }

    fn withdraw(&mut self, port: Programmed, plan: &mut Plan) {
        plan.gone.services.extend(port.frontends.iter().map(|(key, _)| *key));
        for set in port.sets {
            self.drop_set(set, plan);
        }
        self.drop_ranges(port.service, plan);
    }

    fn drop_set(&mut self, id: u32, plan: &mut Plan) {
        let Some(set) = self.sets.remove(&id) else { return };
        self.blocks -= set.blocks();
        self.by_chance.remove(&id);
        let slots = (0..set.slots.len()).map(|at| BackendKey { set: id, slot: slot(at) });
        plan.gone.backends.extend(slots);
        let Some(extra) = set.extra else { return };
        let members = extra.members.iter();
        plan.gone
            .members
            .extend(members.map(|(backend, _)| MemberKey { set: id, backend: *backend }));
        let blocks = (0..extra.blocks.len()).map(|at| MaglevKey { set: id, block: slot(at) });
        plan.gone.blocks.extend(blocks);
    }

    fn drop_ranges(&mut self, service: u32, plan: &mut Plan) {
        let ranges = self.ranges.remove(&service).unwrap_or_default();
        let key = |(bits, addr)| (bits, SourceRange { service, addr });
        plan.gone.ranges.extend(ranges.into_iter().map(key));
    }

    const fn fresh_set(&mut self) -> u32 {
        // 2^32 sets would have to be made during one life of the maps for this to come around.
        self.last_set += 1;
        self.last_set
    }
}

impl Set {
    fn extra(&mut self) -> &mut Extra {
        self.extra.get_or_insert_default()
    }

    /// Gives up what is empty.
    fn tidy(&mut self) {
        self.extra.take_if(|extra| extra.members.is_empty() && extra.blocks.is_empty());
    }

    fn fill_slots(&mut self, id: u32, slots: Vec<Backend>, plan: &mut Plan) {
        if slots == self.slots {
            return;
        }
        let changed =
            slots.iter().enumerate().filter(|(at, one)| self.slots.get(*at) != Some(*one));
        let key = |at| BackendKey { set: id, slot: slot(at) };
        plan.backends.extend(changed.map(|(at, backend)| (key(at), *backend)));
        plan.gone.backends.extend((slots.len()..self.slots.len()).map(key));
        self.slots = slots;
        self.is_filled = false;
    }

    /// How many blocks its table has.
    fn blocks(&self) -> usize {
        self.extra.as_ref().map_or(0, |extra| extra.blocks.len())
    }

    fn fill_members(&mut self, id: u32, wanted: bool, plan: &mut Plan) {
        if !wanted && self.extra.is_none() {
            return;
        }
        let old = std::mem::take(&mut self.extra().members);
        let mut members: Vec<(Peer, u32)> = Vec::new();
        if wanted {
            let peer = |one: &Backend| Peer { addr: one.addr, port: one.port, reserved: [0; 2] };
            members.extend(self.slots.iter().zip(0..).map(|(one, slot)| (peer(one), slot)));
            members.sort_unstable();
        }
        let key = |backend: &Peer| MemberKey { set: id, backend: *backend };
        let new = members.iter().filter(|member| old.binary_search(member).is_err());
        plan.members.extend(new.map(|(backend, slot)| (key(backend), *slot)));
        let is_in = |backend: &Peer| members.binary_search_by_key(backend, |(one, _)| *one).is_ok();
        let gone = old.iter().filter(|(backend, _)| !is_in(backend));
        plan.gone.members.extend(gone.map(|(backend, _)| key(backend)));
        self.extra().members = members;
        self.tidy();
    }

    /// Makes the table anew, which is `count` blocks long.
    fn fill_table(&mut self, id: u32, count: usize, plan: &mut Plan) {
        if self.blocks() == count && (count == 0 || self.is_filled) {
            self.is_filled = true;
            return;
        }
        let blocks = consistent::table(&self.slots, count * maglev::BLOCK);
        let old = std::mem::take(&mut self.extra().blocks);
        let key = |at| MaglevKey { set: id, block: slot(at) };
        let changed = blocks.iter().enumerate().filter(|(at, one)| old.get(*at) != Some(*one));
        plan.blocks.extend(changed.map(|(at, block)| (key(at), *block)));
        plan.gone.blocks.extend((count..old.len()).map(key));
        self.extra().blocks = blocks;
        self.is_filled = true;
        self.tidy();
    }
}

/// Puts the desired backends (sorted, each once) into slots: those that stay keep theirs, newcomers
/// fill the holes, and what is left of the holes is filled from the end.
#[must_use]
pub fn arrange(current: &[Backend], desired: &[Backend]) -> Vec<Backend> {
    if current.is_empty() {
        return desired.to_vec();
    }
    let mut is_placed = vec![false; desired.len()];
    let mut keep = |backend: &Backend| {
        let at = desired.binary_search(backend).ok()?;
        let is_second = std::mem::replace(is_placed.get_mut(at)?, true);
        (!is_second).then_some(*backend)
    };
    let mut slots: Vec<Option<Backend>> = current.iter().map(&mut keep).collect();
    let newcomers = desired.iter().zip(is_placed).filter(|(_, is_placed)| !is_placed);
    let mut newcomers = newcomers.map(|(backend, _)| *backend);
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

/// A block that was not in the dump.
const HOLE: MaglevBlock = MaglevBlock { slots: [u16::MAX; maglev::BLOCK] };

fn place<T: Copy>(rows: &mut Vec<T>, at: usize, row: T, hole: T) {
    if rows.len() <= at {
        rows.resize(at + 1, hole);
    }
    rows[at] = row;
}

/// Whether programs ask who belongs to a port's sets: affinity before it takes a client back to its
/// backend, and UDP before a flow goes on.
fn has_members(port: &Port) -> bool {
    port.affinity_s != 0 || port.id.protocol == Protocol::Udp
}

fn slot(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn index(slot: u32) -> usize {
    usize::try_from(slot).unwrap_or(usize::MAX)
}

#[path = "consistent.rs"]
mod consistent;
#[path = "programmed.rs"]
mod programmed;

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
