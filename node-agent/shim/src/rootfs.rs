//! A container's file tree, from inside its new mount namespace: overlay, kernel file systems, devices,
//! volumes, hidden paths; then it becomes `/`.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _, symlink},
    },
    path::Path,
};

use rustix::{
    fs::{self as rfs, FileType, Mode, OFlags},
    mount::{
        MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change,
        mount_move, unmount,
    },
    process::{chdir, chroot, fchdir, pivot_root},
};
use shim::wire::{ContainerConfig, Failure, MountConfig};

use crate::{
    mount::{Root, bind, bind_fd, is_dir_fd, new_mount, place},
    step::At as _,
    sys,
};

/// Size of `/dev` (runc's default spec).
const DEV_SIZE: &str = "65536k";

/// Devices of every container (OCI runtime specification, "Default Devices").
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Folders of the node's `/dev` that a privileged container does not get: it has its own.
const PRIVATE_DEV: [&str; 4] = ["pts", "shm", "mqueue", "fd"];

/// Builds the tree and makes it the root of this process. The caller is alone in its mount namespace.
pub(crate) fn enter(config: &ContainerConfig) -> Result<(), Failure> {
    // Nothing done here may reach the node; what the node mounts later may reach the container's binds.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).at(|| "make mounts private".to_owned())?;
    let path = format!("{}/root", config.work_dir);
    overlay(config, &path)?;
    let root = Root::open(&path).at(|| format!("open {path}"))?;
    kernel_mounts(config, &root)?;
    devices(config, &root, &path)?;
    for entry in &config.mounts {
        volume(entry, &root).at(|| format!("mount {}", entry.destination))?;
    }
    for hidden in &config.masked_paths {
        mask(&root, hidden).at(|| format!("mask {hidden}"))?;
    }
    for fixed in &config.read_only_paths {
        read_only(&root, fixed).at(|| format!("make {fixed} read-only"))?;
    }
    become_root(&path).at(|| "change the root folder".to_owned())?;
    if config.read_only_root {
        let top = rfs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .at(|| "open /".to_owned())?;
        sys::mount_attributes(top.as_fd(), sys::READ_ONLY)
            .at(|| "make the root read-only".to_owned())?;
    }
    Ok(())
}

/// `volatile`: a container's own layer never outlives its container, so nothing is gained by syncing
/// it to the disk. No devices in it, as containers may make nodes (`CAP_MKNOD`).
fn overlay(config: &ContainerConfig, root: &str) -> Result<(), Failure> {
    let lower: Vec<&str> = config.layers.iter().rev().map(String::as_str).collect();
    let work = &config.work_dir;
    let options =
        format!("lowerdir={},upperdir={work}/upper,workdir={work}/work,volatile", lower.join(":"));
    let options = std::ffi::CString::new(options).at(|| "name the layers".to_owned())?;
    chdir(&*config.layers_dir).at(|| format!("enter {}", config.layers_dir))?;
    let flags = if config.privileged { MountFlags::empty() } else { MountFlags::NODEV };
    mount("overlay", root, "overlay", flags, options.as_c_str())
        .at(|| format!("mount {} layers as overlay", lower.len()))?;
    chdir("/").at(|| "leave the layers' folder".to_owned())
}

fn kernel_mounts(config: &ContainerConfig, root: &Root) -> Result<(), Failure> {
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let fixed = if config.privileged { quiet } else { quiet | MountAttrFlags::MOUNT_ATTR_RDONLY };
    let put = |kind: &str, at: &str, attributes| -> io::Result<()> {
        let target = root.ensure_dir(Path::new(at))?;
        place(&new_mount(kind, &[], attributes)?, &target)
    };
    put("proc", "/proc", quiet).at(|| "mount /proc".to_owned())?;
    put("sysfs", "/sys", fixed).at(|| "mount /sys".to_owned())?;
    put("cgroup2", "/sys/fs/cgroup", fixed).at(|| "mount /sys/fs/cgroup".to_owned())
}

