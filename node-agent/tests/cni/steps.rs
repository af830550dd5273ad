//! A process that is watched at its system calls and dies at one of them.
//!
//! What a CNI server does to the kernel and to its files goes through three of them, so that a death before each
//! is a death between any two of its steps.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// What a process says when it is ready.
pub(crate) const READY: &str = "ready to be asked";

/// Runs the program until it says that it is ready, tells `is_ready` its number, and lets it go on to its `last`-th
/// step, before which it is killed. Gives how many it came to, once it has ended: `last` if that killed it.
///
/// All of this is one thread's: a process is watched by a thread, not by a process.
#[expect(clippy::zombie_processes, reason = "its threads are waited for, the first one last")]
pub(crate) fn run_to(last: usize, mut program: Command, is_ready: impl FnOnce(Pid)) -> usize {
    let mut child = program.stdout(Stdio::piped()).spawn().unwrap();
    let said = BufReader::new(child.stdout.take().unwrap());
    assert!(said.lines().any(|line| line.unwrap().contains(READY)), "it does not come up");
    let process = Pid::from_raw(i32::try_from(child.id()).unwrap());
    watch(&child);
    is_ready(process);
    let mut steps = 0;
    loop {
        // Only of what this thread watches; other threads have children too.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let (thread, signal) = match waitpid(Pid::from_raw(-1), Some(flags)).unwrap() {
            WaitStatus::PtraceSyscall(thread) => {
                steps += usize::from(is_step(thread));
                if steps == last {
                    kill(process, Signal::SIGKILL).unwrap();
                }
                (thread, None)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::PtraceEvent(thread, _, _) => (thread, None),
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, _, _) => {
                if thread == process {
                    return steps.min(last);
                }
                continue;
            }
            WaitStatus::Continued(_) | WaitStatus::StillAlive => continue,
        };
        match ptrace::syscall(thread, signal) {
            // It was killed meanwhile.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Stops every thread of the process, and those to come, at each system call.
fn watch(child: &Child) {
    let options =
        Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    // Until there is none that was not there before: what a watched one starts is watched. Each is waited for, as one that
    // is just being started is neither watched nor listed until its maker has come out of that call.
    let (mut known, mut stopped) = (BTreeSet::new(), Vec::new());
    loop {
        let before = known.len();
        for thread in fs::read_dir(format!("/proc/{}/task", child.id())).unwrap() {
            let thread = thread.unwrap().file_name().into_string().unwrap();
            let thread = Pid::from_raw(thread.parse().unwrap());
            if !known.insert(thread) {
                continue;
            }
            match ptrace::seize(thread, options).and_then(|()| ptrace::interrupt(thread)) {
                Ok(()) => {
                    let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
                    if let WaitStatus::PtraceEvent(..) = waitpid(thread, Some(flags)).unwrap() {
                        stopped.push(thread);
                    }
                }
                // It has ended meanwhile, or is watched already.
                Err(Errno::ESRCH | Errno::EPERM) => {}
                Err(error) => panic!("{error}"),
            }
        }
        if known.len() == before {
            break;
        }
    }
    for thread in stopped {
        ptrace::syscall(thread, None).unwrap();
    }
}

/// Whether a thread is about to change something outside of itself: by a message to the kernel's network, by what
/// it writes to a file or to whoever asked, or by making that last.
fn is_step(thread: Pid) -> bool {
    let is_entry =
        ptrace::syscall_info(thread).is_ok_and(|info| info.op == libc::PTRACE_SYSCALL_INFO_ENTRY);
    // Killed meanwhile, it has no such file.
    let Ok(text) = fs::read_to_string(format!("/proc/{thread}/syscall")) else { return false };
    let mut words = text.split_whitespace();
    let Some(call) = words.next().and_then(|word| word.parse().ok()) else { return false };
    let length = words.nth(2).and_then(|word| usize::from_str_radix(word.get(2..)?, 16).ok());
    let is_such = match call {
        libc::SYS_sendto | libc::SYS_fsync => true,
        // Threads wake each other by numbers of eight bytes.
        libc::SYS_write => length.is_some_and(|length| length > 8),
        _ => false,
    };
    is_entry && is_such
}
