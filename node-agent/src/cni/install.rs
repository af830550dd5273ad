//! Files that others read: written whole or not at all.
//!
//! Effects, blocking.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use serde_json::json;

/// Replaces a file so that after a crash either the old or the new one is there, whole: a new file,
/// synced, renamed over the old, the folder synced. Makes the folder when it is missing.
///
/// # Errors
/// When a step fails; the old file is then untouched.
pub(crate) fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    fs::create_dir_all(folder)?;
    replace(path, bytes, mode)?;
    File::open(folder)?.sync_all()
}

/// Replaces a file as [`write_durably`] does, but leaves the folder unsynced: for what need not
/// outlive a boot.
///
/// # Errors
/// When a step fails; the old file is then untouched.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    // The mode above is only for a new file and less the umask.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, path)
}

/// Writes the plugin where runtimes look for it; one with the same bytes is left alone.
pub(super) fn install_plugin(bin_dir: &Path, plugin: &[u8]) -> io::Result<()> {
    let path = bin_dir.join(super::PLUGIN);
    let same = fs::read(&path).is_ok_and(|present| present == plugin);
    let executable = fs::metadata(&path).is_ok_and(|m| m.permissions().mode() & 0o111 == 0o111);
    if same && executable { Ok(()) } else { write_durably(&path, plugin, 0o755) }
}

/// Writes the network configuration. Runtimes take its presence for "the network is ready".
///
/// `cniVersion` is for runtimes that know no 1.1.0 and refuse it (containerd before 2.0, podman 4);
/// those that do choose from `cniVersions`.
pub(super) fn install_configuration(conf_dir: &Path, socket: &Path) -> io::Result<()> {
    let list = json!({
        "cniVersion": super::wire::Version::V1_0_0.as_str(),
        "cniVersions": super::wire::SUPPORTED,
        "name": super::PLUGIN,
        "plugins": [{
            "type": super::PLUGIN,
            "socket": socket,
            "capabilities": {"dns": true, "portMappings": true},
        }],
    });
    let text = format!("{list:#}\n");
    let path = conf_dir.join("10-orlop.conflist");
    if fs::read(&path).is_ok_and(|present| present == text.as_bytes()) {
        return Ok(());
    }
    write_durably(&path, text.as_bytes(), 0o644)
}
