//! What is known of a container that waits or runs. Pure.

use std::time::Instant;

use jiff::Timestamp;

use crate::kubelet::{
    probe::{ProbeKind, ProbeSchedule},
    runtime::ContainerId,
};

/// What a container waits for, in upstream's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub reason: &'static str,
    pub message: String,
}

/// A running instance.
#[derive(Clone, Debug)]
pub struct Running {
    pub id: ContainerId,
    pub at: Timestamp,
    /// The startup probe succeeded, or there is none.
    pub started: bool,
    pub ready: bool,
    /// A stop was asked for; when to ask again, harder, and how often that was done.
    pub(super) stop: Option<(Instant, u32)>,
    pub(super) probes: Vec<(ProbeKind, ProbeSchedule)>,
}

impl Running {
    /// The probes that count now: the startup probe alone until it has succeeded.
    pub(super) fn active_probes(&self) -> impl Iterator<Item = &(ProbeKind, ProbeSchedule)> {
        self.probes.iter().filter(|(kind, _)| (*kind == ProbeKind::Startup) != self.started)
    }

    /// Whether the instance was asked to end.
    #[must_use]
    pub const fn is_stopping(&self) -> bool {
        self.stop.is_some()
    }
}
