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
use crate::{overlay::chain, sys::map::Walk};

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
    /// Drops for want of room in the connection table, and when they last became more.
    drops: Option<u64>,
    dropped_at: Option<u32>,
    /// The table had no room when it was last looked at.
    overflows: bool,
}

impl Room {
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
        let is_recent = |at: u32| now_s().wrapping_sub(at) < TOLD_S;
        let flows = self.room.dropped_at.filter(|at| is_recent(*at)).map(|_at| {
            let drops = self.room.drops.unwrap_or(0);
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
        let drops = self.maps.dropped(DropReason::ConntrackFull).map_err(|error| chain(&error))?;
        // What an earlier agent saw is not news.
        if self.room.drops.is_some_and(|before| drops > before) {
            (self.room.dropped_at, self.room.overflows) = (Some(now_s()), true);
        }
        self.room.drops = Some(drops);
        Ok(())
    }
}
