//! Which DNS process serves: a file that the process keeps locked for its life.
//!
//! Effects. `<run-dir>/dns/server` holds process id and build id. The lock is the truth: a file
//! without one belongs to a dead process. A successor renames its own, locked file over it once it
//! listens, and the predecessor ends when it sees that the file is no longer its own.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// A process that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Instance {
    pub(super) pid: u32,
    pub(super) build: String,
}

/// Our own claim to be the server.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    file: File,
}

fn path_in(folder: &Path) -> PathBuf {
    folder.join("server")
}

/// The process that serves; `None` when there is none alive.
pub(super) fn running(folder: &Path) -> io::Result<Option<Instance>> {
    let file = match File::open(path_in(folder)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => return Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => {}
        Err(error) => return Err(error.into()),
    }
    let text = io::read_to_string(&file)?;
    let (pid, build) = text.trim_end().split_once(' ').unwrap_or_default();
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the server file is malformed");
    let pid = pid.parse().map_err(|_error| invalid())?;
    Ok(Some(Instance { pid, build: build.to_owned() }))
}

/// Becomes the server; whoever was it will notice.
pub(super) fn claim(folder: &Path, build: &str) -> io::Result<Claim> {
    let path = path_in(folder);
    let temporary = folder.join(format!("server.{}", std::process::id()));
    let mut file = File::create(&temporary)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    writeln!(file, "{} {build}", std::process::id())?;
    fs::rename(&temporary, &path)?;
    Ok(Claim { path, file })
}

impl Claim {
    /// Whether another process has taken over. A file that is gone is no takeover.
    pub(super) fn is_lost(&self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            other => {
                let there = other?;
                Ok((there.dev(), there.ino()) != (ours.dev(), ours.ino()))
            }
        }
    }
}
