//! One container while the shim has it: its process, streams, log, and how it ended.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    io::Errno,
    net::RecvFlags,
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};
use shim::{
    channel,
    wire::{ContainerConfig, ContainerReport, ExitReport, Failure, MAX_MESSAGE_BYTES},
};

use crate::{
    container::{self, Starting},
    exec,
    log::{Head, Lines, LogFile, rfc3339},
    step::At as _,
};

/// What a container's process is doing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Forked, not yet the program.
    Starting,
    Running,
    /// Could not become the program.
    Failed(Failure),
    Exited,
}

/// A container's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// An output stream that is still open.
#[derive(Debug)]
struct Output {
    fd: OwnedFd,
    lines: Lines,
}

#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) report: ContainerReport,
    pub(crate) phase: Phase,
    /// Who waits for the start: connection and request.
    pub(crate) waiting: Vec<(u64, u64)>,
    pub(crate) kill_at: Option<Instant>,
    /// Forgotten; taken out of the list at the end of the round.
    pub(crate) removed: bool,
    cgroup: String,
    stop_signal: i32,
    termination_file: String,
    pidfd: Option<OwnedFd>,
    status: Option<OwnedFd>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    /// Held open so that a program that reads its input waits.
    _stdin: Option<OwnedFd>,
    log: LogFile,
}

impl Container {
    pub(crate) fn start(config: &ContainerConfig) -> Result<Self, Failure> {
        let log = LogFile::open(config.log_path.clone().into())
            .at(|| format!("open {}", config.log_path))?;
        let Starting { pid, pidfd, status, stdout, stderr, stdin } = container::start(config)?;
        let step = || "watch the container".to_owned();
        let output = |fd: Option<OwnedFd>| fd.map(open_output).transpose();
        let (stdout, stderr) = (output(stdout).at(step)?, output(stderr).at(step)?);
        Ok(Self {
            report: ContainerReport { id: config.id.clone(), pid, started_ns: 0, exit: None },
            phase: Phase::Starting,
            waiting: Vec::new(),
            kill_at: None,
            removed: false,
            cgroup: config.cgroup.clone(),
            stop_signal: config.stop_signal,
            termination_file: config.termination_file.clone(),
            pidfd: Some(pidfd),
            status: Some(status),
            stdout,
            stderr,
            _stdin: stdin,
            log,
        })
    }

    pub(crate) fn status(&self) -> Option<&OwnedFd> {
        self.status.as_ref()
    }

    pub(crate) fn pidfd(&self) -> Option<&OwnedFd> {
        // Its end is looked at after its start, so that a failure to start is not taken for an exit.
        if self.status.is_some() { None } else { self.pidfd.as_ref() }
    }

    pub(crate) fn output(&self, stream: Stream) -> Option<&OwnedFd> {
        match stream {
            Stream::Stdout => self.stdout.as_ref(),
            Stream::Stderr => self.stderr.as_ref(),
        }
        .map(|output| &output.fd)
    }

    pub(crate) fn ended(&self) -> bool {
        matches!(self.phase, Phase::Failed(_) | Phase::Exited)
    }

    /// The status channel has something: a terminal, a failure, or the end that means "it runs".
    pub(crate) fn read_status(&mut self) {
        let Some(status) = self.status.take() else { return };
        let mut first = [0; 1];
        // A failure is an object, what comes with a terminal is `null`: the first byte tells them apart.
        let peeked = rustix::net::recv(&status, &mut first[..], RecvFlags::PEEK);
        match peeked {
            Ok((0, _)) | Err(_) => {
                self.report.started_ns = now_ns();
                self.phase = Phase::Running;
            }
            Ok(_) if first == *b"{" => {
                let failure = match channel::receive(&status) {
                    Ok(Some((failure, _))) => failure,
                    _ => Failure { step: "start".to_owned(), message: "unreadable".to_owned() },
                };
                self.phase = Phase::Failed(failure);
            }
            Ok(_) => {
                if let Ok(Some(((), Some(master)))) = channel::receive::<()>(&status) {
                    self.stdout = open_output(master).ok();
                }
                self.status = Some(status);
            }
        }
    }

