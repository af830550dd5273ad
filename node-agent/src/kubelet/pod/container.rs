//! One container of a pod: its state, its back-off and its probes. Pure.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::{
    CRASH_BACKOFF, ContainerPlan, EXIT_OVERDUE, History, IMAGE_BACKOFF, MIN_GRACE, Note, PodEffect,
    RestartPolicy, Role, Running, Waiting, backoff, unseen_exit,
};
use crate::kubelet::runtime::{ContainerId, Exit, Started};

/// How long `ErrImagePull` is shown before it becomes `ImagePullBackOff`.
const PULL_ERROR_SHOWN: Duration = Duration::from_secs(2);

/// Where a container is.
#[derive(Clone, Debug)]
pub enum Phase {
    /// To be started when its turn comes and the time is reached.
    Waiting {
        since: Waiting,
        until: Option<Instant>,
    },
    /// The image is looked for; `again` is why it is not there after an earlier try.
    Pulling {
        again: Option<Waiting>,
    },
    /// The pull failed; `shown` is when the reason turns into `ImagePullBackOff`.
    PullFailed {
        since: Waiting,
        shown: Option<Instant>,
        until: Instant,
    },
    Starting,
    Running(Running),
    /// Not to be started again.
    Exited,
}

/// One container of the pod.
#[derive(Clone, Debug)]
pub struct Slot {
    pub plan: ContainerPlan,
    pub phase: Phase,
    /// Of the present or next instance.
    pub restart_count: u32,
    /// The last instance that ended: its id, start and exit.
    pub last: Option<(ContainerId, Option<Timestamp>, Exit)>,
    pub image_digest: String,
    /// Of the newest instance, or of the one to come where there was none.
    pub image: Box<str>,
    /// What is under way is of an image that the spec no longer names.
    pub(super) outdated: bool,
    restart_policy: RestartPolicy,
    pull_failures: u32,
    start_failures: u32,
    /// Crashes in a row, and when the last restart was decided.
    crashes: Option<(u32, Instant)>,
}

impl Slot {
    pub(super) fn new(
        plan: &ContainerPlan,
        pod_policy: RestartPolicy,
        history: &History,
        now: Instant,
    ) -> Self {
        let own = plan.restart_policy.unwrap_or(pod_policy);
        let restart_policy = match plan.role {
            Role::Sidecar => RestartPolicy::Always,
            // An init container that fails is tried again unless it or the pod says never.
            Role::Init if own == RestartPolicy::Always => RestartPolicy::OnFailure,
            Role::Init | Role::Main => own,
        };
        let mut slot = Self {
            plan: plan.clone(),
            phase: Phase::Waiting { since: creating(), until: None },
            restart_count: 0,
            last: None,
            image_digest: String::new(),
            image: plan.image.clone(),
            outdated: false,
            restart_policy,
            pull_failures: 0,
            start_failures: 0,
            crashes: None,
        };
        slot.take_over(history, now);
        slot
    }

    /// Continues what an earlier agent did: instances in the sandbox first, the API's word else.
    fn take_over(&mut self, history: &History, now: Instant) {
        let told = history.containers.iter().find(|c| c.name == *self.plan.name);
        let found = history.sandbox.iter().flat_map(|sandbox| &sandbox.containers);
        let newest =
            found.filter(|c| c.name == *self.plan.name).max_by_key(|c| c.restart_count).cloned();
        if let Some(state) = newest {
            self.restart_count = state.restart_count;
            self.image_digest = state.image_digest;
            self.image = state.image_reference.into();
            match state.exit {
                None => {
                    let running = Running {
                        id: state.id,
                        at: state.started_at,
                        started: told.is_some_and(|c| c.started) || self.plan.startup.is_none(),
                        ready: told.is_some_and(|c| c.ready),
                        stop: None,
                        probes: Vec::new(),
                    };
                    self.phase = Phase::Running(running);
                    self.begin_probes(now);
                    self.outdated = self.image != self.plan.image && self.plan.role != Role::Init;
                }
                Some(exit) => self.ended(state.id, Some(state.started_at), exit, now),
            }
            return;
        }
        let Some(told) = told.filter(|c| c.ran) else { return };
        self.restart_count = told.restart_count;
        let (id, exit) = told
            .exit
            .clone()
            .unwrap_or_else(|| (String::new(), unseen_exit(Timestamp::UNIX_EPOCH)));
        let id = ContainerId(id.into());
        if history.over {
            self.last = Some((id, None, exit));
            self.phase = Phase::Exited;
        } else {
            self.ended(id, None, exit, now);
        }
    }

