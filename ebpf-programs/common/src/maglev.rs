//! Consistent choice of backends for traffic from outside: every node gives a flow to the same backend,
//! and a flow stays with its backend while others come and go. What Maglev (NSDI 2016) is for; its
//! tables move a fifth of all flows when one of four backends goes, so they are filled differently.
//!
//! - A flow's hash falls into a *cell*. Each backend ranks all cells by a permutation that follows from
//!   its address and port alone ([`Preference`]); the backend that ranks a cell lowest has it. Flows of
//!   others do not move when a backend goes (rendezvous hashing).
//! - Up to [`RANKED`] backends the kernel compares ranks itself: no table, no memory, nothing to fill.
//!   Larger sets have a table with the winners, in which no backend gets more than 1/32 above its share
//!   ([`fill`]; Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2016).
//! - A table has [`LEAST`] slots, and from 128 backends on [`BLOCK`] slots for each backend. It grows as
//!   in linear hashing (Litwin 1980): cells are the low bits of the hash, and cells beyond the table's
//!   end lie in the slot of one bit less. One backend more splits 64 slots and leaves all others.
//!
//! A power of two of cells makes permutations cheap both ways: multiplication by odd numbers and shifts
//! are bijections on it. The module's tests hold the two promises: shares, and flows moved by a loss.

use crate::{
    addr::Addr,
    service::{Backend, Service, ServiceKey, choose},
};

/// Slots in a block. A table is a whole number of blocks long.
pub const BLOCK: usize = BLOCK_SLOTS as usize;

/// Sets of at most so many backends have no table: eight look-ups and comparisons for a new flow cost
/// less than a table of 16 KiB for each small service.
pub const RANKED: usize = RANKED_BACKENDS as usize;

/// Length of the smallest table, and number of cells that backends rank: 64 slots for each of 128
/// backends make shares differ by their 1/32 and not by what one slot is worth.
pub const LEAST: usize = 1 << CELL_BITS;

/// A set with more backends has no table and its flows choose by chance: one service is not to take
/// more than 1 MiB, and filling it not more than a third of a second.
pub const BACKENDS_MAX: usize = 8_192;

const BLOCK_SLOTS: u32 = 64;
const RANKED_BACKENDS: u32 = 8;
const CELL_BITS: u32 = 13;
const CELLS: u32 = (1 << CELL_BITS) - 1;
/// Half of the bits, rounded up: a shift by it is its own inverse under exclusive or.
const FOLD_BITS: u32 = CELL_BITS.div_ceil(2);

/// One block of a set's table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MaglevKey {
    /// [`crate::service::Service::set`].
    pub set: u32,
    /// The slot divided by [`BLOCK`].
    pub block: u32,
}
const _: () = assert!(size_of::<MaglevKey>() == 8 && align_of::<MaglevKey>() == 4);

/// Backend slots, host order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaglevBlock {
    /// [`crate::service::BackendKey::slot`] by position.
    pub slots: [u16; BLOCK],
}
const _: () = assert!(size_of::<MaglevBlock>() == 128 && align_of::<MaglevBlock>() == 2);

/// [`crate::service::Service::maglev_bits`] for a set of so many backends: the bits of a hash that name
/// a cell. 0 when there is nothing to choose from or too much of it ([`BACKENDS_MAX`]).
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "at most 19")]
pub const fn bits_for(backends: usize) -> u8 {
    if backends < 2 || backends > BACKENDS_MAX {
        return 0;
    }
    if backends * BLOCK <= LEAST {
        return CELL_BITS as u8;
    }
    (backends * BLOCK).next_power_of_two().trailing_zeros() as u8
}

/// Length of the table of a set of so many backends, a multiple of [`BLOCK`]; 0 when it needs none.
#[must_use]
pub const fn len_for(backends: usize) -> usize {
    if backends <= RANKED || backends > BACKENDS_MAX {
        0
    } else if backends * BLOCK <= LEAST {
        LEAST
    } else {
        backends * BLOCK
    }
}

/// Whether a set of `count` backends is chosen from by comparing ranks, without a table.
#[inline(always)]
#[must_use]
pub const fn is_ranked(count: u32) -> bool {
    count <= RANKED_BACKENDS
}

