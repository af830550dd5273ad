//! The VMs' file systems: the initramfs that finds the disk, and the disk's tree with busybox, modules,
//! the Orlop programs and the sample's images.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    cpio::{self, Entry, Kind},
    deb, debian,
    exec::{cmd, make_parent, output},
    kernel::Kernel,
    paths::Paths,
};

/// What the initramfs needs to see the disk. `ext4` is built into Debian's cloud kernel, not into others.
const DISK_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "ext4"];

/// What a node needs, loaded by init: NICs, overlay file systems, pod links, tunnels, tc programs; and
/// nf_tables only so that "no rule anywhere" can be asked of the kernel.
const NODE_MODULES: &[&str] = &[
    "virtio_net",
    "virtio_rng",
    "overlay",
    "vxlan",
    "veth",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "nf_tables",
];

/// `nft`, `iptables` and `ethtool` with the libraries they load; used by tests to look, never by Orlop.
const LOOKING_TOOLS: &[&str] = &[
    "ethtool",
    "nftables",
    "iptables",
    "libnftables1",
    "libedit2",
    "libmnl0",
    "libnftnl11",
    "libxtables12",
    "libjansson4",
    "libgmp10",
    "libtinfo6",
    "libbsd0",
    "libmd0",
    "libip4tc2",
    "libip6tc2",
    "libnetfilter-conntrack3",
    "libnfnetlink0",
    "libc6",
];

/// Size of a node's disk; the file is sparse and holds about 100 MiB.
const DISK_SIZE: &str = "3G";

/// A static busybox: the host's when it is Debian's, else unpacked from its package.
pub(crate) fn busybox(paths: &Paths) -> Result<PathBuf> {
    Ok(deb::unpack(paths, "busybox", &["busybox-static"])?.join("bin/busybox"))
}

/// Writes the initramfs for `kernel` and returns its path.
pub(crate) fn initramfs(paths: &Paths, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = fs::read(busybox(paths)?).context("read busybox")?;
    let init =
        fs::read(paths.root.join("deploy/vm/initramfs-init")).context("read initramfs-init")?;
    let directory =
        |path: &str| Entry { path: path.into(), permissions: 0o755, kind: Kind::Directory };
    let file =
        |path: String, permissions, bytes| Entry { path, permissions, kind: Kind::File(bytes) };
    let mut entries: Vec<Entry> = ["bin", "dev", "proc", "root", "modules"].map(directory).into();
    // The kernel opens it before devtmpfs is mounted.
    let console = Kind::Device(5, 1);
    entries.push(Entry { path: "dev/console".into(), permissions: 0o600, kind: console });
    entries.push(file("bin/busybox".into(), 0o755, busybox));
    let shell = Kind::Symlink("busybox".into());
    entries.push(Entry { path: "bin/sh".into(), permissions: 0o777, kind: shell });
    entries.push(file("init".into(), 0o755, init));
    let mut order = String::new();
    for (name, module) in kernel.modules(DISK_MODULES)? {
        order.push_str(&format!("{name}\n"));
        entries.push(file(format!("modules/{name}.ko"), 0o644, module));
    }
    entries.push(file("modules/order".into(), 0o644, order.into_bytes()));
    let path = paths.cluster.join("initramfs");
    make_parent(&path)?;
    fs::write(&path, cpio::archive(&entries))
        .with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// What a node's disk holds beside the system.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Programs for `/usr/local/bin`.
    pub(crate) programs: Vec<PathBuf>,
    /// OCI archives for `/var/lib/orlop/images`.
    pub(crate) images: Vec<PathBuf>,
    /// Debian with systemd instead of busybox.
    pub(crate) debian: bool,
}

/// Makes the ext4 image that each node's disk is a copy of.
pub(crate) fn disk(paths: &Paths, kernel: &Kernel, contents: &Contents) -> Result<PathBuf> {
    let tree = paths.cluster.join("tree");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
    }
    if contents.debian {
        debian::skeleton(paths, &tree)?;
    } else {
        skeleton(paths, &tree)?;
        looking_tools(paths, &tree)?;
    }
    let modules = tree.join("lib/orlop/modules");
    fs::create_dir_all(&modules).with_context(|| format!("make {}", modules.display()))?;
    let mut order = String::new();
    for (name, module) in kernel.modules(NODE_MODULES)? {
        order.push_str(&format!("{name}\n"));
        write(&modules.join(format!("{name}.ko")), &module, 0o644)?;
    }
    write(&modules.join("order"), order.as_bytes(), 0o644)?;
    for (files, folder) in
        [(&contents.programs, "usr/local/bin"), (&contents.images, "var/lib/orlop/images")]
    {
        for file in files {
            let name = file.file_name().context("a file without a name")?;
            let to = tree.join(folder).join(name);
            make_parent(&to)?;
            fs::copy(file, &to).with_context(|| format!("copy {}", file.display()))?;
        }
    }
    let disk = paths.cluster.join("base.ext4");
    make_ext4(&tree, &disk, DISK_SIZE)?;
    fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
    Ok(disk)
}

