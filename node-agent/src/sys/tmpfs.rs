//! A tmpfs on a folder: for what must not be written to disk.

use std::{io, path::Path};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mounts a tmpfs on a folder unless one is there.
///
/// # Errors
/// mount(2)'s.
pub fn ensure(folder: &Path, options: &str) -> io::Result<()> {
    if is_mounted(folder)? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), folder, Some("tmpfs"), flags, Some(options)).map_err(io::Error::from)
}

/// Unmounts what is mounted on a folder; nothing there is a success.
///
/// # Errors
/// umount(2)'s.
pub fn remove(folder: &Path) -> io::Result<()> {
    if !is_mounted(folder)? {
        return Ok(());
    }
    umount2(folder, MntFlags::MNT_DETACH).map_err(io::Error::from)
}

/// Whether a folder is a mount point: it lies on another device than its parent.
fn is_mounted(folder: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt as _;
    let Some(parent) = folder.parent() else { return Ok(true) };
    Ok(std::fs::symlink_metadata(folder)?.dev() != std::fs::symlink_metadata(parent)?.dev())
}
