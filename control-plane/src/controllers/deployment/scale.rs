//! How many pods each ReplicaSet of a Deployment is to have. Pure arithmetic.

use super::{Deployment, Strategy};

/// A ReplicaSet's numbers that sizes follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) spec: i64,
    pub(super) available: i64,
    /// The largest number of pods that the Deployment could have when this set was last sized.
    pub(super) before: Option<i64>,
}

/// All of them, the old ones from oldest to newest.
#[derive(Clone, Debug, Default)]
pub(super) struct Sizes {
    pub(super) new: Option<Size>,
    pub(super) old: Vec<Size>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    New,
    /// Index into the old ones.
    Old(usize),
}

/// A set and the size it is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resize {
    pub(super) which: Which,
    pub(super) to: i64,
}

impl Sizes {
    fn total(&self) -> i64 {
        self.old.iter().chain(&self.new).map(|size| size.spec).sum()
    }

    fn available(&self) -> i64 {
        self.old.iter().chain(&self.new).map(|size| size.available).sum()
    }
}

/// The new set's size during a rollout: up to the surge limit (upstream `NewRSNewReplicas`).
pub(super) fn new_size(deployment: &Deployment<'_>, total: i64, new: i64) -> i64 {
    match deployment.strategy {
        Strategy::Recreate => deployment.replicas,
        Strategy::Rolling { surge, .. } => {
            let room = deployment.replicas + surge - total;
            if room <= 0 { new } else { new + room.min(deployment.replicas - new) }
        }
    }
}

/// One step of a rolling update: first the new set, and only when it stays, the old ones.
pub(super) fn rolling(deployment: &Deployment<'_>, sizes: &Sizes) -> Vec<Resize> {
    let Some(new) = sizes.new else { return Vec::new() };
    let to = if new.spec > deployment.replicas {
        deployment.replicas
    } else {
        new_size(deployment, sizes.total(), new.spec)
    };
    if to != new.spec {
        return vec![Resize { which: Which::New, to }];
    }
    let mut resizes = vec![Resize { which: Which::New, to }];
    resizes.extend(shrink_old(deployment, sizes, new));
    resizes
}

fn shrink_old(deployment: &Deployment<'_>, sizes: &Sizes, new: Size) -> Vec<Resize> {
    let min_available = deployment.replicas - deployment.max_unavailable();
    let room = sizes.total() - min_available - (new.spec - new.available);
    if room <= 0 {
        return Vec::new();
    }
    let mut to: Vec<i64> = sizes.old.iter().map(|size| size.spec).collect();
    // Pods that serve nobody go first: that costs no availability.
    let mut cleaned = 0;
    for (size, to) in sizes.old.iter().zip(&mut to) {
        let unhealthy = (size.spec - size.available).max(0);
        let less = unhealthy.min(room - cleaned);
        *to -= less;
        cleaned += less;
    }
    let mut spare = (sizes.available() - min_available).max(0);
    for to in &mut to {
        let less = (*to).min(spare);
        *to -= less;
        spare -= less;
    }
    sizes
        .old
        .iter()
        .zip(to)
        .enumerate()
        .filter(|(_, (size, to))| size.spec != *to)
        .map(|(index, (_, to))| Resize { which: Which::Old(index), to })
        .collect()
}

/// Recreate: all old ones to nothing; the new one to its full size once their pods are gone.
pub(super) fn recreate(
    deployment: &Deployment<'_>,
    sizes: &Sizes,
    old_are_gone: bool,
) -> Vec<Resize> {
    let shrunk: Vec<Resize> = sizes
        .old
        .iter()
        .enumerate()
        .filter(|(_, size)| size.spec > 0)
        .map(|(index, _)| Resize { which: Which::Old(index), to: 0 })
        .collect();
    if !shrunk.is_empty() || !old_are_gone || sizes.new.is_none() {
        return shrunk;
    }
    vec![Resize { which: Which::New, to: deployment.replicas }]
}

/// A Deployment that was scaled or is paused: one live set follows at once; several, in the middle
/// of a rollout, share the difference in proportion (upstream `scale`).
pub(super) fn proportional(deployment: &Deployment<'_>, sizes: &Sizes) -> Vec<Resize> {
    let mut live: Vec<(Which, Size)> = sizes
        .old
        .iter()
        .enumerate()
        .map(|(index, size)| (Which::Old(index), *size))
        .chain(sizes.new.map(|size| (Which::New, size)))
        .filter(|(_, size)| size.spec > 0)
        .collect();
    match live.as_slice() {
        [] => {
            let last = sizes.old.len().checked_sub(1).map(Which::Old);
            let which = sizes.new.map(|_| Which::New).or(last);
            return which
                .map(|which| Resize { which, to: deployment.replicas })
                .into_iter()
                .collect();
        }
        [(which, _)] => return vec![Resize { which: *which, to: deployment.replicas }],
        _ => (),
    }
    let saturated = sizes
        .new
        .is_some_and(|new| new.spec == deployment.replicas && new.available == deployment.replicas);
    if saturated {
        return (0..sizes.old.len())
            .filter(|index| sizes.old[*index].spec > 0)
            .map(|index| Resize { which: Which::Old(index), to: 0 })
            .collect();
    }
    if deployment.strategy == Strategy::Recreate {
        return Vec::new();
    }
    // Largest first; of equals the newer when growing, the older when shrinking.
    let allowed =
        if deployment.replicas > 0 { deployment.replicas + deployment.surge() } else { 0 };
    let add = allowed - live.iter().map(|(_, size)| size.spec).sum::<i64>();
    if add > 0 {
        live.reverse();
    }
    live.sort_by_key(|(_, size)| std::cmp::Reverse(size.spec));
    let mut resizes = Vec::with_capacity(live.len());
    let mut added = 0;
    for (which, size) in &live {
        let share = share(deployment, *size, add, added);
        added += share;
        resizes.push(Resize { which: *which, to: size.spec + share });
    }
    if let Some(first) = resizes.first_mut() {
        first.to = (first.to + add - added).max(0);
    }
    resizes
}

fn share(deployment: &Deployment<'_>, size: Size, add: i64, added: i64) -> i64 {
    if add == added {
        return 0;
    }
    let left = add - added;
    let share = if deployment.replicas == 0 {
        -size.spec
    } else {
        let before = size.before.filter(|before| *before > 0).unwrap_or(deployment.replicas);
        let after = deployment.replicas + deployment.surge();
        // Rounded to the nearest, halves up: all three are small and not negative.
        (size.spec * after * 2 + before).div_euclid(before * 2) - size.spec
    };
    if add > 0 { share.clamp(0, left) } else { share.clamp(left, 0) }
}