    /// Moves what a stream has into the log. `true` when there may be more.
    pub(crate) fn read_output(&mut self, stream: Stream, space: &mut [u8]) -> bool {
        let (slot, name) = match stream {
            Stream::Stdout => (&mut self.stdout, "stdout"),
            Stream::Stderr => (&mut self.stderr, "stderr"),
        };
        let Some(output) = slot else { return false };
        let head = Head { time: rfc3339(now_ns()), stream: name };
        let mut entries = Vec::new();
        let more = match rustix::io::read(&output.fd, &mut *space) {
            Ok(count) if count > 0 => {
                output.lines.feed(space.get(..count).unwrap_or_default(), &head, &mut entries);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            // Zero, or EIO of a terminal whose other side is closed.
            Ok(_) | Err(_) => {
                output.lines.finish(&head, &mut entries);
                *slot = None;
                false
            }
        };
        self.log.append(&entries);
        more
    }

    /// The process has ended: takes its status, and the rest of its output. All other processes of its
    /// pid namespace are gone by then, so that nothing can be written any more.
    pub(crate) fn reap(&mut self, space: &mut [u8]) -> io::Result<()> {
        let Some(pidfd) = self.pidfd.take() else { return Ok(()) };
        let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
        for stream in [Stream::Stdout, Stream::Stderr] {
            while self.read_output(stream, space) {}
            let rest = match stream {
                Stream::Stdout => self.stdout.take(),
                Stream::Stderr => self.stderr.take(),
            };
            drop(rest);
        }
        self.kill_at = None;
        if matches!(self.phase, Phase::Failed(_)) {
            return Ok(());
        }
        let (code, signal) = status.as_ref().map_or((255, 0), exec::code);
        self.report.exit = Some(ExitReport {
            code,
            signal,
            oom_killed: oom_killed(&self.cgroup),
            at_ns: now_ns(),
            message: termination_message(&self.termination_file),
        });
        self.phase = Phase::Exited;
        Ok(())
    }

    /// Asks the program to end, and remembers when to make it.
    pub(crate) fn stop(&mut self, grace: Duration) {
        let deadline = Instant::now() + grace;
        self.kill_at = Some(self.kill_at.map_or(deadline, |earlier| earlier.min(deadline)));
        if grace.is_zero() {
            return;
        }
        if let (Some(pidfd), Some(signal)) = (&self.pidfd, Signal::from_named_raw(self.stop_signal))
        {
            // It may have just ended; then its exit is on its way.
            pidfd_send_signal(pidfd, signal).unwrap_or_default();
        }
    }

    /// SIGKILL to everything in the cgroup, so that no process can outrun it by forking.
    pub(crate) fn kill(&mut self) {
        self.kill_at = None;
        let done = fs::write(format!("{}/cgroup.kill", self.cgroup), "1");
        if let (Err(_), Some(pidfd)) = (done, &self.pidfd) {
            pidfd_send_signal(pidfd, Signal::KILL).unwrap_or_default();
        }
    }

    pub(crate) fn reopen_log(&mut self) -> io::Result<()> {
        self.log.reopen()
    }
}

fn open_output(fd: OwnedFd) -> io::Result<Output> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(Output { fd, lines: Lines::default() })
}

/// Nanoseconds since 1970; the year 2262 is the end of `i64`.
fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The cgroup is as old as the container, so that any kill counted in it is the container's.
fn oom_killed(cgroup: &str) -> bool {
    let events = fs::read_to_string(format!("{cgroup}/memory.events")).unwrap_or_default();
    events
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "))
        .any(|count| count.trim() != "0")
}

fn termination_message(path: &str) -> String {
    use io::Read as _;
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(Path::new(path)) {
        // What was read before an error is better than nothing.
        drop(file.take(MAX_MESSAGE_BYTES).read_to_end(&mut bytes));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
