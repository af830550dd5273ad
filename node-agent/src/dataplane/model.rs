//! What should be programmed: follows the tables' changes, and says which services they touch.
//!
//! Pure. One changed endpoint costs in proportion to its service, not to the cluster. What a service
//! should look like is worked out when it is asked for (`frontends.rs`) and not kept: rows are
//! shared with the tables, and a node must afford tens of thousands of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
};

use ebpf_common::service::ServiceKey;

use super::{
    frontends::{self, Desired, Node},
    health::Check,
    host_ports::{self, Ports},
    select::{self, Place},
    status,
};
use crate::{
    model::{EndpointSliceRow, ObjectKey, ServiceRow},
    table::{Delta, compact},
};

pub use super::frontends::key;

/// Cluster DNS answers on every node: the service's backend is an address of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeLocalService {
    /// The service whose endpoints are replaced.
    pub service: ObjectKey,
    /// The address that answers on this node, at the service's own ports.
    pub address: IpAddr,
}

/// What is wrong with services, in words that name the field.
pub type Problems = BTreeMap<ObjectKey, Vec<String>>;

/// Services, their slices, and who owns which frontend.
#[derive(Debug, Default)]
pub struct Model {
    node_local: Option<NodeLocalService>,
    /// As in [`Node`].
    node_ports: (u16, u16),
    place: Place,
    entries: BTreeMap<ObjectKey, Entry>,
    slices: BTreeMap<ObjectKey, Arc<EndpointSliceRow>>,
    owners: BTreeMap<ServiceKey, ObjectKey>,
    /// Services that claim a frontend and have not got it; few frontends have any.
    losers: BTreeMap<ServiceKey, BTreeSet<ObjectKey>>,
    problems: Problems,
    /// Pods with ports of the node, as they were last made.
    with_ports: BTreeSet<ObjectKey>,
}

/// A service and the slices that name it, either of which may come first.
#[derive(Debug, Default)]
struct Entry {
    row: Option<Arc<ServiceRow>>,
    slices: Slices,
}

/// Most services have one slice, which then takes no list.
#[derive(Debug, Default)]
enum Slices {
    #[default]
    None,
    One(Arc<EndpointSliceRow>),
    Several(Vec<Arc<EndpointSliceRow>>),
}

impl Slices {
    fn as_slice(&self) -> &[Arc<EndpointSliceRow>] {
        match self {
            Self::None => &[],
            Self::One(slice) => std::slice::from_ref(slice),
            Self::Several(slices) => slices,
        }
    }

    fn push(&mut self, slice: Arc<EndpointSliceRow>) {
        *self = match std::mem::take(self) {
            Self::None => Self::One(slice),
            Self::One(first) => Self::Several(vec![first, slice]),
            Self::Several(mut slices) => {
                slices.push(slice);
                Self::Several(slices)
            }
        };
    }

    fn remove(&mut self, slice: &Arc<EndpointSliceRow>) {
        match self {
            Self::One(one) if Arc::ptr_eq(one, slice) => *self = Self::None,
            Self::None | Self::One(_) => {}
            Self::Several(slices) => slices.retain(|one| !Arc::ptr_eq(one, slice)),
        }
    }

    fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }
}

impl Model {
    /// An empty model, for which every port may be a node port.
    #[must_use]
    pub fn new(node_local: Option<NodeLocalService>) -> Self {
        Self { node_local, node_ports: (0, u16::MAX), ..Self::default() }
    }

    /// Says which node ports the programs look for; to be called before there are services.
    pub const fn set_node_ports(&mut self, first_and_last: (u16, u16)) {
        self.node_ports = first_and_last;
    }

    /// Says where this node is. Returns the services that this touches.
    pub fn set_place(&mut self, place: Place) -> BTreeSet<ObjectKey> {
        if self.place == place {
            return BTreeSet::new();
        }
        self.place = place;
        self.services().cloned().collect()
    }

