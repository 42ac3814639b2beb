//! Images as other tools hand them over: found, read, checked and described, before any layer is touched.
//!
//! An OCI image layout (a directory, or a tar archive of one) and `docker save`'s archive all end up as an [`OpenImage`]: the
//! image's identity, its configuration, and where each layer's blob is. Documents are bounded in size and verified by digest;
//! a digest is parsed into a [`Digest`] before it is ever part of a path.

mod config;
mod docker_archive;
mod oci;
mod source;
mod storage;

use std::io;
use std::path::PathBuf;

pub use config::ImageConfig;
#[cfg(feature = "registry")]
pub(crate) use oci::{Document, blob_name, open_manifest};
pub use source::ImageSource;
pub(crate) use storage::Storage;

use crate::digest::{Digest, DigestError};
use crate::tar::TarError;

/// Why an image can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(
        "{text:?} names no image: expected oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME]"
    )]
    Source { text: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is no image: {problem}")]
    NotAnImage { path: PathBuf, problem: &'static str },
    #[error("archive {path} is damaged")]
    Archive { path: PathBuf, source: TarError },
    #[error("{name} is missing from the image")]
    Missing { name: String },
    #[error("{name} has {bytes} bytes, more than the limit of {limit}")]
    DocumentTooLarge { name: String, bytes: u64, limit: u64 },
    #[error("{name} has {actual} bytes where its descriptor says {expected}")]
    WrongSize {
        name: String,
        expected: u64,
        actual: u64,
    },
    #[error("{name} does not have the digest it is named by")]
    WrongDigest { name: String },
    #[error("{name} is malformed")]
    Malformed { name: String, source: serde_json::Error },
    #[error("{name} is malformed: {problem}")]
    Invalid { name: String, problem: &'static str },
    #[error("{place} has an unusable digest")]
    Digest {
        place: &'static str,
        source: DigestError,
    },
    #[error("there is no image tagged {tag:?}; there are: {known}")]
    NoSuchTag { tag: String, known: String },
    #[error("several images are there, name one of them: {known}")]
    Ambiguous { known: String },
    #[error("the image is for {found}; this machine runs {wanted}")]
    Platform { found: String, wanted: &'static str },
    #[error("{media_type} is not something a container is made of")]
    MediaType { media_type: String },
    #[error("the image has {layers} layers, more than the limit of {limit}")]
    TooManyLayers { layers: usize, limit: usize },
    #[error("the manifest lists {layers} layers, the configuration {diff_ids}")]
    LayerCount { layers: usize, diff_ids: usize },
}

/// An image ready to be imported.
#[derive(Debug)]
pub(crate) struct OpenImage {
    pub storage: Storage,
    /// The configuration's digest: what identifies the image.
    pub id: Digest,
    /// Absent where the format has no manifest of its own.
    pub manifest: Option<Digest>,
    pub config: ImageConfig,
    /// The configuration as it stands in the image.
    pub raw_config: String,
    /// Bottom layer first.
    pub layers: Vec<LayerSource>,
    /// What the image is called where it comes from.
    pub suggested_name: String,
}

/// A layer's blob, not yet looked into.
#[derive(Debug, Clone)]
pub(crate) struct LayerSource {
    /// Where in the storage the blob is.
    pub name: String,
    /// The blob's digest and size, where the format has them.
    pub blob: Option<(Digest, u64)>,
    pub diff_id: Digest,
}

impl LayerSource {
    /// The digest people know the layer by.
    pub fn digest(&self) -> &Digest {
        self.blob.as_ref().map_or(&self.diff_id, |(digest, _)| digest)
    }
}

/// This machine's architecture as images call it.
pub(crate) const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};
