//! Starting a container: the fork into its cgroup and namespaces, and what the child says about it.

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    fs::{Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
    thread::UnshareFlags,
};
use shim::{
    channel,
    wire::{ContainerConfig, Failure},
};

use crate::{
    process::{self, Streams},
    rootfs,
    step::At as _,
    sys,
};

/// A child on its way to become the container's program.
#[derive(Debug)]
pub(crate) struct Starting {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    /// A `Failure`, or a terminal's master side, then the end of the stream once the program runs.
    pub(crate) status: OwnedFd,
    /// Read ends; none with a terminal.
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// Kept so that a program that reads its input waits instead of seeing its end.
    pub(crate) stdin: Option<OwnedFd>,
}

/// Forks the container's first process and returns while it still prepares itself.
///
/// # Errors
/// Of pipes, the cgroup, and the fork itself.
pub(crate) fn start(config: &ContainerConfig) -> Result<Starting, Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(&*config.cgroup, flags, Mode::empty())
        .at(|| format!("open cgroup {}", config.cgroup))?;
    let streams = || "make the standard streams".to_owned();
    let (status, child_status) = channel::pair().at(streams)?;
    let (stdin_read, stdin) = if config.stdin && !config.tty {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).at(streams)?;
        (read, Some(write))
    } else {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        (null.at(streams)?, None)
    };
    let (stdout, stdout_write) = pipe_with(PipeFlags::CLOEXEC).at(streams)?;
    let (stderr, stderr_write) = pipe_with(PipeFlags::CLOEXEC).at(streams)?;
    let forked = sys::fork_into(cgroup.as_fd(), sys::CONTAINER_NAMESPACES)
        .at(|| "fork into the container's cgroup and namespaces".to_owned())?;
    match forked {
        sys::Forked::Child => {
            let streams = Streams { stdin: stdin_read, stdout: stdout_write, stderr: stderr_write };
            let Err(failure) = become_container(config, streams, &child_status);
            // If the parent cannot be told, it is gone, and with it the pod.
            drop(channel::send(&child_status, &failure, None));
            sys::end(1)
        }
        sys::Forked::Parent { pid, pidfd } => {
            let (stdout, stderr) =
                if config.tty { (None, None) } else { (Some(stdout), Some(stderr)) };
            Ok(Starting { pid, pidfd, status, stdout, stderr, stdin })
        }
    }
}

fn become_container(
    config: &ContainerConfig,
    streams: Streams,
    status: &OwnedFd,
) -> Result<std::convert::Infallible, Failure> {
    // While the node's /proc is still there.
    fs::write("/proc/self/oom_score_adj", config.oom_score_adj.to_string())
        .at(|| "set oom_score_adj".to_owned())?;
    // Here and not with the fork: a new cgroup namespace begins at the cgroup of its maker.
    sys::unshare(UnshareFlags::NEWCGROUP).at(|| "make the cgroup namespace".to_owned())?;
    rootfs::enter(config)?;
    let streams = if config.tty {
        let (master, streams) = process::open_terminal().at(|| "open a terminal".to_owned())?;
        channel::send(status, &(), Some(master.as_fd())).at(|| "pass the terminal".to_owned())?;
        streams
    } else {
        streams
    };
    process::become_program(config, &config.args, streams)
}
