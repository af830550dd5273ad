//! Which flows of the connection table are over.
//!
//! Pure; the walk over the table and the deletions are the caller's.

use std::collections::BTreeMap;

use ebpf_common::conntrack::{FORWARD, Flow, FlowKey, idle_limit_s};

/// Rows to delete at `now_s` (seconds of the monotonic clock). Both halves of a flow go together,
/// the forward one first: a packet that comes in between opens the flow anew with another port. A
/// half without its other half is over once it is older than `ORPHAN_S`.
#[must_use]
pub fn expired(flows: &BTreeMap<FlowKey, Flow>, now_s: u32) -> Vec<FlowKey> {
    let mut gone = Vec::new();
    let mut paired = std::collections::BTreeSet::new();
    for (key, forward) in flows.iter().filter(|(_, flow)| flow.direction == FORWARD) {
        let opposite = forward.opposite(key.proto);
        let Some(reverse) = flows.get(&opposite) else {
            if idle(forward, now_s) > ORPHAN_S {
                gone.push(*key);
            }
            continue;
        };
        paired.insert(opposite);
        let limit = idle_limit_s(key.proto, forward.seen, reverse.seen);
        if idle(forward, now_s).min(idle(reverse, now_s)) > limit {
            gone.extend([*key, opposite]);
        }
    }
    let orphans = flows.iter().filter(|(key, flow)| {
        flow.direction != FORWARD && !paired.contains(*key) && idle(flow, now_s) > ORPHAN_S
    });
    gone.extend(orphans.map(|(key, _)| *key));
    gone
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
    use ebpf_common::{
        addr::Addr,
        conntrack::{REVERSE, SEEN_FIN, SEEN_REPLY},
    };

    use super::*;

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
        let reverse =
            Flow { seen: seen.1, last_seen: last.1, direction: REVERSE, ..Flow::default() };
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
}
