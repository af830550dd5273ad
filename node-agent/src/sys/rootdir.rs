//! A folder that paths from outside (image layers) cannot leave: links in them are followed as if it were
//! `/` (`openat2` with `RESOLVE_IN_ROOT`).

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::fs::{
    self as rfs, AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps,
    Uid, XattrFlags,
};

/// Owner, mode and time of an entry.
#[derive(Clone, Debug)]
pub struct Attributes {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime: i64,
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// What kind of special file to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Character(u64),
    Block(u64),
    Fifo,
}

/// Device number of an overlayfs whiteout (`Documentation/filesystems/overlayfs.rst`).
pub const WHITEOUT: Special = Special::Character(0);

#[derive(Debug)]
pub struct RootDir {
    dir: OwnedFd,
}

impl RootDir {
    /// # Errors
    /// When the folder cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { dir: rfs::open(path, flags, Mode::empty())? })
    }

    /// Opens an existing regular file for reading.
    ///
    /// # Errors
    /// When there is none, or it is something else.
    pub fn open_file(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(self.resolve(path, flags)?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rfs::openat2(&self.dir, path, flags, Mode::empty(), resolve)?)
    }

    /// The folder that is to hold `path`, made where missing, and the last name.
    fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a Path)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = path.parent().unwrap_or_else(|| Path::new(""));
        let mut place = PathBuf::from("/");
        if let Ok(found) = self.resolve(&place.join(folder), flags) {
            return Ok((found, Path::new(name)));
        }
        let mut parent = self.resolve(&place, flags)?;
        for component in folder.components() {
            let Component::Normal(component) = component else { continue };
            place.push(component);
            parent = match self.resolve(&place, flags) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    rfs::mkdirat(&parent, component, Mode::from_raw_mode(0o755))?;
                    self.resolve(&place, flags)?
                }
                found => found?,
            };
        }
        Ok((parent, Path::new(name)))
    }

    /// Takes away what is at the name unless it is a folder: a layer may hold a path twice.
    fn clear(parent: &OwnedFd, name: &Path) -> io::Result<()> {
        match rfs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::ISDIR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a folder, or takes the one that is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn dir(&self, path: &Path, attributes: &Attributes) -> io::Result<()> {
        if path.as_os_str().is_empty() {
            return finish(&self.dir, attributes);
        }
        let (parent, name) = self.parent(path)?;
        if rfs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)).is_err() {
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let about = rfs::statat(&parent, name, flags)?;
            if FileType::from_raw_mode(about.st_mode) != FileType::Directory {
                Self::clear(&parent, name)?;
                rfs::mkdirat(&parent, name, Mode::from_raw_mode(0o700))?;
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        finish(&rfs::openat(&parent, name, flags, Mode::empty())?, attributes)
    }

    /// Marks the folder as hiding what lower layers have in it.
    ///
    /// # Errors
    /// The kernel's: `trusted.` needs root.
    pub fn opaque(&self, path: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = self.resolve(&Path::new("/").join(path), flags)?;
        Ok(rfs::fsetxattr(&dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())?)
    }

    /// Makes a regular file with all of `content`.
    ///
    /// # Errors
    /// Of reading or writing.
    pub fn file(
        &self,
        path: &Path,
        attributes: &Attributes,
        content: &mut impl io::Read,
    ) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        Self::clear(&parent, name)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rfs::openat(&parent, name, flags, Mode::from_raw_mode(0o600))?);
        io::copy(content, &mut file)?;
        finish(&OwnedFd::from(file), attributes)
    }

    /// # Errors
    /// The kernel's.
    pub fn symlink(&self, path: &Path, to: &Path, attributes: &Attributes) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        Self::clear(&parent, name)?;
        rfs::symlinkat(to, &parent, name)?;
        own(&parent, name, attributes)
    }

    /// A second name for the file at `to`, a path of the same tree.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link(&self, path: &Path, to: &Path) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let (from, old) = self.parent(to)?;
        Self::clear(&parent, name)?;
        Ok(rfs::linkat(&from, old, &parent, name, AtFlags::empty())?)
    }

    /// # Errors
    /// The kernel's: devices need root.
    pub fn special(&self, path: &Path, kind: Special, attributes: &Attributes) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        Self::clear(&parent, name)?;
        let (kind, device) = match kind {
            Special::Character(device) => (FileType::CharacterDevice, device),
            Special::Block(device) => (FileType::BlockDevice, device),
            Special::Fifo => (FileType::Fifo, 0),
        };
        let mode = Mode::from_raw_mode(attributes.mode & 0o7777);
        rfs::mknodat(&parent, name, kind, mode, device)?;
        own(&parent, name, attributes)?;
        Ok(rfs::chmodat(&parent, name, mode, AtFlags::empty())?)
    }

    /// Everything written to the file system of this folder is on the disk when this returns.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rfs::syncfs(&self.dir)?)
    }
}

/// The device number of a major and a minor number.
#[must_use]
pub fn device(major: u32, minor: u32) -> u64 {
    rfs::makedev(major, minor)
}

/// Owner before mode: a change of owner clears the set-user-id bit. Times last.
fn finish(file: &OwnedFd, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    rfs::fchown(file, Some(uid), Some(gid))?;
    for (name, value) in &attributes.xattrs {
        rfs::fsetxattr(file, name, value, XattrFlags::empty())?;
    }
    rfs::fchmod(file, Mode::from_raw_mode(attributes.mode & 0o7777))?;
    Ok(rfs::futimens(file.as_fd(), &times(attributes))?)
}

fn own(parent: &OwnedFd, name: &Path, attributes: &Attributes) -> io::Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    rfs::chownat(parent, name, Some(uid), Some(gid), flags)?;
    Ok(rfs::utimensat(parent, name, &times(attributes), flags)?)
}

fn times(attributes: &Attributes) -> Timestamps {
    let time = Timespec { tv_sec: attributes.mtime, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

/// Removes a tree, and says nothing when it is not there.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Whether there is a folder at `path` itself.
#[must_use]
pub fn is_dir(path: &Path) -> bool {
    rfs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|about| FileType::from_raw_mode(about.st_mode) == FileType::Directory)
}
