//! Maglev tables of sets that clients outside choose from: their room, and who has none.
//!
//! Pure; a part of the plan.

use ebpf_common::{
    maglev::{self, Candidate, MaglevBlock},
    maps as names,
    service::Backend,
};

use super::{Observed, Plan, index};
use crate::model::ObjectKey;

impl Observed {
    /// Makes a set's table, if it is to have one and there is room for it beside what is only deleted
    /// at the end of the round. A set without room chooses by chance; its table is tried again
    /// whenever the set is planned.
    pub(super) fn fill_table(&mut self, id: u32, is_consistent: bool, plan: &mut Plan) {
        let Some(set) = self.sets.get_mut(&id) else { return };
        let backends = set.slots.len();
        let wanted = if is_consistent { maglev::len_for(backends) } else { 0 };
        let others = self.blocks - set.blocks();
        let most = index(names::MAGLEV_MAX).saturating_sub(plan.gone.blocks.len());
        let count = wanted / maglev::BLOCK;
        let has_room = count <= set.blocks() || others + count <= most;
        let count = if has_room { count } else { 0 };
        set.fill_table(id, count, plan);
        self.blocks = others + count;
        if is_consistent && backends > 1 && (!has_room || maglev::bits_for(backends) == 0) {
            self.by_chance.insert(id);
        } else {
            self.by_chance.remove(&id);
        }
    }

    /// Service ports whose backends are not the same on every node for clients outside: their set has
    /// too many backends for a table, or the map has no room for it.
    pub fn by_chance(&self) -> impl Iterator<Item = &ObjectKey> {
        self.ports()
            .filter(|(_, port)| port.sets.iter().any(|set| self.by_chance.contains(set)))
            .map(|(key, _)| key)
    }
}

/// The Maglev table of a set.
pub(super) fn table(slots: &[Backend], length: usize) -> Vec<MaglevBlock> {
    if length == 0 {
        return Vec::new();
    }
    let mut candidates: Vec<Candidate> =
        slots.iter().zip(0_u16..).map(|(one, slot)| Candidate::new(one, slot)).collect();
    let mut table = vec![0; length];
    maglev::fill(&mut candidates, &mut table);
    maglev::blocks(&table).collect()
}

#[cfg(test)]
#[path = "consistent_tests.rs"]
mod tests;
