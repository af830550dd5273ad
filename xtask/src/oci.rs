//! Writes an image as an OCI archive (image-spec 1.1: `oci-layout`, `index.json`, blobs by digest, in a tar).
//! The same tree gives the same bytes: entries sorted, times zero, owner root.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// What an image is, beside its files.
#[derive(Debug)]
pub(crate) struct Image {
    /// Full reference, such as `docker.io/library/nginx:1.22`.
    pub(crate) reference: String,
    /// `amd64` or `arm64`.
    pub(crate) architecture: String,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) environment: Vec<String>,
    /// Signal that asks the main process to end; the runtime's default when `None`.
    pub(crate) stop_signal: Option<String>,
}

/// Writes `image` with the one layer `tree` to `archive`.
pub(crate) fn write(image: &Image, tree: &Path, archive: &Path) -> Result<()> {
    let layer = layer(tree)?;
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(&layer).context("compress the layer")?;
    let packed = gzip.finish().context("compress the layer")?;
    let config = to_bytes(&config(image, &digest(&layer)))?;
    let manifest = to_bytes(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
    }))?;
    let mut named = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    named["platform"] = json!({ "architecture": image.architecture, "os": "linux" });
    // The second annotation is what containerd, podman and Orlop's kubelet take the name from.
    named["annotations"] = json!({
        "org.opencontainers.image.ref.name": image.reference,
        "io.containerd.image.name": image.reference,
    });
    let index = to_bytes(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [named],
    }))?;
    let mut tar = tar::Builder::new(Vec::new());
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut tar, "index.json", &index)?;
    for blob in [&config, &manifest, &packed] {
        append(&mut tar, &format!("blobs/sha256/{}", hex(blob)), blob)?;
    }
    let bytes = tar.into_inner().context("finish the archive")?;
    crate::exec::make_parent(archive)?;
    fs::write(archive, bytes).with_context(|| format!("write {}", archive.display()))
}

fn config(image: &Image, layer: &str) -> Value {
    let mut run = json!({
        "Env": image.environment,
        "Entrypoint": image.entrypoint,
        "Cmd": image.command,
        "WorkingDir": "/",
    });
    if let Some(signal) = &image.stop_signal {
        run["StopSignal"] = json!(signal);
    }
    json!({
        "architecture": image.architecture,
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": [layer] },
        "history": [{ "created_by": "cargo xtask image" }],
    })
}

/// The tree as an uncompressed layer.
fn layer(tree: &Path) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for path in walk(tree)? {
        let inner = path.strip_prefix(tree).context("a path outside the tree")?;
        let metadata =
            path.symlink_metadata().with_context(|| format!("read {}", path.display()))?;
        let mut header = tar::Header::new_ustar();
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mode(metadata.permissions().mode() & 0o7777);
        header.set_size(0);
        if metadata.is_symlink() {
            let target =
                fs::read_link(&path).with_context(|| format!("read {}", path.display()))?;
            header.set_entry_type(tar::EntryType::Symlink);
            tar.append_link(&mut header, inner, target)
        } else if metadata.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, inner, std::io::empty())
        } else {
            let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            header.set_size(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            tar.append_data(&mut header, inner, bytes.as_slice())
        }
        .with_context(|| format!("add {} to the layer", path.display()))?;
    }
    tar.into_inner().context("finish the layer")
}

/// Everything below `tree`, folders before what they hold, names sorted.
fn walk(tree: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![tree.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry.with_context(|| format!("read {}", folder.display()))?.path();
            if path.is_dir() && !path.is_symlink() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn append(tar: &mut tar::Builder<Vec<u8>>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    tar.append_data(&mut header, name, bytes).with_context(|| format!("add {name}"))
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() })
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(bytes))
}

/// SHA-256 in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn to_bytes(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).context("write JSON")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn nginx() -> Image {
        Image {
            reference: "docker.io/library/nginx:1".into(),
            architecture: "amd64".into(),
            entrypoint: vec!["/usr/sbin/nginx".into()],
            command: Vec::new(),
            environment: Vec::new(),
            stop_signal: Some("SIGQUIT".into()),
        }
    }

    #[test]
    fn same_tree_gives_same_bytes_and_digests_name_their_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("bin")).unwrap();
        fs::write(tree.join("bin/a"), "x").unwrap();
        symlink("a", tree.join("bin/b")).unwrap();
        let (one, two) = (dir.path().join("1.tar"), dir.path().join("2.tar"));
        write(&nginx(), &tree, &one).unwrap();
        fs::write(tree.join("bin/a"), "x").unwrap();
        write(&nginx(), &tree, &two).unwrap();
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());

        let mut blobs = 0;
        let bytes = fs::read(&one).unwrap();
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut blob = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut blob).unwrap();
            if let Some(digest) = name.strip_prefix("blobs/sha256/") {
                assert_eq!(digest, hex(&blob));
                blobs += 1;
            }
        }
        assert_eq!(blobs, 3, "configuration, manifest, layer");
    }

    #[test]
    fn layer_holds_folders_before_files_and_links_as_links() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("bin")).unwrap();
        fs::write(dir.path().join("bin/a"), "x").unwrap();
        symlink("a", dir.path().join("bin/b")).unwrap();
        let layer = layer(dir.path()).unwrap();
        let names: Vec<String> = tar::Archive::new(layer.as_slice())
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                let to = entry.link_name().unwrap().map(|to| format!(" -> {}", to.display()));
                path + &to.unwrap_or_default()
            })
            .collect();
        assert_eq!(names, ["bin", "bin/a", "bin/b -> a"]);
    }
}
