//! The four laws over random states: safe at every step, complete, idempotent, minimal; and what a
//! writer leaves behind that dies between any two writes.

use ebpf_common::service::{KEEP_SOURCE, SOURCE_RANGES};
use proptest::prelude::*;

use super::*;

/// The maps.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Maps {
    pub(super) services: BTreeMap<ServiceKey, Service>,
    pub(super) backends: BTreeMap<BackendKey, Backend>,
    members: BTreeMap<MemberKey, u32>,
    ranges: BTreeSet<RangeKey>,
    pub(super) blocks: BTreeMap<MaglevKey, MaglevBlock>,
}

/// A batch as single writes, since a writer may die inside of it.
fn single(batch: Batch) -> Vec<Batch> {
    match batch {
        Batch::PutBackends(rows) => rows.into_iter().map(|r| Batch::PutBackends(vec![r])).collect(),
        Batch::PutMembers(rows) => rows.into_iter().map(|r| Batch::PutMembers(vec![r])).collect(),
        Batch::PutRanges(rows) => rows.into_iter().map(|r| Batch::PutRanges(vec![r])).collect(),
        Batch::PutBlocks(rows) => rows.into_iter().map(|r| Batch::PutBlocks(vec![r])).collect(),
        Batch::PutServices(rows) => rows.into_iter().map(|r| Batch::PutServices(vec![r])).collect(),
        Batch::DelServices(rows) => rows.into_iter().map(|r| Batch::DelServices(vec![r])).collect(),
        Batch::DelBlocks(rows) => rows.into_iter().map(|r| Batch::DelBlocks(vec![r])).collect(),
        Batch::DelRanges(rows) => rows.into_iter().map(|r| Batch::DelRanges(vec![r])).collect(),
        Batch::DelMembers(rows) => rows.into_iter().map(|r| Batch::DelMembers(vec![r])).collect(),
        Batch::DelBackends(rows) => rows.into_iter().map(|r| Batch::DelBackends(vec![r])).collect(),
    }
}

impl Maps {
    fn apply(&mut self, batch: Batch) {
        match batch {
            Batch::PutBackends(rows) => self.backends.extend(rows),
            Batch::PutMembers(rows) => self.members.extend(rows),
            Batch::PutRanges(rows) => self.ranges.extend(rows),
            Batch::PutBlocks(rows) => self.blocks.extend(rows),
            Batch::PutServices(rows) => self.services.extend(rows),
            Batch::DelServices(keys) => self.services.retain(|key, _| !keys.contains(key)),
            Batch::DelBlocks(keys) => self.blocks.retain(|key, _| !keys.contains(key)),
            Batch::DelRanges(keys) => self.ranges.retain(|key| !keys.contains(key)),
            Batch::DelMembers(keys) => self.members.retain(|key, _| !keys.contains(key)),
            Batch::DelBackends(keys) => self.backends.retain(|key, _| !keys.contains(key)),
        }
    }

    fn rows(&self) -> Rows {
        Rows {
            services: self.services.iter().map(|(key, row)| (*key, *row)).collect(),
            backends: self.backends.iter().map(|(key, row)| (*key, *row)).collect(),
            members: self.members.iter().map(|(key, row)| (*key, *row)).collect(),
            ranges: self.ranges.iter().copied().collect(),
            blocks: self.blocks.iter().map(|(key, row)| (*key, *row)).collect(),
        }
    }

    /// What programs rely on: every slot, every block, and ranges where they are asked for.
    fn check(&self, after: &Batch) -> Result<(), TestCaseError> {
        for (key, service) in &self.services {
            for slot in 0..service.count {
                let key = BackendKey { set: service.set, slot };
                prop_assert!(self.backends.contains_key(&key), "no {key:?} after {after:?}");
            }
            let count = usize::try_from(service.count).unwrap();
            let length = if service.maglev_bits == 0 { 0 } else { maglev::len_for(count) };
            for block in 0..slot(length / maglev::BLOCK) {
                let key = MaglevKey { set: service.set, block };
                prop_assert!(self.blocks.contains_key(&key), "no {key:?} after {after:?}");
            }
            let guarded = service.flags & SOURCE_RANGES != 0;
            let has_range = self.ranges.iter().any(|(_, range)| range.service == service.service);
            prop_assert!(!guarded || has_range, "no range for {key:?} after {after:?}");
        }
        Ok(())
    }

    /// A whole round by an agent that has just started; the first `die_at` writes are done.
    fn round(&mut self, world: &World, die_at: Option<usize>) -> Result<Observed, TestCaseError> {
        let (mut observed, orphans) = Observed::from_rows(self.rows());
        let mut batches = orphans.into_batches();
        let mut plan = Plan::default();
        for (key, ports) in world {
            observed.plan_service(key, ports, &mut plan);
        }
        observed.sweep(&mut plan);
        batches.extend(plan.into_batches());
        self.write(batches, die_at)?;
        Ok(observed)
    }

