//! `down`: ends the VMs by recorded process and start time, and removes what they stored.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{cluster::Cluster, paths::Paths};

/// Removes the local cluster; nothing happens when there is none. Caches stay.
///
/// # Errors
/// When a VM does not end or files cannot be removed; run it again.
pub fn down(paths: &Paths) -> Result<()> {
    let ended = Cluster::end(paths)?;
    remove(paths)?;
    match ended {
        0 => println!("no cluster is running"),
        vms => println!("removed {vms} VMs"),
    }
    Ok(())
}

pub(crate) fn remove(paths: &Paths) -> Result<()> {
    if paths.cluster.exists() {
        fs::remove_dir_all(&paths.cluster)
            .with_context(|| format!("remove {}", paths.cluster.display()))?;
    }
    Ok(())
}
