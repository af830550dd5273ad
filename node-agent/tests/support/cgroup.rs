//! A cgroup of version 2 of the test's own, and the test's process in it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The process is in the cgroup while this lives; then it goes back and the cgroup is removed.
pub(crate) struct TestCgroup {
    pub(crate) path: PathBuf,
    before: PathBuf,
}

impl TestCgroup {
    /// Makes a cgroup below the unified hierarchy and moves this process there.
    pub(crate) fn enter(name: &str) -> Self {
        let hybrid = Path::new("/sys/fs/cgroup/unified");
        let root = if hybrid.is_dir() { hybrid } else { Path::new("/sys/fs/cgroup") };
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
        let path = root.join(format!("orlop-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let cgroup = Self { path, before: root.join(own) };
        move_to(&cgroup.path);
        cgroup
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        move_to(&self.before);
        // Threads that are ending hold on to it for a moment.
        let start = Instant::now();
        while let Err(error) = fs::remove_dir(&self.path) {
            assert!(start.elapsed() < Duration::from_secs(5), "{error}");
            std::thread::yield_now();
        }
    }
}

fn move_to(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}
