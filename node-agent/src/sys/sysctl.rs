//! Settings below `/proc/sys/net` of the calling thread's network namespace.
//!
//! Effects. A setting is read first and written only when it differs, so that a read-only `/proc/sys`
//! with the right values is good enough.

use std::{fs, io, path::PathBuf};

/// A setting that could not be brought to its value.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {} to {value}", path.display())]
pub struct SettingError {
    pub path: PathBuf,
    pub value: &'static str,
    #[source]
    pub source: io::Error,
}

/// Brings a setting (such as `ipv4/ip_forward`) to a value.
///
/// # Errors
/// When there is no such setting or the kernel refuses.
pub fn set(name: &str, value: &'static str) -> Result<(), SettingError> {
    let path = path(name);
    let result = match fs::read_to_string(&path) {
        Ok(present) if present.trim() == value => Ok(()),
        Ok(_) => fs::write(&path, value),
        Err(error) => Err(error),
    };
    result.map_err(|source| SettingError { path, value, source })
}

/// The same, but a kernel without the setting is taken as it is.
///
/// # Errors
/// When the kernel refuses.
pub fn set_if_there(name: &str, value: &'static str) -> Result<(), SettingError> {
    match set(name, value) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Lets a device take packets whose source is routed elsewhere. The kernel goes by the larger of the
/// value for all devices and the device's: where the administrator has 1 (strict), 2 (loose) is the
/// most that a device can be let off.
///
/// # Errors
/// When the kernel refuses.
pub fn relax_reverse_path(device: &str) -> Result<(), SettingError> {
    let all = fs::read_to_string(path("ipv4/conf/all/rp_filter")).unwrap_or_default();
    let value = if matches!(all.trim(), "" | "0") { "0" } else { "2" };
    set(&format!("ipv4/conf/{device}/rp_filter"), value)
}

/// Makes a device speak IPv6 with the addresses that it is given and nothing else: no link-local
/// address of its own, no waiting for duplicates, no router that could give it addresses or routes.
///
/// # Errors
/// When the kernel has no IPv6 or refuses.
pub fn plain_ipv6(device: &str) -> Result<(), SettingError> {
    // First what must hold before the device may speak; 1 is IN6_ADDR_GEN_MODE_NONE (linux/if_link.h).
    for (setting, value) in
        [("addr_gen_mode", "1"), ("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")]
    {
        set(&format!("ipv6/conf/{device}/{setting}"), value)?;
    }
    Ok(())
}

/// Lets the namespace pass IPv4 packets between its devices.
///
/// # Errors
/// When the kernel refuses.
pub fn forward_ipv4() -> Result<(), SettingError> {
    set("ipv4/ip_forward", "1")
}

/// Lets the namespace pass IPv6 packets between its devices. A kernel that forwards forgets what it
/// learned from router advertisements, unless the device says that it listens to them all the same
/// (`accept_ra` 2); a node that lives by them would lose its default route.
///
/// # Errors
/// When the kernel has no IPv6 or refuses.
pub fn forward_ipv6() -> Result<(), SettingError> {
    const FORWARDING: &str = "ipv6/conf/all/forwarding";
    if fs::read_to_string(path(FORWARDING)).is_ok_and(|present| present.trim() == "1") {
        return Ok(());
    }
    let folder = path("ipv6/conf");
    let failed = |source| SettingError { path: folder.clone(), value: "2", source };
    for device in fs::read_dir(&folder).map_err(failed)? {
        let device = device.map_err(failed)?.file_name();
        let name = format!("ipv6/conf/{}/accept_ra", device.display());
        if fs::read_to_string(path(&name)).is_ok_and(|present| present.trim() == "1") {
            set(&name, "2")?;
        }
    }
    set(FORWARDING, "1")
}

/// Whether the namespace's kernel speaks IPv6.
#[must_use]
pub fn has_ipv6() -> bool {
    path("ipv6/conf/all").exists()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(name)
}
