//! Which flows of the connection table are over.
//!
//! Pure; the walk over the table and the deletions are the caller's.

use std::collections::BTreeSet;

use ebpf_common::conntrack::{FORWARD, Flow, FlowKey, idle_limit_s};

/// What is to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expired {
    /// In the order in which they are to be deleted.
    pub keys: Vec<FlowKey>,
    /// How many of the rows that were looked through are forward halves among these.
    pub forward: usize,
}

impl Expired {
    /// Leaves rows alone that had a packet since they were read: a client that takes the port of a connection that is
    /// over opens one anew, whose rows have the same keys. What is to be deleted after this is to be so at once.
    ///
    /// # Errors
    ///
    /// What `look_up` says.
    pub(super) fn retain_idle<E>(
        &mut self,
        now_s: u32,
        mut look_up: impl FnMut(&FlowKey) -> Result<Option<Flow>, E>,
    ) -> Result<(), E> {
        let mut spared = BTreeSet::new();
        for key in &self.keys {
            if let Some(flow) = look_up(key)?
                && idle(&flow, now_s) <= ORPHAN_S
            {
                let forward = usize::from(flow.direction == FORWARD);
                self.forward = self.forward.saturating_sub(forward);
                // Its other half goes with it, whichever of them had the packet.
                spared.extend([*key, flow.opposite(key.proto)]);
            }
        }
        self.keys.retain(|key| !spared.contains(key));
        Ok(())
    }

    /// Adds whole flows, given as both halves of each, the forward one first.
    pub(super) fn add(&mut self, flows: Vec<FlowKey>) {
        let known: BTreeSet<FlowKey> = self.keys.iter().copied().collect();
        for pair in flows.chunks(2).filter(|pair| !known.contains(&pair[0])) {
            self.keys.extend(pair);
            self.forward += 1;
        }
    }
}

/// Of some rows, those to delete at `now_s` (seconds of the monotonic clock), with their other halves.
/// Both halves of a flow go together, the forward one first: a packet that comes in between opens the
/// flow anew with another port. It is the forward half's turn that decides. A half without its other
/// half is over once it is older than `ORPHAN_S`. `look_up` finds a row; it is asked for the other
/// halves of rows that had no packet for some seconds.
///
/// # Errors
///
/// What `look_up` says.
pub fn expired<E>(
    rows: &[(FlowKey, Flow)],
    now_s: u32,
    mut look_up: impl FnMut(&FlowKey) -> Result<Option<Flow>, E>,
) -> Result<Expired, E> {
    let mut gone = Expired::default();
    for (key, flow) in rows {
        let age = idle(flow, now_s);
        // No flow is over so soon.
        if age <= ORPHAN_S {
            continue;
        }
        let opposite = flow.opposite(key.proto);
        let other = look_up(&opposite)?;
        match (flow.direction, other) {
            (FORWARD, Some(other)) => {
                let limit = idle_limit_s(key.proto, flow.seen, other.seen);
                if age.min(idle(&other, now_s)) > limit {
                    gone.keys.extend([*key, opposite]);
                    gone.forward += 1;
                }
            }
            (FORWARD, None) => {
                gone.keys.push(*key);
                gone.forward += 1;
            }
            // A flow that moved to another backend has another reverse half.
            (_, Some(other)) if other.direction == FORWARD && other.opposite(key.proto) == *key => {
            }
            (_, _) => gone.keys.push(*key),
        }
    }
    Ok(gone)
}

/// A program inserts both halves within microseconds; a dump may see one before the other.
const ORPHAN_S: u32 = 5;

