//! What a pod needs of the node before its first process: a pinned network namespace, shared memory.

#![expect(unsafe_code, reason = "unshare has no safe wrapper")]

use std::{fs, io, path::Path, thread};

use rustix::{
    mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

/// `NSFS_MAGIC` (`include/uapi/linux/magic.h`).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Size of a pod's `/dev/shm` (containerd's default).
const SHM_OPTIONS: &std::ffi::CStr = c"mode=1777,size=65536k";

/// Makes a network namespace that stays when nobody is in it, held by a mount at `path`. One that is
/// there already is kept.
///
/// # Errors
/// The kernel's.
pub fn ensure_netns(path: &Path) -> io::Result<()> {
    if is_namespace(path) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, "")?;
    // On a thread of its own that ends with it: the agent's other threads keep their namespace.
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            // SAFETY: CLONE_NEWNET changes nothing that other threads share.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            mount_bind("/proc/thread-self/ns/net", path)
        })?;
        let done = thread.join().map_err(|_panic| io::Error::other("the thread panicked"))?;
        Ok(done?)
    })
}

fn is_namespace(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|about| about.f_type == NSFS_MAGIC)
}

/// Mounts the pod's shared memory at `path`, once.
///
/// # Errors
/// The kernel's.
pub fn ensure_shm(path: &Path) -> io::Result<()> {
    if is_mount(path)? {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("shm", path, "tmpfs", flags, SHM_OPTIONS)?)
}

fn is_mount(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let Some(parent) = path.parent() else { return Ok(false) };
    match fs::metadata(path) {
        Ok(about) => Ok(about.dev() != fs::metadata(parent)?.dev()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes away what is mounted at `path`, if anything is, and then the file or empty folder.
///
/// # Errors
/// The kernel's.
pub fn release(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
    match gone {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
