//! The VMs' kernel: Debian's cloud kernel by package, or a file; and which modules it needs in which order.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    deb,
    exec::{cmd, output_bytes},
    paths::Paths,
    stop::wrong_input,
};

/// Kernel series when none is asked for: the floor that the project promises (Debian 12).
pub(crate) const DEFAULT: &str = "6.1";

/// A kernel image and its loadable modules by name, dashes as underscores.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) image: PathBuf,
    /// The folder of all its modules, and its release (`uname -r`), when it came from a package.
    pub(crate) tree: Option<(PathBuf, String)>,
    modules: BTreeMap<String, PathBuf>,
}

/// A kernel by series (`6.1`, `6.12`, from Debian) or by path; `modules` is the folder of a path's modules.
pub(crate) fn get(paths: &Paths, wanted: &str, modules: Option<&Path>) -> Result<Kernel> {
    if wanted.contains('/') || Path::new(wanted).is_file() {
        return from_file(Path::new(wanted), modules);
    }
    let package = package(wanted)?;
    let tree = deb::unpack(paths, &format!("kernel-{wanted}"), &[&package])?;
    let release = package.strip_prefix("linux-image-").unwrap_or(&package);
    let folder = tree.join("lib/modules").join(release);
    Ok(Kernel {
        name: format!("Debian {release}"),
        image: tree.join("boot").join(format!("vmlinuz-{release}")),
        modules: index(&folder)?,
        tree: Some((folder, release.to_owned())),
    })
}

fn from_file(image: &Path, modules: Option<&Path>) -> Result<Kernel> {
    if !image.is_file() {
        return Err(wrong_input(format!("--kernel {}: no such file", image.display())));
    }
    let modules = match modules {
        Some(dir) if dir.is_dir() => index(dir)?,
        Some(dir) => {
            return Err(wrong_input(format!("--modules {}: no such folder", dir.display())));
        }
        None => BTreeMap::new(),
    };
    Ok(Kernel { name: image.display().to_string(), image: image.to_owned(), tree: None, modules })
}

/// The package that holds the newest kernel of a series.
fn package(series: &str) -> Result<String> {
    let prefix = format!("linux-image-{series}.");
    [format!("linux-image-{series}-cloud-amd64"), "linux-image-cloud-amd64".to_owned()]
        .iter()
        .find_map(|meta| deb::dependency(meta, &prefix))
        .ok_or_else(|| {
            wrong_input(format!(
                "--kernel {series}: apt offers no Debian cloud kernel of that series \
                 (6.1 is in bookworm, 6.12 in bookworm-backports); or give a file, --kernel /path/to/vmlinuz --modules DIR"
            ))
        })
}

/// Every module under `dir` by name.
fn index(dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("read {}", folder.display()))?.path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Some(name) = module_name(&path) {
                found.insert(name, path);
            }
        }
    }
    Ok(found)
}

fn module_name(path: &Path) -> Option<String> {
    let (stem, suffix) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst"].contains(&suffix).then(|| stem.replace('-', "_"))
}

impl Kernel {
    /// The bytes of `wanted` modules and of what they depend on, in load order. A name that the kernel
    /// has not as a module is taken as built in; that one really lacks is found out at boot, by name.
    pub(crate) fn modules(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut bytes = BTreeMap::new();
        let mut open: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        let mut needs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        while let Some(name) = open.pop() {
            let Some(path) = self.modules.get(&name) else { continue };
            if needs.contains_key(&name) {
                continue;
            }
            let module = read_module(path)?;
            let depends = depends(&module);
            open.extend(depends.iter().cloned());
            needs.insert(name.clone(), depends);
            bytes.insert(name, module);
        }
        let order = load_order(wanted, &needs);
        Ok(order
            .into_iter()
            .filter_map(|name| bytes.remove(&name).map(|module| (name, module)))
            .collect())
    }
}

/// A module's ELF bytes, unpacked: busybox `insmod` takes no compressed ones.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let unpacker = match path.extension().and_then(|suffix| suffix.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).with_context(|| format!("read {}", path.display())),
    };
    output_bytes(cmd(unpacker, ["-dc"]).arg(path))
}

/// The names in the module's `depends=` of its `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default();
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(value.get(..end).unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// Each module after everything it needs; each once.
fn load_order(wanted: &[&str], needs: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    fn visit(
        name: &str,
        needs: &BTreeMap<String, Vec<String>>,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<String>,
    ) {
        if !seen.insert(name.to_owned()) {
            return;
        }
        for dependency in needs.get(name).into_iter().flatten() {
            visit(dependency, needs, seen, order);
        }
        order.push(name.to_owned());
    }
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted {
        visit(name, needs, &mut seen, &mut order);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need_and_once() {
        let needs = BTreeMap::from([
            ("vxlan".to_owned(), vec!["udp_tunnel".to_owned(), "ip6_udp_tunnel".to_owned()]),
            ("geneve".to_owned(), vec!["udp_tunnel".to_owned()]),
        ]);
        assert_eq!(
            load_order(&["geneve", "vxlan"], &needs),
            ["udp_tunnel", "geneve", "ip6_udp_tunnel", "vxlan"]
        );
    }

    #[test]
    fn dependencies_come_from_modinfo() {
        assert_eq!(depends(b"ELF\0license=GPL\0depends=a-b,c\0name=x\0"), ["a_b", "c"]);
        assert!(depends(b"ELF\0license=GPL\0depends=\0").is_empty());
        assert!(depends(b"ELF").is_empty());
    }

    #[test]
    fn module_names_are_files_with_dashes_as_underscores() {
        assert_eq!(module_name(Path::new("/m/virtio-rng.ko.xz")).as_deref(), Some("virtio_rng"));
        assert_eq!(module_name(Path::new("/m/modules.order")), None);
    }
}