/// Position of a flow in the table of a set of `count` backends, whose cells have `bits` bits.
#[inline(always)]
#[must_use]
pub const fn position(hash: u32, bits: u8, count: u32) -> u32 {
    let cell = hash & ((1 << (bits & 31)) - 1);
    let len = count.wrapping_mul(BLOCK_SLOTS);
    if len <= CELLS { cell & CELLS } else { slot_of(cell, bits, len) }
}

/// The slot in which a cell lies.
#[inline(always)]
const fn slot_of(cell: u32, bits: u8, len: u32) -> u32 {
    if cell < len { cell } else { cell & ((1 << (bits.wrapping_sub(1) & 31)) - 1) }
}

/// The slot of a flow's backend in the set of a service whose `maglev_bits` are not 0. `rank` looks the
/// backend of a slot up and gives its [`rank`] of a cell ([`NO_RANK`] from the service's count on), `cell`
/// looks up one position of a block. Rows that are missing while a set changes lead to any slot of it.
#[inline(always)]
pub fn slot(
    service: &Service,
    hash: u32,
    rank: impl Fn(&Service, u32, u32) -> u64,
    cell: impl Fn(&MaglevKey, usize) -> Option<u16>,
) -> u32 {
    let &Service { set, count, maglev_bits, .. } = service;
    if is_ranked(count) {
        return lowest(service, hash, rank);
    }
    let position = position(hash, maglev_bits, count);
    let key = MaglevKey { set, block: position / BLOCK_SLOTS };
    match cell(&key, position as usize % BLOCK) {
        Some(slot) => u32::from(slot),
        None => choose(hash, count).unwrap_or(0),
    }
}

/// The slot of the backend that ranks the cell of `hash` lowest.
#[inline(always)]
fn lowest(service: &Service, hash: u32, rank: impl Fn(&Service, u32, u32) -> u64) -> u32 {
    let mut least = NO_RANK;
    let mut slot = 0;
    // A bound that the verifier can see, and one number, so that it need not follow who has which.
    while slot < RANKED_BACKENDS {
        least = least.min(rank(service, slot, hash & CELLS));
        slot += 1;
    }
    u32::try_from(least % u64::from(RANKED_BACKENDS)).unwrap_or(0)
}

/// The rank of a backend that is not there: nobody's.
pub const NO_RANK: u64 = u64::MAX;

/// How the backend of a slot ranks a cell: a number that no other of its set has, and whose remainder is
/// the slot.
#[inline(always)]
#[must_use]
pub fn rank(backend: &Backend, slot: u32, cell: u32) -> u64 {
    const SLOTS: u64 = RANKED_BACKENDS as u64;
    let (rank, identity) = Preference::of(backend).rank(cell);
    let rank = (u64::from(rank) << (u64::BITS - CELL_BITS)) | (identity >> CELL_BITS);
    (rank / SLOTS * SLOTS) | (u64::from(slot) % SLOTS)
}

/// How a backend ranks cells: the same on every node, independent of the order of backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preference {
    /// Decides between backends that rank a cell alike: the smaller wins.
    identity: u64,
    offset: u32,
    /// Odd.
    factors: [u32; 3],
}

impl Preference {
    /// Preferences of a backend.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "parts of a hash")]
    pub const fn of(backend: &Backend) -> Self {
        let identity = address_hash(SEED, &backend.addr);
        let identity = fold(identity, u16::from_be_bytes(backend.port) as u64);
        let bits = fold(identity, 1);
        let factors = [bits as u32 | 1, (bits >> 16) as u32 | 1, (bits >> 32) as u32 | 1];
        Self { identity, offset: (bits >> 48) as u32, factors }
    }

    /// The rank of a cell: the backend with the smallest value has it.
    #[inline(always)]
    #[must_use]
    pub const fn rank(&self, cell: u32) -> (u32, u64) {
        let [first, second, third] = self.factors;
        let x = cell.wrapping_add(self.offset).wrapping_mul(first) & CELLS;
        let x = (x ^ x >> FOLD_BITS).wrapping_mul(second) & CELLS;
        let x = (x ^ x >> FOLD_BITS).wrapping_mul(third) & CELLS;
        (x ^ x >> FOLD_BITS, self.identity)
    }
}

/// A backend while a table is filled.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    preference: Preference,
    /// Inverses of the preference's factors.
    inverses: [u32; 3],
    /// Its [`crate::service::BackendKey::slot`].
    slot: u16,
    /// Cells it has.
    cells: u32,
}

