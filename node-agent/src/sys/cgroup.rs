//! The cgroup v2 tree: folders, controllers, values, counters. Version 1 is never touched.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// Controllers that limits cannot be enforced without, and the boot parameter that brings each.
pub const REQUIRED: [(&str, &str); 3] = [
    ("cpu", "systemd.unified_cgroup_hierarchy=1"),
    ("memory", "cgroup_enable=memory"),
    ("pids", "systemd.unified_cgroup_hierarchy=1"),
];

/// Times that removal waits for processes that are being reaped, and the pause between: 2 s in all.
const REMOVE_TRIES: u32 = 200;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// Why the tree cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("{} is not a cgroup v2 tree; boot with systemd.unified_cgroup_hierarchy=1", .0.display())]
    NotV2(PathBuf),
    #[error("the cgroup v2 controller \"{controller}\" is missing; boot with {parameter}")]
    Missing { controller: String, parameter: &'static str },
    #[error("{what} of cgroup {}", path.display())]
    Failed { what: &'static str, path: PathBuf, source: io::Error },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Failed { what, path: path.to_owned(), source }
}

/// Finds the mount of the tree that `path` is to lie in: its nearest existing folder must be of v2.
///
/// # Errors
/// `NotV2` when it is not.
pub fn check(path: &Path) -> Result<(), CgroupError> {
    let existing =
        path.ancestors().find(|folder| folder.exists()).unwrap_or_else(|| Path::new("/"));
    if existing.join("cgroup.controllers").exists() {
        Ok(())
    } else {
        Err(CgroupError::NotV2(path.to_owned()))
    }
}

/// Whether limits can be enforced in the tree that `path` is to lie in.
///
/// # Errors
/// `NotV2`, or `Missing` for a controller of [`REQUIRED`] that the kernel does not give to the tree.
pub fn require(path: &Path) -> Result<(), CgroupError> {
    check(path)?;
    // The tree's top has all that there is; folders below have what was enabled for them so far.
    let folders = path.ancestors().filter(|folder| folder.join("cgroup.controllers").exists());
    let top = folders.last().unwrap_or(path);
    let available = fs::read_to_string(top.join("cgroup.controllers"))
        .map_err(failed("read the controllers", top))?;
    let missing =
        REQUIRED.iter().find(|(name, _)| !available.split_whitespace().any(|one| one == *name));
    match missing {
        None => Ok(()),
        Some((controller, parameter)) => {
            Err(CgroupError::Missing { controller: (*controller).to_owned(), parameter })
        }
    }
}

/// Makes the folder, with the `wanted` controllers enabled in each folder above it up to the tree's top.
///
/// # Errors
/// `Missing` names the controller and its boot parameter.
pub fn ensure(path: &Path, wanted: &[&str]) -> Result<(), CgroupError> {
    let parent = path.parent().ok_or_else(|| CgroupError::NotV2(path.to_owned()))?;
    if parent.join("cgroup.controllers").exists() {
        enable(parent, wanted)?;
    } else if parent.parent().is_some_and(|above| above.join("cgroup.controllers").exists())
        || !parent.exists()
    {
        ensure(parent, wanted)?;
        enable(parent, wanted)?;
    } else {
        return Err(CgroupError::NotV2(path.to_owned()));
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("make", path)(error))
        }
        _ => Ok(()),
    }
}

/// Gives the folder's children the controllers.
fn enable(path: &Path, wanted: &[&str]) -> Result<(), CgroupError> {
    let read = |name: &str| {
        fs::read_to_string(path.join(name)).map_err(failed("read the controllers", path))
    };
    let (available, enabled) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let has = |list: &str, controller: &str| list.split_whitespace().any(|one| one == controller);
    let mut change = String::new();
    for controller in wanted {
        if !has(&available, controller) {
            let known = REQUIRED.iter().find(|(name, _)| name == controller);
            return Err(CgroupError::Missing {
                controller: (*controller).to_owned(),
                parameter: known.map_or("systemd.unified_cgroup_hierarchy=1", |(_, how)| how),
            });
        }
        if !has(&enabled, controller) {
            change.push('+');
            change.push_str(controller);
            change.push(' ');
        }
    }
    if change.is_empty() {
        return Ok(());
    }
    fs::write(path.join("cgroup.subtree_control"), change.trim_end())
        .map_err(failed("enable controllers", path))
}

/// Writes one value, such as `cpu.max`.
///
/// # Errors
/// The kernel's: the controller is not enabled, or the value is out of range.
pub fn write(path: &Path, file: &'static str, value: &str) -> Result<(), CgroupError> {
    fs::write(path.join(file), value).map_err(failed(file, path))
}

/// A number in a file of `name value` lines, such as `oom_kill` of `memory.events`; 0 when absent.
#[must_use]
pub fn counter(path: &Path, file: &str, name: &str) -> u64 {
    fs::read_to_string(path.join(file))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find_map(|(key, value)| (key == name).then(|| value.trim().parse().ok()).flatten())
        .unwrap_or(0)
}

/// SIGKILL to every process in the folder and below. Nothing to do when it is not there.
///
/// # Errors
/// The kernel's.
pub fn kill(path: &Path) -> Result<(), CgroupError> {
    match fs::write(path.join("cgroup.kill"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("kill", path)(error)),
        _ => Ok(()),
    }
}

/// Removes the folder and those below it once their processes are gone. Blocks up to 2 s.
///
/// # Errors
/// When a process stays.
pub fn remove(path: &Path) -> Result<(), CgroupError> {
    for _ in 0..REMOVE_TRIES {
        match remove_once(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => pause(REMOVE_PAUSE),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", path)(error));
            }
            _ => return Ok(()),
        }
    }
    remove_once(path).map_err(failed("remove", path))
}

fn remove_once(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_once(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[expect(
    clippy::disallowed_methods,
    reason = "called from blocking threads only, as its callers say"
)]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_no_cgroup_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubepods");
        let error = check(&path).unwrap_err().to_string();
        assert!(error.contains("systemd.unified_cgroup_hierarchy=1"), "{error}");
    }

    #[test]
    fn a_missing_controller_is_named_with_its_boot_parameter() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        fs::write(dir.path().join("cgroup.subtree_control"), "\n").unwrap();
        let error = ensure(&dir.path().join("kubepods"), &["cpu", "memory"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the cgroup v2 controller \"memory\" is missing; boot with cgroup_enable=memory"
        );
    }

    #[test]
    fn counters_are_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.events"), "low 0\noom 3\noom_kill 2\n").unwrap();
        assert_eq!(counter(dir.path(), "memory.events", "oom_kill"), 2);
        assert_eq!(counter(dir.path(), "memory.events", "absent"), 0);
        assert_eq!(counter(dir.path(), "absent", "oom"), 0);
    }

    #[test]
    fn the_controllers_are_looked_for_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubepods");
        assert!(matches!(require(&path), Err(CgroupError::NotV2(_))));
        let words = |controllers: &str| {
            fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
            require(&path).err().map(|error| error.to_string())
        };
        let memory =
            "the cgroup v2 controller \"memory\" is missing; boot with cgroup_enable=memory";
        assert_eq!(words("cpuset cpu io pids\n").as_deref(), Some(memory));
        assert_eq!(words("cpuset cpu io memory hugetlb pids\n"), None);
    }
}
