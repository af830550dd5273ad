//! Images in OCI archives: a tar of an image layout (`oci-layout`, `index.json`, `blobs/`), as `skopeo`,
//! `umoci` and `xtask image` make them. Blobs are read in place, never copied out.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};

use super::{
    layout::{self, Image},
    unpack::digest,
};

/// Annotation with the image's name (OCI image specification, "Annotations").
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The same by containerd and Docker, where `ref.name` is only the tag.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Longest manifest, index or configuration (containerd's limit for manifests is 4 MiB too).
const MAX_JSON_BYTES: u64 = 4 << 20;

/// One image of an archive.
#[derive(Clone, Debug)]
pub(super) struct Archived {
    pub(super) image: Image,
    archive: PathBuf,
    /// Where each layer's blob lies: offset and length.
    blobs: Vec<(u64, u64)>,
}

impl Archived {
    /// The blob of the layer at `place`.
    pub(super) fn blob(&self, place: usize) -> io::Result<io::Take<File>> {
        let (offset, length) = self.blobs.get(place).copied().ok_or(io::ErrorKind::NotFound)?;
        let mut file = File::open(&self.archive)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(file.take(length))
    }

    /// Size of all blobs.
    pub(super) fn bytes(&self) -> u64 {
        self.blobs.iter().map(|(_, length)| length).sum()
    }
}

/// The images of the archive at `path` for this machine, by complete name. Reads only headers and JSON.
/// Blocks.
///
/// # Errors
/// When it is no such archive, or does not hold together.
pub(super) fn scan(path: &Path) -> io::Result<BTreeMap<String, Archived>> {
    let mut archive = tar::Archive::new(File::open(path)?);
    let mut files = BTreeMap::new();
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let name = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        files.insert(name, (entry.raw_file_position(), entry.size()));
    }
    let archive = Files { path, files };
    let index: ImageIndex = json(&archive.read("index.json")?)?;
    let mut images = BTreeMap::new();
    for entry in index.manifests() {
        let annotations = entry.annotations().clone().unwrap_or_default();
        let name = annotations.get(CONTAINERD_NAME).or_else(|| annotations.get(REF_NAME));
        let Some(reference) = name.and_then(|name| layout::parse_reference(name).ok()) else {
            continue;
        };
        if let Some(image) = archive.image(entry)? {
            images.insert(reference.whole(), image);
        }
    }
    Ok(images)
}

struct Files<'a> {
    path: &'a Path,
    files: BTreeMap<String, (u64, u64)>,
}

impl Files<'_> {
    fn image(&self, entry: &Descriptor) -> io::Result<Option<Archived>> {
        if *entry.media_type() == MediaType::ImageIndex {
            let index: ImageIndex = json(&self.read_blob(entry.digest().as_ref())?)?;
            return match layout::choose(&index) {
                Some(inner) if *inner.media_type() != MediaType::ImageIndex => self.image(inner),
                _ => Ok(None),
            };
        }
        let manifest: ImageManifest = json(&self.read_blob(entry.digest().as_ref())?)?;
        let config = self.read_blob(manifest.config().digest().as_ref())?;
        let image = layout::image(&manifest, &config).map_err(invalid)?;
        let place = |blob: &str| -> io::Result<(u64, u64)> {
            let name = format!("blobs/{}", blob.replace(':', "/"));
            self.files.get(&name).copied().ok_or_else(|| invalid(format!("{name} is missing")))
        };
        let blobs =
            image.layers.iter().map(|layer| place(&layer.blob)).collect::<io::Result<_>>()?;
        Ok(Some(Archived { image, archive: self.path.to_owned(), blobs }))
    }

    /// A blob that is what its digest says.
    fn read_blob(&self, expected: &str) -> io::Result<Vec<u8>> {
        let bytes = self.read(&format!("blobs/{}", expected.replace(':', "/")))?;
        let found = digest(&bytes);
        if found == expected {
            Ok(bytes)
        } else {
            Err(invalid(format!("blob {expected} has digest {found}")))
        }
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let (offset, length) = self
            .files
            .get(name)
            .copied()
            .ok_or_else(|| invalid(format!("{name} is missing: not an OCI archive")))?;
        if length > MAX_JSON_BYTES {
            return Err(invalid(format!("{name} is longer than {MAX_JSON_BYTES} bytes")));
        }
        let mut file = File::open(self.path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    Ok(serde_json::from_slice(bytes)?)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
