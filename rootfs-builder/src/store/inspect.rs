//! What the store knows of its images, for people to look at.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;

use super::files::StoreLock;
use super::record::{ImageRecord, ImageSummary};
use super::{Error, Store};
use crate::image::ImageConfig;

/// All that is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDetails {
    /// Hex digits of the configuration's digest.
    pub id: String,
    pub names: Vec<String>,
    /// `HOST/REPOSITORY@DIGEST` of every registry it was pulled from.
    pub repo_digests: Vec<String>,
    /// Empty if the image came without a manifest.
    pub manifest_digest: String,
    pub config: ImageConfig,
    /// The configuration as it came, JSON.
    pub raw_config: String,
    /// The image's layers, bottom one first, whether or not they are mounted one by one.
    pub layers: Vec<LayerDetails>,
    /// What made the image, oldest first.
    pub history: Vec<HistoryEntry>,
    /// Space of what a container mounts.
    pub size_bytes: u64,
    /// Seconds since 1970.
    pub imported_at: u64,
}

/// A layer as its image describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDetails {
    /// Of the blob, compressed or not, if the image's format says; else of the archive.
    pub digest: String,
    /// Of the archive.
    pub diff_id: String,
    /// Of the blob, if the image's format says.
    pub blob_bytes: Option<u64>,
    /// Of the archive; nothing if the layer was merged into others and is gone itself.
    pub archive_bytes: Option<u64>,
    /// Of the file system made of it.
    pub size_bytes: u64,
}

/// One step of an image's making.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HistoryEntry {
    /// RFC 3339.
    pub created: Option<String>,
    pub created_by: Option<String>,
    pub author: Option<String>,
    pub comment: Option<String>,
    /// The step changed no file.
    pub empty_layer: bool,
    /// Space of the layer it made.
    pub size_bytes: u64,
}

impl Store {
    /// The image's configuration as it came, JSON.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn raw_config(&self, name_or_id: &str) -> Result<String, Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        self.find(name_or_id).map(|record| record.raw_config)
    }

    /// Everything about an image.
    ///
    /// # Errors
    /// As [`Store::resolve`], but its layers need not be there.
    pub fn inspect(&self, name_or_id: &str) -> Result<ImageDetails, Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        let record = self.find(name_or_id)?;
        let layers = record
            .layers
            .iter()
            .map(|layer| LayerDetails {
                digest: layer.digest.to_string(),
                diff_id: layer.diff_id.to_string(),
                blob_bytes: layer.blob_bytes,
                archive_bytes: match self.directories.layer(&layer.key) {
                    Ok(Some(record)) => Some(record.archive_bytes),
                    _ => None,
                },
                size_bytes: layer.size_bytes,
            })
            .collect();
        Ok(ImageDetails {
            names: self.names_of(&record.id)?,
            layers,
            history: history(&record),
            size_bytes: record.mounts().iter().map(|layer| layer.size_bytes).sum(),
            id: record.id,
            repo_digests: record.repo_digests,
            manifest_digest: record.manifest_digest,
            config: record.config,
            raw_config: record.raw_config,
            imported_at: record.imported_at,
        })
    }

    /// All images, by name. One whose description is damaged is left out; asked for by name, it says so.
    ///
    /// # Errors
    /// The store can't be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, id) in self.names()? {
            names.entry(id).or_default().push(name);
        }
        let mut images = Vec::new();
        for record in self.records()? {
            images.push(ImageSummary {
                names: names.remove(&record.id).unwrap_or_default(),
                created: record.config.created.clone(),
                size_bytes: record.mounts().iter().map(|layer| layer.size_bytes).sum(),
                layers: record.layers.len(),
                imported_at: record.imported_at,
                manifest_digest: record.manifest_digest,
                repo_digests: record.repo_digests,
                labels: record.config.labels,
                id: record.id,
            });
        }
        images.sort_by(|a, b| a.names.cmp(&b.names).then_with(|| a.id.cmp(&b.id)));
        Ok(images)
    }
}

/// The history its configuration tells, with the sizes of the layers that are not empty.
fn history(record: &ImageRecord) -> Vec<HistoryEntry> {
    let Ok(config) = serde_json::from_str::<ImageConfiguration>(&record.raw_config) else {
        return Vec::new();
    };
    let mut sizes = record.layers.iter().map(|layer| layer.size_bytes);
    let entries = config.history().clone().unwrap_or_default();
    entries
        .into_iter()
        .map(|entry| {
            let empty_layer = entry.empty_layer().unwrap_or(false);
            HistoryEntry {
                created: entry.created().clone(),
                created_by: entry.created_by().clone(),
                author: entry.author().clone(),
                comment: entry.comment().clone(),
                empty_layer,
                size_bytes: if empty_layer { 0 } else { sizes.next().unwrap_or(0) },
            }
        })
        .collect()
}
