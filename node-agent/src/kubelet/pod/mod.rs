//! The life of one pod as a sans-IO machine: events and the time in, effects out.
//!
//! The machine knows no runtime, clock or channel. `worker` carries its effects out and tells it what
//! came of them; `status` reads it to write `PodStatus`. Everything the machine waits for is either an
//! effect whose result will be told, or a time that `poll_timeout` names.

mod change;
mod container;
mod probing;
mod running;
mod step;
#[cfg(test)]
mod tests;

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{
    probe::{ProbeKind, ProbePlan},
    runtime::{ContainerId, Exit, SandboxState, Started},
};

use container::note;
pub use container::{Phase, Slot};
pub use running::{Running, Waiting};

/// Least time a container is given between the stop signal and SIGKILL (kubelet's
/// `minimumGracePeriodInSeconds`).
pub const MIN_GRACE: Duration = Duration::from_secs(2);
/// First and longest pause before a crashed container is started again; the pause doubles.
pub const CRASH_BACKOFF: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
/// First and longest pause before an image is asked for again.
pub const IMAGE_BACKOFF: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
/// First and longest pause before a failed sandbox is tried again.
pub const SANDBOX_BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long an exit may be overdue before the container is killed again.
const EXIT_OVERDUE: Duration = Duration::from_secs(10);

/// `spec.restartPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// What a container is to the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs to its end before the next starts.
    Init,
    /// An init container with `restartPolicy: Always`: the next starts once it has started.
    Sidecar,
    Main,
}

/// The parts of a pod's spec that decide its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// `<name>_<namespace>(<uid>)`, as upstream's messages name a pod.
    pub display: String,
    pub restart_policy: RestartPolicy,
    pub grace: Duration,
    /// Init containers in their order, then the main ones.
    pub containers: Vec<ContainerPlan>,
}

/// The parts of a container's spec that decide its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPlan {
    pub name: Box<str>,
    pub role: Role,
    /// The container's own, over the pod's (KEP-5307).
    pub restart_policy: Option<RestartPolicy>,
    pub image: Box<str>,
    pub startup: Option<ProbePlan>,
    pub liveness: Option<ProbePlan>,
    pub readiness: Option<ProbePlan>,
}

/// What the machine is told. `slot` counts the containers in the plan's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEvent {
    SandboxReady {
        ips: Vec<IpAddr>,
    },
    /// `reason` is that of the Event: `FailedCreatePodSandBox` or `FailedMount`.
    SandboxFailed {
        reason: &'static str,
        message: String,
    },
    /// The pod's shim died; its containers are dead.
    SandboxLost,
    SandboxRemoved,
    /// The removal failed and must be asked for again.
    SandboxStuck {
        message: String,
    },
    ImageReady {
        slot: usize,
        digest: String,
    },
    /// `reason` is upstream's, such as `ErrImagePull` or `InvalidImageName`.
    ImageFailed {
        slot: usize,
        reason: &'static str,
        message: String,
    },
    Started {
        slot: usize,
        id: ContainerId,
        started: Started,
    },
    /// `reason` is upstream's, such as `CreateContainerConfigError` or `RunContainerError`. An instance that was made
    /// and could not be started has ended, with an exit of its own.
    StartFailed {
        slot: usize,
        reason: &'static str,
        message: String,
        instance: Option<(ContainerId, Exit)>,
    },
    Exited {
        id: ContainerId,
        exit: Exit,
    },
    Probed {
        slot: usize,
        id: ContainerId,
        kind: ProbeKind,
        success: bool,
        message: String,
    },
    /// The API object has a deletion time; told again when the grace becomes shorter.
    DeleteRequested {
        grace: Duration,
    },
    /// The API object is gone.
    DeletedFromApi,
    /// The final delete call failed and must be asked for again.
    DeleteFailed,
    /// The API object's spec may have changed; the same containers are in it.
    SpecChanged {
        plan: PodPlan,
    },
}

impl PodEvent {
    pub(super) const fn no_image(slot: usize, reason: &'static str, message: String) -> Self {
        Self::ImageFailed { slot, reason, message }
    }

    /// The instance was made and did not start.
    #[must_use]
    pub fn refused(slot: usize, id: ContainerId, exit: Exit) -> Self {
        let (reason, message) = ("RunContainerError", exit.message.clone());
        Self::StartFailed { slot, reason, message, instance: Some((id, exit)) }
    }

    /// There is no instance, and there will be another try.
    #[must_use]
    pub const fn not_made(slot: usize, reason: &'static str, message: String) -> Self {
        Self::StartFailed { slot, reason, message, instance: None }
    }
}

/// What the machine asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodEffect {
    EnsureSandbox,
    PullImage {
        slot: usize,
    },
    StartContainer {
        slot: usize,
        restart_count: u32,
    },
    /// preStop, the stop signal, and SIGKILL when `grace` is over.
    StopContainer {
        slot: usize,
        id: ContainerId,
        grace: Duration,
    },
    RemoveContainer {
        id: ContainerId,
    },
    RemoveSandbox,
    Probe {
        slot: usize,
        id: ContainerId,
        kind: ProbeKind,
        timeout: Duration,
    },
    /// Delete the API object with a grace of 0; every container has ended and has been reported.
    DeleteFromApi,
    /// An Event about the pod, or about the container in `slot`.
    Record(Note),
    /// The pod is over and gone: remove its volumes and logs, end the worker.
    Finish,
}