    /// Drops every back-off.
    pub(super) const fn forget_failures(&mut self) {
        (self.pull_failures, self.start_failures, self.crashes) = (0, 0, None);
    }

    /// Whether an instance runs.
    #[must_use]
    pub const fn running(&self) -> Option<&Running> {
        match &self.phase {
            Phase::Running(running) => Some(running),
            Phase::Waiting { .. }
            | Phase::Pulling { .. }
            | Phase::PullFailed { .. }
            | Phase::Starting
            | Phase::Exited => None,
        }
    }

    /// Whether the pod may go on past this init container.
    pub(super) fn lets_pass(&self) -> bool {
        match self.plan.role {
            Role::Init => {
                matches!(self.phase, Phase::Exited)
                    && self.last.as_ref().is_some_and(|(_, _, exit)| exit.code == 0)
            }
            Role::Sidecar => self.running().is_some_and(|running| running.started),
            Role::Main => true,
        }
    }

    /// The start call is under way: its result must be awaited before the sandbox goes.
    pub(super) const fn in_flight(&self) -> bool {
        matches!(self.phase, Phase::Starting)
    }

    /// When something is due; without a turn, only a stop that was asked for has a time.
    pub(super) fn timeout(&self, turn: bool) -> Option<Instant> {
        match &self.phase {
            Phase::Running(Running { stop: Some((again, _)), .. }) => Some(*again),
            Phase::Waiting { .. }
            | Phase::Pulling { .. }
            | Phase::PullFailed { .. }
            | Phase::Starting
            | Phase::Running(_)
            | Phase::Exited
                if !turn =>
            {
                None
            }
            Phase::Waiting { until, .. } => *until,
            Phase::PullFailed { shown, until, .. } => {
                Some(shown.map_or(*until, |shown| shown.min(*until)))
            }
            Phase::Running(running) => {
                running.active_probes().filter_map(|(_, probe)| probe.due()).min()
            }
            Phase::Pulling { .. } | Phase::Starting | Phase::Exited => None,
        }
    }

    /// Does the next thing that brings the container up, now that it is its turn.
    pub(super) fn drive(&mut self, index: usize, now: Instant) -> Vec<PodEffect> {
        let mut out = Vec::new();
        match &mut self.phase {
            Phase::Waiting { until, .. } => {
                if until.is_some_and(|until| now < until) {
                    return out;
                }
                self.phase = Phase::Pulling { again: None };
                out.push(PodEffect::PullImage { slot: index });
            }
            Phase::PullFailed { since, shown, until } => {
                if shown.is_some_and(|shown| now >= shown) {
                    *shown = None;
                    *since = Waiting {
                        reason: "ImagePullBackOff",
                        message: format!(
                            "Back-off pulling image \"{}\": {}: {}",
                            self.plan.image, since.reason, since.message
                        ),
                    };
                    let message = format!("Back-off pulling image \"{}\"", self.plan.image);
                    out.push(note(index, false, "BackOff", message));
                    let message = "Error: ImagePullBackOff".to_owned();
                    out.push(note(index, true, "Failed", message));
                }
                if now >= *until {
                    self.phase = Phase::Pulling { again: Some(since.clone()) };
                    out.push(PodEffect::PullImage { slot: index });
                }
            }
            Phase::Running(_) => self.drive_probes(index, now, &mut out),
            Phase::Pulling { .. } | Phase::Starting | Phase::Exited => {}
        }
        out
    }

