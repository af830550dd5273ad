//! The small static binary that the agent carries, and where it is put to be executed.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Shim, exec helper and CNI plugin in one (`node-agent/shim`).
pub static SHIM: &[u8] = include_bytes!(env!("ORLOP_SHIM"));

/// Writes the binary as `name` into `dir` unless it is there already. Processes that run an older one keep
/// it: the file is replaced, not changed.
///
/// # Errors
/// Of the file system.
pub fn install(dir: &Path, name: &str) -> io::Result<PathBuf> {
    let path = dir.join(name);
    if fs::read(&path).is_ok_and(|found| found == SHIM) {
        return Ok(path);
    }
    fs::create_dir_all(dir)?;
    let part = dir.join(format!(".{name}.part"));
    fs::write(&part, SHIM)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(0o755))?;
    fs::File::open(&part)?.sync_all()?;
    fs::rename(&part, &path)?;
    Ok(path)
}