/// Seconds since the last packet; one that came after the clock was read counts as now.
const fn idle(flow: &Flow, now_s: u32) -> u32 {
    let age = now_s.wrapping_sub(flow.last_seen);
    if age > u32::MAX / 2 { 0 } else { age }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, convert::Infallible};

    use ebpf_common::{
        addr::Addr,
        conntrack::{REVERSE, SEEN_FIN, SEEN_REPLY},
    };

    use super::*;

    fn expired(flows: &BTreeMap<FlowKey, Flow>, now_s: u32) -> Vec<FlowKey> {
        let rows: Vec<_> = flows.iter().map(|(key, flow)| (*key, *flow)).collect();
        let look_up = |key: &FlowKey| Ok::<_, Infallible>(flows.get(key).copied());
        super::expired(&rows, now_s, look_up).unwrap().keys
    }

    fn pair(port: u8, seen: (u8, u8), last: (u32, u32)) -> [(FlowKey, Flow); 2] {
        let key = FlowKey {
            src: Addr::v4([1, 1, 1, 1]),
            sport: [0, port],
            proto: 6,
            ..FlowKey::default()
        };
        let forward = Flow {
            src: Addr::v4([10, 244, 0, 1]),
            sport: [4, port],
            seen: seen.0,
            last_seen: last.0,
            direction: FORWARD,
            ..Flow::default()
        };
        let reverse = Flow {
            src: key.dst,
            dst: key.src,
            sport: key.dport,
            dport: key.sport,
            seen: seen.1,
            last_seen: last.1,
            direction: REVERSE,
            ..Flow::default()
        };
        [(key, forward), (forward.opposite(6), reverse)]
    }

    #[test]
    fn both_halves_go_when_neither_has_seen_a_packet_for_the_limit() {
        let open = (SEEN_REPLY, SEEN_REPLY);
        let closed = (SEEN_FIN, SEEN_FIN | SEEN_REPLY);
        let cases = [
            (open, (0, 0), 7_440, 0),
            (open, (0, 0), 7_441, 2),
            (open, (0, 5_000), 7_441, 0),
            (closed, (0, 0), 31, 2),
            (closed, (40, 0), 60, 0),
            ((0, 0), (0, 0), 61, 2),
            (open, (100, 100), 99, 0),
        ];
        for (seen, last, now, count) in cases {
            let flows = BTreeMap::from(pair(1, seen, last));
            assert_eq!(expired(&flows, now).len(), count, "{seen:?} {last:?} {now}");
        }
    }

    #[test]
    fn the_forward_half_goes_first_and_halves_without_the_other_go_soon() {
        let [forward, reverse] = pair(1, (SEEN_FIN, SEEN_FIN | SEEN_REPLY), (0, 0));
        let flows = BTreeMap::from([forward, reverse]);
        assert_eq!(expired(&flows, 100), [forward.0, reverse.0]);
        for half in [forward, reverse] {
            let flows = BTreeMap::from([half]);
            assert_eq!(expired(&flows, 5), []);
            assert_eq!(expired(&flows, 6), [half.0]);
        }
    }

    #[test]
    fn what_was_opened_anew_since_it_was_read_is_left_alone() {
        let rows = pair(1, (SEEN_FIN, SEEN_FIN | SEEN_REPLY), (0, 0));
        let [(key, _), (other, reverse)] = rows;
        let read = BTreeMap::from(rows);
        let look_up = |key: &FlowKey| Ok::<_, Infallible>(read.get(key).copied());
        let mut gone = super::expired(&rows, 100, look_up).unwrap();
        assert_eq!((gone.keys.as_slice(), gone.forward), (&[key, other][..], 1));
        // Towards another backend: the answers of the former one have a row that nobody needs.
        let elsewhere = Flow { src: Addr::v4([10, 244, 0, 2]), last_seen: 101, ..rows[0].1 };
        let now = BTreeMap::from([(key, elsewhere), (other, reverse)]);
        gone.retain_idle(100, |key| Ok::<_, Infallible>(now.get(key).copied())).unwrap();
        assert_eq!((gone.keys, gone.forward), (vec![other], 0));

        // The same flow, of which one half had a packet: the other one is still needed.
        let mut gone = super::expired(&rows, 100, look_up).unwrap();
        let now = BTreeMap::from([(key, Flow { last_seen: 101, ..rows[0].1 }), rows[1]]);
        gone.retain_idle(100, |key| Ok::<_, Infallible>(now.get(key).copied())).unwrap();
        assert_eq!((gone.keys, gone.forward), (vec![], 0));
    }

    #[test]
    fn a_reverse_half_that_its_flow_has_left_goes_and_the_flow_stays() {
        let [(key, forward), (stale, reverse)] = pair(1, (0, 0), (50, 0));
        let moved = Flow { src: Addr::v4([10, 244, 0, 2]), ..forward };
        let new = (moved.opposite(6), Flow { last_seen: 50, ..reverse });
        let flows = BTreeMap::from([(key, moved), (stale, reverse), new]);
        assert_eq!(expired(&flows, 52), [stale]);
    }

    #[test]
    fn the_other_half_is_looked_up_only_of_rows_that_are_idle() {
        let rows = pair(1, (0, 0), (50, 40));
        let mut asked = Vec::new();
        let look_up = |key: &FlowKey| {
            asked.push(*key);
            Ok::<_, Infallible>(None)
        };
        let gone = super::expired(&rows, 52, look_up).unwrap();
        assert_eq!(asked, [rows[1].1.opposite(6)]);
        assert_eq!((gone.keys, gone.forward), (vec![rows[1].0], 0));
    }
}
