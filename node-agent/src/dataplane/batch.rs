//! The writes of a round by kind, and their order.
//!
//! Pure.

use std::collections::BTreeSet;

use ebpf_common::{
    affinity::MemberKey,
    maglev::{MaglevBlock, MaglevKey},
    service::{Backend, BackendKey, Service, ServiceKey, SourceRange},
};

/// A row of the source ranges: prefix length with the 32 bits of the service, and the rest of the key.
pub type RangeKey = (u32, SourceRange);

/// Writes of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Batch {
    PutBackends(Vec<(BackendKey, Backend)>),
    PutMembers(Vec<(MemberKey, u32)>),
    PutRanges(Vec<RangeKey>),
    PutBlocks(Vec<(MaglevKey, MaglevBlock)>),
    PutServices(Vec<(ServiceKey, Service)>),
    DelServices(Vec<ServiceKey>),
    DelBlocks(Vec<MaglevKey>),
    DelRanges(Vec<RangeKey>),
    DelMembers(Vec<MemberKey>),
    DelBackends(Vec<BackendKey>),
}

impl Batch {
    /// Number of rows.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::PutBackends(rows) => rows.len(),
            Self::PutMembers(rows) => rows.len(),
            Self::PutRanges(rows) => rows.len(),
            Self::PutBlocks(rows) => rows.len(),
            Self::PutServices(rows) => rows.len(),
            Self::DelServices(keys) => keys.len(),
            Self::DelBlocks(keys) => keys.len(),
            Self::DelRanges(keys) => keys.len(),
            Self::DelMembers(keys) => keys.len(),
            Self::DelBackends(keys) => keys.len(),
        }
    }

    /// Whether there is nothing to write.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it takes something away that a frontend may lead to.
    #[must_use]
    pub const fn is_emptying(&self) -> bool {
        match self {
            Self::DelBlocks(_)
            | Self::DelRanges(_)
            | Self::DelMembers(_)
            | Self::DelBackends(_) => true,
            Self::PutBackends(_)
            | Self::PutMembers(_)
            | Self::PutRanges(_)
            | Self::PutBlocks(_)
            | Self::PutServices(_)
            | Self::DelServices(_) => false,
        }
    }

    /// Whether it makes room.
    #[must_use]
    pub const fn is_deleting(&self) -> bool {
        !self.is_empty() && (self.is_emptying() || matches!(self, Self::DelServices(_)))
    }
}

/// The writes of one round. Nothing is left to choose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub backends: Vec<(BackendKey, Backend)>,
    pub members: Vec<(MemberKey, u32)>,
    pub ranges: Vec<RangeKey>,
    pub blocks: Vec<(MaglevKey, MaglevBlock)>,
    pub services: Vec<(ServiceKey, Service)>,
    /// Of those frontends, the ones that led to another set before.
    pub moved: Vec<ServiceKey>,
    pub gone: Gone,
}

/// What is to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    pub services: Vec<ServiceKey>,
    pub blocks: Vec<MaglevKey>,
    pub ranges: Vec<RangeKey>,
    pub members: Vec<MemberKey>,
    pub backends: Vec<BackendKey>,
}

impl Plan {
    /// Writes a frontend's row unless it stands there already.
    pub(super) fn put_frontend(&mut self, (key, row): (ServiceKey, Service), old: Option<Service>) {
        if old != Some(row) {
            self.services.push((key, row));
        }
        if old.is_some_and(|old| old.set != row.set) {
            self.moved.push(key);
        }
    }

    /// The writes in their order: this list is what the promise at the head of `plan.rs` rests on.
    #[must_use]
    pub fn into_batches(mut self) -> Vec<Batch> {
        // One service gives a frontend up and another takes it: the new row is in place of the old.
        if !self.gone.services.is_empty() {
            let put: BTreeSet<ServiceKey> = self.services.iter().map(|(key, _)| *key).collect();
            self.gone.services.retain(|key| !put.contains(key));
        }
        let mut batches = vec![
            Batch::PutBackends(self.backends),
            Batch::PutMembers(self.members),
            Batch::PutRanges(self.ranges),
            Batch::PutBlocks(self.blocks),
            Batch::PutServices(self.services),
        ];
        batches.extend(self.gone.into_batches());
        batches
    }
}

impl Gone {
    /// Frontends before what they lead to.
    #[must_use]
    pub fn into_batches(self) -> Vec<Batch> {
        vec![
            Batch::DelServices(self.services),
            Batch::DelBlocks(self.blocks),
            Batch::DelRanges(self.ranges),
            Batch::DelMembers(self.members),
            Batch::DelBackends(self.backends),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frontend_that_leads_to_another_set_than_before_has_moved() {
        let key = ServiceKey { proto: 17, ..ServiceKey::default() };
        let row = Service { set: 7, count: 1, ..Service::default() };
        for (old, writes, moves) in [
            (None, 1, 0),
            (Some(row), 0, 0),
            (Some(Service { count: 2, ..row }), 1, 0),
            (Some(Service { set: 8, ..row }), 1, 1),
        ] {
            let mut plan = Plan::default();
            plan.put_frontend((key, row), old);
            assert_eq!((plan.services.len(), plan.moved.len()), (writes, moves), "{old:?}");
        }
    }
}