/// An Event to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    pub slot: Option<usize>,
    pub warning: bool,
    pub reason: &'static str,
    pub message: String,
}

/// Where the sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SandboxPhase {
    /// Not there; to be made at or after the time.
    Absent {
        retry: Option<Instant>,
    },
    Creating,
    Ready,
    /// It is broken or no longer wanted; to be removed at or after the time.
    Broken {
        retry: Option<Instant>,
    },
    Removing,
    /// Removed, never to be made again.
    Gone,
}

/// Why the pod no longer runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// Every container has done what it should, or failed for good.
    Completed,
    /// Someone deleted the pod.
    Deleted { grace: Duration },
}

/// Where the API object is, once the pod ends by deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ApiPhase {
    Present { retry: Option<Instant> },
    Deleting,
    Gone,
}

/// What a pod that is seen for the first time by this process already has behind it.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// A sandbox that an earlier agent made.
    pub sandbox: Option<SandboxState>,
    /// By container name, from the API object's status.
    pub containers: Vec<ContainerHistory>,
    /// The phase in the API is `Succeeded` or `Failed`: nothing may be started.
    pub over: bool,
}

/// What the API object says about one container.
#[derive(Clone, Debug)]
pub struct ContainerHistory {
    pub name: String,
    pub restart_count: u32,
    pub ready: bool,
    pub started: bool,
    /// It has run before.
    pub ran: bool,
    /// It ended by itself, with this exit code.
    pub exit: Option<(String, Exit)>,
}

/// The machine of one pod.
#[derive(Debug)]
pub struct PodMachine {
    plan: PodPlan,
    slots: Vec<Slot>,
    sandbox: SandboxPhase,
    sandbox_failures: u32,
    ips: Vec<IpAddr>,
    ending: Option<Ending>,
    api: ApiPhase,
    finished: bool,
    /// Exits that were told before the start they belong to; at most one a container.
    early_exits: Vec<(ContainerId, Exit)>,
}

impl PodMachine {
    /// A machine for a pod; call `handle_timeout` once to set it going.
    #[must_use]
    pub fn new(plan: PodPlan, history: &History, now: Instant) -> Self {
        let slots = plan
            .containers
            .iter()
            .map(|container| Slot::new(container, plan.restart_policy, history, now))
            .collect();
        let sandbox = match (&history.sandbox, history.over) {
            (Some(_), _) => SandboxPhase::Ready,
            (None, true) => SandboxPhase::Gone,
            (None, false) => SandboxPhase::Absent { retry: None },
        };
        Self {
            plan,
            slots,
            sandbox,
            sandbox_failures: 0,
            ips: history.sandbox.as_ref().map(|s| s.ips.clone()).unwrap_or_default(),
            ending: history.over.then_some(Ending::Completed),
            api: ApiPhase::Present { retry: None },
            finished: false,
            early_exits: Vec::new(),
        }
    }

    /// Takes in what happened and says what to do next.
    pub fn handle_event(&mut self, event: PodEvent, now: Instant, out: &mut Vec<PodEffect>) {
        self.take_in(event, now, out);
        self.advance(now, out);
    }

    /// Does what the time asks for. A spurious call is a no-op.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Vec<PodEffect>) {
        self.advance(now, out);
    }

    /// When `handle_timeout` must be called next; may change after each of the above.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.finished {
            return None;
        }
        let sandbox = match self.sandbox {
            SandboxPhase::Absent { retry } | SandboxPhase::Broken { retry } => retry,
            SandboxPhase::Creating
            | SandboxPhase::Ready
            | SandboxPhase::Removing
            | SandboxPhase::Gone => None,
        };
        let api = match self.api {
            ApiPhase::Present { retry } => retry,
            ApiPhase::Deleting | ApiPhase::Gone => None,
        };
        let turns = self.turns();
        let slots = self.slots.iter().zip(turns).filter_map(|(slot, turn)| slot.timeout(turn));
        slots.chain(sandbox).chain(api).min()
    }

    /// The containers in the plan's order.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The plan it was made from.
    #[must_use]
    pub const fn plan(&self) -> &PodPlan {
        &self.plan
    }

    /// The pod's addresses; empty before the sandbox was ready.
    #[must_use]
    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    /// Whether the sandbox and its network are there.
    #[must_use]
    pub fn sandbox_ready(&self) -> bool {
        self.sandbox == SandboxPhase::Ready
    }

    /// Whether the pod runs no more and will not run again.
    #[must_use]
    pub const fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Whether someone deleted the pod.
    #[must_use]
    pub const fn is_deleted(&self) -> bool {
        matches!(self.ending, Some(Ending::Deleted { .. }))
    }

    /// Whether `Finish` was said: the machine does nothing any more.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        self.finished
    }

    /// The container instance that runs under a name, or ran last.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| &*slot.plan.name == name)
    }
}

/// `first × 2^failures`, at most `longest`.
fn backoff((first, longest): (Duration, Duration), failures: u32) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(failures.min(16))).min(longest)
}

/// The exit of a container whose end nobody saw (upstream's `ContainerStatusUnknown`, code 137).
fn unseen_exit(at: Timestamp) -> Exit {
    Exit {
        code: 137,
        signal: 9,
        oom_killed: false,
        unstarted: false,
        at,
        message: "The container could not be located when the pod was terminated".to_owned(),
    }
}