    /// The image is there; `useless` says that there is no sandbox to start in.
    pub(super) fn image_ready(
        &mut self,
        index: usize,
        digest: String,
        useless: bool,
    ) -> Option<PodEffect> {
        if !matches!(self.phase, Phase::Pulling { .. }) {
            return None;
        }
        if useless || self.outdated {
            self.begin_anew();
            return None;
        }
        self.pull_failures = 0;
        self.image = self.plan.image.clone();
        self.image_digest = digest;
        self.phase = Phase::Starting;
        Some(PodEffect::StartContainer { slot: index, restart_count: self.restart_count })
    }

    pub(super) fn image_failed(
        &mut self,
        failure: Waiting,
        index: usize,
        now: Instant,
    ) -> Vec<PodEffect> {
        if !matches!(self.phase, Phase::Pulling { .. }) {
            return Vec::new();
        }
        if self.outdated {
            self.begin_anew();
            return Vec::new();
        }
        let until = now + backoff(IMAGE_BACKOFF, self.pull_failures);
        self.pull_failures += 1;
        let out = vec![
            note(
                index,
                true,
                "Failed",
                format!("Failed to pull image \"{}\": {}", self.plan.image, failure.message),
            ),
            note(index, true, "Failed", format!("Error: {}", failure.reason)),
        ];
        let shown = (failure.reason == "ErrImagePull").then(|| now + PULL_ERROR_SHOWN);
        self.phase = Phase::PullFailed { since: failure, shown, until };
        out
    }

    pub(super) fn start_failed(
        &mut self,
        failure: Waiting,
        instance: Option<(ContainerId, Exit)>,
        index: usize,
        now: Instant,
    ) -> Vec<PodEffect> {
        if !matches!(self.phase, Phase::Starting) {
            return Vec::new();
        }
        if self.outdated {
            self.begin_anew();
            return Vec::new();
        }
        if let Some((id, exit)) = instance {
            return self.start_refused(failure, (id, exit), index, now);
        }
        let pause = backoff(CRASH_BACKOFF, self.start_failures);
        self.start_failures += 1;
        let message = format!("Error: {}", failure.message);
        self.phase = Phase::Waiting { since: failure, until: Some(now + pause) };
        vec![note(index, true, "Failed", message)]
    }

    /// The instance counts as one that ended. It is not started again at once, as nothing says that it would start.
    fn start_refused(
        &mut self,
        failure: Waiting,
        (id, exit): (ContainerId, Exit),
        index: usize,
        now: Instant,
    ) -> Vec<PodEffect> {
        let message = format!("Error: {}", failure.message);
        let replaced = self.instance_before().map(|id| PodEffect::RemoveContainer { id });
        self.ended(id, Some(Timestamp::UNIX_EPOCH), exit, now);
        if let Phase::Waiting { since, until: until @ None } = &mut self.phase {
            (*since, *until) = (failure, Some(now + CRASH_BACKOFF.0));
        }
        replaced.into_iter().chain([note(index, true, "Failed", message)]).collect()
    }

    /// What the runtime still has of the last instance that ended.
    fn instance_before(&self) -> Option<ContainerId> {
        let (id, _, exit) = self.last.as_ref()?;
        (!id.0.is_empty() && !exit.unstarted).then(|| id.clone())
    }

    /// The start call succeeded. Returns the instance that it replaced, to be removed.
    pub(super) fn begun(
        &mut self,
        id: ContainerId,
        started: &Started,
        now: Instant,
    ) -> Option<ContainerId> {
        if !matches!(self.phase, Phase::Starting) {
            return None;
        }
        self.start_failures = 0;
        let bare = self.plan.startup.is_none();
        self.phase = Phase::Running(Running {
            id,
            at: started.at,
            started: bare,
            ready: bare && self.plan.readiness.is_none(),
            stop: None,
            probes: Vec::new(),
        });
        self.begin_probes(now);
        self.instance_before()
    }