    /// Takes changes over and returns the services that they touch.
    pub fn update(
        &mut self,
        services: Delta<ObjectKey, ServiceRow>,
        slices: Delta<ObjectKey, EndpointSliceRow>,
    ) -> BTreeSet<ObjectKey> {
        let mut dirty = BTreeSet::new();
        self.take_services(services, &mut dirty);
        self.take_slices(slices, &mut dirty);
        dirty
    }

    /// Takes less memory from now on; worth it after many changes.
    pub fn compact(&mut self) {
        compact(&mut self.entries);
        compact(&mut self.slices);
        compact(&mut self.owners);
    }

    /// Makes the ports of pods exactly these. Returns which of them this touches.
    pub fn set_host_ports(&mut self, desired: BTreeMap<ObjectKey, Ports>) -> BTreeSet<ObjectKey> {
        let mut dirty = BTreeSet::new();
        let here = desired.keys().cloned().collect();
        let before = std::mem::replace(&mut self.with_ports, here);
        for key in before.difference(&self.with_ports).cloned().collect::<Vec<_>>() {
            self.set_row(&key, None, &mut dirty);
            for slice in slice_keys(&key) {
                self.set_slice(slice, None, &mut dirty);
            }
        }
        for (key, ports) in desired {
            if self.row(&key).is_none_or(|row| *row != ports.row) {
                self.set_row(&key, Some(ports.row), &mut dirty);
            }
            let mut slices = ports.slices.into_iter();
            for slice in slice_keys(&key) {
                let row = slices.next();
                if self.slices.get(&slice) != row.as_ref() {
                    self.set_slice(slice, row, &mut dirty);
                }
            }
        }
        dirty
    }

    /// Every service, and every pod with ports of the node.
    pub fn services(&self) -> impl Iterator<Item = &ObjectKey> {
        self.entries.iter().filter(|(_, entry)| entry.row.is_some()).map(|(key, _)| key)
    }

    /// The same from a place on, with the rows and slices of each.
    pub fn from(
        &self,
        start: Bound<&ObjectKey>,
    ) -> impl Iterator<Item = (&ObjectKey, &Arc<ServiceRow>, &[Arc<EndpointSliceRow>])> {
        let entries = self.entries.range::<ObjectKey, _>((start, Bound::Unbounded));
        entries.filter_map(|(key, one)| Some((key, one.row.as_ref()?, one.slices.as_slice())))
    }

    /// Whether an address of this node answers for the service.
    #[must_use]
    pub fn is_answered_here(&self, key: &ObjectKey) -> bool {
        self.node_local.as_ref().is_some_and(|local| local.service == *key)
    }

    /// What a service should have; nothing when it is not there. Notes what is wrong with it.
    pub fn desired(&mut self, key: &ObjectKey) -> Desired {
        let Some((entry, row)) =
            self.entries.get(key).and_then(|one| Some((one, one.row.as_ref()?)))
        else {
            self.problems.remove(key);
            return Desired::default();
        };
        let local = self.node_local.as_ref().filter(|local| local.service == *key);
        let answers = local.map(|local| local.address);
        let node = Node { place: &self.place, answers, node_ports: self.node_ports };
        let owns = |claim: &ServiceKey| {
            self.owners.get(claim) == Some(key) && self.node_port_of(claim, key).is_none()
        };
        let mut desired = frontends::desired(row, entry.slices.as_slice(), node, owns);
        let rejected = entry.slices.as_slice().iter().flat_map(|slice| &slice.rejected);
        let rejected = rejected.map(|words| format!("EndpointSlice: {words}"));
        desired.problems.extend(row.rejected.iter().map(ToString::to_string).chain(rejected));
        if !self.losers.is_empty() || host_ports::is_pods(key) {
            desired.problems.extend(self.lost(key, row));
        }
        if desired.problems.is_empty() {
            self.problems.remove(key);
        } else {
            self.problems.insert(key.clone(), desired.problems.clone());
        }
        desired
    }

