//! `image`: static programs, and OCI archives of them and of the sample, without Docker.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    deb,
    exec::{cmd, output, run},
    oci::{self, Image},
    paths::Paths,
    rootfs,
    setup::{self, Need},
    step,
    stop::wrong_input,
};

/// `x86_64-unknown-linux-gnu` with the C library linked in: runs in any root file system.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// nginx and the libraries it loads.
const NGINX: &[&str] = &[
    "nginx",
    "nginx-common",
    "libc6",
    "libcrypt1",
    "libpcre2-8-0",
    "libssl3",
    "zlib1g",
    "libgcc-s1",
    "gcc-12-base",
];

/// Reference of the sample's web server; the version is Debian 12's.
pub const NGINX_REFERENCE: &str = "docker.io/library/nginx:1.22";
/// Reference of the sample's client: busybox and `load`.
pub const TOOLS_REFERENCE: &str = "docker.io/orlop/tools:1";

/// The static programs.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) node_agent: PathBuf,
    pub(crate) control_plane: PathBuf,
    pub(crate) load: PathBuf,
}

/// Builds every archive and prints where it is.
///
/// # Errors
/// Wrong input for an architecture that is not offered; else what failed.
pub fn image(paths: &Paths, arch: &str) -> Result<()> {
    check_arch(arch)?;
    setup::ensure(paths, &[Need::Ebpf, Need::Packages])?;
    let programs = programs(paths, Profile::Fast)?;
    let mut archives = vec![
        program(paths, "node-agent", &programs.node_agent)?,
        program(paths, "control-plane", &programs.control_plane)?,
    ];
    archives.extend(sample(paths, &programs)?);
    for archive in archives {
        let size = fs::metadata(&archive).map(|file| file.len()).unwrap_or_default();
        println!("{} ({} KiB)", archive.display(), size / 1024);
    }
    Ok(())
}

/// Refuses what cannot be built yet.
pub(crate) fn check_arch(arch: &str) -> Result<()> {
    match arch {
        "amd64" => Ok(()),
        "arm64" => Err(wrong_input("--arch arm64: not offered yet; amd64 is")),
        other => {
            Err(wrong_input(format!("--arch {other}: no such architecture; amd64 is offered")))
        }
    }
}

/// How the programs are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// As the tests are, with which they share what they are made of: for the tests' VMs.
    Dev,
    /// Optimised: for a user's VMs, to be measured, and for images.
    Fast,
}

impl Profile {
    /// Its name in `Cargo.toml`, and the folder that cargo puts it in.
    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Dev => ("dev", "debug"),
            Self::Fast => ("fast", "fast"),
        }
    }
}

/// Builds the programs, which `.cargo/config.toml` makes static; cargo shows its progress.
pub(crate) fn programs(paths: &Paths, profile: Profile) -> Result<Programs> {
    step("build the static programs (a few minutes the first time)");
    let (name, folder) = profile.names();
    let mut cargo = cmd("cargo", ["build", "--locked", "--profile", name, "--target", TARGET]);
    if profile == Profile::Dev {
        // With the tests: what they need switches features on, and without them some crates would be built once more.
        cargo.args(["--workspace", "--tests"]);
    }
    for package in ["node-agent", "control-plane", "load"] {
        if profile == Profile::Fast {
            cargo.args(["--package", package]);
        }
        cargo.args(["--bin", package]);
    }
    run(cargo.current_dir(&paths.root))?;
    let folder = paths.target.join(TARGET).join(folder);
    Ok(Programs {
        node_agent: folder.join("node-agent"),
        control_plane: folder.join("control-plane"),
        load: folder.join("load"),
    })
}

/// An image that holds one static program.
fn program(paths: &Paths, name: &str, binary: &Path) -> Result<PathBuf> {
    let tree = fresh(paths, name)?;
    copy(binary, &tree.join(name))?;
    let image = Image {
        reference: format!("docker.io/orlop/{name}:{}", env!("CARGO_PKG_VERSION")),
        architecture: "amd64".into(),
        entrypoint: vec![format!("/{name}")],
        command: vec!["--help".into()],
        environment: vec!["PATH=/".into()],
        stop_signal: None,
    };
    finish(paths, name, &image, &tree)
}