/// An ext4 file system of `size` with the contents of `tree`; needs no root.
pub(crate) fn make_ext4(tree: &Path, disk: &Path, size: &str) -> Result<()> {
    if disk.exists() {
        fs::remove_file(disk).with_context(|| format!("remove {}", disk.display()))?;
    }
    let options = "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1";
    let mke2fs = crate::exec::find("mke2fs").unwrap_or_else(|| "mke2fs".into());
    output(
        cmd(mke2fs, ["-q", "-F", "-t", "ext4", "-L", "orlop", "-E", options, "-d"])
            .arg(tree)
            .arg(disk)
            .arg(size),
    )?;
    Ok(())
}

/// Folders, busybox and its links, init and the files in `/etc` that programs expect.
fn skeleton(paths: &Paths, tree: &Path) -> Result<()> {
    for folder in [
        "bin",
        "sbin",
        "usr/bin",
        "usr/sbin",
        "usr/local/bin",
        "usr/lib",
        "lib",
        "lib64",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "root",
        "etc",
        "var/log",
        "var/lib/orlop",
        "opt/cni/bin",
        "etc/cni/net.d",
    ] {
        let folder = tree.join(folder);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let busybox = busybox(paths)?;
    deb::copy_resolved(tree, &busybox.to_string_lossy(), &tree.join("bin/busybox"))?;
    for applet in output(&mut cmd(&busybox, ["--list"]))?.lines() {
        let link = tree.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    write(&tree.join("etc/ssl/certs/ca-certificates.crt"), &authorities(paths)?, 0o644)?;
    let init = fs::read(paths.root.join("deploy/vm/init")).context("read deploy/vm/init")?;
    write(&tree.join("sbin/init"), &init, 0o755)?;
    for (file, text) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ("etc/resolv.conf", "nameserver 10.0.2.3\n"),
        ("etc/os-release", "PRETTY_NAME=\"Orlop node VM (busybox)\"\nID=orlop\n"),
        ("etc/nsswitch.conf", "hosts: files dns\n"),
    ] {
        write(&tree.join(file), text.as_bytes(), 0o644)?;
    }
    Ok(())
}

/// Debian's certificate authorities in one file: TLS clients on the nodes expect some.
fn authorities(paths: &Paths) -> Result<Vec<u8>> {
    let folder = deb::unpack(paths, "authorities", &["ca-certificates"])?
        .join("usr/share/ca-certificates/mozilla");
    let mut all = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        all.extend(fs::read(&path).with_context(|| format!("read {}", path.display()))?);
        all.push(b'\n');
    }
    Ok(all)
}

/// Puts `nft`, both kinds of `iptables-save` and `ethtool` into the tree.
fn looking_tools(paths: &Paths, tree: &Path) -> Result<()> {
    let unpacked = deb::unpack(paths, "looking-tools", LOOKING_TOOLS)?;
    let libraries = unpacked.join("usr/lib/x86_64-linux-gnu");
    let flat = tree.join("usr/lib/x86_64-linux-gnu");
    fs::create_dir_all(flat.join("xtables")).context("make the library folder")?;
    for folder in [&libraries, &unpacked.join("lib/x86_64-linux-gnu")] {
        for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_file() && name.contains(".so") {
                fs::copy(&path, flat.join(&name)).with_context(|| format!("copy {name}"))?;
            }
        }
    }
    let loader = unpacked.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    fs::copy(&loader, tree.join("lib64/ld-linux-x86-64.so.2")).context("copy the loader")?;
    symlink("../usr/lib/x86_64-linux-gnu", tree.join("lib/x86_64-linux-gnu"))
        .context("link the library folder")?;
    for (folder, program) in [
        ("sbin", "ethtool"),
        ("usr/sbin", "nft"),
        ("usr/sbin", "xtables-nft-multi"),
        ("usr/sbin", "xtables-legacy-multi"),
    ] {
        let to = tree.join("usr/sbin").join(program);
        deb::copy_resolved(&unpacked.join(folder), program, &to)?;
    }
    for (link, to) in [
        ("iptables-nft-save", "xtables-nft-multi"),
        ("iptables-legacy-save", "xtables-legacy-multi"),
    ] {
        symlink(to, tree.join("usr/sbin").join(link)).with_context(|| format!("link {link}"))?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8], permissions: u32) -> Result<()> {
    make_parent(path)?;
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(permissions))
        .with_context(|| format!("set permissions of {}", path.display()))
}
