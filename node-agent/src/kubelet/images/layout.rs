//! Manifests and configurations, from their bytes to what is needed of them. Pure.

use oci_client::Reference;
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};

use crate::kubelet::runtime::ImageConfig;

/// A name as the pod has it, completed: `nginx` is `docker.io/library/nginx:latest`.
///
/// # Errors
/// Why the text is no reference.
pub(super) fn parse_reference(text: &str) -> Result<Reference, String> {
    text.parse::<Reference>().map_err(|error| error.to_string())
}

/// `registry/repository@digest`.
pub(super) fn by_digest(reference: &Reference, digest: &str) -> String {
    format!("{}/{}@{digest}", reference.registry(), reference.repository())
}

/// An image as its manifest and configuration describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// Digest of the configuration: the image's id.
    pub(super) id: String,
    pub(super) layers: Vec<Layer>,
    pub(super) config: ImageConfig,
}

/// A layer by both of its digests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// Of the blob as it travels.
    pub(super) blob: String,
    pub(super) blob_bytes: u64,
    /// Of the uncompressed tar; its hexadecimal part is the layer's folder.
    pub(super) diff_id: String,
}

impl Layer {
    /// Name of its folder.
    pub(super) fn folder(&self) -> &str {
        self.diff_id.split_once(':').map_or(self.diff_id.as_str(), |(_, hex)| hex)
    }
}

/// Joins a manifest and its configuration.
///
/// # Errors
/// What does not fit together.
pub(super) fn image(manifest: &ImageManifest, config: &[u8]) -> Result<Image, String> {
    let parsed = ImageConfiguration::from_reader(config).map_err(|error| error.to_string())?;
    if let Some(reason) = wrong_platform(parsed.os(), parsed.architecture()) {
        return Err(reason);
    }
    let diff_ids = parsed.rootfs().diff_ids();
    if diff_ids.len() != manifest.layers().len() || diff_ids.is_empty() {
        return Err(format!(
            "the manifest has {} layers and the configuration {}",
            manifest.layers().len(),
            diff_ids.len()
        ));
    }
    let layers = manifest.layers().iter().zip(diff_ids).map(|(blob, diff_id)| {
        let hex = diff_id.strip_prefix("sha256:").unwrap_or_default();
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("layer digest \"{diff_id}\" is not sha256"));
        }
        Ok(Layer {
            blob: blob.digest().to_string(),
            blob_bytes: blob.size(),
            diff_id: diff_id.clone(),
        })
    });
    Ok(Image {
        id: manifest.config().digest().to_string(),
        layers: layers.collect::<Result<_, _>>()?,
        config: parts(&parsed),
    })
}

fn parts(parsed: &ImageConfiguration) -> ImageConfig {
    let Some(config) = parsed.config() else { return ImageConfig::default() };
    ImageConfig {
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
        env: config.env().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        stop_signal: config.stop_signal().clone().unwrap_or_default(),
    }
}

/// What this machine runs, in the words of the image specification (Go's `GOARCH`).
pub(super) fn architecture() -> Arch {
    if cfg!(target_arch = "aarch64") { Arch::ARM64 } else { Arch::Amd64 }
}

fn wrong_platform(os: &Os, arch: &Arch) -> Option<String> {
    let fits = *os == Os::Linux && *arch == architecture();
    (!fits).then(|| format!("no match for platform in manifest: the image is for {os}/{arch}"))
}

/// The entry of an index for this machine; one without platform is taken when there is no better.
pub(super) fn choose(index: &ImageIndex) -> Option<&Descriptor> {
    let fits = |entry: &&Descriptor| {
        entry.platform().as_ref().is_some_and(|platform| {
            *platform.os() == Os::Linux && *platform.architecture() == architecture()
        })
    };
    let entries = index.manifests();
    entries.iter().find(fits).or_else(|| entries.iter().find(|entry| entry.platform().is_none()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        let whole = |text: &str| parse_reference(text).map(|reference| reference.whole());
        assert_eq!(whole("nginx"), Ok("docker.io/library/nginx:latest".to_owned()));
        assert_eq!(whole("acme/web:1.2"), Ok("docker.io/acme/web:1.2".to_owned()));
        assert_eq!(whole("10.0.2.2:5000/web"), Ok("10.0.2.2:5000/web:latest".to_owned()));
        parse_reference("Web:").unwrap_err();
        parse_reference("").unwrap_err();
    }
}
