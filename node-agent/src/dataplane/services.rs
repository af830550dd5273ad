//! The services' part of a round: what changed in the tables, planned and written.
//!
//! Effects, in the order read, plan, write, record. While the sources are not synced (what a
//! node-local snapshot brought, or a list that is not whole), nothing is deleted and what an earlier
//! agent programmed is left as it is: that is newer than any snapshot. Only what the maps lack is
//! added.
//!
//! A map that is full is no reason to read it back: what it lacks is known, and so is all else. Its services
//! are left alone until one of them changes or rows have gone; whatever other services need is written as ever.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ebpf_common::service::ServiceKey;
use tokio::sync::watch;

use super::{
    Tables,
    health::Checks,
    host_ports,
    listing::{self, Page, Sight, Wanted},
    metrics::Rounds,
    model::{Model, NodeLocalService, Problems},
    plan::{Batch, Observed, Plan, Programmed},
    seek::Sought,
    select::Place,
    service_maps::{ServiceMaps, Undone, WriteError},
};
use crate::{
    chain::chain,
    model::{LocalEndpoint, ObjectKey},
    sys::memory,
    table::Table,
};

/// A round that looks through more services or writes more rows than this took megabytes that are not needed again.
const GIVE_BACK: usize = 10_000;
/// The least time between two attempts to write what had no room when rows have gone; each reads all maps back, as does a
/// change of a service that lacks rows.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Up to where the maps say what the tables say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Revision of the table of services.
    pub services: u64,
    /// Revision of the table of slices.
    pub slices: u64,
    /// Rows written and deleted since the start.
    pub writes: u64,
    /// Whether the sources were synced, so that nothing else is in the maps.
    pub is_whole: bool,
}

/// What of this node matters to services.
pub(super) struct Here<'a> {
    pub(super) place: Place,
    /// Its addresses, where pods have ports.
    pub(super) addresses: &'a BTreeSet<IpAddr>,
    /// As in [`super::DataplaneConfig`].
    pub(super) waits_for_pods: bool,
}

/// What others may follow.
#[derive(Debug)]
pub(super) struct Outlets {
    pub(super) settled: watch::Sender<Settled>,
    pub(super) problems: watch::Sender<Arc<Problems>>,
    pub(super) checks: watch::Sender<Arc<Checks>>,
}

/// What is known of services, and of the maps.
pub(super) struct Services {
    pub(super) model: Model,
    /// What the service maps hold; `None` until they are read (again).
    pub(super) observed: Option<Observed>,
    /// What they should hold after a round that left something undone, until the next one.
    hoped: Option<Observed>,
    /// Frontends that it lacks.
    missing: BTreeSet<ServiceKey>,
    /// What there was no room for since the maps were read.
    short: Short,
    /// Services that were left to what an earlier agent programmed, until the sources are synced.
    left: BTreeSet<ObjectKey>,
    /// Every service was planned from synced sources since the maps were read.
    is_swept: bool,
    settled: Settled,
    outlets: Outlets,
    /// What load balancers are told once the sources are synced.
    checks: Checks,
    /// Maps that had no room in the last round, and for how many rows.
    pub(super) full: BTreeMap<&'static str, u64>,
    /// Rows were written since somebody last asked how full the maps are.
    pub(super) has_written: bool,
    /// How long writing took so far.
    pub(super) rounds: Rounds,
    /// Flows by frontends that were withdrawn since somebody last asked.
    pub(super) withdrawn: Sought,
    /// Up to where the pods' ports of the node are followed, and at which addresses.
    ports: Option<(u64, BTreeSet<IpAddr>)>,
}

/// Of full maps, what follows from it.
#[derive(Debug, Default)]
struct Short {
    /// Services that are not whole: what there is of them has to be read before they are planned again.
    services: BTreeSet<ObjectKey>,
    /// Rows have gone, so there may be room.
    has_room: bool,
    /// When rows were last refused.
    since: Option<Instant>,
    /// Nothing else keeps the maps from what the tables say.
    is_all: bool,
}

impl Services {
    pub(super) fn new(node_local: Option<NodeLocalService>, outlets: Outlets) -> Self {
        Self {
            model: Model::new(node_local),
            observed: None,
            hoped: None,
            missing: BTreeSet::new(),
            short: Short::default(),
            left: BTreeSet::new(),
            is_swept: false,
            settled: Settled::default(),
            outlets,
            checks: Checks::new(),
            full: BTreeMap::new(),
            has_written: true,
            rounds: Rounds::default(),
            withdrawn: Sought::default(),
            ports: None,
        }
    }

