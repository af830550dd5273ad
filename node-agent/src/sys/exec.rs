//! Running other programs: the CNI plugins, the shim, and processes in containers.

#![expect(unsafe_code, reason = "a descriptor must get its number between fork and exec")]

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncWriteExt as _, Interest, unix::AsyncFd},
    process::{Child, Command},
};

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// Runs a program with exactly this environment and input until its end.
///
/// # Errors
/// When it cannot be started, or does not end within `limit`; then it is killed.
pub async fn run(
    program: &Path,
    args: &[&str],
    env: &[(String, String)],
    input: &[u8],
    limit: Duration,
) -> io::Result<Output> {
    tracing::debug!(program = %program.display(), ?args, "program started");
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input).await {
            // A program may end without reading its input; its exit code says whether that was right.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => drop(stdin),
        }
    }
    let ended = tokio::time::timeout(limit, child.wait_with_output()).await;
    let output = ended.map_err(|_late| {
        let message = format!("{} did not end within {limit:?}", program.display());
        io::Error::new(io::ErrorKind::TimedOut, message)
    })??;
    Ok(Output {
        status: output.status,
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Number under which a program started with `spawn_with_channel` finds its channel.
const CHANNEL: i32 = 3;

/// Starts a program with `channel` as its descriptor 3 and three streams of its own.
///
/// # Errors
/// When it cannot be started.
pub fn spawn_with_channel(
    program: &Path,
    args: &[&str],
    channel: &OwnedFd,
    streams: [Stdio; 3],
) -> io::Result<Child> {
    let [stdin, stdout, stderr] = streams;
    // Out of the way of the number that it is to get.
    let channel = rustix::io::fcntl_dupfd_cloexec(channel.as_fd(), CHANNEL + 1)?;
    let mut command = Command::new(program);
    command.args(args).env_clear().stdin(stdin).stdout(stdout).stderr(stderr);
    let renumber = move || {
        // SAFETY: both are numbers; `channel` lives in this closure and is open.
        match unsafe { libc::dup2(channel.as_raw_fd(), CHANNEL) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe. The numbers differ,
    // so that the copy is not close-on-exec.
    unsafe {
        command.pre_exec(renumber);
    }
    command.spawn()
}

/// Lets the runtime wait until there is something to read from a descriptor that does not block.
///
/// # Errors
/// When it cannot be polled.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` owns its descriptor and always returns the same one, open until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
