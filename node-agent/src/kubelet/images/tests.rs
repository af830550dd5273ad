//! Real tars, a real OCI layout, a real registry. Layers have owners and whiteouts: root only.

use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
};

use super::{unpack::unpack_layer, *};

/// Whether this process may make devices; says so when not.
fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip::because("not root");
    }
    root
}

fn entry(builder: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, path: &str, content: &str) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_000_000_000);
    if kind.is_symlink() || kind.is_hard_link() {
        header.set_size(0);
        builder.append_link(&mut header, path, content).unwrap();
        return;
    }
    header.set_size(content.len().try_into().unwrap());
    // Written by hand, as the builder refuses the paths that an attacker would use.
    if let Some(name) = header.as_gnu_mut() {
        name.name.get_mut(..path.len()).unwrap().copy_from_slice(path.as_bytes());
    }
    header.set_cksum();
    builder.append(&header, content.as_bytes()).unwrap();
}

fn layer(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, path, content) in entries {
        entry(&mut builder, *kind, path, content);
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_layer_becomes_what_overlayfs_expects() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tar = layer(&[
        (Directory, "etc/", ""),
        (Regular, "etc/file", "content"),
        (Link, "etc/second", "etc/file"),
        (Symlink, "etc/soft", "/etc/file"),
        (Regular, "etc/.wh.gone", ""),
        (Directory, "opt/", ""),
        (Regular, "opt/.wh..wh..opq", ""),
    ]);
    let mut packed = zstd::encode_all(tar.as_slice(), 1).unwrap();
    let found = unpack_layer(packed.as_slice(), dir.path()).unwrap();
    assert_eq!(found, unpack::digest(&tar), "the digest is of the uncompressed bytes");

    let at = |path: &str| fs::symlink_metadata(dir.path().join(path)).unwrap();
    let file = at("etc/file");
    assert_eq!((file.uid(), file.gid(), file.permissions().mode() & 0o7777), (7, 8, 0o755));
    assert_eq!((file.mtime(), at("etc").mtime()), (1_000_000_000, 1_000_000_000));
    assert_eq!(file.ino(), at("etc/second").ino());
    assert!(at("etc/soft").is_symlink());
    assert!(at("etc/gone").file_type().is_char_device());
    assert_eq!(at("etc/gone").rdev(), 0);
    let mut value = [0; 8];
    let opaque = dir.path().join("opt");
    let length = rustix::fs::getxattr(&opaque, "trusted.overlay.opaque", &mut value[..]).unwrap();
    assert_eq!(value.get(..length), Some(&b"y"[..]));

    packed.truncate(packed.len() / 2);
    let other = tempfile::tempdir().unwrap();
    unpack_layer(packed.as_slice(), other.path()).unwrap_err();
}

#[test]
fn a_layer_cannot_write_outside_its_folder() {
    use tar::EntryType::{Regular, Symlink};
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (outside, inside) = (dir.path().join("outside"), dir.path().join("inside"));
    fs::create_dir(&outside).unwrap();
    fs::create_dir(&inside).unwrap();
    let up = layer(&[(Regular, "../outside/file", "x")]);
    assert!(unpack_layer(up.as_slice(), &inside).unwrap_err().to_string().contains("leads out"));
    let link = outside.to_str().unwrap();
    let through = layer(&[(Symlink, "door", link), (Regular, "door/file", "x")]);
    unpack_layer(through.as_slice(), &inside).unwrap_err();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

/// An OCI archive with one image of one layer, written blob by blob.
fn archive(path: &Path, name: &str, layer: &[u8]) {
    let mut builder = tar::Builder::new(fs::File::create(path).unwrap());
    let mut blob = |bytes: &[u8]| -> (String, usize) {
        let digest = unpack::digest(bytes);
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len().try_into().unwrap());
        header.set_mode(0o644);
        let path = format!("blobs/{}", digest.replace(':', "/"));
        builder.append_data(&mut header, path, bytes).unwrap();
        (digest, bytes.len())
    };
    let packed = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut encoder, layer).unwrap();
        encoder.finish().unwrap()
    };
    let (layer_digest, layer_size) = blob(&packed);
    let config = serde_json::json!({
        "architecture": layout::architecture().to_string(), "os": "linux",
        "config": {"Entrypoint": ["/bin/tool"], "Cmd": ["run"], "User": "7:8",
                   "Env": ["A=1"], "WorkingDir": "/opt", "StopSignal": "SIGQUIT"},
        "rootfs": {"type": "layers", "diff_ids": [unpack::digest(layer)]},
        "history": [],
    });
    let (config_digest, config_size) = blob(&serde_json::to_vec(&config).unwrap());
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": config_digest, "size": config_size},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": layer_digest, "size": layer_size}],
    });
    let (manifest_digest, manifest_size) = blob(&serde_json::to_vec(&manifest).unwrap());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
                       "digest": manifest_digest, "size": manifest_size,
                       "annotations": {"org.opencontainers.image.ref.name": name}}],
    });
    for (name, value) in
        [("index.json", index), ("oci-layout", serde_json::json!({"imageLayoutVersion": "1.0.0"}))]
    {
        let bytes = serde_json::to_vec(&value).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len().try_into().unwrap());
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes.as_slice()).unwrap();
    }
    builder.finish().unwrap();
}

