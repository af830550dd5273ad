//! The walk over the connection table that removes finished flows and counts the others.
//!
//! Effects. A walk goes in parts, so that a table of a million rows neither stops the task for long nor
//! is held in memory: a part reads some ten thousand rows in batches, and deletes in batches.

use std::io;

use ebpf_common::conntrack::{FORWARD, Flow, FlowKey};

use super::{gc, seek::Sought};
use crate::sys::map::{RowMap, Walk};

/// A connection table.
type Flows = RowMap<FlowKey, Flow>;

/// Batches in one part: 32,768 rows, some 50 ms of work when all of them are idle.
const BATCHES: usize = 8;

/// A walk, and what the last whole one found.
#[derive(Debug, Default)]
pub struct Collector {
    walk: Option<Walk>,
    /// What this walk looks for beside what is idle.
    sought: Sought,
    /// The same for the next one.
    wanted: Sought,
    /// Rows seen and left in this walk.
    seen: u64,
    rows: u64,
}

impl Collector {
    /// Rows that the last whole walk left in the table.
    #[must_use]
    pub const fn rows(&self) -> u64 {
        self.rows
    }

    /// Whether a walk is under way.
    #[must_use]
    pub const fn is_walking(&self) -> bool {
        self.walk.is_some()
    }

    /// Begins a walk unless one is under way.
    pub fn begin(&mut self) {
        if self.walk.is_none() {
            (self.walk, self.seen) = (Some(Walk::new()), 0);
            self.sought.add(std::mem::take(&mut self.wanted));
        }
    }

    /// Begins a walk that looks for more than what is idle, if it is to look for anything; behind the one that is
    /// under way, which has passed rows already.
    pub fn seek(&mut self, sought: Sought) {
        if !sought.is_empty() {
            self.wanted.add(sought);
            self.begin();
        }
    }

    /// Begins anew with the next walk: the table is another one.
    pub fn forget(&mut self) {
        self.walk = None;
    }

    /// Does a part of the walk at `now_s` (seconds of the monotonic clock). While the table grows, the
    /// other half of a flow may stand in the old one. `seek` finds among rows what is sought ([`Sought::over`]).
    /// `tell` is given rows, and which are about to go with them.
    ///
    /// # Errors
    ///
    /// What the kernel says; the walk is then over, and the next one looks for the same.
    pub fn part(
        &mut self,
        (table, old): (&Flows, &Flows),
        now_s: u32,
        mut seek: impl FnMut(&Sought, &[(FlowKey, Flow)]) -> io::Result<Vec<FlowKey>>,
        mut tell: impl FnMut(&[(FlowKey, Flow)], &[FlowKey]),
    ) -> io::Result<()> {
        let Some(mut walk) = self.walk.take() else { return Ok(()) };
        let is_growing = old.max() > 1;
        let look_up = |key: &FlowKey| match table.row(key)? {
            None if is_growing => old.row(key),
            found => Ok(found),
        };
        for _batch in 0..BATCHES {
            let rows = table.next(&mut walk)?;
            let mut gone = gc::expired(&rows, now_s, look_up)?;
            let mut sought = Vec::new();
            if !self.sought.is_empty() {
                // What has the keys by now may be another flow.
                let again = seek(&self.sought, &rows)?;
                let again = again.chunks(2).filter_map(|pair| {
                    let row = look_up(&pair[0]).transpose()?;
                    Some(row.map(|row| (pair[0], row)))
                });
                sought = seek(&self.sought, &again.collect::<io::Result<Vec<_>>>()?)?;
            }
            gone.retain_idle(now_s, look_up)?;
            gone.add(sought);
            tell(&rows, &gone.keys);
            let mut failed = table.delete(&gone.keys);
            if is_growing {
                failed.extend(old.delete(&gone.keys));
            }
            if let Some((_, error)) = failed.into_iter().next() {
                return Err(error);
            }
            // Each flow is counted where its forward half stands: the other may be in another batch.
            let forward = rows.iter().filter(|(_, flow)| flow.direction == FORWARD).count();
            self.seen += 2 * u64::try_from(forward.saturating_sub(gone.forward)).unwrap_or(0);
            if walk.is_over() {
                self.rows = self.seen;
                let sought = std::mem::take(&mut self.sought);
                // Rows that moved from the old table to this one may have been passed by.
                if is_growing {
                    self.wanted.add(sought);
                } else if !self.wanted.is_empty() {
                    self.begin();
                }
                return Ok(());
            }
        }
        self.walk = Some(walk);
        Ok(())
    }
}
