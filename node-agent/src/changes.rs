//! When to look at the node's devices and addresses again because they have changed.
//!
//! `Pace` decides (pure); [`Changes`] listens to the kernel. Where it cannot, nothing is ever heard, and
//! whoever listens looks from time to time as before.

use std::{io, os::fd::OwnedFd, time::Duration};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{self, Instant},
};

use crate::sys::{exec, netns::NetNs, notices};

/// How long it is waited after a first change: an interface comes up in several steps.
const SETTLE: Duration = Duration::from_millis(50);
/// Least time between two looks, however much changes: pods' own links come and go too.
const PAUSE: Duration = Duration::from_millis(500);

/// Changes of a namespace's devices and addresses.
#[derive(Debug)]
pub(crate) struct Changes {
    notices: Option<AsyncFd<OwnedFd>>,
    pace: Pace,
}

impl Changes {
    /// Listens from now on. Call it in a tokio runtime.
    #[must_use]
    pub(crate) fn of(namespace: &NetNs) -> Self {
        let notices = namespace.run(notices::open).flatten().and_then(exec::watch);
        if let Err(error) = &notices {
            tracing::warn!(%error, "changes of devices are not heard of at once");
        }
        Self { notices: notices.ok(), pace: Pace::default() }
    }

    /// Waits until something has changed and a look is due, which sees everything that has. Nothing is lost
    /// when the future is dropped.
    pub(crate) async fn settled(&mut self) {
        let due = match self.pace.due {
            Some(due) => due,
            None => {
                self.heard().await;
                self.pace.hear(Instant::now())
            }
        };
        time::sleep_until(due).await;
        self.forget();
        self.pace.look(Instant::now());
    }

    async fn heard(&self) {
        let readable = match &self.notices {
            Some(notices) => notices.readable().await.map(|mut guard| guard.retain_ready()),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        if readable.is_err() {
            std::future::pending().await
        }
    }

    /// What was told before a look is seen by it.
    fn forget(&self) {
        let Some(notices) = &self.notices else { return };
        while notices.try_io(Interest::READABLE, |socket| notices::take(socket)).is_ok() {}
    }
}

/// When the next look is due, and when the last was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pace {
    due: Option<Instant>,
    last: Option<Instant>,
}

impl Pace {
    /// A change; further ones do not put the look off.
    fn hear(&mut self, now: Instant) -> Instant {
        let rested = self.last.map_or(now, |last| last + PAUSE);
        *self.due.get_or_insert_with(|| rested.max(now + SETTLE))
    }

    const fn look(&mut self, now: Instant) {
        *self = Self { due: None, last: Some(now) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_follows_soon_after_a_change_and_a_storm_does_not_put_it_off() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        assert_eq!(pace.hear(at(0)), at(50));
        assert_eq!(pace.hear(at(49)), at(50));
        pace.look(at(50));
        assert_eq!(pace.hear(at(51)), at(550), "a rest between looks");
        pace.look(at(550));
        assert_eq!(pace.hear(at(9000)), at(9050));
    }
}