    /// What load balancers are told of a service, if they are to ask this node for it.
    #[must_use]
    pub fn check(&self, key: &ObjectKey) -> Option<Check> {
        let entry = self.entries.get(key)?;
        let row = entry.row.as_ref()?;
        let is_asked = row.health_check_port != 0 && frontends::is_programmed(row);
        let endpoints = || select::ready_here(row, entry.slices.as_slice(), &self.place);
        is_asked.then(|| Check { port: row.health_check_port, endpoints: endpoints() })
    }

    /// What was wrong with services when they were last asked for.
    #[must_use]
    pub const fn problems(&self) -> &Problems {
        &self.problems
    }

    /// The row of a service.
    #[must_use]
    pub fn row(&self, key: &ObjectKey) -> Option<&Arc<ServiceRow>> {
        self.entries.get(key)?.row.as_ref()
    }

    /// Services that are not programmed since they use fields this agent does not implement.
    pub fn unsupported(&self) -> impl Iterator<Item = (&ObjectKey, &[Box<str>])> {
        let rows = self.entries.iter().filter_map(|(key, entry)| Some((key, entry.row.as_ref()?)));
        rows.filter(|(_, row)| !row.unsupported.is_empty())
            .map(|(key, row)| (key, &*row.unsupported))
    }

    /// Frontends that a service claims and another has.
    fn lost(&self, key: &ObjectKey, row: &ServiceRow) -> Vec<String> {
        let lost = frontends::claims(row).into_iter().filter_map(|claim| {
            let words = status::frontend(&claim);
            if let Some(owner) = self.node_port_of(&claim, key) {
                return Some(format!("{words} is the node port of service {owner}, which has it"));
            }
            let owner = self.owners.get(&claim).filter(|owner| *owner != key)?;
            if let Some(pod) = host_ports::pod(owner) {
                return Some(format!(
                    "{words} is a host port of pod {pod}, which is first by name"
                ));
            }
            Some(format!("{words} belongs to service {owner}, which is older or first by name"))
        });
        lost.collect()
    }

    /// The service whose node port a pod's port at an address of the node is.
    fn node_port_of(&self, claim: &ServiceKey, key: &ObjectKey) -> Option<&ObjectKey> {
        let everywhere = ServiceKey { addr: claim.addr.any(), ..*claim };
        self.owners.get(&everywhere).filter(|_| host_ports::is_pods(key))
    }

    /// Pods with a port of the node that is this node port.
    fn pods_at<'a>(&'a self, node_port: &'a ServiceKey) -> impl Iterator<Item = &'a ObjectKey> {
        let has = |row: &ServiceRow| {
            let mut claims = frontends::claims(row).into_iter();
            claims.any(|claim| ServiceKey { addr: claim.addr.any(), ..claim } == *node_port)
        };
        self.with_ports.iter().filter(move |key| self.row(key).is_some_and(|row| has(row)))
    }

    fn take_services(
        &mut self,
        delta: Delta<ObjectKey, ServiceRow>,
        dirty: &mut BTreeSet<ObjectKey>,
    ) {
        if delta.full {
            let live: BTreeSet<&ObjectKey> = delta.upserts.iter().map(|(key, _)| key).collect();
            let gone: Vec<ObjectKey> = self
                .services()
                .filter(|key| !live.contains(key) && !host_ports::is_pods(key))
                .cloned()
                .collect();
            for key in gone {
                self.set_row(&key, None, dirty);
            }
        }
        for key in delta.deletes {
            self.set_row(&key, None, dirty);
        }
        for (key, row) in delta.upserts {
            self.set_row(&key, Some(row), dirty);
        }
    }

    /// Replaces a service's row, and hands frontends on that it gives up or takes.
    fn set_row(
        &mut self,
        key: &ObjectKey,
        row: Option<Arc<ServiceRow>>,
        dirty: &mut BTreeSet<ObjectKey>,
    ) {
        dirty.insert(key.clone());
        let claims = row.as_deref().map(frontends::claims).unwrap_or_default();
        let entry = self.entries.entry(key.clone()).or_default();
        let old = std::mem::replace(&mut entry.row, row);
        if entry.row.is_none() && entry.slices.is_empty() {
            self.entries.remove(key);
        }
        let had = old.as_deref().map(frontends::claims).unwrap_or_default();
        let is_same_age = old.map(|old| old.created_s) == self.row(key).map(|row| row.created_s);
        for claim in had.iter().chain(&claims).filter(|claim| claim.addr == claim.addr.any()) {
            dirty.extend(self.pods_at(claim).cloned());
        }
        for claim in had {
            if !is_same_age || claims.binary_search(&claim).is_err() {
                self.release(claim, key, dirty);
            }
        }
        for claim in claims {
            self.claim(claim, key, dirty);
        }
    }