    pub(super) fn write(
        &mut self,
        batches: Vec<Batch>,
        die_at: Option<usize>,
    ) -> Result<(), TestCaseError> {
        let writes = batches.into_iter().flat_map(single);
        for write in writes.take(die_at.unwrap_or(usize::MAX)) {
            self.apply(write.clone());
            self.check(&write)?;
        }
        Ok(())
    }

    /// The maps say exactly what `world` asks for and nothing else.
    fn says(&self, world: &World) -> Result<(), TestCaseError> {
        let (mut sets, mut services) = (BTreeMap::new(), BTreeMap::new());
        let mut frontends = 0;
        for port in world.values().flatten() {
            for one in &port.frontends {
                frontends += 1;
                let row = self.services[&one.key];
                let desired = &port.backends[usize::from(one.which == Which::Local)];
                let owner = sets.insert(row.set, desired).unwrap_or(desired);
                prop_assert_eq!(owner, desired, "a set belongs to one port");
                let mine: &PortId = services.insert(row.service, &port.id).unwrap_or(&port.id);
                prop_assert_eq!(mine, &port.id, "an identifier belongs to one port");
                let mut found: Vec<Backend> = (0..row.count)
                    .map(|slot| self.backends[&BackendKey { set: row.set, slot }])
                    .collect();
                let bits = if one.is_consistent { maglev::bits_for(found.len()) } else { 0 };
                prop_assert_eq!((row.affinity_s, row.flags), (port.affinity_s, one.flags));
                prop_assert_eq!(row.maglev_bits, bits);
                let length = if bits == 0 { 0 } else { maglev::len_for(found.len()) };
                for (block, at) in consistent::table(&found, length).into_iter().zip(0..) {
                    prop_assert_eq!(&self.blocks[&MaglevKey { set: row.set, block: at }], &block);
                }
                found.sort_unstable();
                prop_assert_eq!(&found, desired);
            }
        }
        prop_assert_eq!(self.services.len(), frontends);
        let all: usize = sets.values().map(|set| set.len()).sum();
        prop_assert_eq!(self.backends.len(), all);
        let members = world.values().flatten().filter(|port| has_members(port));
        let members: usize =
            members.map(|port| leading(port).map(|set| set.len()).sum::<usize>()).sum();
        prop_assert_eq!(self.members.len(), members);
        for (member, slot) in &self.members {
            let backend = self.backends[&BackendKey { set: member.set, slot: *slot }];
            prop_assert_eq!(
                (backend.addr, backend.port),
                (member.backend.addr, member.backend.port)
            );
        }
        let ranges: usize = world.values().flatten().map(|port| port.ranges.len()).sum();
        prop_assert_eq!(self.ranges.len(), ranges);
        Ok(())
    }
}

/// The sets of a port that a frontend leads to.
fn leading(port: &Port) -> impl Iterator<Item = &Vec<Backend>> {
    let has = |which| port.frontends.iter().any(|one| one.which == which);
    [Which::Cluster, Which::Local]
        .into_iter()
        .filter(move |which| has(*which))
        .map(|which| &port.backends[usize::from(which == Which::Local)])
}

type World = BTreeMap<ObjectKey, Vec<Port>>;

fn backend(last: u8) -> Backend {
    Backend { addr: Addr::v4([10, 0, 0, last]), port: [0, 80], reserved: [0; 2] }
}

fn frontend(last: u8, which: Which, (scope, flags): (u8, u16), is_consistent: bool) -> Frontend {
    let key = ServiceKey { addr: Addr::v4([10, 96, 0, last]), port: [0, 80], proto: 6, scope };
    Frontend { key, which, flags, is_consistent }
}

/// A port that may be asked for by any service: the frontend's address says which one it is.
fn port(address: u8) -> impl Strategy<Value = Port> {
    let set = || prop::collection::btree_set(0..24_u8, 0..14);
    let backends = |set: BTreeSet<u8>| {
        let mut set: Vec<Backend> = set.into_iter().map(backend).collect();
        set.sort_unstable();
        set
    };
    (set(), set(), 0..4_u8, prop::option::of(1..4_u32), 0..3_u32).prop_map(
        move |(cluster, local, shape, affinity, ranges)| {
            let guard = if ranges > 0 { SOURCE_RANGES } else { 0 };
            let mut frontends = vec![match shape {
                0 | 1 => frontend(address, Which::Cluster, (0, guard), shape == 1),
                _ => frontend(address, Which::Local, (0, guard), false),
            }];
            if shape == 3 {
                let outside = (1, guard | KEEP_SOURCE);
                frontends.push(frontend(address, Which::Cluster, outside, true));
            }
            let ranges = (0..ranges).map(|n| (104 + n, Addr::v4([10, 0, 0, 0]))).collect();
            Port {
                id: PortId {
                    name: address.to_string().into(),
                    protocol: Protocol::Tcp,
                    family: Family::V4,
                },
                backends: [backends(cluster), backends(local)],
                frontends,
                affinity_s: affinity.unwrap_or(0),
                ranges,
            }
        },
    )
}

