//! Images from registries. Blobs stream to the disk, are checked, unpacked and removed.

use std::{
    fmt::Write as _,
    fs::File,
    sync::{Arc, OnceLock},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use oci_client::{
    Client, Reference,
    client::{ClientConfig, ClientProtocol},
    manifest::OciDescriptor,
    secrets::RegistryAuth,
};
use oci_spec::image::{ImageIndex, ImageManifest};
use tokio::task::spawn_blocking;

use super::{
    Auth, Locks,
    layout::{self, Image, Layer},
    store::{Record, Store},
    unpack::digest,
};

/// Layers of one image that are fetched at a time (containerd's `max_concurrent_downloads`).
const PARALLEL_LAYERS: usize = 3;

/// Manifest types that are asked for: OCI's and Docker's, single and list.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

pub(super) struct Puller {
    /// Registries that are spoken to without TLS, as `host:port`.
    insecure: Vec<String>,
    /// Made by the first pull, as it needs the machine's CA certificates: a node without them, or
    /// with pre-loaded images only, runs all the same.
    client: OnceLock<Client>,
    store: Arc<Store>,
    layers: Arc<Locks>,
}

impl Puller {
    pub(super) fn new(insecure: Vec<String>, store: Arc<Store>, layers: Arc<Locks>) -> Self {
        Self { insecure, client: OnceLock::new(), store, layers }
    }

    fn client(&self) -> Result<&Client, String> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let protocol = if self.insecure.is_empty() {
            ClientProtocol::Https
        } else {
            ClientProtocol::HttpsExcept(self.insecure.clone())
        };
        let config = ClientConfig { protocol, ..ClientConfig::default() };
        let made = Client::try_from(config)
            .map_err(|error| format!("cannot make a client for registries: {}", words(&error)))?;
        Ok(self.client.get_or_init(|| made))
    }

    /// Fetches what is missing of an image and records it.
    ///
    /// # Errors
    /// The registry's words, or what went wrong with a layer.
    pub(super) async fn pull(&self, reference: &Reference, auth: &Auth) -> Result<Record, String> {
        let auth = match auth {
            Auth::Anonymous => RegistryAuth::Anonymous,
            Auth::Basic { username, password } => {
                RegistryAuth::Basic(username.clone(), password.clone())
            }
        };
        let (manifest, manifest_digest) = self.manifest(reference, &auth).await?;
        let config = self.config(reference, &manifest).await?;
        let image = layout::image(&manifest, &config)?;
        // Owned layers: a closure over borrowed ones is not general enough for a `Send` future.
        stream::iter(image.layers.clone())
            .map(|layer| async move { self.layer(reference, &layer).await })
            .buffer_unordered(PARALLEL_LAYERS)
            .try_collect::<()>()
            .await?;
        self.record(reference, &manifest_digest, &image).await
    }

    /// The manifest for this machine, and the digest by which the registry knows the name.
    async fn manifest(
        &self,
        reference: &Reference,
        auth: &RegistryAuth,
    ) -> Result<(ImageManifest, String), String> {
        let failed =
            |error| format!("failed to resolve reference \"{reference}\": {}", words(&error));
        let (bytes, found) =
            self.client()?.pull_manifest_raw(reference, auth, &ACCEPTED).await.map_err(failed)?;
        let unreadable = |error: serde_json::Error| format!("unreadable manifest: {error}");
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(unreadable)?;
        if value.get("manifests").is_none() {
            return Ok((serde_json::from_slice(&bytes).map_err(unreadable)?, found));
        }
        let index: ImageIndex = serde_json::from_slice(&bytes).map_err(unreadable)?;
        let chosen =
            layout::choose(&index).ok_or("no match for platform in manifest: not found")?;
        let inner = reference.clone_with_digest(chosen.digest().to_string());
        let (bytes, _) =
            self.client()?.pull_manifest_raw(&inner, auth, &ACCEPTED).await.map_err(failed)?;
        Ok((serde_json::from_slice(&bytes).map_err(unreadable)?, found))
    }

    async fn config(
        &self,
        reference: &Reference,
        manifest: &ImageManifest,
    ) -> Result<Vec<u8>, String> {
        let expected = manifest.config().digest().to_string();
        let blob = descriptor(&expected, manifest.config().size());
        let mut bytes = Vec::new();
        self.client()?
            .pull_blob(reference, &blob, &mut bytes)
            .await
            .map_err(|error| format!("failed to fetch {expected}: {}", words(&error)))?;
        if digest(&bytes) == expected { Ok(bytes) } else { Err(format!("{expected} was altered")) }
    }

    async fn layer(&self, reference: &Reference, layer: &Layer) -> Result<(), String> {
        let _mine = self.layers.lock(&layer.diff_id).await;
        if self.store.has_layer(layer) {
            return Ok(());
        }
        let failed = |what: &str| format!("failed to {what} layer {}", layer.blob);
        let part = self.store.part(layer);
        let mut file = tokio::fs::File::create(&part)
            .await
            .map_err(|error| format!("{}: {error}", failed("store")))?;
        self.client()?
            .pull_blob(reference, &descriptor(&layer.blob, layer.blob_bytes), &mut file)
            .await
            .map_err(|error| format!("{}: {}", failed("fetch"), words(&error)))?;
        drop(file);
        let (store, wanted) = (Arc::clone(&self.store), layer.clone());
        let unpacked = spawn_blocking(move || {
            let blob = File::open(store.part(&wanted))?;
            store.add_layer(&wanted, blob)?;
            std::fs::remove_file(store.part(&wanted))
        })
        .await;
        match unpacked {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("{}: {error}", failed("unpack"))),
            Err(error) => Err(format!("{}: {error}", failed("unpack"))),
        }
    }

    async fn record(
        &self,
        reference: &Reference,
        manifest_digest: &str,
        image: &Image,
    ) -> Result<Record, String> {
        let digest = layout::by_digest(reference, manifest_digest);
        let record = Record::new(reference.whole(), digest, image);
        let (store, saved) = (Arc::clone(&self.store), record.clone());
        match spawn_blocking(move || store.save(&saved)).await {
            Ok(Ok(())) => Ok(record),
            Ok(Err(error)) => Err(format!("failed to record the image: {error}")),
            Err(error) => Err(format!("failed to record the image: {error}")),
        }
    }
}

fn descriptor(digest: &str, bytes: u64) -> OciDescriptor {
    OciDescriptor {
        digest: digest.to_owned(),
        size: i64::try_from(bytes).unwrap_or(i64::MAX),
        ..OciDescriptor::default()
    }
}

/// An error with its causes: the registry's own words are often the last of them.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Transparent layers repeat their cause's words.
        if !text.contains(&inner.to_string()) {
            write!(text, ": {inner}").unwrap_or_default();
        }
        cause = inner.source();
    }
    text
}
