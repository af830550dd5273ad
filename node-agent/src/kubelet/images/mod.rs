//! Images: references, pulls, OCI archives, unpacked layers.
//!
//! `layout` is pure; `store` keeps layers on disk, `archive` and `pull` are the two
//! sources. [`Images`] is the face of it.
//!
//! A process that pulls over TLS must have installed a process-wide rustls provider before
//! (`rustls::crypto::ring::default_provider().install_default()`), as the agent's `main` does.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::SystemTime,
};

use oci_client::Reference;
use tokio::task::spawn_blocking;

use self::{
    archive::Archived,
    pull::Puller,
    store::{Record, Store},
};
use super::runtime::UnpackedImage;

mod archive;
mod layout;
mod pull;
mod store;
#[cfg(test)]
mod tests;
mod unpack;
mod user;

pub use self::user::{UserError, resolve_user};

/// Where images are kept and found.
#[derive(Clone, Debug)]
pub struct ImagesConfig {
    /// Layers and records: `<state-dir>/images`. OCI archives `*.tar` in it are images that need no
    /// registry.
    pub dir: PathBuf,
    /// `host:port` of registries that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
}

/// `imagePullPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// Credentials for one registry, out of a `kubernetes.io/dockerconfigjson` secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    #[default]
    Anonymous,
    Basic {
        username: String,
        password: String,
    },
}

/// Why an image cannot be had; `reason` gives the kubelet's word for it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("couldn't parse image name \"{reference}\": {message}")]
    InvalidName { reference: String, message: String },
    #[error("Container image \"{reference}\" is not present with pull policy of Never")]
    NeverPull { reference: String },
    /// The registry's own words.
    #[error("failed to pull and unpack image \"{reference}\": {message}")]
    Pull { reference: String, message: String },
    #[error("failed to unpack image \"{reference}\": {message}")]
    Unpack { reference: String, message: String },
}

impl ImageError {
    /// The container's `waiting.reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "InvalidImageName",
            Self::NeverPull { .. } => "ErrImageNeverPull",
            Self::Pull { .. } | Self::Unpack { .. } => "ErrImagePull",
        }
    }
}

/// One line of `status.images` of a Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// Tags and digests by which it is known.
    pub names: Vec<String>,
    /// Unpacked, or the archive's compressed size while it is not.
    pub size_bytes: u64,
}

/// The images of this node. Clones share it.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<Store>,
    puller: Puller,
    archives: Mutex<BTreeMap<PathBuf, Scanned>>,
    images: Locks,
    layers: Arc<Locks>,
}

/// An archive as it was when it was read.
struct Scanned {
    changed: Option<SystemTime>,
    bytes: u64,
    images: BTreeMap<String, Archived>,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images").field("dir", &self.inner.store.dir()).finish_non_exhaustive()
    }
}

impl Images {
    /// Opens the folder. Archives are read when an image is first asked for.
    ///
    /// # Errors
    /// When the folder cannot be made or cleared of half-done work.
    pub fn new(config: ImagesConfig) -> io::Result<Self> {
        let store = Arc::new(Store::open(config.dir)?);
        let layers = Arc::new(Locks::default());
        let puller =
            Puller::new(config.insecure_registries, Arc::clone(&store), Arc::clone(&layers));
        let archives = Mutex::default();
        Ok(Self {
            inner: Arc::new(Inner { store, puller, archives, images: Locks::default(), layers }),
        })
    }

    /// Has the image unpacked on this node: from what is there, from an archive, or from its registry.
    /// Callers that ask for the same image or layer at a time share one piece of work.
    ///
    /// # Errors
    /// `ImageError::reason` is the container's waiting reason; retry with backoff helps for pulls.
    pub async fn ensure(
        &self,
        reference: &str,
        policy: PullPolicy,
        auth: &Auth,
    ) -> Result<UnpackedImage, ImageError> {
        let parsed = layout::parse_reference(reference).map_err(|message| {
            ImageError::InvalidName { reference: reference.to_owned(), message }
        })?;
        let name = parsed.whole();
        let _mine = self.inner.images.lock(&name).await;
        let local = match policy {
            PullPolicy::Always => None,
            PullPolicy::IfNotPresent | PullPolicy::Never => self.local(reference, &name).await?,
        };
        let record = match (local, policy) {
            (Some(record), _) => record,
            (None, PullPolicy::Never) => {
                return Err(ImageError::NeverPull { reference: reference.to_owned() });
            }
            (None, PullPolicy::Always | PullPolicy::IfNotPresent) => {
                self.pull(reference, &parsed, auth).await?
            }
        };
        Ok(self.inner.store.unpacked(reference, record))
    }