/// A small tmpfs with the default devices. They are bound from the node, not made, and the tmpfs itself
/// allows none: a node that the container makes there opens nothing.
fn devices(config: &ContainerConfig, root: &Root, path: &str) -> Result<(), Failure> {
    let dev = || "make /dev".to_owned();
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID;
    if !config.privileged {
        attributes |= MountAttrFlags::MOUNT_ATTR_NODEV;
    }
    let options = [("mode", "0755"), ("size", DEV_SIZE)];
    let tmpfs = new_mount("tmpfs", &options, attributes).at(dev)?;
    place(&tmpfs, &root.ensure_dir(Path::new("/dev")).at(dev)?).at(dev)?;
    if config.privileged {
        copy_nodes(Path::new("/dev"), &Path::new(path).join("dev")).at(dev)?;
    }
    for name in DEVICES {
        let source = format!("/dev/{name}");
        let target = root.ensure_file(Path::new(&source)).at(dev)?;
        place(&bind(&source, 0).at(dev)?, &target).at(|| format!("make {source}"))?;
    }
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let pts = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let pts = new_mount("devpts", &pts, quiet).at(|| "mount /dev/pts".to_owned())?;
    place(&pts, &root.ensure_dir(Path::new("/dev/pts")).at(dev)?).at(dev)?;
    // A kernel may be built without POSIX message queues; then the container has none, as on the node.
    if let Ok(queues) = new_mount("mqueue", &[], quiet | MountAttrFlags::MOUNT_ATTR_NODEV) {
        place(&queues, &root.ensure_dir(Path::new("/dev/mqueue")).at(dev)?).at(dev)?;
    }
    let links = [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ];
    for (to, name) in links {
        // `/dev` is our own new tmpfs, so that the path cannot lead elsewhere.
        let link = Path::new(path).join("dev").join(name);
        drop(fs::remove_file(&link));
        symlink(to, link).at(dev)?;
    }
    Ok(())
}

/// All device nodes of the node, for a privileged container.
fn copy_nodes(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        let target = to.join(&name);
        if kind.is_dir() && !PRIVATE_DEV.iter().any(|private| *name == **private) {
            fs::create_dir(&target)?;
            copy_nodes(&entry.path(), &target)?;
        } else if kind.is_block_device() || kind.is_char_device() {
            let about = entry.metadata()?;
            let kind = if kind.is_block_device() {
                FileType::BlockDevice
            } else {
                FileType::CharacterDevice
            };
            let mode = Mode::from_raw_mode(about.mode() & 0o777);
            rfs::mknodat(rfs::CWD, &target, kind, mode, about.rdev())?;
        }
    }
    Ok(())
}

/// As upstream, read-only holds for the mount itself, not for mounts below it.
fn volume(entry: &MountConfig, root: &Root) -> io::Result<()> {
    let path = Path::new(&entry.destination);
    let attributes = sys::NO_DEVICES | if entry.read_only { sys::READ_ONLY } else { 0 };
    if entry.source.is_empty() {
        let target = root.ensure_dir(path)?;
        let tmpfs = new_mount("tmpfs", &[("mode", "0777")], MountAttrFlags::empty())?;
        sys::mount_attributes(tmpfs.as_fd(), attributes)?;
        return place(&tmpfs, &target);
    }
    let target = root.ensure_like(&entry.source, path)?;
    // A device that is mounted on purpose stays one.
    let device = {
        let kind = fs::metadata(&entry.source)?.file_type();
        kind.is_block_device() || kind.is_char_device()
    };
    let attributes = if device { attributes & !sys::NO_DEVICES } else { attributes };
    place(&bind(&entry.source, attributes)?, &target)
}

/// Hides a file under `/dev/null` or a folder under an empty one; what is not there needs no hiding.
fn mask(root: &Root, path: &str) -> io::Result<()> {
    let Some(target) = present(root, path)? else { return Ok(()) };
    if is_dir_fd(&target)? {
        let tmpfs = new_mount(
            "tmpfs",
            &[("size", "0"), ("nr_inodes", "1")],
            MountAttrFlags::MOUNT_ATTR_RDONLY,
        )?;
        return place(&tmpfs, &target);
    }
    // The node's, which the container cannot have replaced by something else.
    place(&bind("/dev/null", sys::READ_ONLY)?, &target)
}

fn read_only(root: &Root, path: &str) -> io::Result<()> {
    let Some(target) = present(root, path)? else { return Ok(()) };
    place(&bind_fd(target.as_fd(), sys::READ_ONLY)?, &target)
}

fn present(root: &Root, path: &str) -> io::Result<Option<OwnedFd>> {
    match root.find(Path::new(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

/// Puts the new root on top of the old one and takes the old one away from below. A node that runs from
/// its initramfs cannot pivot: there the new root is moved over the old one, as `switch_root` does.
fn become_root(path: &str) -> io::Result<()> {
    let top = rfs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    fchdir(&top)?;
    match pivot_root(".", ".") {
        Ok(()) => {
            unmount(".", UnmountFlags::DETACH)?;
        }
        Err(rustix::io::Errno::INVAL) => {
            mount_move(".", "/")?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(chdir("/")?)
}
