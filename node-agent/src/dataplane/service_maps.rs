//! The maps of services: what they hold, and a round's writes in their order.
//!
//! Effects only. Rows travel in batches. A row that cannot be written does not stop the others, but
//! nothing that needs it is exposed and nothing is emptied after it: the caller reads the maps back
//! and plans anew.

use std::{collections::BTreeSet, fmt, io, os::fd::AsFd as _, path::Path};

use aya::{
    Ebpf, Pod,
    maps::{Map, MapError, lpm_trie::Key},
};
use ebpf_common::{
    affinity::MemberKey,
    maglev::{MaglevBlock, MaglevKey},
    maps as names,
    service::{Backend, BackendKey, Service, ServiceKey, SourceRange},
};

use super::{
    grow,
    load::LoadError,
    plan::{Batch, RangeKey, Rows},
};
use crate::sys::map::{Failed, RowMap};

/// The maps of services.
#[derive(Debug)]
pub struct ServiceMaps {
    services: RowMap<ServiceKey, Service>,
    backends: RowMap<BackendKey, Backend>,
    members: RowMap<MemberKey, u32>,
    ranges: RowMap<Key<SourceRange>, u32>,
    blocks: RowMap<MaglevKey, MaglevBlock>,
    /// Programs that are still to be loaded name the maps by these descriptors.
    _kept: Vec<Map>,
}

/// Rows of one map that could not be written.
#[derive(Debug)]
pub struct WriteError {
    pub map: &'static str,
    pub rows: usize,
    /// What the kernel said to the first.
    pub error: io::Error,
}

impl WriteError {
    /// Whether the map has no room left.
    #[must_use]
    pub fn is_full(&self) -> bool {
        // A hash map says the first, a trie the second.
        matches!(self.error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    }

    /// Words for a map that has no room for so many rows.
    #[must_use]
    pub fn no_room(map: &str, rows: u64) -> String {
        format!("map {map} is full: {rows} rows are not written")
    }
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { map, rows, error } = self;
        write!(f, "map {map}: {rows} rows are not written: {error}")
    }
}

/// What a round's writes left undone.
#[derive(Debug, Default)]
pub struct Undone {
    /// One entry for a batch.
    pub failures: Vec<WriteError>,
    /// Sets that are not whole.
    pub sets: BTreeSet<u32>,
    /// Service ports ([`Service::service`]) whose source ranges are not.
    pub services: BTreeSet<u32>,
    /// Frontends that are not written, or not exposed for want of what they lead to.
    pub frontends: BTreeSet<ServiceKey>,
    /// Rows that nothing is to lead to any more were left, since it is not known that nothing does.
    pub is_unemptied: bool,
}

impl ServiceMaps {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the object lacks one or has it in another shape.
    pub(super) fn take(object: &mut Ebpf) -> Result<Self, LoadError> {
        let mut kept = Vec::new();
        Ok(Self {
            services: take(object, names::SERVICES, &mut kept)?,
            backends: take(object, names::BACKENDS, &mut kept)?,
            members: take(object, names::MEMBERS, &mut kept)?,
            ranges: take(object, names::SOURCE_RANGES, &mut kept)?,
            blocks: take(object, names::MAGLEV, &mut kept)?,
            _kept: kept,
        })
    }

    /// Every row.
    ///
    /// # Errors
    ///
    /// What the kernel says to reading.
    pub fn read(&self) -> io::Result<Rows> {
        let ranges = self.ranges.dump()?;
        Ok(Rows {
            services: self.services.dump()?,
            backends: self.backends.dump()?,
            members: self.members.dump()?,
            ranges: ranges.into_iter().map(|(key, _)| (key.prefix_len(), key.data())).collect(),
            blocks: self.blocks.dump()?,
        })
    }

    /// The row of a frontend.
    ///
    /// # Errors
    ///
    /// What the kernel says to reading.
    pub fn frontend(&self, key: &ServiceKey) -> io::Result<Option<Service>> {
        self.services.row(key)
    }

