//! The dataplane's task seeing to it that its maps have room, step by step.
//!
//! Effects: how full the maps are in, `size.rs` asked, the step done (`grow.rs`), programs loaded anew.
//! Loading takes the verifier a second or so in which the task does nothing else; it happens once for
//! service maps and three times for the connection table, which then has twice the room.

use std::{path::Path, time::Instant};

use ebpf_common::{maps as names, verdict::DropReason};

use super::{
    apply::{Runner, now_s},
    grow,
    size::{self, Connections, Step},
    status::Full,
};
use crate::{chain::chain, sys::map::Walk};

/// Batches of rows that one round of work moves: 65,536 rows, some 100 ms.
const BATCHES: usize = 16;
/// Seconds for which a full connection table is told after the last packet that it cost.
const TOLD_S: u32 = 60;

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Pins have changed, or a link could not be swapped: not all that runs is of the present pins.
    is_stale: bool,
    /// Through the old connection table.
    walk: Option<Walk>,
    old_is_empty: bool,
    /// Drops for want of room in the connection table.
    drops: Drops,
    /// Later pieces of packets that were dropped since their first one was not known.
    pieces: Drops,
    /// The table had no room when it was last looked at.
    overflows: bool,
}

/// A reason's drops, and when they last became more.
#[derive(Debug, Default)]
struct Drops {
    count: Option<u64>,
    at: Option<u32>,
}

impl Drops {
    /// Takes the count over. Says whether there are more than when it was last looked at; what an earlier
    /// agent saw is not news.
    fn see(&mut self, count: u64, now_s: u32) -> bool {
        let are_more = self.count.is_some_and(|before| count > before);
        if are_more {
            self.at = Some(now_s);
        }
        self.count = Some(count);
        are_more
    }

    /// Whether there were any lately.
    fn are_recent(&self, now_s: u32) -> bool {
        self.at.is_some_and(|at| now_s.wrapping_sub(at) < TOLD_S)
    }
}

impl Room {
    /// Whether packets in pieces were dropped lately since their first pieces were not known.
    pub(super) fn loses_pieces(&self) -> bool {
        self.pieces.are_recent(now_s())
    }

    /// Whether it is still to come that programs and maps are those of the present pins.
    pub(super) const fn is_stale(&self) -> bool {
        self.is_stale
    }
}

impl Runner {
    /// Gives maps of services room for what they have, and for rows that were refused. Says whether any
    /// got some.
    pub(super) fn make_room_for_services(&mut self) -> Result<bool, String> {
        let Some(folder) = self.programs.pins.clone() else { return Ok(false) };
        let maps = self.maps.services();
        let mut has_grown = false;
        for (map, rows, max) in maps.fill().map_err(|error| chain(&error))? {
            let wanted = rows + self.services.full.get(map).copied().unwrap_or(0);
            let Some(room) = self.programs.sizes.grown(map, wanted, max) else { continue };
            maps.enlarge(&folder, map, room).map_err(|error| format!("map {map}: {error}"))?;
            // Also when the next one fails: what is pinned now is a copy, which nobody writes.
            (self.room.is_stale, has_grown) = (true, true);
            tracing::info!(map, from = max, to = room, rows, "a map grows");
        }
        if has_grown {
            self.renew()?;
        }
        Ok(has_grown)
    }

    /// Goes on with a larger connection table, if there is to be one.
    pub(super) fn make_room_for_connections(&mut self) -> Result<(), String> {
        self.look_for_drops()?;
        let Some(folder) = self.programs.pins.clone() else { return Ok(()) };
        if self.room.is_stale {
            self.renew()?;
        }
        let (table, old) = (self.maps.connections(), self.maps.old_connections());
        let max = table.max();
        let rows = if self.room.overflows { u64::from(max) } else { self.collector.rows() };
        let (old_max, old_is_empty) = (old.max(), self.room.old_is_empty);
        let tables = Connections { rows, max, old_max, old_is_empty };
        let Some(step) = size::next_step(tables, &self.programs.sizes) else { return Ok(()) };
        // Filters that an earlier agent left are known when all devices and pods are.
        if !self.is_attached() {
            return Ok(());
        }
        match step {
            Step::Move => self.move_connections(),
            Step::Offer { .. } | Step::Exchange | Step::Retire => self.change(&folder, step),
        }
    }