    async fn pull(
        &self,
        reference: &str,
        parsed: &Reference,
        auth: &Auth,
    ) -> Result<Record, ImageError> {
        self.inner
            .puller
            .pull(parsed, auth)
            .await
            .map_err(|message| ImageError::Pull { reference: reference.to_owned(), message })
    }

    /// The image as the disk has it, unpacked or in an archive.
    async fn local(&self, reference: &str, name: &str) -> Result<Option<Record>, ImageError> {
        let failed =
            |message: String| ImageError::Unpack { reference: reference.to_owned(), message };
        let (this, wanted) = (self.clone(), name.to_owned());
        let found = spawn_blocking(move || {
            let record = this.inner.store.find(&wanted);
            let archived = if record.is_none() { this.archived(&wanted) } else { Ok(None) };
            archived.map(|archived| (record, archived))
        })
        .await
        .map_err(|error| failed(error.to_string()))?
        .map_err(|error| failed(error.to_string()))?;
        let archived = match found {
            (Some(record), _) => return Ok(Some(record)),
            (None, None) => return Ok(None),
            (None, Some(archived)) => archived,
        };
        for place in 0..archived.image.layers.len() {
            self.unpack(&archived, place).await.map_err(|error| failed(error.to_string()))?;
        }
        let record = Record::new(name.to_owned(), archived.image.id.clone(), &archived.image);
        self.inner.store.save(&record).map_err(|error| failed(error.to_string()))?;
        Ok(Some(record))
    }

    async fn unpack(&self, archived: &Archived, place: usize) -> io::Result<()> {
        let Some(layer) = archived.image.layers.get(place).cloned() else { return Ok(()) };
        let _mine = self.inner.layers.lock(&layer.diff_id).await;
        if self.inner.store.has_layer(&layer) {
            return Ok(());
        }
        let (store, blob) = (Arc::clone(&self.inner.store), archived.blob(place)?);
        spawn_blocking(move || store.add_layer(&layer, blob)).await?
    }

    /// Looks the name up in the archives, reading those that are new or changed. Blocks.
    fn archived(&self, name: &str) -> io::Result<Option<Archived>> {
        let mut archives = self.inner.archives.lock().unwrap_or_else(PoisonError::into_inner);
        refresh(&mut archives, self.inner.store.dir())?;
        Ok(archives.values().find_map(|scanned| scanned.images.get(name)).cloned())
    }

    /// The images on this node, unpacked or in archives. Blocks.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(&self) -> io::Result<Vec<ImageSummary>> {
        let mut images: BTreeMap<String, ImageSummary> = BTreeMap::new();
        for record in self.inner.store.records()? {
            let names = if record.digest.contains('@') {
                vec![record.digest, record.name.clone()]
            } else {
                vec![record.name.clone()]
            };
            images.insert(record.name, ImageSummary { names, size_bytes: record.bytes });
        }
        let mut archives = self.inner.archives.lock().unwrap_or_else(PoisonError::into_inner);
        refresh(&mut archives, self.inner.store.dir())?;
        for (name, archived) in archives.values().flat_map(|scanned| &scanned.images) {
            images.entry(name.clone()).or_insert_with(|| ImageSummary {
                names: vec![name.clone()],
                size_bytes: archived.bytes(),
            });
        }
        Ok(images.into_values().collect())
    }
}

/// Reads new and changed archives and forgets removed ones. An archive that cannot be read is logged once
/// and has no images.
fn refresh(archives: &mut BTreeMap<PathBuf, Scanned>, dir: &Path) -> io::Result<()> {
    let mut seen = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "tar") {
            let about = std::fs::metadata(&path)?;
            seen.insert(path, (about.modified().ok(), about.len()));
        }
    }
    archives.retain(|path, scanned| seen.get(path) == Some(&(scanned.changed, scanned.bytes)));
    for (path, (changed, bytes)) in seen {
        archives.entry(path).or_insert_with_key(|path| {
            let images = archive::scan(path).unwrap_or_else(|error| {
                tracing::warn!(archive = %path.display(), %error, "image archive could not be read");
                BTreeMap::new()
            });
            Scanned { changed, bytes, images }
        });
    }
    Ok(())
}

/// One lock for each name in use; a name that nobody uses takes no memory.
#[derive(Default)]
struct Locks {
    names: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl Locks {
    async fn lock(&self, name: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
            names.retain(|_, lock| lock.strong_count() > 0);
            match names.get(name).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    names.insert(name.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}