    /// How full the maps are that grow: rows, and rows for which there is room.
    ///
    /// # Errors
    ///
    /// What the kernel says to reading.
    pub fn fill(&self) -> io::Result<[(&'static str, u64, u32); 4]> {
        Ok([
            (names::SERVICES, self.services.count()?, self.services.max()),
            (names::BACKENDS, self.backends.count()?, self.backends.max()),
            (names::MEMBERS, self.members.count()?, self.members.max()),
            (names::MAGLEV, self.blocks.count()?, self.blocks.max()),
        ])
    }

    /// Rows for which one of the maps has room.
    #[must_use]
    pub fn max(&self, map: &str) -> u32 {
        match map {
            names::SERVICES => self.services.max(),
            names::BACKENDS => self.backends.max(),
            names::MEMBERS => self.members.max(),
            names::MAGLEV => self.blocks.max(),
            _ => self.ranges.max(),
        }
    }

    /// Pins a larger copy of one of the maps of [`Self::fill`] in its place. Nothing may be written until
    /// the programs are loaded anew.
    ///
    /// # Errors
    ///
    /// As [`grow::enlarge`].
    pub(super) fn enlarge(&self, folder: &Path, map: &'static str, rows: u32) -> io::Result<()> {
        match map {
            names::SERVICES => grow::enlarge(folder, (map, rows), &self.services),
            names::BACKENDS => grow::enlarge(folder, (map, rows), &self.backends),
            names::MEMBERS => grow::enlarge(folder, (map, rows), &self.members),
            names::MAGLEV => grow::enlarge(folder, (map, rows), &self.blocks),
            _ => Ok(()),
        }
    }

    /// Does the writes of a round. Returns what failed, one entry for a batch.
    pub fn write(&self, batches: &[Batch]) -> Vec<WriteError> {
        self.write_telling(batches).failures
    }

    /// The same; tells too what that leaves undone.
    pub fn write_telling(&self, batches: &[Batch]) -> Undone {
        let mut undone = Undone::default();
        for batch in batches {
            // A frontend that nobody has may always go. What it led to stays until it is known that
            // nothing else leads there.
            if !undone.failures.is_empty() && batch.is_emptying() {
                undone.is_unemptied |= !batch.is_empty();
                continue;
            }
            let failure = self.write_one(batch, &mut undone);
            undone.failures.extend(failure);
        }
        undone
    }

    fn write_one(&self, batch: &Batch, undone: &mut Undone) -> Option<WriteError> {
        let (map, failed) = match batch {
            Batch::PutBackends(rows) => {
                let failed = self.backends.update(rows);
                undone.sets.extend(failed.iter().map(|(at, _)| rows[*at].0.set));
                (names::BACKENDS, failed)
            }
            Batch::PutMembers(rows) => {
                let failed = self.members.update(rows);
                undone.sets.extend(failed.iter().map(|(at, _)| rows[*at].0.set));
                (names::MEMBERS, failed)
            }
            Batch::PutRanges(rows) => {
                let trie: Vec<_> = rows.iter().map(|range| (key(range), 1)).collect();
                let failed = self.ranges.update(&trie);
                undone.services.extend(failed.iter().map(|(at, _)| rows[*at].1.service));
                (names::SOURCE_RANGES, failed)
            }
            Batch::PutBlocks(rows) => {
                let failed = self.blocks.update(rows);
                undone.sets.extend(failed.iter().map(|(at, _)| rows[*at].0.set));
                (names::MAGLEV, failed)
            }
            Batch::PutServices(rows) => (names::SERVICES, self.expose(rows, undone)),
            Batch::DelServices(keys) => (names::SERVICES, self.services.delete(keys)),
            Batch::DelBlocks(keys) => (names::MAGLEV, self.blocks.delete(keys)),
            Batch::DelRanges(keys) => {
                let keys: Vec<_> = keys.iter().map(key).collect();
                (names::SOURCE_RANGES, self.ranges.delete(&keys))
            }
            Batch::DelMembers(keys) => (names::MEMBERS, self.members.delete(keys)),
            Batch::DelBackends(keys) => (names::BACKENDS, self.backends.delete(keys)),
        };
        let rows = failed.len();
        let (_, error) = failed.into_iter().next()?;
        Some(WriteError { map, rows, error })
    }

    /// Writes frontends, those apart whose set or ranges are not whole.
    fn expose(&self, rows: &[(ServiceKey, Service)], undone: &mut Undone) -> Vec<Failed> {
        if undone.sets.is_empty() && undone.services.is_empty() {
            let failed = self.services.update(rows);
            undone.frontends.extend(failed.iter().map(|(at, _)| rows[*at].0));
            return failed;
        }
        let is_whole = |row: &Service| {
            !undone.sets.contains(&row.set) && !undone.services.contains(&row.service)
        };
        let (whole, held): (Vec<_>, Vec<_>) =
            rows.iter().copied().partition(|(_, row)| is_whole(row));
        let failed = self.services.update(&whole);
        undone.frontends.extend(held.iter().map(|(key, _)| *key));
        undone.frontends.extend(failed.iter().map(|(at, _)| whole[*at].0));
        failed
    }
}

const fn key((bits, range): &RangeKey) -> Key<SourceRange> {
    Key::new(*bits, *range)
}

/// A map whose rows have the sizes of the types; the map itself goes to `kept`.
pub(super) fn take<K: Pod, V: Pod>(
    object: &mut Ebpf,
    name: &'static str,
    kept: &mut Vec<Map>,
) -> Result<RowMap<K, V>, LoadError> {
    let failed = |source| LoadError::Map { name, source };
    let map = object.take_map(name).ok_or(LoadError::NoMap { name })?;
    let (Map::HashMap(data) | Map::LruHashMap(data) | Map::LpmTrie(data)) = &map else {
        return Err(failed(MapError::InvalidMapType { map_type: 0 }));
    };
    let info = data.info().map_err(failed)?;
    let sizes = [(info.key_size(), size_of::<K>()), (info.value_size(), size_of::<V>())];
    for (found, expected) in sizes {
        let size = usize::try_from(found).unwrap_or(usize::MAX);
        if size != expected {
            // Which of the two it is, the sizes say.
            return Err(failed(MapError::InvalidKeySize { size, expected }));
        }
    }
    let fd = data.fd().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|error| failed(MapError::IoError(error)))?;
    let rows = RowMap::new(fd, info.max_entries());
    kept.push(map);
    Ok(rows)
}
