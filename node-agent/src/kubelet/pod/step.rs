//! What follows from what: the pod machine's intake and its one level-triggered step. Pure.

use std::time::{Duration, Instant};

use super::{
    ApiPhase, Ending, MIN_GRACE, Note, Phase, PodEffect, PodEvent, PodMachine, Role,
    SANDBOX_BACKOFF, SandboxPhase, Slot, Waiting, backoff, note,
};

impl PodMachine {
    /// Notes what happened; deciding is left to `advance`.
    pub(super) fn take_in(&mut self, event: PodEvent, now: Instant, out: &mut Vec<PodEffect>) {
        match event {
            PodEvent::SandboxReady { ips } => self.sandbox_made(ips),
            PodEvent::SandboxFailed { reason, message } => {
                self.sandbox_failed((reason, message), now, out);
            }
            PodEvent::SandboxLost => self.sandbox_lost(now, out),
            PodEvent::SandboxRemoved => {
                let gone = self.ending.is_some();
                self.sandbox =
                    if gone { SandboxPhase::Gone } else { SandboxPhase::Absent { retry: None } };
            }
            PodEvent::SandboxStuck { message } => self.sandbox_stuck(&message, now, out),
            PodEvent::DeleteRequested { grace } => self.delete(grace.max(MIN_GRACE)),
            PodEvent::DeletedFromApi => {
                self.api = ApiPhase::Gone;
                self.delete(MIN_GRACE);
            }
            PodEvent::DeleteFailed => {
                if self.api == ApiPhase::Deleting {
                    self.api = ApiPhase::Present { retry: Some(now + SANDBOX_BACKOFF.0) };
                }
            }
            PodEvent::SpecChanged { plan } => self.change(plan),
            PodEvent::ImageReady { .. }
            | PodEvent::ImageFailed { .. }
            | PodEvent::Started { .. }
            | PodEvent::StartFailed { .. }
            | PodEvent::Exited { .. }
            | PodEvent::Probed { .. } => self.take_in_container(event, now, out),
        }
    }

    fn take_in_container(&mut self, event: PodEvent, now: Instant, out: &mut Vec<PodEffect>) {
        let grace = self.plan.grace;
        match event {
            PodEvent::ImageReady { slot, digest } => {
                let useless = self.ending.is_some() || self.sandbox != SandboxPhase::Ready;
                if let Some(container) = self.slots.get_mut(slot) {
                    out.extend(container.image_ready(slot, digest, useless));
                }
            }
            PodEvent::ImageFailed { slot, reason, message } => {
                if let Some(container) = self.slots.get_mut(slot) {
                    out.extend(container.image_failed(Waiting { reason, message }, slot, now));
                }
            }
            PodEvent::StartFailed { slot, reason, message, instance } => {
                if let Some(container) = self.slots.get_mut(slot) {
                    out.extend(container.start_failed(
                        Waiting { reason, message },
                        instance,
                        slot,
                        now,
                    ));
                    if self.ending.is_none() {
                        out.extend(self.crash_loop(slot));
                    }
                }
            }
            PodEvent::Started { slot, id, started } => {
                let lost = self.sandbox != SandboxPhase::Ready;
                if let Some(container) = self.slots.get_mut(slot) {
                    let replaced = container.begun(id.clone(), &started, now);
                    out.extend(replaced.map(|id| PodEffect::RemoveContainer { id }));
                }
                let early = self.early_exits.iter().position(|(early, _)| *early == id);
                if let Some((id, exit)) = early.map(|at| self.early_exits.swap_remove(at)) {
                    self.exited(&id, exit, now, out);
                }
                if let Some(container) = self.slots.get_mut(slot).filter(|_| lost) {
                    container.lost(now);
                }
            }
            PodEvent::Exited { id, exit } => self.exited(&id, exit, now, out),
            PodEvent::Probed { slot, id, kind, success, message } => {
                let result = if success { Ok(()) } else { Err(message) };
                if let Some(container) = self.slots.get_mut(slot) {
                    out.extend(container.probed((slot, &id, kind), result, grace, now));
                }
            }
            PodEvent::SandboxReady { .. }
            | PodEvent::SandboxFailed { .. }
            | PodEvent::SandboxLost
            | PodEvent::SandboxRemoved
            | PodEvent::SandboxStuck { .. }
            | PodEvent::DeleteRequested { .. }
            | PodEvent::DeletedFromApi
            | PodEvent::DeleteFailed
            | PodEvent::SpecChanged { .. } => {}
        }
    }