/// Up to four addresses, each with one of three services.
fn world() -> impl Strategy<Value = World> {
    let one = |address: u8| (prop::option::of(0..3_u8), port(address));
    (one(1), one(2), one(3), one(4)).prop_map(|(a, b, c, d)| {
        let mut world: World = (0..3).map(|n| (service(n), Vec::new())).collect();
        for (owner, port) in [a, b, c, d] {
            if let Some(owner) = owner {
                world.entry(service(owner)).or_default().push(port);
            }
        }
        world
    })
}

fn service(number: u8) -> ObjectKey {
    ObjectKey::new("d", &number.to_string())
}

proptest! {
    /// Wherever a writer dies, the next one takes over; nothing is exposed half, nothing is left.
    #[test]
    fn restarted_agents(worlds in prop::collection::vec(world(), 1..5), die_at in 0_usize..60) {
        let mut maps = Maps::default();
        for (number, world) in worlds.iter().enumerate() {
            if number % 2 == 1 {
                maps.round(world, Some(die_at))?;
                continue;
            }
            let observed = maps.round(world, None)?;
            maps.says(world)?;
            // Idempotent, by memory and by dump.
            let mut plan = Plan::default();
            let mut again = observed.clone();
            for (key, ports) in world {
                again.plan_service(key, ports, &mut plan);
            }
            again.sweep(&mut plan);
            prop_assert_eq!(&plan, &Plan::default());
            prop_assert_eq!(&again, &observed);
            let before = maps.clone();
            maps.round(world, Some(0))?;
            let (_, orphans) = Observed::from_rows(maps.rows());
            prop_assert_eq!(orphans, Gone::default());
            maps.round(world, None)?;
            prop_assert_eq!(&maps, &before, "a restart changes nothing, identifiers neither");
        }
    }

    /// The same agent, whose memory of the maps must equal the maps.
    #[test]
    fn one_agent(worlds in prop::collection::vec(world(), 1..6)) {
        let (mut maps, mut observed) = (Maps::default(), Observed::default());
        for world in &worlds {
            let mut plan = Plan::default();
            for (key, ports) in world {
                observed.plan_service(key, ports, &mut plan);
            }
            maps.write(plan.into_batches(), None)?;
            maps.says(world)?;
        }
    }

    /// Minimal: as many backend writes as backends that came or had to move into a hole.
    #[test]
    fn what_stays_is_untouched(
        old in prop::collection::btree_set(0..20_u8, 0..20),
        new in prop::collection::btree_set(0..20_u8, 0..20),
    ) {
        let sorted = |set: &BTreeSet<u8>| {
            let mut set: Vec<Backend> = set.iter().map(|last| backend(*last)).collect();
            set.sort_unstable();
            set
        };
        let (old_slots, wanted) = (sorted(&old), sorted(&new));
        let slots = arrange(&old_slots, &wanted);
        let written = slots.iter().zip(0..).filter(|(b, i)| old_slots.get(*i) != Some(*b)).count();
        let (came, went) = (new.difference(&old).count(), old.difference(&new).count());
        prop_assert!(written <= came + went.saturating_sub(came));
        let mut found = slots;
        found.sort_unstable();
        prop_assert_eq!(found, wanted);
    }
}

#[test]
fn a_duplicate_row_of_a_dead_writer_is_repaired() {
    let mut wanted = [backend(1), backend(2)];
    wanted.sort_unstable();
    let slots = arrange(&[backend(1), backend(1)], &wanted);
    assert_eq!((slots.len(), slots.contains(&backend(2))), (2, true));
}

#[test]
fn rows_that_make_no_sense_are_orphans_and_cost_nothing() {
    let far = BackendKey { set: 7, slot: u32::MAX };
    let key = ServiceKey { addr: Addr::v4([10, 96, 0, 1]), port: [0, 80], proto: 6, scope: 0 };
    let rows = Rows {
        services: vec![(
            key,
            Service { set: 7, count: u32::MAX, service: 3, ..Service::default() },
        )],
        backends: vec![(far, backend(1)), (BackendKey { set: 8, slot: 0 }, backend(2))],
        ..Rows::default()
    };
    let (observed, orphans) = Observed::from_rows(rows);
    assert_eq!(orphans.backends.len(), 2);
    assert_eq!((observed.last_set, observed.last_service), (8, 3));
}
