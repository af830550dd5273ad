//! Network namespaces: naming one, and running a piece of blocking work inside it.
//!
//! Effects. The work runs on a thread of its own that ends with it, so that no thread of the agent
//! is ever left in a foreign namespace.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace: the agent's own, or one held open by a file of `/proc/…/ns/net` or a bind
/// mount of it. Cloning it clones the handle.
#[derive(Clone, Debug)]
pub struct NetNs {
    held: Option<Arc<Held>>,
}

#[derive(Debug)]
struct Held {
    file: File,
    path: PathBuf,
}

impl NetNs {
    /// The namespace that the calling process lives in.
    #[must_use]
    pub const fn own() -> Self {
        Self { held: None }
    }

    /// Opens the namespace that a file stands for.
    ///
    /// # Errors
    /// When the file cannot be opened. A file that is no namespace is only found out by [`Self::run`].
    pub fn open(path: &Path) -> io::Result<Self> {
        let held = Held { file: File::open(path)?, path: path.to_owned() };
        Ok(Self { held: Some(Arc::new(held)) })
    }

    /// The path it was opened by; `None` for the agent's own.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.held.as_ref().map(|held| held.path.as_path())
    }

    /// An open descriptor, to name the namespace to the kernel; `None` for the agent's own.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.held.as_ref().map(|held| &held.file)
    }

    /// Whether both are the same namespace.
    ///
    /// # Errors
    /// When one of them cannot be looked at.
    pub fn is_same_as(&self, other: &Self) -> io::Result<bool> {
        Ok(self.identity()? == other.identity()?)
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = match &self.held {
            Some(held) => held.file.metadata()?,
            None => std::fs::metadata("/proc/self/ns/net")?,
        };
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Runs blocking work on a thread inside the namespace and waits for its end. Sockets that the
    /// work opens stay in the namespace for their life, also when they are handed out.
    ///
    /// # Errors
    /// When there is no thread to be had, or the kernel does not let it enter (no `CAP_SYS_ADMIN`,
    /// not a network namespace).
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let Some(held) = &self.held else { return Ok(work()) };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(
                scope,
                || -> io::Result<T> {
                    move_into_link_name_space(held.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                    Ok(work())
                },
            )?;
            thread
                .join()
                .map_err(|_panic| io::Error::other("the work in the namespace panicked"))?
        })
    }
}
