//! The system calls for which no safe wrapper exists.

#![expect(unsafe_code, reason = "raw system calls of a process that is about to become another")]

use std::{
    ffi::{CStr, CString, c_char},
    io, mem,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    ptr,
};

/// `struct clone_args` (`include/uapi/linux/sched.h`), version 2: with the cgroup.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP` (`include/uapi/linux/sched.h`); `libc` has it as a truncated `int`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// New mount and pid namespaces, for a container's first process.
pub(crate) const CONTAINER_NAMESPACES: u64 = 0x0002_0000 | 0x2000_0000;

/// Which side of a fork this is.
pub(crate) enum Forked {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// Forks into `cgroup` and new namespaces. The child has its own copy of everything, as after `fork`.
///
/// # Errors
/// The kernel's.
pub(crate) fn fork_into(cgroup: BorrowedFd<'_>, namespaces: u64) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    let signal = u64::from(libc::SIGCHLD.unsigned_abs());
    let mut args = CloneArgs {
        flags: namespaces | u64::from(libc::CLONE_PIDFD.unsigned_abs()) | CLONE_INTO_CGROUP,
        pidfd: ptr::from_mut(&mut pidfd).addr() as u64,
        exit_signal: signal,
        cgroup: u64::from(cgroup.as_raw_fd().unsigned_abs()),
        ..CloneArgs::default()
    };
    // SAFETY: `args` is a valid `clone_args` of the size given, `pidfd` outlives the call; without
    // CLONE_VM the child runs on its own copy of this stack; the process has one thread, so no lock
    // can be held by a thread that the child lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match i32::try_from(pid) {
        Ok(0) => Ok(Forked::Child),
        Ok(pid) if pid > 0 => {
            // SAFETY: CLONE_PIDFD stored a new descriptor there that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Forked::Parent { pid, pidfd })
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Plain `fork`, to leave the starter. `true` in the child.
///
/// # Errors
/// The kernel's.
pub(crate) fn fork() -> io::Result<bool> {
    // SAFETY: the process has one thread.
    match unsafe { libc::fork() } {
        0 => Ok(true),
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(false),
    }
}

/// Leaves the namespaces named by `flags` for new ones.
///
/// # Errors
/// The kernel's.
pub(crate) fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: only namespace flags are passed, never CLONE_FILES; the process has one thread.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// `struct mount_attr` (`include/uapi/linux/mount.h`).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// `MOUNT_ATTR_RDONLY`.
pub(crate) const READ_ONLY: u64 = 1;
/// `MOUNT_ATTR_NODEV`.
pub(crate) const NO_DEVICES: u64 = 4;

/// Adds attributes to the mount at `mount`, and takes it out of its peer group. Not recursive but for
/// the propagation.
///
/// # Errors
/// The kernel's.
pub(crate) fn mount_attributes(mount: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH;
    mount_setattr(mount, flags | libc::AT_RECURSIVE, 0, libc::MS_PRIVATE)?;
    if set == 0 { Ok(()) } else { mount_setattr(mount, flags, set, 0) }
}

fn mount_setattr(mount: BorrowedFd<'_>, flags: i32, set: u64, propagation: u64) -> io::Result<()> {
    let attr = MountAttr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the path is an empty C string, `attr` a valid structure of the size given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Loads a seccomp filter, given as `sock_filter`s in 64-bit words, for this process for ever.
///
/// # Errors
/// The kernel's: without `no_new_privs` it needs `CAP_SYS_ADMIN`.
pub(crate) fn load_seccomp(program: &[u64]) -> io::Result<()> {
    let filters: Vec<libc::sock_filter> = program.iter().map(|word| instruction(*word)).collect();
    let length = u16::try_from(filters.len())
        .map_err(|_too_long| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog { len: length, filter: filters.as_ptr().cast_mut() };
    // SAFETY: `program` points to `len` instructions, which the kernel only reads.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One instruction: code in the lowest 16 bits, then `jt`, `jf`, `k`.
fn instruction(word: u64) -> libc::sock_filter {
    let [code_low, code_high, jt, jf, k @ ..] = word.to_le_bytes();
    libc::sock_filter {
        code: u16::from_le_bytes([code_low, code_high]),
        jt,
        jf,
        k: u32::from_le_bytes(k),
    }
}

/// Gives signals the dispositions and mask a fresh program expects: Rust's start ignores SIGPIPE.
pub(crate) fn reset_signals() {
    for signal in 1..=31 {
        // SAFETY: SIG_DFL is a valid disposition; failures for SIGKILL and SIGSTOP change nothing.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    // SAFETY: an all-zero `sigset_t` is a valid (empty) value of it.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is a valid place.
    unsafe {
        libc::sigemptyset(&raw mut set);
    }
    // SAFETY: `set` was initialised above; the old mask is not asked for.
    unsafe {
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut());
    }
}

/// Becomes `path`. Returns only on failure.
pub(crate) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: all are C strings that live through the call, in arrays that end with a null pointer.
    unsafe {
        libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr());
    }
    io::Error::last_os_error()
}

/// The descriptor that the starter left open under `number`, once.
///
/// # Errors
/// When there is none.
pub(crate) fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD with FD_CLOEXEC takes no pointer; a bad number is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as just shown, and called once, before anything else of this process could
    // own that number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Marks every descriptor from 3 on as close-on-exec: nothing of the node leaks into a container.
///
/// # Errors
/// The kernel's.
pub(crate) fn close_on_exec_from_3() -> io::Result<()> {
    // SAFETY: takes numbers only, and closes nothing now.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 4) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends this process at once, running nothing of the parent's that the fork copied.
pub(crate) fn end(code: i32) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(code) }
}
