//! The disk of VMs that run test programs: Debian, the kernels' modules, and the programs at the paths that
//! they have here.

use std::{fs, path::Path, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};

use super::Programs;
use crate::{
    debian,
    exec::{cmd, make_parent, output},
    kernel::Kernel,
    paths::Paths,
    rootfs,
};

/// Sparse; test programs with debug lines are about 80 MiB each.
const DISK_SIZE: &str = "6G";

/// What runs.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) programs: &'a Programs,
    /// Only tests whose name contains this.
    pub(crate) filter: Option<&'a str>,
    /// For each program.
    pub(crate) limit: Duration,
}

/// Makes the disk below the cluster's folder.
pub(crate) fn make(paths: &Paths, kernels: &[Kernel], plan: &Plan<'_>) -> Result<PathBuf> {
    let tree = paths.cluster.join("tree");
    debian::root(paths, &tree)?;
    for (modules, release) in kernels.iter().filter_map(|kernel| kernel.tree.as_ref()) {
        // Whole, so that the kernel finds what a test asks for, as it does on a Debian node.
        let folder = tree.join("usr/lib/modules");
        fs::create_dir_all(&folder).context("make the folder of modules")?;
        output(cmd("cp", ["-a"]).arg(modules).arg(&folder))?;
        output(cmd("depmod", ["-b"]).arg(&tree).arg(release))?;
    }
    let tests = plan.programs.tests.iter().map(|(_, file)| file);
    for file in tests.chain(&plan.programs.beside) {
        put(file, &below(&tree, file))?;
    }
    let package = paths.root.join("node-agent");
    fs::create_dir_all(below(&tree, &package)).context("make the package's folder")?;
    write(
        &tree.join("lib/orlop/kernel-tests-folder"),
        &below(Path::new(""), &package).to_string_lossy(),
    )?;
    write(&tree.join("lib/orlop/kernel-tests"), &list(plan))?;
    let init = tree.join("usr/sbin/init");
    // Debian's is a link to systemd.
    fs::remove_file(&init).context("remove Debian's init")?;
    put(&paths.root.join("deploy/vm/kernel-tests-init"), &init)?;
    let disk = paths.cluster.join("disk.ext4");
    rootfs::make_ext4(&tree, &disk, DISK_SIZE)?;
    fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
    Ok(disk)
}

/// A line for each program: name, seconds, file, arguments.
fn list(plan: &Plan<'_>) -> String {
    let line = |(name, file): &(String, PathBuf)| {
        // Also what tests that passed said: one that skips says why.
        let arguments = format!("--color never --show-output {}", plan.filter.unwrap_or_default());
        format!("{name} {} {} {}\n", plan.limit.as_secs(), file.display(), arguments.trim_end())
    };
    plan.programs.tests.iter().map(line).collect()
}

/// The absolute `path` inside `tree`.
fn below(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

fn put(from: &Path, to: &Path) -> Result<()> {
    make_parent(to)?;
    if to.is_symlink() {
        fs::remove_file(to).with_context(|| format!("replace {}", to.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    output(cmd("chmod", ["755"]).arg(to))?;
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    make_parent(path)?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_laid_below_the_tree() {
        let tree = Path::new("/t");
        assert_eq!(below(tree, Path::new("/a/b")), Path::new("/t/a/b"));
    }

    #[test]
    fn each_program_has_a_line_with_its_arguments() {
        let programs = Programs {
            tests: vec![("cni".into(), "/t/cni-1".into()), ("dns".into(), "/t/dns-2".into())],
            beside: Vec::new(),
        };
        let plan =
            Plan { programs: &programs, filter: Some("add"), limit: Duration::from_secs(60) };
        assert_eq!(
            list(&plan),
            "cni 60 /t/cni-1 --color never --show-output add\ndns 60 /t/dns-2 --color never --show-output add\n"
        );
        assert!(
            list(&Plan { filter: None, ..plan })
                .starts_with("cni 60 /t/cni-1 --color never --show-output\n")
        );
    }
}
