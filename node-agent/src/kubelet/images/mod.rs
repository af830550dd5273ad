//! Images: references, pulls, OCI archives, unpacked layers.
//!
//! `reference` and `layout` are pure; `store` keeps layers on disk, `archive` and `pull` are the two
//! sources. [`Images`] is the face of it.
//!
//! A process that pulls over TLS must have installed a process-wide rustls provider before
//! (`rustls::crypto::ring::default_provider().install_default()`), as the agent's `main` does.

use std::path::PathBuf;

/// Where images are kept and found.
#[derive(Clone, Debug)]
pub struct ImagesConfig {
    /// Layers and records: `<state-dir>/images`. OCI archives `*.tar` in it are images that need no
    /// registry.
    pub dir: PathBuf,
    /// `host:port` of registries that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
}

/// `imagePullPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

/// Credentials for one registry, out of a `kubernetes.io/dockerconfigjson` secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    #[default]
    Anonymous,
    Basic {
        username: String,
        password: String,
    },
}

/// Why an image cannot be had; `reason` gives the kubelet's word for it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("couldn't parse image name \"{reference}\": {message}")]
    InvalidName { reference: String, message: String },
    #[error("Container image \"{reference}\" is not present with pull policy of Never")]
    NeverPull { reference: String },
    /// The registry's own words.
    #[error("failed to pull and unpack image \"{reference}\": {message}")]
    Pull { reference: String, message: String },
    #[error("failed to unpack image \"{reference}\": {message}")]
    Unpack { reference: String, message: String },
}

impl ImageError {
    /// The container's `waiting.reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InvalidName { .. } => "InvalidImageName",
            Self::NeverPull { .. } => "ErrImageNeverPull",
            Self::Pull { .. } | Self::Unpack { .. } => "ErrImagePull",
        }
    }
}

/// One line of `status.images` of a Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// Tags and digests by which it is known.
    pub names: Vec<String>,
    /// Unpacked, or the archive's compressed size while it is not.
    pub size_bytes: u64,
}