    /// Reads the maps back in the next round, to repair what others have changed.
    pub(super) fn forget(&mut self) {
        self.observed = None;
    }

    /// How many frontends are programmed, as far as it is known.
    pub(super) fn programmed(&self) -> usize {
        let observed = self.observed.as_ref().or(self.hoped.as_ref());
        let ports = observed.into_iter().flat_map(Observed::ports);
        let count: usize = ports.map(|(_, port)| port.frontends.len()).sum();
        count.saturating_sub(self.missing.len())
    }

    /// Some of the frontends, as far as it is known what the maps hold.
    pub(super) fn page(&self, wanted: &Wanted, unserved: &Problems) -> Page {
        let observed = self.observed.as_ref().or(self.hoped.as_ref());
        let (model, missing) = (&self.model, &self.missing);
        listing::page(Sight { model, observed, missing, unserved }, wanted)
    }

    /// Whether it is known what the maps hold: services were written, or found as they are to be.
    pub(super) const fn is_known(&self) -> bool {
        self.observed.is_some() || self.hoped.is_some()
    }

    /// Whether full maps are all that keeps them from what the tables say. Every node has them then, and the other
    /// services are served: no reason to tell load balancers that this node is behind.
    pub(super) const fn is_only_short(&self) -> bool {
        self.short.is_all
    }

    /// Follows the tables. Errors are words for the report; unless it is only room that is short, the next
    /// round starts from the maps.
    pub(super) fn round(
        &mut self,
        tables: &Tables,
        here: Here<'_>,
        maps: &ServiceMaps,
    ) -> Result<(), String> {
        let began = Instant::now();
        // A service without its slices would lose its backends, so both must be complete.
        let is_synced = tables.services.is_synced()
            && tables.slices.is_synced()
            && (tables.endpoints.is_synced() || !here.waits_for_pods);
        let services = tables.services.changes_since(self.settled.services);
        let slices = tables.slices.changes_since(self.settled.slices);
        (self.settled.services, self.settled.slices) = (services.revision, slices.revision);
        let mut dirty = self.model.set_place(here.place);
        dirty.extend(self.follow_ports(&tables.endpoints, here.addresses));
        dirty.extend(self.model.update(services, slices));
        if self.short.has_room && self.short.since.is_none_or(|since| since.elapsed() >= ATTEMPT) {
            self.forget();
        }
        let is_idle = dirty.is_empty() && self.observed.is_some();
        if is_idle && (self.is_swept || !is_synced) {
            return self.outcome(Vec::new());
        }
        if self.observed.is_none() && !is_synced && self.model.services().next().is_none() {
            return Ok(());
        }
        let outcome = self.write(is_synced, dirty, maps);
        self.rounds.add(began.elapsed(), outcome.is_ok());
        if is_synced {
            self.tell_checks();
        }
        self.tell(is_synced && outcome.is_ok());
        outcome
    }

    /// Takes over the pods' ports of the node where pods or addresses have changed.
    fn follow_ports(
        &mut self,
        pods: &Table<IpAddr, LocalEndpoint>,
        addresses: &BTreeSet<IpAddr>,
    ) -> BTreeSet<ObjectKey> {
        let delta = match &self.ports {
            Some((revision, known)) if known == addresses => {
                let delta = pods.changes_since(*revision);
                if delta.revision == *revision {
                    return BTreeSet::new();
                }
                delta
            }
            _ => pods.changes_since(0),
        };
        self.ports = Some((delta.revision, addresses.clone()));
        let all = if delta.full { delta.upserts } else { pods.changes_since(0).upserts };
        self.model.set_host_ports(host_ports::rows(all.iter().map(|(_, pod)| pod), addresses))
    }

