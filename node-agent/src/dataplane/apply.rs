//! The loop that keeps the kernel's maps and attachments equal to the tables.
//!
//! Effects. Each round takes what changed, plans it and writes it item by item. An item that fails
//! is told in the report; the part it belongs to is then read back from the kernel and planned as a
//! whole after a pause.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use ebpf_common::{
    addr::{Addr, Net},
    config::{Config, EVENTS, LOOPBACK_PORTS, MASQUERADE_V4, MASQUERADE_V6},
};
use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};

use super::{
    DataplaneConfig, Tables,
    asked::Question,
    collect::Collector,
    events::Teller,
    health::Pulse,
    host_ports,
    load::Programs,
    maps::Maps,
    model::Problems,
    paths::Untranslated,
    pods::Namespaces,
    room::Room,
    seek::Sought,
    select::Place,
    services::{Here, Outlets, Services},
    status::{self, Report},
    xdp::Xdp,
};
use crate::{
    chain::chain,
    changes::Changes,
    model::{ObjectKey, Programmed},
    overlay::OverlayDevice,
    sys::netns::NetNs,
    table::Followed,
};

/// How often devices are looked up although nothing was heard of them, and a walk for finished flows begins.
const HOUSEKEEPING: Duration = Duration::from_secs(10);
/// How often a part of a long work is done.
const WORK: Duration = Duration::from_secs(1);
/// The label that says in which zone a node is.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Parts without which services are not what the cluster says.
const PROXY: [&str; 4] = ["sockets", "settings", "services", "devices"];
/// The part that makes room for services; without it those that have some are served.
const ROOM: &str = "room for services";
/// First and longest pause after a failed round.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Owner of programs and maps.
pub(super) struct Runner {
    pub(super) config: DataplaneConfig,
    pub(super) tables: Tables,
    pub(super) programs: Programs,
    pub(super) xdp: Xdp,
    pub(super) maps: Maps,
    pub(super) programmed: watch::Sender<Programmed>,
    pub(super) services: Services,
    pub(super) seen: Seen,
    pub(super) attached: Attached,
    pub(super) namespaces: Namespaces,
    pub(super) collector: Collector,
    pub(super) room: Room,
    pub(super) trouble: BTreeMap<&'static str, String>,
    pub(super) retry: Duration,
    pub(super) pulse: watch::Sender<Pulse>,
    pub(super) teller: Teller,
    pub(super) began: Instant,
    /// What agents of other versions left is gone.
    pub(super) is_alone: bool,
    /// Health checks that are not served.
    pub(super) unserved: watch::Receiver<Arc<Problems>>,
}

/// Up to where the maps follow the tables.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) endpoints: Followed,
    pub(super) tunnels: Followed,
}

/// Devices that have our programs.
#[derive(Default)]
pub(super) struct Attached {
    /// Those on which all programs were put, or found, since the last refresh.
    pub(super) sure: BTreeSet<u32>,
    /// The programs at the sockets are, in the same sense.
    pub(super) sockets: bool,
    pub(super) pods: BTreeMap<IpAddr, u32>,
    /// Pods that could not be served.
    pub(super) refused: BTreeSet<IpAddr>,
    pub(super) underlay: BTreeSet<u32>,
    /// Names of those of the underlay that have none.
    pub(super) untranslated: BTreeMap<String, Untranslated>,
    /// Other devices, from which what an earlier agent may have put there was taken.
    pub(super) left: BTreeSet<u32>,
    /// The node's addresses.
    pub(super) addresses: BTreeSet<IpAddr>,
    pub(super) overlay: Option<u32>,
    /// The peer of the host device.
    pub(super) host: Option<u32>,
}

impl Runner {
    pub(super) fn new(
        config: DataplaneConfig,
        tables: Tables,
        (mut programs, maps): (Programs, Maps),
        (programmed, outlets): (watch::Sender<Programmed>, Outlets),
        (pulse, unserved, teller): (watch::Sender<Pulse>, watch::Receiver<Arc<Problems>>, Teller),
    ) -> Self {
        let mut services = Services::new(config.node_local.clone(), outlets);
        services.model.set_node_ports(config.node_ports);
        let xdp = Xdp::new(&mut programs, config.xdp);
        Self {
            config,
            tables,
            programs,
            xdp,
            maps,
            programmed,
            services,
            seen: Seen::default(),
            attached: Attached::default(),
            namespaces: Namespaces::default(),
            collector: Collector::default(),
            room: Room::default(),
            trouble: BTreeMap::new(),
            retry: RETRY.0,
            pulse,
            teller,
            began: Instant::now(),
            is_alone: false,
            unserved,
        }
    }

