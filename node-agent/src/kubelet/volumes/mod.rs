//! Volumes of pods on this node: `emptyDir`, `hostPath`, `configMap`, `secret`, `downwardAPI`, `projected`.
//!
//! `payload` decides what files a volume holds (pure); `atomic` writes them so that a reader sees either
//! all old or all new ones; here they are put in their places. Secrets and tokens live on tmpfs.

pub mod atomic;
pub mod payload;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, HostPathVolumeSource, Pod, Volume};

use self::payload::{Payload, PayloadContext};
use crate::sys::tmpfs;

/// A volume that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("MountVolume.SetUp failed for volume \"{volume}\" : {message}")]
    Content { volume: String, message: String },
    #[error("MountVolume.SetUp failed for volume \"{volume}\"")]
    Write {
        volume: String,
        #[source]
        source: io::Error,
    },
}

/// Folder of a pod's volumes below the agent's state folder.
#[must_use]
pub fn pod_dir(state_dir: &Path, uid: &str) -> PathBuf {
    state_dir.join("pods").join(uid)
}

/// Sets every volume of a pod up, or brings its files up to date, and returns where each is.
///
/// # Errors
/// The first volume that failed; retry helps once what it needs is there.
pub fn ensure(
    dir: &Path,
    pod: &Pod,
    ctx: &PayloadContext<'_>,
) -> Result<BTreeMap<String, PathBuf>, VolumeError> {
    let mut places = BTreeMap::new();
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_ref());
    for volume in volumes.into_iter().flatten() {
        places.insert(volume.name.clone(), ensure_one(dir, volume, ctx)?);
    }
    Ok(places)
}

fn ensure_one(
    dir: &Path,
    volume: &Volume,
    ctx: &PayloadContext<'_>,
) -> Result<PathBuf, VolumeError> {
    let write = |source| VolumeError::Write { volume: volume.name.clone(), source };
    let content = |message| VolumeError::Content { volume: volume.name.clone(), message };
    let place = dir.join("volumes").join(&volume.name);
    if let Some(source) = &volume.host_path {
        return host_path(source).map_err(content);
    }
    if let Some(source) = &volume.empty_dir {
        empty_dir(&place, source).map_err(write)?;
        return Ok(place);
    }
    let Some(Payload { files, secret }) = payload::payload(volume, ctx).map_err(content)? else {
        return Err(content("no supported volume source".to_owned()));
    };
    std::fs::create_dir_all(&place).map_err(write)?;
    if secret {
        tmpfs::ensure(&place, "mode=0755").map_err(write)?;
    }
    atomic::write(&place, &files).map_err(write)?;
    Ok(place)
}

fn empty_dir(place: &Path, source: &EmptyDirVolumeSource) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(place)?;
    if source.medium.as_deref() == Some("Memory") {
        tmpfs::ensure(place, "mode=0777")?;
    }
    std::fs::set_permissions(place, std::fs::Permissions::from_mode(0o777))
}

/// Checks what `hostPath.type` promises, and makes what it says to make.
fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, String> {
    use std::os::unix::fs::FileTypeExt as _;
    let path = PathBuf::from(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let made = match kind {
        "DirectoryOrCreate" => std::fs::create_dir_all(&path),
        "FileOrCreate" if !path.exists() => std::fs::write(&path, b""),
        _ => Ok(()),
    };
    made.map_err(|error| format!("hostPath {}: {error}", source.path))?;
    let file_type = std::fs::metadata(&path).map(|meta| meta.file_type());
    let (good, what) = match (kind, &file_type) {
        ("", _) => (true, "path"),
        ("Directory" | "DirectoryOrCreate", found) => {
            (found.as_ref().is_ok_and(std::fs::FileType::is_dir), "directory")
        }
        ("File" | "FileOrCreate", found) => {
            (found.as_ref().is_ok_and(std::fs::FileType::is_file), "file")
        }
        ("Socket", found) => (found.as_ref().is_ok_and(|found| found.is_socket()), "socket file"),
        (_, _) => (false, "known type"),
    };
    if kind.is_empty() && file_type.is_err() {
        // As the container runtimes do for a bind mount whose source is missing.
        std::fs::create_dir_all(&path)
            .map_err(|error| format!("hostPath {}: {error}", source.path))?;
    }
    if good {
        return Ok(path);
    }
    Err(format!("hostPath type check failed: {} is not a {what}", source.path))
}

/// Takes a pod's volumes away: unmounts what is mounted below its folder, then removes the folder.
///
/// # Errors
/// When something is still in use; retry helps.
pub fn remove(dir: &Path) -> io::Result<()> {
    let volumes = dir.join("volumes");
    if let Ok(entries) = std::fs::read_dir(&volumes) {
        for entry in entries {
            tmpfs::remove(&entry?.path())?;
        }
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
