//! Which of the nodes that fit is best. Pure. Weights are upstream's default plug-ins':
//! TaintToleration 3, NodeAffinity 2, spreading 2, LeastAllocated 1, BalancedAllocation 1.

use super::{
    filter::{term_matches, tolerated},
    pod::Pod,
    snapshot::Node,
};

const MAX: i64 = 100;
const TAINT_WEIGHT: i64 = 3;
const AFFINITY_WEIGHT: i64 = 2;
const SPREAD_WEIGHT: i64 = 2;

/// The best node; of equals the one that `seed` picks. `None` of none.
pub(super) fn best<'a>(nodes: &[&'a Node], pod: &Pod, seed: u64) -> Option<&'a Node> {
    if nodes.len() < 2 {
        return nodes.first().copied();
    }
    let taints: Vec<i64> = nodes.iter().map(|node| disliked(node, pod)).collect();
    let affinity: Vec<i64> = nodes.iter().map(|node| preferred(node, pod)).collect();
    let crowd: Vec<i64> = nodes
        .iter()
        .map(|node| if pod.group.is_empty() { 0 } else { node.of_group(&pod.group) })
        .collect();
    let most = |values: &[i64]| values.iter().copied().max().unwrap_or(0);
    let (most_taints, most_affinity, most_crowd) = (most(&taints), most(&affinity), most(&crowd));
    let least_crowd = crowd.iter().copied().min().unwrap_or(0);
    let scores: Vec<i64> = nodes
        .iter()
        .enumerate()
        .map(|(index, node)| {
            let spread = if most_crowd == 0 {
                MAX
            } else {
                MAX * (most_crowd + least_crowd - crowd[index]) / most_crowd
            };
            let taint = MAX - share(taints[index], most_taints);
            least_allocated(node, pod)
                + balanced(node, pod)
                + TAINT_WEIGHT * taint
                + AFFINITY_WEIGHT * share(affinity[index], most_affinity)
                + SPREAD_WEIGHT * spread
        })
        .collect();
    let top = scores.iter().copied().max()?;
    let equals: Vec<&'a Node> = nodes
        .iter()
        .zip(&scores)
        .filter(|(_, score)| **score == top)
        .map(|(node, _)| *node)
        .collect();
    let pick = usize::try_from(mix(seed)).unwrap_or(0) % equals.len();
    equals.get(pick).copied()
}

/// Spreads the bits of a seed (the finalizer of MurmurHash3).
fn mix(mut seed: u64) -> u64 {
    seed ^= seed >> 33;
    seed = seed.wrapping_mul(0xff51_afd7_ed55_8ccd);
    seed ^= seed >> 33;
    seed & u64::from(u32::MAX)
}

fn share(value: i64, most: i64) -> i64 {
    if most == 0 { 0 } else { MAX * value / most }
}

/// `PreferNoSchedule` taints that the pod does not tolerate.
fn disliked(node: &Node, pod: &Pod) -> i64 {
    let count = node
        .taints
        .iter()
        .filter(|taint| taint.effect == "PreferNoSchedule")
        .filter(|taint| !pod.tolerations.iter().any(|toleration| tolerated(toleration, taint)))
        .count();
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The weights of the preferred node affinity terms that match.
fn preferred(node: &Node, pod: &Pod) -> i64 {
    pod.preferred
        .iter()
        .filter(|(_, term)| term_matches(term, node))
        .map(|(weight, _)| *weight)
        .sum()
}

/// The free share of CPU and memory, in per cent, their mean.
fn least_allocated(node: &Node, pod: &Pod) -> i64 {
    let free = |resource: &str| {
        let all = node.allocatable.amount(resource);
        let used = node.scored.amount(resource).saturating_add(pod.scored.amount(resource));
        if all <= 0 || used > all { 0 } else { percent(all - used, all) }
    };
    (free("cpu") + free("memory")) / 2
}

/// How alike the used shares of CPU and memory are.
fn balanced(node: &Node, pod: &Pod) -> i64 {
    let used = |resource: &str| {
        let all = node.allocatable.amount(resource);
        let used = node.used.amount(resource).saturating_add(pod.requests.amount(resource));
        if all <= 0 { MAX } else { percent(used.min(all), all) }
    };
    // The standard deviation of two values is half their distance.
    MAX - (used("cpu") - used("memory")).abs() / 2
}

/// Bytes times a hundred may exceed 63 bits.
fn percent(part: i64, all: i64) -> i64 {
    let value = i128::from(part) * i128::from(MAX) / i128::from(all);
    i64::try_from(value).unwrap_or(MAX)
}