    pub(super) async fn run(mut self, mut asked: mpsc::Receiver<Question>) {
        let mut services = self.tables.services.subscribe();
        let mut slices = self.tables.slices.subscribe();
        let mut endpoints = self.tables.endpoints.subscribe();
        let mut tunnels = self.tables.tunnels.subscribe();
        let mut overlay = self.tables.overlay.clone();
        let mut overlay_lives = true;
        let mut listening = self.teller.wanted.clone();
        let mut hub_lives = true;
        let mut changes = Changes::of(&NetNs::own());
        let mut housekeeping = every(HOUSEKEEPING);
        let period = self.config.refresh;
        let mut refresh = time::interval_at(Instant::now() + period, period);
        let mut work = every(WORK);
        let mut again = Instant::now() + period;
        loop {
            let alive = tokio::select! {
                changed = services.changed() => changed.is_ok(),
                changed = slices.changed() => changed.is_ok(),
                changed = endpoints.changed() => changed.is_ok(),
                changed = tunnels.changed() => changed.is_ok(),
                changed = overlay.changed(), if overlay_lives => {
                    overlay_lives = changed.is_ok();
                    true
                }
                changed = listening.changed(), if hub_lives => {
                    hub_lives = changed.is_ok();
                    true
                }
                () = changes.settled() => {
                    self.follow_devices();
                    true
                }
                _instant = housekeeping.tick() => {
                    self.housekeep();
                    true
                }
                _instant = refresh.tick() => {
                    self.forget();
                    true
                }
                () = time::sleep_until(again) => true,
                _instant = work.tick() => if self.work() { true } else { continue },
                question = asked.recv() => match question {
                    Some(question) => {
                        self.answer(question);
                        continue;
                    }
                    None => false,
                },
            };
            if !alive {
                return;
            }
            self.round();
            again = Instant::now() + if self.trouble.is_empty() { period } else { self.retry };
        }
    }

    /// Reads everything back in the next round and attaches everything anew, to repair what others have changed.
    fn forget(&mut self) {
        self.services.forget();
        self.seen = Seen::default();
        self.attached.sure.clear();
        self.attached.sockets = false;
        self.xdp.doubt();
        self.follow_devices();
    }

    fn follow_devices(&mut self) {
        let outcome = self.devices();
        self.note("devices", outcome);
    }

    fn round(&mut self) {
        let device = *self.tables.overlay.borrow();
        let had_trouble = !self.trouble.is_empty();
        let outcome = self.sockets();
        self.note("sockets", outcome);
        let waits = self.waits_for_services();
        if !waits {
            let outcome = self.settings(device);
            self.note("settings", outcome);
        }
        let outcome = self.follow_endpoints();
        self.note("pods", outcome);
        let outcome = self.follow_tunnels();
        self.note("tunnels", outcome);
        let outcome = self.follow_services();
        self.note("services", outcome);
        if waits && !self.waits_for_services() {
            let outcome = self.settings(device);
            self.note("settings", outcome);
        }
        self.remove_other_versions();
        self.retry = match (had_trouble, self.trouble.is_empty()) {
            (_, true) => RETRY.0,
            (true, false) => (self.retry * 2).min(RETRY.1),
            (false, false) => self.retry,
        };
        let is_short = self.services.is_only_short();
        let mut parts = PROXY.iter().filter(|part| **part != "services" || !is_short);
        let behind = parts.any(|part| self.trouble.contains_key(part));
        self.pulse.send_modify(|pulse| *pulse = pulse.after(Instant::now(), behind));
    }

