//! Consistent hashing from the plan to what programs choose by it: alike on nodes whose maps came about
//! differently, few flows moved by a loss, and what is done without room.

use ebpf_common::{TCP, service::SCOPE_INTERNAL};
use proptest::prelude::*;

use super::{
    super::{tests::Maps, *},
    names,
};

fn backend(number: u16) -> Backend {
    let [high, low] = number.to_be_bytes();
    Backend { addr: Addr::v4([10, 244, high, low]), port: [31, 144], reserved: [0; 2] }
}

const FRONTEND: ServiceKey =
    ServiceKey { addr: Addr::ANY_V4, port: [117, 128], proto: TCP, scope: SCOPE_INTERNAL };

/// A node port whose choice is to be consistent.
fn port(backends: &BTreeSet<u16>, key: ServiceKey) -> Port {
    let mut set: Vec<Backend> = backends.iter().map(|number| backend(*number)).collect();
    set.sort_unstable();
    Port {
        id: PortId { name: "".into(), protocol: Protocol::Tcp, family: Family::V4 },
        backends: [set, Vec::new()],
        frontends: vec![Frontend { key, which: Which::Cluster, flags: 0, is_consistent: true }],
        affinity_s: 0,
        ranges: Vec::new(),
    }
}

/// One agent and its maps.
#[derive(Default)]
struct Node {
    maps: Maps,
    observed: Observed,
}

impl Node {
    fn program(&mut self, name: &str, backends: &BTreeSet<u16>, key: ServiceKey) {
        let mut plan = Plan::default();
        self.observed.plan_service(&ObjectKey::new("d", name), &[port(backends, key)], &mut plan);
        self.maps.write(plan.into_batches(), None).unwrap();
    }

    /// What the programs choose.
    fn choose(&self, hash: u32) -> Backend {
        let service = self.maps.services[&FRONTEND];
        let rank = |service: &Service, slot, cell| {
            let backend = self.maps.backends.get(&BackendKey { set: service.set, slot });
            let backend = backend.filter(|_| slot < service.count);
            backend.map_or(maglev::NO_RANK, |one| maglev::rank(one, slot, cell))
        };
        let cell = |key: &MaglevKey, at: usize| Some(self.maps.blocks.get(key)?.slots[at]);
        let slot = maglev::slot(&service, hash, rank, cell);
        self.maps.backends[&BackendKey { set: service.set, slot }]
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn nodes_agree_and_a_lost_backend_moves_few_flows_of_others(
        histories in prop::array::uniform2(prop::collection::vec(
            prop::collection::btree_set(0_u16..400, 0..40), 0..4,
        )),
        last in prop::collection::btree_set(0_u16..400, 2..150),
        lost in any::<prop::sample::Index>(),
    ) {
        let mut nodes = [Node::default(), Node::default()];
        for (node, history) in nodes.iter_mut().zip(&histories) {
            node.program("another", &last, ServiceKey { port: [0, 81], ..FRONTEND });
            for backends in history.iter().chain([&last]) {
                node.program("web", backends, FRONTEND);
            }
        }
        let hashes = || (0..20_000_u32).map(|n| n.wrapping_mul(0x9e37_79b9));
        let before: Vec<Backend> = hashes().map(|hash| nodes[0].choose(hash)).collect();
        prop_assert!(before.iter().collect::<BTreeSet<_>>().len() > 1);
        for (hash, chosen) in hashes().zip(&before) {
            prop_assert_eq!(nodes[1].choose(hash), *chosen);
        }
        let mut left = last;
        let lost = *left.iter().nth(lost.index(left.len())).unwrap();
        left.remove(&lost);
        nodes.iter_mut().for_each(|node| node.program("web", &left, FRONTEND));
        let (mut moved, mut kept) = (0_u32, 0_u32);
        for (hash, chosen) in hashes().zip(&before) {
            let now = nodes[0].choose(hash);
            prop_assert_eq!(nodes[1].choose(hash), now);
            prop_assert!(now != backend(lost));
            if *chosen != backend(lost) {
                if *chosen == now { kept += 1 } else { moved += 1 }
            }
        }
        prop_assert!(moved * 100 <= 2 * (moved + kept), "{moved} of {} moved", moved + kept);
    }
}

#[test]
fn without_room_the_choice_is_by_chance_until_there_is_some() {
    let key = |port| ServiceKey { port: [0, port], ..FRONTEND };
    let large: BTreeSet<u16> = (0..20).collect();
    let length = maglev::len_for(large.len()) / maglev::BLOCK;
    // Room for one table.
    let mut node = Node::default();
    node.observed.blocks = index(names::MAGLEV_MAX) - length;
    for (name, port) in [("first", 1), ("second", 2), ("third", 3)] {
        node.program(name, &large, key(port));
    }
    let bits = |node: &Node| [1, 2, 3].map(|port| node.maps.services[&key(port)].maglev_bits != 0);
    let told = |node: &Node| -> Vec<String> {
        node.observed.by_chance().map(|key| key.name.to_string()).collect()
    };
    assert_eq!((bits(&node), node.maps.blocks.len()), ([true, false, false], length));
    assert_eq!(told(&node), ["second", "third"]);
    // Few backends need no table.
    node.program("third", &(0..8).collect(), key(3));
    assert_eq!(bits(&node), [true, false, true]);
    // What one gives up in a round is only there for another in the next.
    let mut plan = Plan::default();
    let name = |name| ObjectKey::new("d", name);
    node.observed.plan_service(&name("first"), &[], &mut plan);
    node.observed.plan_service(&name("second"), &[port(&large, key(2))], &mut plan);
    assert_eq!(plan.blocks.len(), 0);
    node.maps.write(plan.into_batches(), None).unwrap();
    node.program("second", &large, key(2));
    assert_eq!((told(&node), node.maps.blocks.len()), (Vec::new(), length));
    assert_ne!(node.maps.services[&key(2)].maglev_bits, 0);
}

#[test]
fn more_backends_than_a_table_has_room_for_are_chosen_by_chance() {
    let all: BTreeSet<u16> = (0..=u16::try_from(maglev::BACKENDS_MAX).unwrap()).collect();
    let mut node = Node::default();
    node.program("web", &all, FRONTEND);
    assert_eq!(node.maps.services[&FRONTEND].maglev_bits, 0);
    assert_eq!(node.observed.by_chance().count(), 1);
}
