//! Unpacked layers and the records of images on the node's disk.
//!
//! `layers/<hex>` is whole or absent: a layer is unpacked beside it, synced, and renamed. `records/<hash
//! of the name>.json` says which layers an image has.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    layout::{Image, Layer},
    unpack::{digest, unpack_layer},
};
use crate::{
    kubelet::runtime::{ImageConfig, UnpackedImage},
    sys::rootdir::{is_dir, remove_tree},
};

/// An image that is on the disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Complete name.
    pub(super) name: String,
    /// As in `UnpackedImage`.
    pub(super) digest: String,
    pub(super) bytes: u64,
    /// Folders, lowest first.
    layers: Vec<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    working_dir: String,
    user: String,
    stop_signal: String,
}

impl Record {
    pub(super) fn new(name: String, digest: String, image: &Image) -> Self {
        let config = image.config.clone();
        Self {
            name,
            digest,
            bytes: image.layers.iter().map(|layer| layer.blob_bytes).sum(),
            layers: image.layers.iter().map(|layer| layer.folder().to_owned()).collect(),
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            env: config.env,
            working_dir: config.working_dir,
            user: config.user,
            stop_signal: config.stop_signal,
        }
    }
}

#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    /// Makes the folders and clears what a crash left half done.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        remove_tree(&dir.join("parts"))?;
        for folder in ["layers", "records", "parts"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        Ok(Self { dir })
    }

    /// The folder with archives in it.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn layer_dir(&self, folder: &str) -> PathBuf {
        self.dir.join("layers").join(folder)
    }

    pub(super) fn has_layer(&self, layer: &Layer) -> bool {
        is_dir(&self.layer_dir(layer.folder()))
    }

    /// A path for a blob on its way; removed at the next start if it stays.
    pub(super) fn part(&self, layer: &Layer) -> PathBuf {
        self.dir.join("parts").join(format!("{}.blob", layer.folder()))
    }

    /// Unpacks a layer; the caller makes sure that nobody else does the same one now. Blocks.
    pub(super) fn add_layer(&self, layer: &Layer, blob: impl io::Read) -> io::Result<()> {
        let part = self.dir.join("parts").join(layer.folder());
        remove_tree(&part)?;
        fs::create_dir_all(&part)?;
        let found = unpack_layer(blob, &part)?;
        if found != layer.diff_id {
            remove_tree(&part)?;
            let message = format!("layer {} unpacked has digest {found}", layer.diff_id);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        fs::rename(&part, self.layer_dir(layer.folder()))
    }

    fn record_path(&self, name: &str) -> PathBuf {
        let hash = digest(name.as_bytes());
        let hex = hash.split_once(':').map_or(hash.as_str(), |(_, hex)| hex);
        self.dir.join("records").join(format!("{hex}.json"))
    }

    pub(super) fn save(&self, record: &Record) -> io::Result<()> {
        let path = self.record_path(&record.name);
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec(record)?)?;
        fs::File::open(&part)?.sync_all()?;
        fs::rename(part, path)
    }

    /// The record of a name, when all of its layers are there.
    pub(super) fn find(&self, name: &str) -> Option<Record> {
        let text = fs::read(self.record_path(name)).ok()?;
        let record: Record = serde_json::from_slice(&text).ok()?;
        let whole = record.layers.iter().all(|layer| is_dir(&self.layer_dir(layer)));
        whole.then_some(record)
    }

    pub(super) fn records(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(self.dir.join("records"))? {
            let text = fs::read(entry?.path())?;
            if let Ok(record) = serde_json::from_slice(&text) {
                records.push(record);
            }
        }
        Ok(records)
    }

    /// The image in the runtime's terms, under the name that the pod wrote.
    pub(super) fn unpacked(&self, reference: &str, record: Record) -> UnpackedImage {
        UnpackedImage {
            reference: reference.to_owned(),
            digest: record.digest,
            layers: record.layers.iter().map(|layer| self.layer_dir(layer)).collect(),
            config: ImageConfig {
                entrypoint: record.entrypoint,
                cmd: record.cmd,
                env: record.env,
                working_dir: record.working_dir,
                user: record.user,
                stop_signal: record.stop_signal,
            },
        }
    }
}