    fn write(
        &mut self,
        is_synced: bool,
        mut dirty: BTreeSet<ObjectKey>,
        maps: &ServiceMaps,
    ) -> Result<(), String> {
        let mut batches = Vec::new();
        self.hoped = None;
        self.short.is_all = false;
        let is_whole = |key| !self.short.services.contains(key);
        let known = self.observed.take().filter(|_| dirty.iter().all(is_whole));
        let mut observed = match known {
            Some(observed) => observed,
            None => {
                let rows = maps.read().map_err(|error| chain(&error))?;
                let (observed, unreachable) = Observed::from_rows(rows);
                batches.extend(unreachable.into_batches());
                self.is_swept = false;
                (self.short, self.missing) = Default::default();
                self.full.clear();
                dirty.extend(self.model.services().cloned());
                observed
            }
        };
        if is_synced {
            dirty.append(&mut self.left);
        }
        let mut plan = Plan::default();
        for key in &dirty {
            let desired = self.model.desired(key);
            match self.model.check(key) {
                Some(check) => drop(self.checks.insert(key.clone(), check)),
                None => drop(self.checks.remove(key)),
            }
            if is_synced || !observed.has_unclaimed(&desired.ports) {
                observed.plan_service(key, &desired.ports, &mut plan);
            } else {
                self.left.insert(key.clone());
            }
        }
        self.sweep(is_synced, &mut observed, &mut plan);
        let touched = dirty.len();
        drop(dirty);
        batches.extend(plan.into_batches());
        let rows: usize = batches.iter().map(Batch::len).sum();
        self.settled.writes += u64::try_from(rows).unwrap_or(0);
        let undone = maps.write_telling(&batches);
        let has_deleted = batches.iter().any(Batch::is_deleting);
        drop(batches);
        if rows.max(touched) > GIVE_BACK {
            observed.compact();
            self.model.compact();
            memory::give_back();
        }
        self.has_written |= rows > 0;
        let outcome = self.record(observed, undone);
        // Also what was refused before the same round made room.
        self.short.has_room |= has_deleted && !self.full.is_empty();
        outcome
    }

    /// Takes over what a round's writes have come to.
    fn record(&mut self, observed: Observed, undone: Undone) -> Result<(), String> {
        let (full, failures): (Vec<_>, Vec<_>) =
            undone.failures.iter().partition(|failure| failure.is_full());
        for failure in &full {
            let missing = u64::try_from(failure.rows).unwrap_or(u64::MAX);
            *self.full.entry(failure.map).or_default() += missing;
        }
        if !undone.failures.is_empty() {
            self.short.services.extend(not_whole(&observed, &undone));
            self.short.since = Some(Instant::now());
        }
        self.short.is_all = failures.is_empty();
        let words = failures.into_iter().map(ToString::to_string).collect();
        self.missing.extend(undone.frontends);
        // What is left for nobody would be anybody's who gets its identifiers.
        if self.short.is_all && !undone.is_unemptied {
            self.observed = Some(observed);
        } else {
            self.hoped = Some(observed);
        }
        self.outcome(words)
    }

    /// What keeps the maps from what the tables say: these words, and room.
    fn outcome(&self, mut words: Vec<String>) -> Result<(), String> {
        let full = self.full.iter();
        words.extend(full.map(|(map, rows)| WriteError::no_room(map, *rows)));
        words.extend(not_programmed(&self.short.services));
        if words.is_empty() { Ok(()) } else { Err(words.join("; ")) }
    }

    /// Plans the end of what nobody has any more, once, and notes whose flows end with it.
    fn sweep(&mut self, is_synced: bool, observed: &mut Observed, plan: &mut Plan) {
        if is_synced && !self.is_swept {
            observed.sweep(plan);
            if !self.settled.is_whole {
                self.withdrawn.add(Sought::any_port());
            }
            self.is_swept = true;
        }
        self.withdrawn.add(Sought::frontends(&plan.gone.services));
        self.withdrawn.add(Sought::frontends(&plan.moved));
    }

    /// What an earlier boot knew of endpoints is nothing to send clients here for.
    fn tell_checks(&self) {
        self.outlets.checks.send_if_modified(|told| {
            let differs = **told != self.checks;
            if differs {
                *told = Arc::new(self.checks.clone());
            }
            differs
        });
    }

    fn tell(&mut self, is_whole: bool) {
        self.settled.is_whole = is_whole;
        if self.observed.is_some() && self.full.is_empty() {
            self.outlets.settled.send_replace(self.settled);
        }
        self.outlets.problems.send_if_modified(|told| {
            let differs = **told != *self.model.problems();
            if differs {
                *told = Arc::new(self.model.problems().clone());
            }
            differs
        });
    }
}

/// Services named at most in words about what is not written.
const NAMED: usize = 8;

/// Services of which something is not written.
fn not_whole<'a>(
    observed: &'a Observed,
    undone: &'a Undone,
) -> impl Iterator<Item = ObjectKey> + 'a {
    let is_short = |port: &Programmed| {
        port.frontends.iter().any(|(key, _)| undone.frontends.contains(key))
            || port.sets.iter().any(|set| undone.sets.contains(set))
            || undone.services.contains(&port.service)
    };
    observed.ports().filter(move |(_, port)| is_short(port)).map(|(service, _)| service.clone())
}

fn not_programmed(services: &BTreeSet<ObjectKey>) -> Option<String> {
    let first: Vec<String> = services.iter().take(NAMED).map(ToString::to_string).collect();
    let more = services.len().saturating_sub(NAMED);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    (!first.is_empty()).then(|| format!("not programmed: {}{more}", first.join(", ")))
}
