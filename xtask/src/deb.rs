//! Debian packages without root: `apt-get download` and `dpkg-deb -x` into a folder of the cache.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    exec::{cmd, output},
    paths::Paths,
    step,
    stop::impossible,
};

/// Unpacks `packages` (exactly these: dependencies are named by the caller) into `.orlop/cache/<name>`
/// and returns that folder. Nothing is done when the folder already holds these versions.
pub(crate) fn unpack(paths: &Paths, name: &str, packages: &[&str]) -> Result<PathBuf> {
    let dir = paths.cache.join(name);
    let files = locate(packages)?;
    let marker = dir.join(".packages");
    let wanted = files.join("\n");
    if fs::read_to_string(&marker).is_ok_and(|have| have == wanted) {
        return Ok(dir);
    }
    let _lock = paths.lock_cache()?;
    if fs::read_to_string(&marker).is_ok_and(|have| have == wanted) {
        // By the one that held the lock.
        return Ok(dir);
    }
    step(&format!("unpack {} Debian packages for {name}", files.len()));
    let debs = paths.cache.join("debs");
    fs::create_dir_all(&debs).with_context(|| format!("make {}", debs.display()))?;
    if files.iter().any(|file| !debs.join(file).is_file()) {
        output(cmd("apt-get", ["-qq", "download"]).args(packages).current_dir(&debs))?;
    }
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    for file in &files {
        output(cmd("dpkg-deb", ["-x"]).arg(debs.join(file)).arg(&dir))?;
    }
    fs::write(&marker, wanted).with_context(|| format!("write {}", marker.display()))?;
    Ok(dir)
}

/// The package that the meta-package `meta` depends on and that starts with `prefix`; `None` when apt
/// does not know `meta`.
pub(crate) fn dependency(meta: &str, prefix: &str) -> Option<String> {
    let listed = output(&mut cmd("apt-cache", ["depends", meta])).ok()?;
    listed
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with(prefix))
        .map(str::to_owned)
}

/// File names that `apt-get download` would write, in order.
fn locate(packages: &[&str]) -> Result<Vec<String>> {
    let listed = output(cmd("apt-get", ["-qq", "download", "--print-uris"]).args(packages))
        .map_err(|error| {
            impossible(format!(
                "apt does not offer {} ({error:#}); run `apt-get update` as root",
                packages.join(" ")
            ))
        })?;
    Ok(listed.lines().filter_map(file_name).map(str::to_owned).collect())
}

/// `'http://…/a.deb' a.deb 123 SHA256:…` → `a.deb`.
fn file_name(line: &str) -> Option<&str> {
    line.split_whitespace().nth(1).filter(|name| name.ends_with(".deb"))
}

/// Copies a regular file out of an unpacked tree, following links inside that tree.
pub(crate) fn copy_resolved(tree: &Path, inner: &str, to: &Path) -> Result<()> {
    let from = tree.join(inner);
    fs::copy(&from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_name_is_the_second_word_of_a_uri_line() {
        let line = "'http://deb.debian.org/a/b_1%3a2_amd64.deb' b_1%3a2_amd64.deb 12 SHA256:ab";
        assert_eq!(file_name(line), Some("b_1%3a2_amd64.deb"));
        assert_eq!(file_name("W: something else"), None);
    }
}