    /// Asks a running instance to end; a shorter grace than before is asked for anew.
    pub(super) fn stop(
        &mut self,
        index: usize,
        grace: Duration,
        now: Instant,
    ) -> Option<PodEffect> {
        let Phase::Running(running) = &mut self.phase else { return None };
        let grace = grace.max(MIN_GRACE);
        let overdue = now + grace + EXIT_OVERDUE;
        if running.stop.is_some_and(|(again, _)| again <= overdue) {
            return None;
        }
        running.stop = Some((overdue, 0));
        running.ready = false;
        Some(PodEffect::StopContainer { slot: index, id: running.id.clone(), grace })
    }

    /// Kills again what did not end in time, and in the end stops believing that it runs.
    pub(super) fn stop_again(&mut self, index: usize, now: Instant) -> Option<PodEffect> {
        let Phase::Running(running) = &mut self.phase else { return None };
        let (again, tries) = running.stop?;
        if now < again {
            return None;
        }
        let (id, at) = (running.id.clone(), running.at);
        if tries < 2 {
            running.stop = Some((now + EXIT_OVERDUE, tries + 1));
            return Some(PodEffect::StopContainer { slot: index, id, grace: Duration::ZERO });
        }
        self.ended(id, Some(at), unseen_exit(at), now);
        None
    }

    /// The instance ended, or is taken to have; decides whether and when it starts again.
    pub(super) fn ended(
        &mut self,
        id: ContainerId,
        at: Option<Timestamp>,
        exit: Exit,
        now: Instant,
    ) {
        let again = match self.restart_policy {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => exit.code != 0,
            RestartPolicy::Never => false,
        };
        self.last = Some((id, at, exit));
        if !again && !self.outdated {
            self.phase = Phase::Exited;
            return;
        }
        self.restart_count = self.restart_count.saturating_add(1);
        if self.outdated {
            self.begin_anew();
            return;
        }
        // The first restart is immediate; an instance that lived for twice the longest pause since
        // its restart was decided starts the count anew.
        let crashes = match self.crashes {
            Some((crashes, decided)) if now < decided + CRASH_BACKOFF.1 * 2 => crashes + 1,
            Some(_) | None => 0,
        };
        let pause = crashes.checked_sub(1).map(|before| backoff(CRASH_BACKOFF, before));
        let until = pause.map(|pause| now + pause);
        self.crashes = Some((crashes, until.unwrap_or(now)));
        let since = match pause {
            Some(pause) => Waiting {
                reason: "CrashLoopBackOff",
                message: format!(
                    "back-off {} restarting failed container={}",
                    go_duration(pause),
                    self.plan.name
                ),
            },
            None => creating(),
        };
        self.phase = Phase::Waiting { since, until };
    }

    /// The sandbox died under the container.
    pub(super) fn lost(&mut self, now: Instant) {
        match &self.phase {
            Phase::Running(running) => {
                let (id, at) = (running.id.clone(), running.at);
                self.ended(id, Some(at), unseen_exit(at), now);
            }
            // A start under way will be answered, and is looked at then.
            Phase::Starting
            | Phase::Waiting { .. }
            | Phase::Pulling { .. }
            | Phase::PullFailed { .. }
            | Phase::Exited => {}
        }
    }
}

pub(super) const fn creating() -> Waiting {
    Waiting { reason: "ContainerCreating", message: String::new() }
}

pub(super) fn note(slot: usize, warning: bool, reason: &'static str, message: String) -> PodEffect {
    PodEffect::Record(Note { slot: Some(slot), warning, reason, message })
}

/// A duration in Go's way of writing it, as upstream's messages have it: `10s`, `2m40s`, `5m0s`.
fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}