/// The sample's images: nginx and the tools of the client.
pub(crate) fn sample(paths: &Paths, programs: &Programs) -> Result<Vec<PathBuf>> {
    Ok(vec![nginx(paths)?, tools(paths, &programs.load)?])
}

fn nginx(paths: &Paths) -> Result<PathBuf> {
    let unpacked = deb::unpack(paths, "nginx", NGINX)?;
    let tree = fresh(paths, "nginx")?;
    for folder in ["etc/nginx", "usr", "lib", "lib64"] {
        let from = unpacked.join(folder);
        if from.exists() {
            crate::exec::make_parent(&tree.join(folder))?;
            output(cmd("cp", ["-a"]).arg(&from).arg(tree.join(folder)))?;
        }
    }
    for unneeded in ["usr/share/doc", "usr/share/man", "usr/share/lintian", "lib/systemd"] {
        let folder = tree.join(unneeded);
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
    }
    let recipe = paths.root.join("deploy/images/nginx");
    copy(&recipe.join("nginx.conf"), &tree.join("etc/nginx/nginx.conf"))?;
    copy(&recipe.join("passwd"), &tree.join("etc/passwd"))?;
    copy(&recipe.join("group"), &tree.join("etc/group"))?;
    for folder in ["var/log/nginx", "var/lib/nginx", "run", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(tree.join(folder)).with_context(|| format!("make {folder}"))?;
    }
    let image = Image {
        reference: NGINX_REFERENCE.into(),
        architecture: "amd64".into(),
        entrypoint: vec!["/usr/sbin/nginx".into()],
        command: vec!["-g".into(), "daemon off;".into()],
        environment: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into()],
        // nginx ends at once on SIGTERM and after its open requests on SIGQUIT.
        stop_signal: Some("SIGQUIT".into()),
    };
    finish(paths, "nginx", &image, &tree)
}

fn tools(paths: &Paths, load: &Path) -> Result<PathBuf> {
    let tree = fresh(paths, "tools")?;
    let busybox = rootfs::busybox(paths)?;
    copy(&busybox, &tree.join("bin/busybox"))?;
    for applet in output(&mut cmd(&busybox, ["--list"]))?.lines().filter(|name| *name != "busybox")
    {
        symlink("busybox", tree.join("bin").join(applet))
            .with_context(|| format!("link {applet}"))?;
    }
    copy(load, &tree.join("bin/load"))?;
    for folder in ["etc", "tmp", "proc", "sys", "dev"] {
        fs::create_dir_all(tree.join(folder)).with_context(|| format!("make {folder}"))?;
    }
    let passwd = tree.join("etc/passwd");
    fs::write(&passwd, "root:x:0:0:root:/:/bin/sh\n").context("write passwd")?;
    let image = Image {
        reference: TOOLS_REFERENCE.into(),
        architecture: "amd64".into(),
        entrypoint: Vec::new(),
        command: vec!["/bin/sleep".into(), "infinity".into()],
        environment: vec!["PATH=/bin".into()],
        stop_signal: None,
    };
    finish(paths, "tools", &image, &tree)
}

/// An empty folder to build an image's tree in.
fn fresh(paths: &Paths, name: &str) -> Result<PathBuf> {
    let tree = paths.images.join(format!("{name}.tree"));
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("remove {}", tree.display()))?;
    }
    fs::create_dir_all(&tree).with_context(|| format!("make {}", tree.display()))?;
    Ok(tree)
}

fn finish(paths: &Paths, name: &str, image: &Image, tree: &Path) -> Result<PathBuf> {
    let archive = paths.images.join(format!("{name}-amd64.tar"));
    oci::write(image, tree, &archive)?;
    fs::remove_dir_all(tree).with_context(|| format!("remove {}", tree.display()))?;
    Ok(archive)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    crate::exec::make_parent(to)?;
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    Ok(())
}