fn images(dir: &Path, insecure: &[&str]) -> Images {
    // The first test to come installs it for all.
    drop(rustls::crypto::ring::default_provider().install_default());
    Images::new(ImagesConfig {
        dir: dir.to_owned(),
        insecure_registries: insecure.iter().map(|&host| host.to_owned()).collect(),
    })
    .unwrap()
}

#[tokio::test]
async fn an_image_in_an_archive_needs_no_registry() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tar = layer(&[(tar::EntryType::Regular, "bin/tool", "#!")]);
    archive(&dir.path().join("web.tar"), "example.com/web:1", &tar);
    fs::write(dir.path().join("broken.tar"), "no archive").unwrap();
    let images = images(dir.path(), &[]);
    assert_eq!(images.list().unwrap().first().unwrap().names, ["example.com/web:1"]);

    let ensure = |policy| {
        let images = images.clone();
        async move { images.ensure("example.com/web:1", policy, &Auth::Anonymous).await }
    };
    let (one, two) = tokio::join!(ensure(PullPolicy::Never), ensure(PullPolicy::IfNotPresent));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two);
    assert_eq!(one.config.entrypoint, ["/bin/tool"]);
    assert_eq!((&*one.config.user, &*one.config.stop_signal), ("7:8", "SIGQUIT"));
    assert!(one.digest.starts_with("sha256:"));
    let tool = one.layers.first().unwrap().join("bin/tool");
    assert_eq!(fs::read_to_string(tool).unwrap(), "#!");

    fs::remove_file(dir.path().join("web.tar")).unwrap();
    assert_eq!(ensure(PullPolicy::Never).await.unwrap(), one, "unpacked, it needs no archive");
    let absent = images.ensure("ghost", PullPolicy::Never, &Auth::Anonymous).await.unwrap_err();
    assert_eq!(absent.reason(), "ErrImageNeverPull");
    let wrong = images.ensure("Not A Name", PullPolicy::Always, &Auth::Anonymous).await;
    assert_eq!(wrong.unwrap_err().reason(), "InvalidImageName");
}

/// A registry of Debian's `docker-registry`, ended when dropped.
struct Registry {
    process: std::process::Child,
    host: String,
    _dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

async fn registry() -> Option<Registry> {
    for tool in ["/usr/bin/docker-registry", "/usr/bin/skopeo"] {
        if !Path::new(tool).exists() {
            skip::because(&format!("no {tool}"));
            return None;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let config = dir.path().join("config.yml");
    let text = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{host}\"}}\n",
        dir.path().join("data").display()
    );
    fs::write(&config, text).unwrap();
    let process = std::process::Command::new("/usr/bin/docker-registry")
        .arg("serve")
        .arg(&config)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let registry = Registry { process, host, _dir: dir };
    for _ in 0..100 {
        if std::net::TcpStream::connect(&registry.host).is_ok() {
            return Some(registry);
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("the registry did not come up");
}

#[tokio::test]
async fn an_image_is_pulled_from_a_registry_and_its_errors_are_told() {
    if !root() {
        return;
    }
    let Some(registry) = registry().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let tar = layer(&[(tar::EntryType::Regular, "bin/tool", "pulled")]);
    let source = dir.path().join("source");
    archive(&source, "web:1", &tar);
    let pushed = std::process::Command::new("/usr/bin/skopeo")
        .args(["copy", "--insecure-policy", "--dest-tls-verify=false"])
        .arg(format!("oci-archive:{}", source.display()))
        .arg(format!("docker://{}/web:1", registry.host))
        .output()
        .unwrap();
    assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));

    let images = images(&dir.path().join("images"), &[&registry.host]);
    let name = format!("{}/web:1", registry.host);
    let image = images.ensure(&name, PullPolicy::Always, &Auth::Anonymous).await.unwrap();
    assert!(image.digest.starts_with(&format!("{}/web@sha256:", registry.host)));
    let tool = image.layers.first().unwrap().join("bin/tool");
    assert_eq!(fs::read_to_string(tool).unwrap(), "pulled");
    let by_digest = images.ensure(&image.digest, PullPolicy::IfNotPresent, &Auth::Anonymous).await;
    assert_eq!(by_digest.unwrap().layers, image.layers);
    assert_eq!(fs::read_dir(dir.path().join("images/parts")).unwrap().count(), 0);

    let ghost = format!("{}/ghost:1", registry.host);
    let error =
        images.ensure(&ghost, PullPolicy::IfNotPresent, &Auth::Anonymous).await.unwrap_err();
    assert_eq!(error.reason(), "ErrImagePull");
    assert!(error.to_string().contains("manifest unknown"), "{error}");
}
