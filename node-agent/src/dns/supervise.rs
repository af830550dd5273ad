//! Sees to it that a DNS process of this build runs.
//!
//! Effects. One task; it finds the running process by its lock, also one that an earlier agent
//! started, replaces another build, and starts a new one when it ends.

use std::{io, path::PathBuf, time::Duration};

use tokio::time::{Instant, sleep, timeout};

use super::{
    instance::{self, Instance},
    process::ProcessArgs,
};
use crate::sys::daemon::{self, Process};

/// How long a process may take until it serves. It takes milliseconds, but seconds on a machine that boots
/// with all its pods at once; ended too soon it would only begin anew.
const START: Duration = Duration::from_secs(20);
/// A process that ends sooner after its start is in trouble, so the next one waits.
const STABLE: Duration = Duration::from_secs(1);
/// Pauses between failing starts: doubled each time from the first to the last.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// How the process is started.
#[derive(Clone, Debug)]
pub(super) struct Supervisor {
    pub(super) executable: PathBuf,
    pub(super) args: ProcessArgs,
    pub(super) cgroup: Option<PathBuf>,
}

/// Supervises until the task is aborted; the process lives on.
#[expect(clippy::infinite_loop, reason = "its task is aborted when the agent stops")]
pub(super) async fn supervise(supervisor: Supervisor) {
    let mut pause = PAUSE.0;
    loop {
        let since = Instant::now();
        match supervisor.ensure_running().await {
            Ok((instance, process)) => {
                let ended = process.ended().await;
                tracing::warn!(pid = instance.pid, ?ended, "DNS process ended");
                if since.elapsed() >= STABLE {
                    pause = PAUSE.0;
                    continue;
                }
            }
            Err(error) => {
                tracing::error!(%error, log = %supervisor.log().display(), "DNS process not started");
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

impl Supervisor {
    fn folder(&self) -> PathBuf {
        self.args.run_dir.join("dns")
    }

    fn log(&self) -> PathBuf {
        self.folder().join("log")
    }

    /// Finds the process of this build, or starts it.
    async fn ensure_running(&self) -> io::Result<(Instance, Process)> {
        match self.find()? {
            Some(found) => Ok(found),
            None => self.start().await,
        }
    }

    /// The running process of this build, held.
    fn find(&self) -> io::Result<Option<(Instance, Process)>> {
        let Some(instance) = instance::running(&self.folder())? else { return Ok(None) };
        if instance.build != self.args.build_id {
            return Ok(None);
        }
        let process = Process::hold(instance.pid)?;
        // It may have ended, and its id be another's, before we held it: then the lock is gone.
        let same = instance::running(&self.folder())?.is_some_and(|now| now == instance);
        Ok(same.then_some((instance, process)))
    }

    async fn start(&self) -> io::Result<(Instance, Process)> {
        let pid = daemon::spawn(&self.executable, &self.args.to_command_line(), &self.log())?;
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = daemon::move_to_cgroup(pid, cgroup)
        {
            tracing::warn!(pid, %error, "DNS process stays in the agent's control group");
        }
        let started = async {
            let process = Process::hold(pid)?;
            loop {
                if let Some(found) = self.find()? {
                    return Ok(found);
                }
                if timeout(Duration::from_millis(20), process.ended()).await.is_ok() {
                    return Err(io::Error::other("it ended at once"));
                }
            }
        };
        let (instance, process) = timeout(START, started).await??;
        tracing::info!(pid = instance.pid, build = instance.build, "DNS process started");
        Ok((instance, process))
    }
}
