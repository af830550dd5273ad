//! Processes that outlive us: starting one, and knowing when one ends that need not be our child.
//!
//! Effects.

#![expect(unsafe_code, reason = "registering a process descriptor with the runtime")]

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;

/// A log longer than this is emptied before the next start. What we start logs changes of state, not
/// requests, so it grows only when it is started again and again.
const LOG_BYTES: u64 = 1 << 20;

/// Starts a program with nothing on its standard input and output, and its errors in a log file.
/// It is to make itself a session of its own ([`new_session`]). Returns its process id.
///
/// # Errors
/// When the log cannot be opened or the program cannot be executed.
pub fn spawn(program: &Path, arguments: &[OsString], log: &Path) -> io::Result<u32> {
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    if log.metadata()?.len() > LOG_BYTES {
        log.set_len(0)?;
    }
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    let pid = child.id();
    // Somebody must collect its exit status while we live; afterwards it is init's.
    thread::Builder::new().name("reaper".to_owned()).spawn(move || child.wait().map(drop))?;
    Ok(pid)
}

/// Leaves the session of whoever started us, so that its signals do not reach us.
///
/// # Errors
/// When the process leads a group already.
pub fn new_session() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Moves a process into a control group, which is made when it is missing.
///
/// # Errors
/// When the group cannot be made or the process cannot be moved.
pub fn move_to_cgroup(pid: u32, cgroup: &Path) -> io::Result<()> {
    fs::create_dir_all(cgroup)?;
    fs::write(cgroup.join("cgroup.procs"), pid.to_string())
}

/// A process, whoever started it. Its id cannot come to mean another process while this is held.
#[derive(Debug)]
pub struct Process(AsyncFd<OwnedFd>);

impl Process {
    /// Takes hold of a process. Ask afterwards whether it still is the one that was meant.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn hold(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = raw.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let descriptor = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned by the value that is registered, which is moved in here
        // and never taken out, so it stays open and the same until it is deregistered on drop.
        let registered = unsafe { AsyncFd::register(descriptor) };
        Ok(Self(registered?))
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When the kernel cannot tell.
    pub async fn ended(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }
}

/// Names the running executable: another build, or the same one installed again, has another name.
///
/// # Errors
/// When the executable cannot be looked at.
pub fn executable_id() -> io::Result<String> {
    let metadata = File::open("/proc/self/exe")?.metadata()?;
    let (size, seconds, nanoseconds) = (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    Ok(format!("{}-{size:x}-{seconds:x}-{nanoseconds:x}", env!("CARGO_PKG_VERSION")))
}
