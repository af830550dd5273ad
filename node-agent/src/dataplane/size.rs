//! How large the maps are, by the node's memory, and when one gets larger.
//!
//! Pure. Hash maps that are not preallocated cost 16 bytes a row while they are empty (a bucket), so
//! that a small node is not to pay for a large one's tables: maps begin small and grow while in use.

use std::collections::BTreeMap;

use ebpf_common::maps as names;

/// Memory for each frontend that there is room for at the start: the buckets of a frontend, its share of
/// backends and connections take 112 of these bytes, less than half a percent.
const BYTES_A_FRONTEND: u64 = 32 << 10;
/// Backends for each frontend on average.
const BACKENDS: u64 = 4;
/// Connection rows for each frontend; a connection has two.
const FLOWS: u64 = 2;
/// No node has room for more frontends than this from the start: 14 MB of buckets.
const FRONTENDS_MAX: u64 = 131_072;

/// Memory for each client of services with affinity that is remembered. Its map takes all of its memory at once,
/// 112 bytes a row: 0.05 %, or 7 MB for those that every node remembers.
const BYTES_A_CLIENT: u64 = 256 << 10;
/// No node remembers more clients than this: 117 MB.
const CLIENTS_MAX: u64 = 1 << 20;

/// A map may grow until it would take this part of the node's memory when it is full.
const SHARE: u64 = 16;
/// What a row takes with its bucket, bytes: the kernel's `struct htab_elem` (48) with key and value in
/// a slab's next size, and 16 for the bucket.
const ROW_BYTES: [(&str, u64); 5] = [
    (names::SERVICES, 96 + 16),
    (names::BACKENDS, 96 + 16),
    (names::MEMBERS, 96 + 16),
    (names::MAGLEV, 192 + 16),
    (names::CONNTRACK, 192 + 16),
];
/// Beyond this many rows nothing grows whatever the memory: a walk takes seconds.
const ROWS_MAX: u64 = 1 << 23;

/// How many rows maps have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// When they are made; maps that are not named have the object's.
    pub first: BTreeMap<&'static str, u32>,
    /// At most; maps that are not named do not grow.
    pub most: BTreeMap<&'static str, u32>,
}

impl Sizes {
    /// For a node with this much memory.
    #[must_use]
    pub fn for_memory(total_bytes: u64) -> Self {
        let floor = u64::from(names::SERVICES_MAX);
        let rows = (total_bytes / BYTES_A_FRONTEND).clamp(floor, FRONTENDS_MAX);
        let rows = round_up(rows).min(FRONTENDS_MAX);
        let clients = round_down(total_bytes / BYTES_A_CLIENT).min(CLIENTS_MAX);
        let first = [
            (names::SERVICES, rows, names::SERVICES_MAX),
            (names::BACKENDS, rows * BACKENDS, names::BACKENDS_MAX),
            (names::CONNTRACK, rows * FLOWS, names::CONNTRACK_MAX),
            (names::AFFINITY, clients, names::AFFINITY_MAX),
            (names::MEMBERS, 0, names::MEMBERS_MAX),
            (names::MAGLEV, 0, names::MAGLEV_MAX),
        ];
        let first: BTreeMap<&str, u32> = first
            .into_iter()
            .map(|(name, rows, least)| (name, u32::try_from(rows).unwrap_or(least).max(least)))
            .collect();
        let most = |(name, bytes): (&'static str, u64)| {
            let rows = round_down(total_bytes / SHARE / bytes).min(ROWS_MAX);
            let least = first.get(name).copied().unwrap_or(0);
            (name, u32::try_from(rows).unwrap_or(least).max(least))
        };
        let most = ROW_BYTES.into_iter().map(most).collect();
        Self { first, most }
    }

    /// The rows that a map of `max` rows should get room for when it has or wants `rows`; `None` when
    /// it has room, or may not grow.
    #[must_use]
    pub fn grown(&self, map: &str, rows: u64, max: u32) -> Option<u32> {
        let most = self.most.get(map).copied().unwrap_or(0);
        if !is_tight(rows, max) || max >= most {
            return None;
        }
        let wanted = round_up(rows.saturating_mul(2)).max(u64::from(max) * 2);
        Some(u32::try_from(wanted).unwrap_or(most).min(most))
    }
}

/// Whether more than three quarters of a map are taken.
#[must_use]
pub fn is_tight(rows: u64, max: u32) -> bool {
    rows.saturating_mul(4) > u64::from(max) * 3
}

/// The connection tables at one moment: how large they are, and whether the old one has rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    /// Rows in the table into which programs insert.
    pub rows: u64,
    pub max: u32,
    pub old_max: u32,
    /// Whether the old one is known to be empty.
    pub old_is_empty: bool,
}

/// What is next on the way from a connection table to a larger one. After each but `Move`, programs are
/// loaded anew over the maps as they are then, and take the place of all that run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Puts an empty table of so many rows in the place of the old one: programs that insert into the
    /// former one look there too, before anybody inserts there.
    Offer { rows: u32 },
    /// The tables change places: programs insert into the large one. Those that do not yet look into
    /// both.
    Exchange,
    /// Moves rows from the old one into the new one.
    Move,
    /// Puts a table of one row into the place of the old one, which is empty.
    Retire,
}