impl Candidate {
    /// The backend in slot `slot` of its set.
    #[must_use]
    pub const fn new(backend: &Backend, slot: u16) -> Self {
        let preference = Preference::of(backend);
        let [first, second, third] = preference.factors;
        let inverses = [inverse(first), inverse(second), inverse(third)];
        Self { preference, inverses, slot, cells: 0 }
    }

    /// The cell that it ranks `rank`, in a table whose cells have more bits than are ranked: each turn
    /// through the ranks leads to other upper bits, so that after all turns every cell was named once.
    const fn cell(&self, rank: u32) -> u32 {
        let [first, second, third] = self.inverses;
        let x = rank & CELLS;
        let x = (x ^ x >> FOLD_BITS).wrapping_mul(third) & CELLS;
        let x = (x ^ x >> FOLD_BITS).wrapping_mul(second) & CELLS;
        let x = (x ^ x >> FOLD_BITS).wrapping_mul(first).wrapping_sub(self.preference.offset);
        let low = x & CELLS;
        #[expect(clippy::cast_possible_truncation, reason = "part of a hash")]
        let upper = fold(self.preference.identity, low as u64 + 2) as u32 ^ rank >> CELL_BITS;
        low | upper << CELL_BITS
    }
}

/// Fills the table of a set. It is [`len_for`] the number of candidates long (another is left as it is);
/// the order of candidates does not matter and is lost.
///
/// Ranks are gone through from the lowest, so that a slot falls to who ranks it lowest; a backend that
/// has its share and 1/32 more claims no further one.
pub fn fill(candidates: &mut [Candidate], table: &mut [u16]) {
    let bits = bits_for(candidates.len());
    if table.is_empty() || table.len() != len_for(candidates.len()) {
        return;
    }
    candidates.sort_unstable_by_key(|candidate| candidate.preference.identity);
    table.fill(FREE);
    #[expect(clippy::cast_possible_truncation, reason = "at most 2^19")]
    let (len, count) = (table.len() as u32, candidates.len() as u32);
    let cells = 1_u32 << bits;
    // Slots of two cells, as their upper half lies beyond the table's end.
    let double = len - cells / 2..cells / 2;
    let most = (cells + cells / 32).div_ceil(count);
    let mut free = len;
    let mut rank = 0;
    while free > 0 {
        for candidate in candidates.iter_mut().filter(|candidate| candidate.cells < most) {
            let slot = slot_of(candidate.cell(rank) & (cells - 1), bits, len);
            let Some(owner) = table.get_mut(slot as usize).filter(|owner| **owner == FREE) else {
                continue;
            };
            *owner = candidate.slot;
            candidate.cells += if double.contains(&slot) { 2 } else { 1 };
            free -= 1;
        }
        rank += 1;
    }
}

/// A table in the form of map rows, in the order of [`MaglevKey::block`].
pub fn blocks(table: &[u16]) -> impl Iterator<Item = MaglevBlock> {
    table.as_chunks::<BLOCK>().0.iter().map(|slots| MaglevBlock { slots: *slots })
}

/// The hash of a flow to a frontend, the same on every node. A service with affinity (`affinity_s` is
/// not 0) hashes the client's address alone, so that a client has one backend without being remembered.
#[inline(always)]
#[must_use]
pub const fn flow_hash(
    client: &Addr,
    port: [u8; 2],
    frontend: &ServiceKey,
    affinity_s: u32,
) -> u32 {
    let hash = address_hash(SEED, client);
    if affinity_s != 0 {
        return upper(hash);
    }
    let ports = (u16::from_be_bytes(port) as u64) << 16 | u16::from_be_bytes(frontend.port) as u64;
    upper(fold(address_hash(hash, &frontend.addr), ports << 8 | frontend.proto as u64))
}

/// A slot that nobody has claimed; no backend's, as a set with a table has fewer.
const FREE: u16 = u16::MAX;

/// Where hashing starts: the same on all nodes, for ever (the first digits of pi's fraction).
const SEED: u64 = 0x243f_6a88_85a3_08d3;

#[inline(always)]
const fn address_hash(state: u64, addr: &Addr) -> u64 {
    let [a, b, c, d] = addr.words();
    let state = fold(state, (a as u64) << 32 | b as u64);
    fold(state, (c as u64) << 32 | d as u64)
}

