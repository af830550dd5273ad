//! The `bpf(2)` calls that the aya crate does not offer: links by target and attach type, swapped in
//! place and pinned, without an owner whose drop would detach them.
//!
//! Effects only; takes and returns plain values.
#![expect(unsafe_code, reason = "bpf(2) and mount(2) take raw pointers")]

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Commands of `enum bpf_cmd` (linux/bpf.h).
const MAP_CREATE: i32 = 0;
const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const OBJ_GET: i32 = 7;
const LINK_CREATE: i32 = 28;
const LINK_UPDATE: i32 = 29;
const LINK_DETACH: i32 = 34;

/// Where a program can be attached; values of `enum bpf_attach_type` (linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    CgroupConnect4 = 10,
    CgroupConnect6 = 11,
    CgroupSendmsg4 = 14,
    CgroupSendmsg6 = 15,
    CgroupRecvmsg4 = 19,
    CgroupRecvmsg6 = 20,
    CgroupGetpeername4 = 29,
    CgroupGetpeername6 = 30,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// `BPF_XDP` of the same.
const XDP: u32 = 37;

/// The part of `union bpf_attr` used here, as eight-byte words; the kernel takes any length whose
/// unknown tail is zero.
type Attributes = [u64; 8];

/// `BPF_MAP_TYPE_ARRAY` and `BPF_PROG_TYPE_SCHED_CLS` (linux/bpf.h).
const ARRAY: u32 = 2;
const SCHED_CLS: u32 = 3;

/// Asks whether this process may make maps and load programs, by doing both and leaving nothing.
///
/// # Errors
///
/// `EPERM` when capabilities or a security policy forbid it, `ENOSYS` when the kernel has no BPF.
pub fn require() -> io::Result<()> {
    // Type, key and value size, entries.
    let mut map: Attributes = [pair(ARRAY, 4), pair(4, 1), 0, 0, 0, 0, 0, 0];
    drop(owned(bpf(MAP_CREATE, &mut map)?)?);
    // `r0 = 0; exit`, in the layout of `struct bpf_insn`.
    let instructions: [u64; 2] = [0xb7, 0x95];
    let code = u64::try_from(instructions.as_ptr().addr()).map_err(io::Error::other)?;
    let licence = u64::try_from(c"GPL".as_ptr().addr()).map_err(io::Error::other)?;
    let mut program: Attributes = [pair(SCHED_CLS, 2), code, licence, 0, 0, 0, 0, 0];
    drop(owned(bpf(PROG_LOAD, &mut program)?)?);
    Ok(())
}

/// Attaches a program to a cgroup (`target` is its descriptor) or device (its interface index). The
/// program stays attached while the link's descriptor or a pin of it lives; programs of others beside
/// it keep running.
///
/// # Errors
///
/// `EINVAL` when the kernel has no such attach type.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach: AttachType,
) -> io::Result<OwnedFd> {
    let program = word(program.as_raw_fd());
    #[expect(clippy::as_conversions, reason = "the discriminants of a repr(u32) enum")]
    let attach = attach as u32;
    let mut attributes: Attributes = [pair(program, target), u64::from(attach), 0, 0, 0, 0, 0, 0];
    owned(bpf(LINK_CREATE, &mut attributes)?)
}

/// Attaches an XDP program to a device; `flags` say where on its way (`XDP_FLAGS_*_MODE`).
///
/// # Errors
///
/// See [`super::xdp::attach`].
pub(super) fn xdp_link_create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let program = word(program.as_raw_fd());
    let mut attributes: Attributes = [pair(program, ifindex), pair(XDP, flags), 0, 0, 0, 0, 0, 0];
    owned(bpf(LINK_CREATE, &mut attributes)?)
}

/// Replaces a link's program; no packet and no call passes without one.
///
/// # Errors
///
/// `ENOLINK` when the device or cgroup is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let both = pair(word(link.as_raw_fd()), word(program.as_raw_fd()));
    let mut attributes: Attributes = [both, 0, 0, 0, 0, 0, 0, 0];
    bpf(LINK_UPDATE, &mut attributes).map(|_zero| ())
}

/// Takes a link's program off its device or cgroup at once, whoever else holds or has pinned the link, which is of no
/// more use then.
///
/// # Errors
///
/// What the kernel says; one that is detached already is a success.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes: Attributes = [u64::from(word(link.as_raw_fd())), 0, 0, 0, 0, 0, 0, 0];
    bpf(LINK_DETACH, &mut attributes).map(|_zero| ())
}

/// Pins an object in a BPF file system.
///
/// # Errors
///
/// `EEXIST` when the path is taken, `EPERM` when it lies in no BPF file system.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let object = u64::from(word(object.as_raw_fd()));
    let mut attributes: Attributes = [address(&path), object, 0, 0, 0, 0, 0, 0];
    bpf(OBJ_PIN, &mut attributes).map(|_zero| ())
}

/// Opens a pinned object.
///
/// # Errors
///
/// `ENOENT` when nothing is pinned there.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attributes: Attributes = [address(&path), 0, 0, 0, 0, 0, 0, 0];
    owned(bpf(OBJ_GET, &mut attributes)?)
}

/// Sees to it that `folder` exists in a BPF file system, and mounts one at `root` if there is none.
///
/// # Errors
///
/// What the kernel says to mounting or making the folder.
pub fn ensure_bpf_folder(root: &Path, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(root)?;
    if statfs(root)?.filesystem_type() != BPF_FS_MAGIC {
        mount(Some("bpf"), root, Some("bpf"), MsFlags::empty(), None::<&str>)?;
    }
    fs::create_dir_all(folder)
}

fn bpf(command: i32, attributes: &mut Attributes) -> io::Result<i32> {
    let length = size_of::<Attributes>();
    // SAFETY: the attributes live through the call, are `length` bytes long and hold either integers
    // or the address of a C string or of instructions that the caller keeps alive; the commands used write nothing back.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, libc::c_long::from(command), attributes.as_mut_ptr(), length)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn owned(descriptor: i32) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn address(path: &CString) -> u64 {
    u64::try_from(path.as_ptr().addr()).expect("addresses have at most 64 bits")
}

/// A valid descriptor is never negative.
const fn word(descriptor: i32) -> u32 {
    descriptor.cast_unsigned()
}

/// Two 32-bit fields in the order in which they lie in memory.
const fn pair(first: u32, second: u32) -> u64 {
    let [a, b, c, d] = first.to_ne_bytes();
    let [e, f, g, h] = second.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
