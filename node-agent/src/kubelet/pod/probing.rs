//! The probes of one container: when to ask, and what an answer changes. Pure.

use std::time::{Duration, Instant};

use super::{Phase, PodEffect, Slot, note};
use crate::kubelet::{
    probe::{ProbeKind, ProbeSchedule, Verdict},
    runtime::ContainerId,
};

impl Slot {
    pub(super) fn drive_probes(&mut self, index: usize, now: Instant, out: &mut Vec<PodEffect>) {
        let Phase::Running(running) = &mut self.phase else { return };
        if running.stop.is_some() {
            return;
        }
        let (started, id) = (running.started, running.id.clone());
        for (kind, schedule) in &mut running.probes {
            if (*kind == ProbeKind::Startup) == started {
                continue;
            }
            if let Some(timeout) = schedule.take(now) {
                out.push(PodEffect::Probe { slot: index, id: id.clone(), kind: *kind, timeout });
            }
        }
    }

    pub(super) fn begin_probes(&mut self, now: Instant) {
        let plan = &self.plan;
        let Phase::Running(running) = &mut self.phase else { return };
        let ready = running.ready;
        let schedule = |probe: &Option<_>, known: Option<bool>| {
            probe.clone().map(|probe| match known {
                Some(good) => ProbeSchedule::resumed(probe, now, good),
                None => ProbeSchedule::new(probe, now),
            })
        };
        running.probes = [
            (ProbeKind::Startup, schedule(&plan.startup, None)),
            (ProbeKind::Liveness, schedule(&plan.liveness, Some(true))),
            (ProbeKind::Readiness, schedule(&plan.readiness, Some(ready))),
        ]
        .into_iter()
        .filter_map(|(kind, probe)| Some((kind, probe?)))
        .collect();
        if plan.readiness.is_none() && running.started {
            running.ready = true;
        }
    }

    /// A probe's result arrived; asks for a stop when it says that the container is dead.
    pub(super) fn probed(
        &mut self,
        (index, id, kind): (usize, &ContainerId, ProbeKind),
        result: Result<(), String>,
        grace: Duration,
        now: Instant,
    ) -> Vec<PodEffect> {
        let mut out = Vec::new();
        let has_readiness = self.plan.readiness.is_some();
        let Phase::Running(running) = &mut self.phase else { return out };
        if running.id != *id || running.stop.is_some() {
            return out;
        }
        let Some((_, schedule)) = running.probes.iter_mut().find(|(k, _)| *k == kind) else {
            return out;
        };
        let verdict = schedule.record(result.is_ok(), now);
        let grace = schedule.grace().unwrap_or(grace);
        if let Err(message) = result {
            let message = format!("{} probe failed: {message}", kind.title());
            out.push(note(index, true, "Unhealthy", message));
        }
        match (kind, verdict) {
            (_, Verdict::Unchanged) | (ProbeKind::Liveness, Verdict::TurnedGood) => {}
            (ProbeKind::Readiness, turned) => running.ready = turned == Verdict::TurnedGood,
            (ProbeKind::Startup, Verdict::TurnedGood) => {
                running.started = true;
                running.ready = !has_readiness;
            }
            (ProbeKind::Startup | ProbeKind::Liveness, Verdict::TurnedBad) => {
                let which = if kind == ProbeKind::Startup { "startup" } else { "liveness" };
                let message =
                    format!("Container {} failed {which} probe, will be restarted", self.plan.name);
                out.push(note(index, false, "Killing", message));
                out.extend(self.stop(index, grace, now));
            }
        }
        out
    }
}