/// The next step; `None` when there is nothing to do. It follows from the tables alone, so that whoever
/// starts after a death between any two steps goes on.
#[must_use]
pub fn next_step(tables: Connections, sizes: &Sizes) -> Option<Step> {
    if tables.old_max <= 1 {
        let rows = sizes.grown(names::CONNTRACK, tables.rows, tables.max)?;
        return Some(Step::Offer { rows });
    }
    if tables.old_max > tables.max {
        return Some(Step::Exchange);
    }
    Some(if tables.old_is_empty { Step::Retire } else { Step::Move })
}

/// A hash map has a power of two of buckets whatever its size.
fn round_up(rows: u64) -> u64 {
    rows.checked_next_power_of_two().unwrap_or(ROWS_MAX)
}

const fn round_down(rows: u64) -> u64 {
    if rows == 0 { 0 } else { 1 << rows.ilog2() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: [&str; 3] = [names::SERVICES, names::BACKENDS, names::CONNTRACK];

    fn first(total_bytes: u64) -> [u32; 3] {
        let sizes = Sizes::for_memory(total_bytes);
        THREE.map(|name| sizes.first[name])
    }

    #[test]
    fn a_small_node_begins_with_the_least_and_a_large_one_with_twice_that() {
        let least = [names::SERVICES_MAX, names::BACKENDS_MAX, names::CONNTRACK_MAX];
        assert_eq!(first(0), least);
        assert_eq!(first(512 << 20), least, "a Raspberry Pi");
        let large = [131_072, 524_288, 262_144];
        assert_eq!(first(4 << 30), large);
        assert_eq!(first(u64::MAX), large);
    }

    #[test]
    fn empty_tables_take_less_than_half_a_percent_of_the_memory() {
        for gigabytes in [4_u64, 8, 64, 1_024] {
            let total = gigabytes << 30;
            let buckets: u64 = first(total).iter().map(|rows| u64::from(*rows) * 16).sum();
            assert!(buckets * 200 < total, "{buckets} of {total}");
        }
    }

    #[test]
    fn clients_of_services_with_affinity_are_as_many_as_the_memory_affords() {
        let clients = |gigabytes: u64| Sizes::for_memory(gigabytes << 30).first[names::AFFINITY];
        assert_eq!([0, 1, 4, 24].map(clients), [names::AFFINITY_MAX; 4]);
        assert_eq!([32, 64, 256, 1_024].map(clients), [1 << 17, 1 << 18, 1 << 20, 1 << 20]);
        for gigabytes in [24, 64, 1_024] {
            assert!(u64::from(clients(gigabytes)) * 112 * 2_000 < gigabytes << 30, "{gigabytes}");
        }
    }

    #[test]
    fn a_full_map_takes_at_most_a_sixteenth_of_the_memory_unless_it_began_larger() {
        for gigabytes in [1_u64, 4, 24, 1_024] {
            let total = gigabytes << 30;
            let sizes = Sizes::for_memory(total);
            for (name, bytes) in ROW_BYTES {
                let (first, most) = (sizes.first[name], sizes.most[name]);
                assert!(most >= first && u64::from(most) <= ROWS_MAX);
                let taken = u64::from(most) * bytes;
                assert!(taken * SHARE <= total || most == first, "{name}: {taken} of {total}");
            }
        }
        let most = |gigabytes: u64| Sizes::for_memory(gigabytes << 30).most;
        assert_eq!(most(4)[names::CONNTRACK], 1 << 20);
        assert_eq!(most(24)[names::CONNTRACK], 1 << 22);
        assert_eq!(most(0)[names::CONNTRACK], names::CONNTRACK_MAX, "it cannot grow");
    }

    #[test]
    fn a_map_grows_by_doubling_until_what_it_wants_is_half_of_it() {
        let sizes = Sizes {
            first: BTreeMap::new(),
            most: BTreeMap::from([(names::SERVICES, 1_000), (names::BACKENDS, 64)]),
        };
        let cases = [
            (names::SERVICES, 75, 100, None),
            (names::SERVICES, 76, 100, Some(256)),
            (names::SERVICES, 100, 100, Some(256)),
            (names::SERVICES, 300, 100, Some(1_000)),
            (names::SERVICES, 70, 65, Some(256)),
            (names::SERVICES, 1_000, 1_000, None),
            (names::BACKENDS, 64, 64, None),
            (names::TUNNELS, 64, 64, None),
        ];
        for (map, rows, max, wanted) in cases {
            assert_eq!(sizes.grown(map, rows, max), wanted, "{map} {rows} of {max}");
        }
    }

    #[test]
    fn the_way_to_a_larger_connection_table_follows_from_the_tables() {
        let sizes = Sizes { most: BTreeMap::from([(names::CONNTRACK, 256)]), ..Sizes::default() };
        let step = |rows, max, old_max, old_is_empty| {
            next_step(Connections { rows, max, old_max, old_is_empty }, &sizes)
        };
        assert_eq!(step(48, 64, 1, true), None);
        assert_eq!(step(49, 64, 1, true), Some(Step::Offer { rows: 128 }));
        assert_eq!(step(64, 64, 128, false), Some(Step::Exchange));
        assert_eq!(step(0, 64, 128, true), Some(Step::Exchange), "whatever else");
        assert_eq!(step(3, 128, 64, false), Some(Step::Move));
        assert_eq!(step(67, 128, 64, true), Some(Step::Retire));
        assert_eq!(step(256, 256, 1, true), None, "it may grow no further");
    }
}