/// One more word into a hash: the finaliser of splitmix64 over both.
#[inline(always)]
const fn fold(state: u64, word: u64) -> u64 {
    let value = state.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word;
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[inline(always)]
const fn upper(hash: u64) -> u32 {
    (hash >> 32) as u32
}

/// The inverse of an odd number modulo 2^32, and so modulo every smaller power of two. Newton's method:
/// an odd number is its own inverse modulo 8, and each step doubles the bits that are right.
const fn inverse(odd: u32) -> u32 {
    let mut found = odd;
    let mut right_bits = 3;
    while right_bits < 32 {
        found = found.wrapping_mul(2_u32.wrapping_sub(odd.wrapping_mul(found)));
        right_bits *= 2;
    }
    found
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::{collections::BTreeSet, vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;
    use crate::{TCP, UDP};

    fn backends(count: usize, seed: u32) -> Vec<Backend> {
        let address = |number: u32| Addr::v4((0x0af4_0000 ^ (seed << 13) ^ number).to_be_bytes());
        (0..u32::try_from(count).unwrap())
            .map(|number| Backend { addr: address(number), port: [31, 144], reserved: [0; 2] })
            .collect()
    }

    /// A set as the kernel sees it: which backend a hash leads to.
    struct Set {
        backends: Vec<Backend>,
        table: Vec<u16>,
    }

    impl Set {
        fn new(backends: Vec<Backend>) -> Self {
            let mut table = vec![0; len_for(backends.len())];
            let mut candidates: Vec<Candidate> =
                backends.iter().zip(0..).map(|(one, slot)| Candidate::new(one, slot)).collect();
            fill(&mut candidates, &mut table);
            Self { backends, table }
        }

        fn choose(&self, hash: u32) -> Backend {
            let count = u32::try_from(self.backends.len()).unwrap();
            let maglev_bits = bits_for(self.backends.len());
            let service = Service { set: 1, count, maglev_bits, ..Service::default() };
            let rank = |_: &Service, slot, cell| {
                let backend = self.backends.get(usize::try_from(slot).unwrap());
                backend.map_or(NO_RANK, |one| rank(one, slot, cell))
            };
            let cell = |key: &MaglevKey, at| {
                self.table.get(usize::try_from(key.block).unwrap() * BLOCK + at).copied()
            };
            self.backends[usize::try_from(slot(&service, hash, rank, cell)).unwrap()]
        }

        /// The largest share of a backend, as a multiple of the mean.
        fn largest_share(&self) -> f64 {
            let cells = 1_u32 << bits_for(self.backends.len());
            let mut owned: Vec<Backend> = (0..cells).map(|hash| self.choose(hash)).collect();
            owned.sort();
            let most = owned.chunk_by(|one, other| one == other).map(<[_]>::len).max().unwrap();
            most as f64 * self.backends.len() as f64 / f64::from(cells)
        }

        /// Part of the flows of all others that has another backend after `lost` went.
        fn moved_by_losing(&self, lost: usize) -> f64 {
            let mut left = self.backends.clone();
            let lost = left.remove(lost);
            let left = Self::new(left);
            let others = (0..1_u32 << bits_for(self.backends.len()))
                .map(|hash| (self.choose(hash), left.choose(hash)))
                .filter(|(before, _)| *before != lost);
            let (mut moved, mut all) = (0_u32, 0_u32);
            for (before, after) in others {
                moved += u32::from(before != after);
                all += 1;
            }
            f64::from(moved) / f64::from(all)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn losing_a_backend_leaves_the_others_flows_and_shares(
            count in 2_usize..=1_000, seed in 0_u32..1_000, lost in any::<prop::sample::Index>(),
        ) {
            let set = Set::new(backends(count, seed));
            let moved = set.moved_by_losing(lost.index(count));
            prop_assert!(moved <= 0.02, "{moved} of the flows moved");
            prop_assert!(count > RANKED || moved == 0.0, "{moved} moved of {count}");
            // A share of 1/32 more, and one slot of two cells of 64 more in the largest tables.
            let share = set.largest_share();
            prop_assert!(share < 1.07 || count <= RANKED && share < 1.12, "{share} of the mean");
        }

        #[test]
        fn the_order_of_backends_does_not_matter(count in 2_usize..300, by in 1_usize..300) {
            let set = Set::new(backends(count, 7));
            let mut other = backends(count, 7);
            other.rotate_left(by % count);
            other.swap(0, count / 2);
            let other = Set::new(other);
            for hash in (0..u32::MAX).step_by(1 << 20) {
                prop_assert_eq!(set.choose(hash), other.choose(hash));
            }
        }

        #[test]
        fn ranks_are_a_permutation_and_its_inverse_is_known(addr in any::<[u8; 4]>()) {
            let backend = Backend { addr: Addr::v4(addr), ..Backend::default() };
            let candidate = Candidate::new(&backend, 0);
            for cell in 0..=CELLS {
                let (rank, _) = candidate.preference.rank(cell);
                prop_assert!(rank <= CELLS);
                prop_assert_eq!(candidate.cell(rank) & CELLS, cell);
            }
        }
    }

    #[test]
    fn sizes_change_where_flows_would_move_most() {
        for count in [2, 3, 8, 9, 10, 127, 128, 129, 130, 255, 256, 257, 511, 512, 513] {
            for seed in 0..3 {
                let moved = Set::new(backends(count, seed)).moved_by_losing(count / 2);
                assert!(moved <= 0.02, "{moved} of the flows moved of {count}");
            }
        }
    }

    #[test]
    fn every_flow_has_a_position_inside_the_table() {
        for count in [RANKED + 1, 128, 129, 191, 256, 1_000, BACKENDS_MAX] {
            let (len, bits) = (len_for(count), bits_for(count));
            assert_eq!(len % BLOCK, 0);
            assert_eq!(blocks(&vec![0; len]).count() * BLOCK, len);
            let cells = 1_u32 << bits;
            let at = |hash| position(hash, bits, u32::try_from(count).unwrap());
            let positions: BTreeSet<u32> = (0..cells).map(at).collect();
            assert_eq!(positions.len(), len, "each slot is reached");
            assert_eq!(positions.last().copied(), u32::try_from(len - 1).ok());
            // While a set changes, rows of two sizes may be read together: never beyond 2^bits.
            assert!(position(u32::MAX, bits, u32::MAX) < cells);
        }
        let needs_none = [0, 1, 2, RANKED, BACKENDS_MAX + 1, usize::MAX / BLOCK];
        assert!(needs_none.iter().all(|count| len_for(*count) == 0));
        assert_eq!([0, 1, 2, 8_192, 8_193].map(bits_for), [0, 0, 13, 19, 0]);
    }

    #[test]
    fn a_table_of_the_wrong_length_is_left_alone() {
        let mut candidates: Vec<Candidate> =
            backends(9, 0).iter().zip(0..).map(|(one, slot)| Candidate::new(one, slot)).collect();
        let mut table = [7; BLOCK];
        fill(&mut candidates, &mut table);
        assert_eq!(table, [7; BLOCK]);
        fill(&mut candidates, &mut []);
    }

    #[test]
    fn flows_differ_by_each_of_their_parts_unless_the_client_is_to_stay() {
        let frontend =
            ServiceKey { addr: Addr::v4([192, 0, 2, 1]), port: [0, 80], proto: TCP, scope: 1 };
        let client = Addr::v4([198, 51, 100, 7]);
        let one = flow_hash(&client, [1, 2], &frontend, 0);
        let others = [
            flow_hash(&Addr::v4([198, 51, 100, 8]), [1, 2], &frontend, 0),
            flow_hash(&client, [2, 1], &frontend, 0),
            flow_hash(&client, [1, 2], &ServiceKey { addr: Addr::ANY_V4, ..frontend }, 0),
            flow_hash(&client, [1, 2], &ServiceKey { port: [0, 81], ..frontend }, 0),
            flow_hash(&client, [1, 2], &ServiceKey { proto: UDP, ..frontend }, 0),
        ];
        assert!(others.iter().all(|other| *other != one));
        // The scope of the row that was found is no part of the flow.
        assert_eq!(one, flow_hash(&client, [1, 2], &ServiceKey { scope: 0, ..frontend }, 0));
        let stays = flow_hash(&client, [1, 2], &frontend, 10_800);
        assert_eq!(stays, flow_hash(&client, [2, 1], &frontend, 10_800));
    }
}