    /// Records how a part went; logs only what changed.
    pub(super) fn note(&mut self, part: &'static str, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => drop(self.trouble.remove(part)),
            Err(words) => {
                if self.trouble.get(part) != Some(&words) {
                    tracing::warn!(part, trouble = words, "dataplane");
                }
                self.trouble.insert(part, words);
            }
        }
    }

    fn settings(&mut self, device: Option<OverlayDevice>) -> Result<(), String> {
        if let Some(device) = device {
            self.serve_overlay(device).map_err(|error| chain(&error))?;
            let host = device.host_peer_ifindex;
            if host != 0 && self.attached.host.replace(host) != Some(host) {
                // The device and its addresses have rows of their own.
                self.devices()?;
                self.follow_namespaces()?;
            }
        }
        let mut services = [Net::default(); 2];
        for (row, cidr) in services.iter_mut().zip(&self.config.service_cidrs) {
            *row = Net::new(cidr.network(), cidr.prefix_len());
        }
        let masquerade = if self.config.masquerade { MASQUERADE_V4 | MASQUERADE_V6 } else { 0 };
        let is_heard = *self.teller.wanted.borrow();
        let heard = if is_heard { EVENTS } else { 0 };
        let loopback = self.loopback_ports()?;
        let gateway = |ip: Option<IpAddr>| ip.map_or_else(Addr::default, Addr::from);
        let config = Config {
            services,
            gateway: device.map_or_else(Default::default, |device| device.gateways.map(gateway)),
            vxlan_ifindex: device.map_or(0, |device| device.ifindex),
            vni: device.map_or(0, |device| device.vni),
            host_ifindex: device.map_or(0, |device| device.host_ifindex),
            flags: masquerade | heard | loopback,
            node_port_first: self.config.node_ports.0,
            node_port_last: self.config.node_ports.1,
            vxlan_port: device.map_or(0, |device| device.port),
            reserved: 0,
        };
        // The overlay has not spoken yet: what an earlier agent wrote still holds.
        let config = if device.is_none() && self.tables.overlay.has_changed().is_ok() {
            let old = self.maps.config().map_err(|error| chain(&error))?;
            Config {
                gateway: old.gateway,
                vxlan_ifindex: old.vxlan_ifindex,
                vni: old.vni,
                host_ifindex: old.host_ifindex,
                vxlan_port: old.vxlan_port,
                ..config
            }
        } else {
            config
        };
        self.maps.set_config(&config).map_err(|error| chain(&error))?;
        self.teller.active.send_replace(is_heard);
        Ok(())
    }

    /// The flag of pods' ports at loopback; what an earlier agent wrote holds until its pods are known.
    fn loopback_ports(&self) -> Result<u32, String> {
        let pods = self.tables.endpoints.changes_since(0);
        if host_ports::are_at_loopback(pods.upserts.iter().map(|(_, pod)| pod)) {
            return Ok(LOOPBACK_PORTS);
        }
        if pods.synced || !self.config.waits_for_pods {
            return Ok(0);
        }
        Ok(self.maps.config().map_err(|error| chain(&error))?.flags & LOOPBACK_PORTS)
    }

    fn follow_tunnels(&mut self) -> Result<(), String> {
        let delta = self.seen.tunnels.changes(&self.tables.tunnels);
        let mut failed = Failures::default();
        let old =
            if delta.full { self.maps.tunnels().map_err(|e| chain(&e))? } else { BTreeMap::new() };
        for (net, far) in &delta.upserts {
            if old.get(net) != Some(far.as_ref()) {
                failed.note(net, self.maps.put_tunnel(*net, **far));
            }
        }
        let mut gone = delta.deletes.clone();
        if delta.full && delta.synced {
            let live: BTreeSet<_> = delta.upserts.iter().map(|(net, _)| *net).collect();
            gone.extend(old.keys().filter(|net| !live.contains(*net)));
        }
        for net in gone {
            failed.note(net, self.maps.delete_tunnel(net));
        }
        failed.outcome()?;
        self.seen.tunnels.record(&delta);
        Ok(())
    }

    fn follow_services(&mut self) -> Result<(), String> {
        let outcome = self.program_services();
        if self.services.full.is_empty() {
            return outcome;
        }
        // What had no room is written as soon as there is some.
        let room = self.make_room_for_services();
        let has_grown = room == Ok(true);
        self.note(ROOM, room.map(|_grown| ()));
        if has_grown { self.program_services() } else { outcome }
    }

    fn program_services(&mut self) -> Result<(), String> {
        let here = Here {
            place: self.place(),
            addresses: &self.attached.addresses,
            waits_for_pods: self.config.waits_for_pods,
        };
        let outcome = self.services.round(&self.tables, here, self.maps.services());
        self.collector.seek(std::mem::take(&mut self.services.withdrawn));
        outcome
    }

    /// Where this node is, as far as its labels are known.
    fn place(&self) -> Place {
        let node = self.config.node_name.clone();
        let key = ObjectKey::new("", &node);
        let row = self.config.nodes.as_ref().and_then(|nodes| nodes.row(&key));
        let zone = row.and_then(|row| row.labels.get(ZONE).cloned()).unwrap_or_default();
        Place { node, zone: zone.into() }
    }

    fn housekeep(&mut self) {
        self.follow_devices();
        self.collector.begin();
        if std::mem::take(&mut self.services.has_written) {
            let outcome = self.make_room_for_services().map(|_grown| ());
            self.note(ROOM, outcome);
        }
    }

    /// A part of what is too long to be done at once. Says whether a round is to follow, as the maps are other ones than
    /// those that were written last.
    fn work(&mut self) -> bool {
        let was_stale = self.room.is_stale();
        if self.collector.is_walking() {
            let (table, old) = (self.maps.connections(), self.maps.old_connections());
            let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            let tell = |rows: &[_], over: &[_]| self.teller.ended(&clock, rows, over);
            let frontend = |key: &_| self.maps.services().frontend(key);
            let is_here = |addr: &Addr| self.attached.pods.contains_key(&addr.ip());
            let seek = |sought: &Sought, rows: &[_]| sought.over(rows, frontend, is_here);
            let outcome = self.collector.part((table, old), now_s(), seek, tell);
            self.note("connections", outcome.map_err(|error| chain(&error)));
        }
        let outcome = self.make_room_for_connections();
        self.note("room for connections", outcome);
        was_stale && !self.room.is_stale()
    }

    /// What is wrong with services, and which health checks are not served.
    fn problems(&self) -> Vec<(ObjectKey, Vec<String>)> {
        let mut problems = self.services.model.problems().clone();
        for (key, words) in self.unserved.borrow().iter() {
            problems.entry(key.clone()).or_default().extend(words.iter().cloned());
        }
        problems.into_iter().collect()
    }

    pub(super) fn report(&self) -> Report {
        Report {
            sockets: self.config.cgroup.clone(),
            hooks: self.programs.hooks(),
            missing: self.programs.missing_hooks().iter().copied().collect(),
            has_host: self.attached.host.is_some(),
            tc: self.programs.tc_path(),
            xdp: self.xdp.paths(),
            untranslated: self.attached.untranslated.clone(),
            pins: self.config.pins.clone(),
            frontends: self.services.programmed(),
            endpoints: self.tables.endpoints.changes_since(0).upserts.into_iter().collect(),
            tunnels: self.maps.tunnels().unwrap_or_default(),
            flows: usize::try_from(self.collector.rows() / 2).unwrap_or(0),
            drops: self.maps.drops().unwrap_or_default(),
            unsupported: status::unsupported(&self.services.model),
            problems: self.problems(),
            full: self.full(),
            loses_pieces: self.room.loses_pieces(),
            evicting: Vec::new(),
            rounds: self.services.rounds,
            by_chance: status::by_chance(self.services.observed.as_ref()),
            trouble: self.trouble.iter().map(|(part, words)| (*part, words.clone())).collect(),
        }
    }
}

/// Ticks at once and from then on, also late ones a period apart.
fn every(period: Duration) -> time::Interval {
    let mut interval = time::interval(period);
    interval.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    interval
}

/// Seconds of the monotonic clock, as programs see it.
pub(super) fn now_s() -> u32 {
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u32::try_from(clock.tv_sec & 0xffff_ffff).unwrap_or(0)
}

/// What went wrong in one part of a round: the first failure in words, and how many there were.
#[derive(Default)]
pub(super) struct Failures {
    first: Option<String>,
    count: usize,
}

impl Failures {
    pub(super) fn note(&mut self, item: impl std::fmt::Display, outcome: io::Result<()>) {
        if let Err(error) = outcome {
            self.count += 1;
            self.first.get_or_insert_with(|| format!("{item}: {error}"));
        }
    }

    pub(super) fn outcome(self) -> Result<(), String> {
        match self.first {
            None => Ok(()),
            Some(first) if self.count == 1 => Err(first),
            Some(first) => Err(format!("{first} (and {} more)", self.count - 1)),
        }
    }
}
