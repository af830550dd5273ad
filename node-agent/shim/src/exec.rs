//! `shim exec`: a process beside a running container's own, in its namespaces and cgroup.
//!
//! Its starter gives it the program's standard streams as its own and a channel as descriptor 3. This
//! process only waits for the program, since a pid namespace takes in children, not the one who enters;
//! when its starter goes away, so does the program.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{Mode, OFlags},
    process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open,
        pidfd_send_signal, waitid,
    },
    thread::{ThreadNameSpaceType, move_into_thread_name_spaces},
};
use shim::{
    channel,
    wire::{ContainerConfig, ExecConfig, ExecMessage, Failure},
};

use crate::{
    process::{self, Streams},
    step::At as _,
    sys,
};

/// Descriptor of the channel.
const CHANNEL: i32 = 3;

/// Runs the whole of it; what fails is told on the channel.
///
/// # Errors
/// When there is no channel to tell it on.
pub(crate) fn run() -> io::Result<()> {
    let channel = sys::inherited_fd(CHANNEL)?;
    match execute(&channel) {
        Ok(code) => channel::send(&channel, &ExecMessage::Exited { code }, None),
        Err(failure) => channel::send(&channel, &ExecMessage::Failed { failure }, None),
    }
}

fn execute(channel: &OwnedFd) -> Result<i32, Failure> {
    let Some((config, _)) =
        channel::receive::<ExecConfig>(channel).at(|| "read the request".to_owned())?
    else {
        return Err(Failure {
            step: "read the request".to_owned(),
            message: "none came".to_owned(),
        });
    };
    let container = container(&config)?;
    // On the node's side of the door: its path means nothing inside.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(&*container.cgroup, flags, Mode::empty())
        .at(|| format!("open cgroup {}", container.cgroup))?;
    let first = enter(&config, &container)?;
    let (status, child_status) = channel::pair().at(|| "make the status channel".to_owned())?;
    let (streams, master) = streams(&config)?;
    let forked =
        sys::fork_into(cgroup.as_fd(), 0).at(|| "fork into the container's cgroup".to_owned())?;
    match forked {
        sys::Forked::Child => {
            drop(master);
            let Err(failure) = enter_cgroup_namespace(&first)
                .and_then(|()| process::become_program(&container, &config.args, streams));
            // If the parent cannot be told, nobody waits for this process.
            drop(channel::send(&child_status, &failure, None));
            sys::end(1)
        }
        sys::Forked::Parent { pid, pidfd } => {
            drop((child_status, streams));
            if let Some((failure, _)) =
                channel::receive::<Failure>(&status).at(|| "hear of the start".to_owned())?
            {
                // It ends by itself; nothing of it is left when its failure is told.
                waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
                    .at(|| "wait for the program".to_owned())?;
                return Err(failure);
            }
            let told = ExecMessage::Running { pid };
            channel::send(channel, &told, master.as_ref().map(OwnedFd::as_fd))
                .at(|| "tell the start".to_owned())?;
            drop(master);
            release_streams().at(|| "close the standard streams".to_owned())?;
            wait(channel, &pidfd).at(|| "wait for the program".to_owned())
        }
    }
}

fn container(config: &ExecConfig) -> Result<ContainerConfig, Failure> {
    let step = || format!("read {}", config.container);
    let text = fs::read(&config.container).at(step)?;
    let mut container: ContainerConfig = serde_json::from_slice(&text).at(step)?;
    container.tty = config.tty;
    Ok(container)
}

/// Moves into the namespaces of the container's first process, which is given, but for that of cgroups.
fn enter(config: &ExecConfig, container: &ContainerConfig) -> Result<OwnedFd, Failure> {
    let gone = || Failure {
        step: "enter the container".to_owned(),
        message: "the container does not run".to_owned(),
    };
    let pid = Pid::from_raw(config.pid).ok_or_else(gone)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_gone| gone())?;
    // The number could have been given to another process before the line above, but not after it.
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", config.pid)).unwrap_or_default();
    if !cgroup.contains(&container.id) {
        return Err(gone());
    }
    fs::write("/proc/self/oom_score_adj", container.oom_score_adj.to_string())
        .at(|| "set oom_score_adj".to_owned())?;
    let spaces = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK;
    move_into_thread_name_spaces(pidfd.as_fd(), spaces).at(|| "enter the container".to_owned())?;
    Ok(pidfd)
}

/// Makes the container's cgroup the root of what the program sees. Once it is there: where cgroups are mounted with
/// `nsdelegate`, as systemd does it, the kernel lets nobody in such a namespace bring a process from outside
/// (`cgroup_procs_write_permission`, kernel/cgroup/cgroup.c).
fn enter_cgroup_namespace(first: &OwnedFd) -> Result<(), Failure> {
    move_into_thread_name_spaces(first.as_fd(), ThreadNameSpaceType::CONTROL_GROUP)
        .at(|| "enter the container's cgroup namespace".to_owned())
}

/// The program's streams: this process's own, or a terminal of the container and its master side.
fn streams(config: &ExecConfig) -> Result<(Streams, Option<OwnedFd>), Failure> {
    if config.tty {
        let (master, streams) = process::open_terminal().at(|| "open a terminal".to_owned())?;
        return Ok((streams, Some(master)));
    }
    let own = || -> io::Result<Streams> {
        Ok(Streams {
            stdin: io::stdin().as_fd().try_clone_to_owned()?,
            stdout: io::stdout().as_fd().try_clone_to_owned()?,
            stderr: io::stderr().as_fd().try_clone_to_owned()?,
        })
    };
    Ok((own().at(|| "take the standard streams".to_owned())?, None))
}

/// Only the program may hold its pipes, or their readers would never see the end.
fn release_streams() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// Waits for the program's end; kills it when the starter hangs up.
fn wait(channel: &OwnedFd, pidfd: &OwnedFd) -> io::Result<i32> {
    loop {
        let mut fds = [PollFd::new(pidfd, PollFlags::IN), PollFd::new(channel, PollFlags::empty())];
        poll(&mut fds, None)?;
        let [program, starter] = &fds;
        if !program.revents().is_empty() {
            break;
        }
        if !starter.revents().is_empty() {
            pidfd_send_signal(pidfd, Signal::KILL)?;
            break;
        }
    }
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
    Ok(status.as_ref().map_or(255, |status| code(status).0))
}

/// Exit code and signal as in `ExitReport`.
pub(crate) fn code(status: &WaitIdStatus) -> (i32, i32) {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => (code, 0),
        (None, Some(signal)) => (128 + signal, signal),
        (None, None) => (255, 0),
    }
}