    fn claim(&mut self, claim: ServiceKey, key: &ObjectKey, dirty: &mut BTreeSet<ObjectKey>) {
        let Some(owner) = self.owners.get(&claim) else {
            self.owners.insert(claim, key.clone());
            return;
        };
        if owner == key {
            return;
        }
        let owner = owner.clone();
        let is_first = self.rank(key) < self.rank(&owner);
        let (winner, loser) = if is_first { (key, &owner) } else { (&owner, key) };
        self.owners.insert(claim, winner.clone());
        self.losers.entry(claim).or_default().insert(loser.clone());
        dirty.extend([winner.clone(), loser.clone()]);
    }

    fn release(&mut self, claim: ServiceKey, key: &ObjectKey, dirty: &mut BTreeSet<ObjectKey>) {
        let mut losers = self.losers.remove(&claim).unwrap_or_default();
        losers.remove(key);
        if self.owners.get(&claim) == Some(key) {
            let heir = losers.iter().min_by_key(|loser| self.rank(loser)).cloned();
            match heir {
                Some(heir) => {
                    losers.remove(&heir);
                    dirty.insert(heir.clone());
                    self.owners.insert(claim, heir);
                }
                None => drop(self.owners.remove(&claim)),
            }
        }
        // Who else lost is told to whom.
        dirty.extend(losers.iter().cloned());
        if !losers.is_empty() {
            self.losers.insert(claim, losers);
        }
    }

    /// The older of two services has what both claim; of the same age, the first by name.
    fn rank<'a>(&self, key: &'a ObjectKey) -> (i64, &'a ObjectKey) {
        (self.row(key).map_or(i64::MAX, |row| row.created_s), key)
    }

    fn take_slices(
        &mut self,
        delta: Delta<ObjectKey, EndpointSliceRow>,
        dirty: &mut BTreeSet<ObjectKey>,
    ) {
        if delta.full {
            let live: BTreeSet<&ObjectKey> = delta.upserts.iter().map(|(key, _)| key).collect();
            let gone: Vec<ObjectKey> = self
                .slices
                .keys()
                .filter(|key| !live.contains(key) && !host_ports::is_pods(key))
                .cloned()
                .collect();
            for key in gone {
                self.set_slice(key, None, dirty);
            }
        }
        for key in delta.deletes {
            self.set_slice(key, None, dirty);
        }
        for (key, row) in delta.upserts {
            self.set_slice(key, Some(row), dirty);
        }
    }

    fn set_slice(
        &mut self,
        key: ObjectKey,
        row: Option<Arc<EndpointSliceRow>>,
        dirty: &mut BTreeSet<ObjectKey>,
    ) {
        let old = match &row {
            Some(row) => self.slices.insert(key, Arc::clone(row)),
            None => self.slices.remove(&key),
        };
        if let Some(old) = old {
            dirty.insert(old.service.clone());
            if let Some(entry) = self.entries.get_mut(&old.service) {
                entry.slices.remove(&old);
                if entry.row.is_none() && entry.slices.is_empty() {
                    self.entries.remove(&old.service);
                }
            }
        }
        if let Some(row) = row {
            dirty.insert(row.service.clone());
            self.entries.entry(row.service.clone()).or_default().slices.push(row);
        }
    }
}

/// Under which keys the slices of a pod's ports are kept, one for each family.
fn slice_keys(key: &ObjectKey) -> [ObjectKey; 2] {
    ["/1", "/2"].map(|end| ObjectKey::new(&key.namespace, &format!("{}{end}", key.name)))
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