    fn sandbox_made(&mut self, ips: Vec<std::net::IpAddr>) {
        if self.sandbox == SandboxPhase::Creating {
            self.sandbox = SandboxPhase::Ready;
            self.sandbox_failures = 0;
            self.ips = ips;
        }
    }

    fn sandbox_failed(
        &mut self,
        (reason, message): (&'static str, String),
        now: Instant,
        out: &mut Vec<PodEffect>,
    ) {
        if self.sandbox != SandboxPhase::Creating {
            return;
        }
        let retry = Some(now + backoff(SANDBOX_BACKOFF, self.sandbox_failures));
        self.sandbox_failures = self.sandbox_failures.saturating_add(1);
        self.sandbox = SandboxPhase::Absent { retry };
        out.push(pod_note(reason, message));
    }

    fn sandbox_lost(&mut self, now: Instant, out: &mut Vec<PodEffect>) {
        for slot in &mut self.slots {
            slot.lost(now);
        }
        if self.sandbox == SandboxPhase::Ready {
            self.sandbox = SandboxPhase::Broken { retry: None };
            let message = "Pod sandbox changed, it will be killed and re-created.".to_owned();
            out.push(PodEffect::Record(Note {
                slot: None,
                warning: false,
                reason: "SandboxChanged",
                message,
            }));
        }
    }

    fn sandbox_stuck(&mut self, message: &str, now: Instant, out: &mut Vec<PodEffect>) {
        if self.sandbox != SandboxPhase::Removing {
            return;
        }
        let retry = Some(now + backoff(SANDBOX_BACKOFF, self.sandbox_failures));
        self.sandbox_failures = self.sandbox_failures.saturating_add(1);
        self.sandbox = SandboxPhase::Broken { retry };
        out.push(pod_note("FailedKillPod", format!("error killing pod: {message}")));
    }

    fn delete(&mut self, grace: Duration) {
        let grace = match self.ending {
            Some(Ending::Deleted { grace: before }) => grace.min(before),
            Some(Ending::Completed) | None => grace,
        };
        self.ending = Some(Ending::Deleted { grace });
    }

    fn exited(
        &mut self,
        id: &super::ContainerId,
        exit: super::Exit,
        now: Instant,
        out: &mut Vec<PodEffect>,
    ) {
        let found = self.slots.iter_mut().enumerate().find_map(|(index, slot)| {
            let at = slot.running().filter(|running| running.id == *id)?.at;
            Some((index, slot, at))
        });
        let Some((index, slot, at)) = found else {
            // The process may end before the call that started it has returned.
            let starting = self.slots.iter().filter(|slot| slot.in_flight()).count();
            if self.early_exits.len() >= self.slots.len() {
                self.early_exits.remove(0);
            }
            if starting > 0 {
                self.early_exits.push((id.clone(), exit));
            }
            return;
        };
        slot.ended(id.clone(), Some(at), exit, now);
        if self.ending.is_none() {
            out.extend(self.crash_loop(index));
        }
    }

    /// What is told of a container that has just ended and is not started again at once.
    fn crash_loop(&self, index: usize) -> Option<PodEffect> {
        let slot = self.slots.get(index)?;
        let Phase::Waiting { since, .. } = &slot.phase else { return None };
        let message = format!(
            "Back-off restarting failed container {} in pod {}",
            slot.plan.name, self.plan.display
        );
        (since.reason == "CrashLoopBackOff").then(|| note(index, true, "BackOff", message))
    }

    /// Asks for everything that is due now. Calling it again without news asks for nothing.
    pub(super) fn advance(&mut self, now: Instant, out: &mut Vec<PodEffect>) {
        if self.finished {
            return;
        }
        for (index, slot) in self.slots.iter_mut().enumerate() {
            out.extend(slot.stop_again(index, now));
        }
        if self.ending.is_none() && self.completed() {
            self.ending = Some(Ending::Completed);
        }
        if self.ending.is_some() {
            self.wind_down(now, out);
            return;
        }
        match self.sandbox {
            SandboxPhase::Absent { retry } if retry.is_none_or(|retry| now >= retry) => {
                self.sandbox = SandboxPhase::Creating;
                out.push(PodEffect::EnsureSandbox);
            }
            SandboxPhase::Broken { retry }
                if retry.is_none_or(|retry| now >= retry)
                    && !self.slots.iter().any(Slot::in_flight) =>
            {
                self.sandbox = SandboxPhase::Removing;
                out.push(PodEffect::RemoveSandbox);
            }
            SandboxPhase::Ready => self.drive_containers(now, out),
            SandboxPhase::Absent { .. }
            | SandboxPhase::Broken { .. }
            | SandboxPhase::Creating
            | SandboxPhase::Removing
            | SandboxPhase::Gone => {}
        }
    }

    fn drive_containers(&mut self, now: Instant, out: &mut Vec<PodEffect>) {
        let grace = self.plan.grace;
        for index in 0..self.slots.len() {
            // Driving one container never gives the turn to another, so this could be asked once.
            if self.turns().get(index) == Some(&true)
                && let Some(slot) = self.slots.get_mut(index)
            {
                out.extend(slot.replace(index, grace, now).into_iter().flatten());
                out.extend(slot.drive(index, now));
            }
        }
    }

    /// For each container, whether it may be brought up now: the sandbox is ready, the pod lives, and
    /// every init container before it lets it pass.
    pub(super) fn turns(&self) -> Vec<bool> {
        let live = self.ending.is_none() && self.sandbox == SandboxPhase::Ready;
        // Once a main container has run, init containers are not looked at again.
        let main_ran = self.slots.iter().any(|slot| {
            slot.plan.role == Role::Main && (slot.running().is_some() || slot.last.is_some())
        });
        let mut open = live;
        self.slots
            .iter()
            .map(|slot| {
                let turn = open && !(main_ran && slot.plan.role == Role::Init);
                open = open && (main_ran || slot.lets_pass());
                turn
            })
            .collect()
    }

    /// Whether no container will ever run again, sidecars aside.
    fn completed(&self) -> bool {
        let failed_init = self.slots.iter().any(|slot| {
            slot.plan.role == Role::Init && matches!(slot.phase, Phase::Exited) && !slot.lets_pass()
        });
        let mut mains = self.slots.iter().filter(|slot| slot.plan.role == Role::Main);
        failed_init || mains.all(|slot| matches!(slot.phase, Phase::Exited))
    }

    /// Stops what runs, then takes the sandbox down, then lets the API object go.
    fn wind_down(&mut self, now: Instant, out: &mut Vec<PodEffect>) {
        let grace = match self.ending {
            Some(Ending::Deleted { grace }) => grace,
            Some(Ending::Completed) | None => self.plan.grace,
        };
        self.stop_containers(grace, now, out);
        let busy = self.slots.iter().any(|slot| slot.running().is_some() || slot.in_flight());
        if busy {
            return;
        }
        match self.sandbox {
            SandboxPhase::Ready | SandboxPhase::Absent { .. } => {
                self.sandbox = SandboxPhase::Removing;
                out.push(PodEffect::RemoveSandbox);
            }
            SandboxPhase::Broken { retry } if retry.is_none_or(|retry| now >= retry) => {
                self.sandbox = SandboxPhase::Removing;
                out.push(PodEffect::RemoveSandbox);
            }
            SandboxPhase::Broken { .. } | SandboxPhase::Creating | SandboxPhase::Removing => {}
            SandboxPhase::Gone => self.let_go(now, out),
        }
    }

    /// Mains first; sidecars once every main container has ended.
    fn stop_containers(&mut self, grace: Duration, now: Instant, out: &mut Vec<PodEffect>) {
        let mains_busy = self.slots.iter().any(|slot| {
            slot.plan.role != Role::Sidecar && (slot.running().is_some() || slot.in_flight())
        });
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.plan.role == Role::Sidecar && mains_busy {
                continue;
            }
            let first = slot.running().is_some_and(|running| !running.is_stopping());
            let effect = slot.stop(index, grace, now);
            if first && effect.is_some() {
                let message = format!("Stopping container {}", slot.plan.name);
                out.push(note(index, false, "Killing", message));
            }
            out.extend(effect);
        }
    }

    fn let_go(&mut self, now: Instant, out: &mut Vec<PodEffect>) {
        if !self.is_deleted() {
            return;
        }
        match self.api {
            ApiPhase::Present { retry } if retry.is_none_or(|retry| now >= retry) => {
                self.api = ApiPhase::Deleting;
                out.push(PodEffect::DeleteFromApi);
            }
            ApiPhase::Gone => {
                self.finished = true;
                out.push(PodEffect::Finish);
            }
            ApiPhase::Present { .. } | ApiPhase::Deleting => {}
        }
    }
}

fn pod_note(reason: &'static str, message: String) -> PodEffect {
    PodEffect::Record(Note { slot: None, warning: true, reason, message })
}
