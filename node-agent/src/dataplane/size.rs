//! How large the maps are, by the node's memory.
//!
//! Pure. Hash maps that are not preallocated cost 16 bytes a row while they are empty (a bucket), so
//! that a small node is not to pay for a large one's tables.

use ebpf_common::maps as names;

/// Memory for each frontend that there is room for: the buckets of a frontend, its share of backends
/// and connections take 112 of these bytes, less than half a percent.
const BYTES_A_FRONTEND: u64 = 32 << 10;
/// Backends for each frontend on average.
const BACKENDS: u64 = 4;
/// Connection rows for each frontend; a connection has two.
const FLOWS: u64 = 2;
/// No node has room for more frontends than this from the start: 29 MB of buckets.
const FRONTENDS_MAX: u64 = 262_144;

/// Sizes that differ from those in the object, by map. Each is at least as large.
#[must_use]
pub fn for_memory(total_bytes: u64) -> Vec<(&'static str, u32)> {
    let floor = u64::from(names::SERVICES_MAX);
    let rows = (total_bytes / BYTES_A_FRONTEND).clamp(floor, FRONTENDS_MAX);
    // A hash map has a power of two of buckets whatever its size.
    let rows = rows.checked_next_power_of_two().unwrap_or(floor).min(FRONTENDS_MAX);
    let sizes = [
        (names::SERVICES, rows, names::SERVICES_MAX),
        (names::BACKENDS, rows * BACKENDS, names::BACKENDS_MAX),
        (names::CONNTRACK, rows * FLOWS, names::CONNTRACK_MAX),
    ];
    let sizes =
        sizes.map(|(name, rows, least)| (name, u32::try_from(rows).unwrap_or(least).max(least)));
    sizes.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(total_bytes: u64) -> [u32; 3] {
        let sizes = for_memory(total_bytes);
        [sizes[0].1, sizes[1].1, sizes[2].1]
    }

    #[test]
    fn a_small_node_has_the_least_and_a_large_one_the_most() {
        let least = [names::SERVICES_MAX, names::BACKENDS_MAX, names::CONNTRACK_MAX];
        assert_eq!(rows(0), least);
        assert_eq!(rows(512 << 20), least, "a Raspberry Pi");
        assert_eq!(rows(4 << 30), [131_072, 524_288, 262_144]);
        let most = [262_144, 1_048_576, 524_288];
        assert_eq!(rows(8 << 30), most);
        assert_eq!(rows(u64::MAX), most);
    }

    #[test]
    fn empty_tables_take_less_than_half_a_percent_of_the_memory() {
        for gigabytes in [4_u64, 8, 64, 1_024] {
            let total = gigabytes << 30;
            let buckets: u64 = rows(total).iter().map(|rows| u64::from(*rows) * 16).sum();
            assert!(buckets * 200 < total, "{buckets} of {total}");
        }
    }
}