    /// Maps that lack room, and may get no more.
    pub(super) fn full(&self) -> Vec<Full> {
        let can_grow = self.programs.pins.is_some();
        let full = |map: &'static str, max: u32, missing| {
            let most = self.programs.sizes.most.get(map).copied().filter(|_| can_grow);
            Full { map, max, most: most.unwrap_or(max).max(max), missing }
        };
        let services = self.services.full.iter();
        let services =
            services.map(|(map, missing)| full(map, self.maps.services().max(map), *missing));
        let flows = self.room.drops.are_recent(now_s()).then(|| {
            let drops = self.room.drops.count.unwrap_or(0);
            full(names::CONNTRACK, self.maps.connections().max(), drops)
        });
        services.chain(flows).collect()
    }

    fn change(&mut self, folder: &Path, step: Step) -> Result<(), String> {
        let start = Instant::now();
        grow::change_pins(folder, step).map_err(|error| format!("connection table: {error}"))?;
        self.room.is_stale = true;
        self.renew()?;
        self.collector.forget();
        (self.room.walk, self.room.old_is_empty, self.room.overflows) = (None, false, false);
        let max = self.maps.connections().max();
        let ms = start.elapsed().as_millis();
        tracing::info!(?step, max, ms, "the connection table grows");
        Ok(())
    }

    fn move_connections(&mut self) -> Result<(), String> {
        let mut walk = self.room.walk.take().unwrap_or_default();
        let (from, to) = (self.maps.old_connections(), self.maps.connections());
        for _batch in 0..BATCHES {
            let moved = grow::move_rows(from, to, &mut walk);
            moved.map_err(|error| format!("rows of the connection table: {error}"))?;
            if walk.is_over() {
                let left = from.count().map_err(|error| chain(&error))?;
                self.room.old_is_empty = left == 0;
                return Ok(());
            }
        }
        self.room.walk = Some(walk);
        Ok(())
    }

    /// Loads the programs over the pins as they are and puts them everywhere.
    fn renew(&mut self) -> Result<(), String> {
        self.maps = self.programs.load_anew().map_err(|error| chain(&error))?;
        // Their copies lack what was written since they were made, if this is not the first attempt.
        self.services.forget();
        self.programs.swap().map_err(|error| chain(&error))?;
        self.xdp.renew(&mut self.programs).map_err(|error| chain(&error))?;
        self.room.is_stale = false;
        Ok(())
    }

    fn is_attached(&self) -> bool {
        let parts = ["settings", "pods", "devices"];
        self.tables.endpoints.is_synced()
            && !parts.iter().any(|part| self.trouble.contains_key(part))
    }

    fn look_for_drops(&mut self) -> Result<(), String> {
        let dropped = |reason| self.maps.dropped(reason).map_err(|error| chain(&error));
        let (drops, pieces) =
            (dropped(DropReason::ConntrackFull)?, dropped(DropReason::FragmentLost)?);
        let now_s = now_s();
        self.room.overflows |= self.room.drops.see(drops, now_s);
        self.room.pieces.see(pieces, now_s);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_told_for_a_while_and_those_of_an_earlier_agent_are_not() {
        let mut drops = Drops::default();
        assert!(!drops.see(7, 100) && !drops.are_recent(100));
        assert!(!drops.see(7, 101));
        assert!(drops.see(8, 102) && drops.are_recent(102) && drops.are_recent(161));
        assert!(!drops.see(8, 162) && !drops.are_recent(162));
    }
}
