//! The other kind of node disk: Debian with systemd and the units of `deploy/systemd`, as on a Raspberry Pi.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    exec::{cmd, make_parent, output},
    oci,
    paths::Paths,
    step,
};

/// Beside Debian's essential packages.
const PACKAGES: &str = "systemd-sysv,iproute2,kmod,busybox-static,nftables,iptables,procps,ca-certificates,\
     bpftool,conntrack,containernetworking-plugins";

/// Fills the empty folder `tree` with Debian.
pub(crate) fn root(paths: &Paths, tree: &Path) -> Result<()> {
    let kept = kept(paths)?;
    fs::create_dir_all(tree).with_context(|| format!("make {}", tree.display()))?;
    // Device files are made by the kernel's devtmpfs, and need root here.
    output(cmd("tar", ["--exclude=./dev/*", "-xf"]).arg(&kept).arg("-C").arg(tree))?;
    Ok(())
}

/// Debian's root file system in an archive; made once, by `mmdebstrap`, and kept in the cache.
pub(crate) fn kept(paths: &Paths) -> Result<PathBuf> {
    let _lock = paths.lock_cache()?;
    let made_from = oci::hex(PACKAGES.as_bytes());
    let made_from = made_from.get(..12).unwrap_or(&made_from);
    let kept = paths.cache.join(format!("debian-rootfs-{made_from}.tar"));
    if !kept.is_file() {
        step("make a Debian root file system with mmdebstrap (a minute, once)");
        make_parent(&kept)?;
        let partial = kept.with_extension("partial.tar");
        let include = format!("--include={PACKAGES}");
        let mut mmdebstrap = cmd("mmdebstrap", ["--quiet", "--variant=minbase", &include]);
        output(mmdebstrap.arg("bookworm").arg(&partial))?;
        fs::rename(&partial, &kept).with_context(|| format!("write {}", kept.display()))?;
    }
    Ok(kept)
}

/// A node's Debian: with the units of `deploy/systemd` and what sets them up at boot.
pub(crate) fn skeleton(paths: &Paths, tree: &Path) -> Result<()> {
    root(paths, tree)?;
    let deploy = paths.root.join("deploy");
    for (from, to, permissions) in [
        ("systemd/orlop-node-agent.service", "etc/systemd/system/orlop-node-agent.service", 0o644),
        (
            "systemd/orlop-control-plane.service",
            "etc/systemd/system/orlop-control-plane.service",
            0o644,
        ),
        ("vm/orlop-vm.service", "etc/systemd/system/orlop-vm.service", 0o644),
        ("vm/orlop-vm-shell.service", "etc/systemd/system/orlop-vm-shell.service", 0o644),
        ("vm/debian-setup", "usr/local/sbin/debian-setup", 0o755),
    ] {
        let to = tree.join(to);
        make_parent(&to)?;
        fs::copy(deploy.join(from), &to).with_context(|| format!("copy {from}"))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(permissions))
            .with_context(|| format!("set permissions of {}", to.display()))?;
    }
    let wants = tree.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).context("make the folder of wanted units")?;
    std::os::unix::fs::symlink("../orlop-vm.service", wants.join("orlop-vm.service"))
        .context("enable orlop-vm.service")?;
    let resolv = tree.join("etc/resolv.conf");
    fs::write(&resolv, "nameserver 10.0.2.3\n").context("write resolv.conf")?;
    Ok(())
}
