//! Mounts made as descriptors first and then placed, and paths that cannot leave the container's root.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    os::unix::ffi::OsStrExt as _,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{self as rfs, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

use crate::sys;

/// A new file system that is mounted nowhere yet. An option without value has an empty one.
pub(crate) fn new_mount(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        if value.is_empty() {
            fsconfig_set_flag(context.as_fd(), *key)?;
        } else {
            fsconfig_set_string(context.as_fd(), *key, *value)?;
        }
    }
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// A copy of what is mounted at `source` on the node, with everything below it.
pub(crate) fn bind(source: &str, attributes: u64) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, flags)?;
    sys::mount_attributes(tree.as_fd(), attributes)?;
    Ok(tree)
}

/// A copy of the mount under an open file, to put attributes on it without touching the original.
pub(crate) fn bind_fd(target: BorrowedFd<'_>, attributes: u64) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(target, "", flags)?;
    sys::mount_attributes(tree.as_fd(), attributes)?;
    Ok(tree)
}

/// Mounts `mount` over the file or folder `target`.
pub(crate) fn place(mount: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", target, "", flags)?)
}

/// Links to nowhere that are followed in a row; images have one, such as `resolv.conf` of systemd.
const MAX_LINKS: u32 = 8;

/// A container's root folder. Symbolic links in its paths are followed as if it were `/`, so that an
/// image cannot make the node's files a mount's target.
#[derive(Debug)]
pub(crate) struct Root {
    dir: OwnedFd,
}

impl Root {
    pub(crate) fn open(path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { dir: rfs::open(path, flags, Mode::empty())? })
    }

    /// Opens what is at `path` as a place, without access to its content.
    pub(crate) fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Ok(rfs::openat2(&self.dir, path, flags, Mode::empty(), resolve)?)
    }

    /// Opens the folder at `path`, made with its parents where missing.
    pub(crate) fn ensure_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        self.ensure_dir_over(path, MAX_LINKS)
    }

    fn ensure_dir_over(&self, path: &Path, links: u32) -> io::Result<OwnedFd> {
        match self.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let mut place = PathBuf::from("/");
        let mut parent = self.find(&place)?;
        for component in path.components() {
            match component {
                Component::Normal(name) => place.push(name),
                Component::ParentDir => drop(place.pop()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
            }
            parent = match self.find(&place) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.make_dir(&parent, &place, links)?
                }
                found => found?,
            };
        }
        Ok(parent)
    }

    /// Makes the folder at `place`, or the one that a link there points to.
    fn make_dir(&self, parent: &OwnedFd, place: &Path, links: u32) -> io::Result<OwnedFd> {
        let name = place.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        match rfs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.find(place),
            Err(Errno::EXIST) if links > 0 => {
                self.ensure_dir_over(&link_target(parent, place)?, links - 1)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Opens the file at `path`, made empty with its parents where missing.
    pub(crate) fn ensure_file(&self, path: &Path) -> io::Result<OwnedFd> {
        self.ensure_file_over(path, MAX_LINKS)
    }

    fn ensure_file_over(&self, path: &Path, links: u32) -> io::Result<OwnedFd> {
        match self.find(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let parent = self.ensure_dir(path.parent().unwrap_or_else(|| Path::new("/")))?;
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rfs::openat(&parent, name, flags, Mode::from_raw_mode(0o644)) {
            Ok(file) => drop(file),
            Err(Errno::EXIST) if links > 0 => {
                return self.ensure_file_over(&link_target(&parent, path)?, links - 1);
            }
            Err(error) => return Err(error.into()),
        }
        self.find(path)
    }

    /// A place of the same kind as `source` on the node: a mount's two sides must agree.
    pub(crate) fn ensure_like(&self, source: &str, path: &Path) -> io::Result<OwnedFd> {
        if is_dir(rfs::stat(source)?.st_mode) {
            self.ensure_dir(path)
        } else {
            self.ensure_file(path)
        }
    }
}

/// Where the link at `place` points to, as a path of the same root. It cannot lead out, whatever it says:
/// the path is resolved in the root again.
fn link_target(parent: &OwnedFd, place: &Path) -> io::Result<PathBuf> {
    let name = place.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let target = rfs::readlinkat(parent, name, Vec::new())?;
    let folder = place.parent().unwrap_or_else(|| Path::new("/"));
    Ok(folder.join(std::ffi::OsStr::from_bytes(target.as_bytes())))
}

/// Whether an open place is a folder.
pub(crate) fn is_dir_fd(place: &OwnedFd) -> io::Result<bool> {
    Ok(is_dir(rfs::statat(place, "", AtFlags::EMPTY_PATH)?.st_mode))
}

fn is_dir(mode: u32) -> bool {
    FileType::from_raw_mode(mode) == FileType::Directory
}
