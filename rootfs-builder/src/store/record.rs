//! What the store writes down about images and layers, and what it tells its users.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::image::{ImageConfig, OpenImage};
use crate::layer::{Conversion, RootMetadata};

/// Raised when older records can't be read any more; layers are then converted again.
pub(super) const VERSION: u32 = 1;

/// `layers/KEY.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub version: u32,
    pub diff_id: Digest,
    /// Of the image, a multiple of 4096.
    pub size_bytes: u64,
    /// Of the archive it was made from.
    pub archive_bytes: u64,
    pub entries: u64,
    pub inodes: u64,
    pub root: Option<RootMetadata>,
    pub hides_lower: bool,
}

impl LayerRecord {
    pub fn new(diff_id: &Digest, conversion: &Conversion) -> Self {
        Self {
            version: VERSION,
            diff_id: diff_id.clone(),
            size_bytes: conversion.size_bytes,
            archive_bytes: conversion.archive_bytes,
            entries: conversion.entries,
            inodes: conversion.inodes,
            root: conversion.root,
            hides_lower: conversion.hides_lower,
        }
    }
}

/// `images/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub version: u32,
    pub id: String,
    pub manifest_digest: String,
    /// `HOST/REPOSITORY@DIGEST` of the registries it was pulled from.
    #[serde(default)]
    pub repo_digests: Vec<String>,
    pub config: ImageConfig,
    pub raw_config: String,
    /// All layers of the image, bottom one first.
    pub layers: Vec<ImageLayer>,
    /// What is mounted, if it isn't exactly these.
    #[serde(default)]
    pub mounts: Option<Vec<ImageLayer>>,
    /// The root's metadata: the uppermost layer's that has some.
    #[serde(default)]
    pub root: Option<RootMetadata>,
    /// Seconds since 1970.
    pub imported_at: u64,
}

/// A layer as an image refers to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageLayer {
    pub key: String,
    pub digest: Digest,
    pub diff_id: Digest,
    pub size_bytes: u64,
    /// Of the blob it was made from, if the image's format says.
    #[serde(default)]
    pub blob_bytes: Option<u64>,
}

impl ImageRecord {
    pub fn new(
        image: &OpenImage,
        layers: Vec<ImageLayer>,
        mounts: Option<Vec<ImageLayer>>,
        root: Option<RootMetadata>,
    ) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            version: VERSION,
            id: image.id.hex().to_owned(),
            manifest_digest: image
                .manifest
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            repo_digests: Vec::new(),
            config: image.config.clone(),
            raw_config: image.raw_config.clone(),
            layers,
            mounts,
            root,
            imported_at: now,
        }
    }

    /// The layers a container needs.
    pub fn mounts(&self) -> &[ImageLayer] {
        self.mounts.as_deref().unwrap_or(&self.layers)
    }
}

/// An image a container can be started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedImage {
    /// Hex digits of the configuration's digest: the image id as people know it.
    pub id: String,
    pub names: Vec<String>,
    /// Empty if the image came without a manifest.
    pub manifest_digest: String,
    /// `HOST/REPOSITORY@DIGEST` of every registry it was pulled from.
    pub repo_digests: Vec<String>,
    pub config: ImageConfig,
    /// The root directory's metadata: overlayfs shows that of its upper directory, so it must be given to that.
    pub root: RootMetadata,
    /// What to mount, bottom one first: the image's layers, some of them merged if they are many. None at all is possible.
    pub layers: Vec<LayerBlob>,
}

/// A converted layer: an EROFS image to be opened for reading only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlob {
    /// Of the layer as the image lists it.
    pub digest: String,
    pub diff_id: String,
    pub path: PathBuf,
    /// A multiple of 4096.
    pub size_bytes: u64,
}

/// A line of a list of images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    pub id: String,
    pub names: Vec<String>,
    /// RFC 3339, from the image.
    pub created: Option<String>,
    /// Space of all layers; shared ones count for each image.
    pub size_bytes: u64,
    pub layers: usize,
    /// Seconds since 1970.
    pub imported_at: u64,
    /// Empty if the image came without a manifest.
    pub manifest_digest: String,
    /// `HOST/REPOSITORY@DIGEST` of every registry it was pulled from.
    pub repo_digests: Vec<String>,
    pub labels: BTreeMap<String, String>,
}
