//! A case: a world and what happens in it, run through the programs and the reference side by side, and made
//! small when they differ.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use super::{
    asking::Reply,
    chance::Random,
    driven::{self, Driven},
    flows::{Direction, Flow},
    random,
    reference::Reference,
    rig::{Answered, Outcome, Rig, hex},
    step::{Error, Hook, Message, Step, again, direct, hook, pieces, told},
    tracing,
    world::{ROUTER, World, ip},
};

/// Steps of a case: enough for flows to meet, few enough to be made small quickly.
const STEPS: usize = 100;
/// One packet of so many is traced first: it costs as much as ten.
const TRACED: usize = 20;
/// Longer than any case takes, and how often one that took longer is run.
const PATIENCE: Duration = Duration::from_millis(500);
const ATTEMPTS: u32 = 5;
/// Bytes of a payload of no matter.
const SHORT: usize = 12;
/// Runs that making a case small may take.
const TRIES: usize = 3_000;

/// What was compared, by what became of it.
pub(crate) type Tally = BTreeMap<&'static str, usize>;

#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) world: World,
    pub(crate) steps: Vec<Step>,
}

/// Where the programs did what the reference does not allow.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Steps that it took.
    pub(crate) steps: usize,
    pub(crate) words: String,
}

impl Case {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let world = random::world(&mut random);
        let steps = (0..STEPS).map(|_| random::step(&mut random, &world)).collect();
        Self { seed, world, steps }
    }

    /// Runs it. Gives the packets and questions that were compared, by what became of them.
    ///
    /// Rows age while a case runs, which waits allow for (`random.rs`); a case during which the machine
    /// stood still says nothing and is run again.
    pub(crate) fn run(&self, rig: &mut Rig) -> Result<Tally, Failure> {
        let mut attempts = 0;
        loop {
            let start = Instant::now();
            let result = self.run_once(rig);
            attempts += 1;
            if result.is_ok() || start.elapsed() < PATIENCE || attempts == ATTEMPTS {
                return result;
            }
        }
    }

    fn run_once(&self, rig: &mut Rig) -> Result<Tally, Failure> {
        rig.set_up(&self.world);
        let _before = rig.newly_counted();
        let reference = Reference::new(self.world.clone());
        let mut bench = Bench { reference, rig, tally: Tally::new() };
        for (index, step) in self.steps.iter().enumerate() {
            bench.take(step).map_err(|words| Failure { steps: index + 1, words })?;
        }
        let (tally, reference) = (bench.tally, bench.reference);
        let steps = self.steps.len();
        let failed = |words| Failure { steps, words };
        rig.compare_flows(&reference.flows).map_err(failed)?;
        let counted = rig.newly_counted();
        if !counted.is_empty() {
            return Err(failed(format!("counted without a drop: {counted:?}")));
        }
        rig.tear_down();
        // Reading every map costs as much as ten cases.
        if self.seed.is_multiple_of(16) && !rig.is_empty() {
            return Err(failed("rows are left in the maps of services".to_owned()));
        }
        Ok(tally)
    }

    /// The smallest case found that fails too. The programs choose by chance, so each is tried some times.
    pub(crate) fn shrink(&self, rig: &mut Rig, failure: Failure) -> (Self, Failure) {
        let mut best = (self.clone(), failure);
        best.0.steps.truncate(best.1.steps);
        let mut tries = 0;
        loop {
            let before = best.0.size();
            for candidate in best.0.smaller() {
                if candidate.size() >= best.0.size() {
                    continue;
                }
                let failure = (0..3).find_map(|_| candidate.run(rig).err());
                tries += 1;
                if let Some(failure) = failure {
                    best = (candidate, failure);
                    best.0.steps.truncate(best.1.steps);
                    break;
                }
                if tries > TRIES {
                    return best;
                }
            }
            if best.0.size() == before {
                return best;
            }
        }
    }

    fn size(&self) -> usize {
        let of_service = |service: &super::world::Service| {
            let extras = [service.external, service.ingress, service.internal_local]
                .into_iter()
                .chain([service.external_local, service.affinity_s != 0])
                .filter(|extra| *extra);
            10 + service.endpoints.len() * 4
                + service.ports.len() * 4
                + service.ranges.len() * 2
                + extras.count()
        };
        let is_long = |step: &&Step| matches!(step, Step::Send(_, Message::Plain(frame)) if frame.payload.len() > SHORT);
        self.steps.len() * 20
            + self.steps.iter().filter(is_long).count()
            + usize::from(self.world.xdp)
            + self.world.host_ports.len() * 4
            + self.world.services.iter().map(of_service).sum::<usize>()
    }

    /// Cases with something left out, the boldest first.
    fn smaller(&self) -> Vec<Self> {
        let mut found = Vec::new();
        let mut chunk = self.steps.len() / 2;
        while chunk > 0 {
            for from in (0..self.steps.len()).step_by(chunk) {
                let mut steps = self.steps.clone();
                steps.drain(from..(from + chunk).min(steps.len()));
                found.push(Self { steps, ..self.clone() });
            }
            chunk /= 2;
        }
        for at in 0..self.steps.len() {
            let mut case = self.clone();
            if let Step::Send(_, Message::Plain(frame)) = &mut case.steps[at]
                && frame.payload.len() > SHORT
            {
                frame.payload.truncate(SHORT);
                found.push(case);
            }
        }
        let without = World { xdp: false, ..self.world.clone() };
        found.push(Self { world: without, ..self.clone() });
        for at in 0..self.world.host_ports.len() {
            let mut case = self.clone();
            case.world.host_ports.remove(at);
            found.push(case);
        }
        for at in 0..self.world.services.len() {
            found.extend(self.without(|services| drop(services.remove(at))));
            let endpoints = self.world.services[at].endpoints.len();
            for endpoint in 0..endpoints {
                found.extend(self.without(|all| _ = all[at].endpoints.remove(endpoint)));
            }
            for port in 0..self.world.services[at].ports.len() {
                found.extend(self.without(|all| _ = all[at].ports.remove(port)));
            }
            found.extend(self.without(|all| all[at].ranges.clear()));
            found.extend(self.without(|all| all[at].external = false));
            found.extend(self.without(|all| all[at].ingress = false));
            found.extend(self.without(|all| all[at].internal_local = false));
            found.extend(self.without(|all| all[at].external_local = false));
            found.extend(self.without(|all| all[at].affinity_s = 0));
        }
        found
    }

    fn without(&self, change: impl FnOnce(&mut Vec<super::world::Service>)) -> Option<Self> {
        let mut case = self.clone();
        change(&mut case.world.services);
        let is_whole = case.world.services.iter().all(|service| !service.ports.is_empty());
        is_whole.then_some(case)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let World { vxlan, routed, masquerade, loopback_ports, xdp, services, host_ports } =
            &self.world;
        writeln!(
            f,
            "seed {}: vxlan {vxlan}, routed {routed:?}, masquerade {masquerade},",
            self.seed
        )?;
        writeln!(f, "node ports at the loopback address {loopback_ports}, XDP {xdp}")?;
        for service in services {
            writeln!(f, "  {service:?}")?;
        }
        for port in host_ports {
            writeln!(f, "  {port:?}")?;
        }
        for step in &self.steps {
            writeln!(f, "  - {step:?}")?;
        }
        Ok(())
    }
}

