//! Where things lie: everything this program makes is under `.orlop` and cargo's target folder.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The project's folders.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The workspace's root.
    pub root: PathBuf,
    /// Downloads and derived files that any cluster may use again.
    pub cache: PathBuf,
    /// One local cluster: disks, consoles, `state.json`, `kubeconfig`.
    pub cluster: PathBuf,
    /// Consoles and logs of test clusters on which a test failed.
    pub failed: PathBuf,
    /// OCI archives made by `cargo xtask image`.
    pub images: PathBuf,
    /// Cargo's target folder.
    pub target: PathBuf,
}

impl Paths {
    /// The folders of the workspace this program was built from.
    #[must_use]
    pub fn new() -> Self {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().unwrap_or(manifest).to_owned();
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        Self {
            cache: root.join(".orlop/cache"),
            cluster: root.join(".orlop/cluster"),
            failed: root.join(".orlop/failed"),
            images: root.join(".orlop/images"),
            root,
            target,
        }
    }

    /// As `new`, with the cluster of `cargo xtask test`, which is never the one that a user has up.
    #[must_use]
    pub fn for_tests() -> Self {
        let paths = Self::new();
        Self { cluster: paths.root.join(".orlop/test-cluster"), ..paths }
    }

    /// Waits until no other process changes the cache; nor does one until what is returned is dropped.
    pub(crate) fn lock_cache(&self) -> Result<File> {
        fs::create_dir_all(&self.cache).context("make the cache")?;
        let lock = File::create(self.cache.join("lock")).context("open the cache's lock")?;
        lock.lock().context("lock the cache")?;
        Ok(lock)
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self::new()
    }
}
