//! A pod CIDR of each family for each node, cut from the cluster CIDRs. Pure.
//!
//! One key for all nodes: two nodes that come at once are seen together, so they never get the same.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::json;

use super::{
    json::{items, text},
    model::{Key, NODES, Object},
    sync::{Context, Controller, Note, Step, Sync, reference},
    world::{Change, World},
};

/// Nodes served in one sync.
const BURST: usize = 100;

pub(super) const CONTROLLER: Controller =
    Controller { name: "nodeipam", component: "cidrAllocator", keys, sync, first: None };

fn keys(_world: &World, change: &Change, out: &mut Vec<Key>) {
    let needs = change.new.as_ref().is_some_and(|node| needs_cidr(node));
    if change.resource == NODES && (needs || change.new.is_none()) {
        out.push(Key::default());
    }
}

fn needs_cidr(node: &Object) -> bool {
    node.meta.deleted.is_none() && text(&node.value, "/spec/podCIDR").is_empty()
}

fn sync(world: &World, _key: &Key, _context: &Context) -> Sync {
    let mut used: BTreeSet<IpNet> = BTreeSet::new();
    for node in world.all(NODES) {
        let cidrs = items(&node.value, "/spec/podCIDRs").iter().filter_map(|cidr| cidr.as_str());
        used.extend(
            cidrs
                .chain([text(&node.value, "/spec/podCIDR")])
                .filter_map(|cidr| cidr.parse::<IpNet>().ok()),
        );
    }
    let settings = &world.settings;
    let ranges = settings.cluster_cidrs.iter();
    let mut free: Vec<Free> = ranges
        .map(|cluster| Free::new(*cluster, settings.node_masks.of(cluster), used.clone()))
        .collect();
    let steps = world
        .all(NODES)
        .filter(|node| needs_cidr(node))
        .take(BURST)
        .map(|node| match next_of_each(&mut free).as_deref() {
            Some(cidrs) => {
                let patch = json!({
                    "metadata": {"resourceVersion": node.meta.revision.to_string()},
                    "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
                });
                Step::patch(node.place(), patch)
            }
            None => {
                let name = &node.meta.key.name;
                let message = format!("Node {name} status is now: CIDRNotAvailable");
                let regarding = reference(node, "v1", "Node");
                Step::tell(Note::normal(regarding, "CIDRNotAvailable", message))
            }
        })
        .collect();
    Sync { steps, ..Sync::default() }
}

/// One free block of each range; `None` when any is used up, as a node needs all families.
fn next_of_each(free: &mut [Free]) -> Option<Vec<String>> {
    free.iter_mut().map(|free| free.next().map(|cidr| cidr.to_string())).collect()
}

/// The free blocks of a network, lowest first.
struct Free {
    cluster: IpNet,
    mask: u8,
    /// Index of the next block to look at.
    next: u128,
    used: BTreeSet<IpNet>,
}

impl Free {
    fn new(cluster: IpNet, mask: u8, used: BTreeSet<IpNet>) -> Self {
        Self { cluster: cluster.trunc(), mask, next: 0, used }
    }

    fn block(&self, index: u128) -> Option<IpNet> {
        if index >> (self.mask - self.cluster.prefix_len()) != 0 {
            return None;
        }
        let shift = u32::from(self.cluster.max_prefix_len() - self.mask);
        let offset = index.checked_shl(shift)?;
        match self.cluster.network() {
            IpAddr::V4(base) => {
                let address = u32::from(base).checked_add(u32::try_from(offset).ok()?)?;
                Ipv4Net::new(address.into(), self.mask).ok().map(IpNet::V4)
            }
            IpAddr::V6(base) => {
                let address = u128::from(base).checked_add(offset)?;
                Ipv6Net::new(address.into(), self.mask).ok().map(IpNet::V6)
            }
        }
    }
}

impl Iterator for Free {
    type Item = IpNet;

    fn next(&mut self) -> Option<IpNet> {
        loop {
            let block = self.block(self.next)?;
            self.next += 1;
            // Blocks of another size, from another configuration, may overlap without being equal.
            let taken = self.used.contains(&block)
                || self.used.iter().any(|used| {
                    used.prefix_len() != self.mask
                        && (used.contains(&block) || block.contains(used))
                });
            if !taken {
                return Some(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{context, node, world};
    use super::*;
    use crate::client::Write;

    fn given(nodes: &[(&str, &str)]) -> Vec<(String, String)> {
        let objects = nodes.iter().map(|(name, cidr)| {
            let mut node = node(name);
            if !cidr.is_empty() {
                node["spec"]["podCIDR"] = json!(cidr);
            }
            node
        });
        sync(&world(objects.collect()), &Key::default(), &context())
            .writes()
            .into_iter()
            .map(|write| {
                let Write::Patch { object, patch, .. } = write else { unreachable!() };
                (object.name, patch["spec"]["podCIDR"].as_str().unwrap().to_owned())
            })
            .collect()
    }

    #[test]
    fn nodes_get_the_lowest_free_blocks() {
        let pair = |name: &str, cidr: &str| (name.to_owned(), cidr.to_owned());
        assert_eq!(
            given(&[("a", ""), ("b", "10.244.0.0/24"), ("c", ""), ("d", "10.244.2.0/24")]),
            [pair("a", "10.244.1.0/24"), pair("c", "10.244.3.0/24")]
        );
        assert_eq!(given(&[("a", "10.244.0.0/23"), ("b", "")]), [pair("b", "10.244.2.0/24")]);
    }

    #[test]
    fn nodes_of_a_dual_stack_cluster_get_a_block_of_each_family() {
        let mut world = world(vec![node("a"), node("b")]);
        world.settings.cluster_cidrs.push("fd00:10:244::/56".parse().unwrap());
        let given = |world: &World| {
            let writes = sync(world, &Key::default(), &context()).writes();
            let mut given = Vec::new();
            for write in writes {
                let Write::Patch { patch, .. } = write else { unreachable!() };
                assert_eq!(patch["spec"]["podCIDR"], patch["spec"]["podCIDRs"][0]);
                given.push(patch["spec"]["podCIDRs"].to_string());
            }
            given
        };
        assert_eq!(
            given(&world),
            [
                r#"["10.244.0.0/24","fd00:10:244::/64"]"#,
                r#"["10.244.1.0/24","fd00:10:244:1::/64"]"#
            ]
        );
        // A family that has nothing left gives no node half of what it needs.
        world.settings.cluster_cidrs[1] = "fd00:10:244::/64".parse().unwrap();
        assert_eq!(given(&world).len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn blocks_never_overlap(used in proptest::collection::btree_set(0_u8..40, 0..20)) {
            let nets = used.iter().map(|n| format!("10.244.{n}.0/24").parse().unwrap());
            let free = Free::new("10.244.0.0/16".parse().unwrap(), 24, nets.collect());
            let blocks: Vec<_> = free.collect();
            proptest::prop_assert_eq!(blocks.len() + used.len(), 256);
            for block in blocks {
                let IpAddr::V4(address) = block.network() else { unreachable!() };
                proptest::prop_assert!(!used.contains(&address.octets()[2]));
            }
        }
    }
}