/// Programs and reference side by side.
pub(crate) struct Bench<'r> {
    pub(crate) reference: Reference,
    pub(crate) rig: &'r mut Rig,
    pub(crate) tally: Tally,
}

impl Bench<'_> {
    pub(crate) fn take(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Send(hook, message) => self.send(*hook, message)?,
            Step::Pieces(hook, frame) => {
                for piece in pieces(frame) {
                    self.send(*hook, &Message::Plain(piece))?;
                }
            }
            Step::Again { flow, outside, direction, flags } => {
                let flows = &self.reference.flows;
                let of_outside = flows.nth(*flow, |kind| *outside && kind.is_outside());
                if let Some(flow) = of_outside.or_else(|| flows.nth(*flow, |_kind| true)) {
                    let (hook, frame) = again(&self.reference.world, &flow, *direction, *flags);
                    self.send(hook, &Message::Plain(frame))?;
                }
            }
            Step::Direct { flow, flags } => self.send_directly(*flow, *flags)?,
            Step::Tell { flow, direction, by_router, kind, quoted } => {
                if let Some(flow) = self.reference.flows.nth(*flow, |_kind| true) {
                    self.tell(&flow, *direction, (*by_router, *kind, *quoted))?;
                }
            }
            Step::Ask(question) => self.ask(question)?,
            Step::Endpoints(number, endpoints) => {
                let services = &self.reference.world.services;
                if let Some(row) = services.iter().find(|one| one.number == *number) {
                    let row = super::world::Service { endpoints: endpoints.clone(), ..row.clone() };
                    self.rig.put_service(&row);
                    self.rig.round();
                    self.reference.change(*number, Some(row));
                }
            }
            Step::Service(number, row) => {
                let services = &self.reference.world.services;
                let old = services.iter().find(|one| one.number == *number);
                match (old, row) {
                    (Some(old), None) => self.rig.delete_service(old),
                    (None, Some(row)) => self.rig.put_service(row),
                    // What a change of its addresses does to open flows is left to tables of packets.
                    _ => return Ok(()),
                }
                self.rig.round();
                self.reference.change(*number, row.as_deref().cloned());
            }
            Step::HostPorts(ports) => {
                self.reference.change_host_ports(ports.clone());
                self.rig.set_host_ports(&self.reference.world);
            }
            Step::Wait(seconds) => {
                self.rig.wait(*seconds);
                let over = self.reference.wait(*seconds);
                *self.tally.entry("flows over").or_default() += over;
                self.rig.compare_flows(&self.reference.flows)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, hook: Hook, message: &Message) -> Result<(), String> {
        let message = &message.at(hook);
        let frame = message.frame();
        let before = self.reference.flows.iter().count();
        let ruling = self.reference.rule(hook, message);
        let bytes = frame.bytes();
        // What a packet ends or remembers before it goes on is not there for a run that writes nothing.
        let is_ended = self.reference.flows.iter().count() != before || frame.fragment.is_some();
        let turn = self.tally.values().sum::<usize>();
        if turn.is_multiple_of(TRACED) && !is_ended && !hook.came_by_device() {
            let run = self.rig.trace(hook, &bytes);
            let (world, flows) = (&self.reference.world, &self.reference.flows);
            // Where a test run has no device, loopback's.
            let back = self.rig.device(hook).max(1);
            tracing::check(&run, (message, &frame), &ruling, (world, flows, back))?;
        }
        let is_driven = self.reference.world.xdp && hook == Hook::FromUnderlay;
        let (driven, outcome) = if is_driven {
            driven::run(self.rig, &frame, &self.reference.world)?
        } else {
            (Driven::Left, self.rig.run(hook, &bytes))
        };
        *self.tally.entry(driven.name(&ruling)).or_default() += 1;
        let flows = &self.reference.flows;
        let effect = ruling.judge(&frame, &outcome, flows);
        let effect = effect.map_err(|words| {
            let Outcome { verdict, packet, dropped } = &outcome;
            format!(
                "{hook:?} {message:?}\n  in  {}\n  out {} verdict {verdict} counted {dropped:?}\n  \
                 {words}\n  allowed: {ruling:?}",
                hex(&bytes),
                hex(packet)
            )
        })?;
        self.reference.take(effect);
        Ok(())
    }

    fn send_directly(&mut self, flow: usize, flags: u8) -> Result<(), String> {
        let Some(flow) = self.reference.flows.nth(flow, |_kind| true) else { return Ok(()) };
        if flow.kind.is_hosts() && World::is_node(&flow.sent.dst.0) {
            // The node asks itself as somebody who sends nothing else.
            return Ok(());
        }
        let (hook, frame) = direct(&self.reference.world, &flow, flags);
        self.send(hook, &Message::Plain(frame))
    }

    fn tell(
        &mut self,
        flow: &Flow,
        direction: Direction,
        (by_router, kind, quoted): (bool, (u8, u8, [u8; 4]), usize),
    ) -> Result<(), String> {
        let v6 = flow.asked.src.0.is_ipv6();
        let kind = match (v6, kind) {
            (true, (3, 4, rest)) => (2, 0, rest),
            (true, (3, _, rest)) => (1, 4, rest),
            (true, (_, _, rest)) => (3, 0, rest),
            (false, kind) => kind,
        };
        let quoted = quoted + if v6 { 20 } else { 0 };
        let router = by_router.then(|| ip(ROUTER, v6));
        let error: Error = told(flow, direction, (router, kind, quoted));
        let back = match direction {
            Direction::Forward => Direction::Reverse,
            Direction::Reverse => Direction::Forward,
        };
        self.send(hook(&self.reference.world, flow, back), &Message::Error(error))
    }

    fn ask(&mut self, question: &super::asking::Question) -> Result<(), String> {
        let allowed = self.reference.reply(question);
        let answered = self.rig.ask(question);
        *self.tally.entry(allowed.name()).or_default() += 1;
        let differs = || format!("{question:?}\n  got {answered:?}\n  allowed: {allowed:?}");
        match (&allowed, answered) {
            (Reply::Left, Answered::Left) => Ok(()),
            (Reply::Refused(reason), Answered::Refused(got)) if *reason == got => Ok(()),
            (Reply::OneOf(backends, port), Answered::To(backend))
                if backends.contains(&backend) =>
            {
                self.reference.take_reply(question, *port, backend);
                // What a socket sends in a row goes to one backend.
                if self.rig.ask(question) != answered {
                    return Err(format!("{}\n  and another one when asked again", differs()));
                }
                Ok(())
            }
            _ => Err(differs()),
        }
    }
}
