//! The image store: layers by digest, images by id, names.
//!
//! ```text
//! ROOT/images/
//!   lock              shared while anyone works here, exclusive to clean up
//!   tmp/              half-made files, and a lock for each layer under conversion
//!   layers/KEY.erofs  a converted layer    layers/KEY.json   what is known of it; its presence makes the layer count
//!   images/ID.json    an image             names/NAME        the id an image's name stands for
//!   downloads/        blobs on their way from a registry, kept if a pull breaks off
//! ```
//!
//! Owner: whichever processes use it; there is no daemon. Everything becomes visible by one rename, after it reached the disk.
//! A process that is killed leaves at most files in `tmp/`, or a layer without its `.json`; [`Store::open`] removes both when
//! nobody else is at work.
//!
//! A layer's key is its `diff_id`, so images share it. A layer that needed the ones below it (see [`crate::layer`]) goes by its
//! chain of layers instead.

mod convert;
mod files;
mod mounts;
mod name;
#[cfg(feature = "registry")]
mod pull;
mod record;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use files::{Directories, StoreLock};
pub use name::ImageName;
use record::{ImageRecord, LayerRecord};
pub use record::{ImageSummary, LayerBlob, PreparedImage};

use crate::image::{ImageError, ImageSource};
use crate::layer::LayerError;
use crate::limits::Limits;
use crate::progress::{LayerOutcome, Progress, ProgressEvent};

/// Why the store can't do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the image store at {path}")]
    Store { path: PathBuf, source: io::Error },
    #[error("cannot import {image}")]
    Image { image: String, source: ImageError },
    #[cfg(feature = "registry")]
    #[error("cannot pull {image}")]
    Pull {
        image: String,
        source: crate::registry::RegistryError,
    },
    #[error("layer {digest} is refused")]
    Layer { digest: String, source: LayerError },
    #[error("no image {name:?} is in the store")]
    NotFound { name: String },
    #[error("{prefix:?} is the beginning of several images' ids")]
    AmbiguousId { prefix: String },
    #[error("{name:?} is no image name: {problem}")]
    Name { name: String, problem: &'static str },
    #[error("{path} is damaged; remove the image and import it again")]
    Damaged {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("layer {diff_id} of image {image} is missing from the store; import the image again")]
    MissingLayer { image: String, diff_id: String },
}

/// What removing an image did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// The id of the image, if nothing refers to it any more.
    pub deleted: Option<String>,
}

/// What a clean-up removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pruned {
    pub images: usize,
    pub layers: usize,
    pub bytes: u64,
}

/// The images of one root directory.
#[derive(Debug, Clone)]
pub struct Store {
    directories: Directories,
    limits: Limits,
    mounts_max: usize,
}

impl Store {
    /// Open the store below `root`, making it if it isn't there, and remove what killed processes left.
    ///
    /// # Errors
    /// The directories can't be made or read.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let directories = Directories::create(&root.join("images"))?;
        if let Some(_lock) = StoreLock::try_exclusive(&directories)? {
            files::remove_leftovers(&directories)?;
        }
        Ok(Self {
            directories,
            limits: Limits::default(),
            mounts_max: mounts::MOUNTS_MAX,
        })
    }

    /// With other limits than the usual ones.
    #[must_use]
    pub const fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Merge layers of images that have more of them than `max`, which is at least 1.
    #[must_use]
    pub const fn with_mounts_max(mut self, max: usize) -> Self {
        self.mounts_max = if max == 0 { 1 } else { max };
        self
    }

    /// Bring an image into the store under `name`, or under what it is called where it comes from.
    ///
    /// Layers that are here already are not read again. Several imports may go on at once.
    ///
    /// # Errors
    /// The image or one of its layers is refused, or the store can't be written to; nothing of the image is visible then.
    pub fn import(
        &self,
        source: &ImageSource,
        name: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<PreparedImage, Error> {
        let name = name.map(ImageName::parse).transpose()?;
        let _lock = StoreLock::shared(&self.directories)?;
        let image_error = |source_error| Error::Image {
            image: source.to_string(),
            source: source_error,
        };
        let image = source
            .open(&self.limits, &self.directories.temporary)
            .map_err(image_error)?;
        let name = match name {
            Some(name) => name,
            None => ImageName::parse(&image.suggested_name)?,
        };
        let bytes = image
            .layers
            .iter()
            .filter_map(|layer| layer.blob.as_ref())
            .map(|(_, size)| size)
            .sum();
        progress.event(ProgressEvent::ImageStarted {
            layers: image.layers.len(),
            bytes,
        });
        if let Some(known) = self.known(image.id.hex(), progress)? {
            self.set_name(&name, &known.id)?;
            progress.event(ProgressEvent::ImageFinished);
            return self.prepare(&known);
        }
        let layers = convert::layers(&self.directories, self.limits, &image, progress)?;
        let (mounts, root) = mounts::choose(&self.directories, &layers, self.mounts_max)?;
        let record = ImageRecord::new(&image, layers, mounts, root);
        self.directories
            .write_json(&self.directories.image(&record.id), &record)?;
        self.set_name(&name, &record.id)?;
        progress.event(ProgressEvent::ImageFinished);
        self.prepare(&record)
    }

    /// The image of this name, or id, or beginning of an id.
    ///
    /// # Errors
    /// There is none, or more than one; or a layer was removed behind the store's back.
    pub fn resolve(&self, name_or_id: &str) -> Result<PreparedImage, Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        let record = self.find(name_or_id)?;
        self.prepare(&record)
    }

    /// The image's configuration as it came, JSON.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn raw_config(&self, name_or_id: &str) -> Result<String, Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        self.find(name_or_id).map(|record| record.raw_config)
    }

    /// All images, by name.
    ///
    /// # Errors
    /// The store can't be read.
    pub fn list(&self) -> Result<Vec<ImageSummary>, Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        let names = self.names()?;
        let mut images = Vec::new();
        for record in self.records()? {
            let own = names
                .iter()
                .filter(|(_, id)| *id == record.id)
                .map(|(name, _)| name.clone())
                .collect();
            images.push(ImageSummary {
                names: own,
                created: record.config.created.clone(),
                size_bytes: record.mounts().iter().map(|layer| layer.size_bytes).sum(),
                layers: record.layers.len(),
                imported_at: record.imported_at,
                id: record.id,
            });
        }
        images.sort_by(|a, b| a.names.cmp(&b.names).then_with(|| a.id.cmp(&b.id)));
        Ok(images)
    }

    /// Give an image one more name, taking it from whichever image had it.
    ///
    /// # Errors
    /// There is no such image, or `new` is no name.
    pub fn tag(&self, name_or_id: &str, new: &str) -> Result<(), Error> {
        let new = ImageName::parse(new)?;
        let _lock = StoreLock::shared(&self.directories)?;
        let record = self.find(name_or_id)?;
        self.set_name(&new, &record.id)
    }

    /// Take a name from its image, and the image away with its last name; an id takes all names.
    ///
    /// # Errors
    /// There is no such image.
    pub fn remove(&self, name_or_id: &str) -> Result<Removed, Error> {
        let lock = StoreLock::shared(&self.directories)?;
        let record = self.find(name_or_id)?;
        let mut of_image = self.names()?;
        of_image.retain(|(_, id)| *id == record.id);
        let by_name = ImageName::parse(name_or_id).ok().map(|name| name.to_string());
        let mut removed = Removed::default();
        let total = of_image.len();
        let named = of_image.iter().any(|(name, _)| by_name.as_ref() == Some(name));
        for (name, _) in of_image
            .into_iter()
            .filter(|(name, _)| !named || by_name.as_ref() == Some(name))
        {
            files::remove(&self.directories.name(&ImageName::parse(&name)?))?;
            removed.untagged.push(name);
        }
        if removed.untagged.len() == total {
            files::remove(&self.directories.image(&record.id))?;
            removed.deleted = Some(record.id);
        }
        drop(lock);
        // Layers go as well, unless someone is just using the store: then the next clean-up takes them.
        if removed.deleted.is_some()
            && let Some(_lock) = StoreLock::try_exclusive(&self.directories)?
        {
            self.remove_unused_layers()?;
        }
        Ok(removed)
    }

    /// Remove images without a name, except those in `keep_ids`, and layers no image has. Waits for others to finish.
    ///
    /// # Errors
    /// The store can't be read or written to.
    pub fn prune(&self, keep_ids: &[String]) -> Result<Pruned, Error> {
        let _lock = StoreLock::exclusive(&self.directories)?;
        files::remove_leftovers(&self.directories)?;
        files::remove_downloads(&self.directories)?;
        let named: BTreeSet<String> = self.names()?.into_iter().map(|(_, id)| id).collect();
        let mut images = 0;
        for record in self.records()? {
            if !named.contains(&record.id) && !keep_ids.contains(&record.id) {
                files::remove(&self.directories.image(&record.id))?;
                images += 1;
            }
        }
        let (layers, bytes) = self.remove_unused_layers()?;
        Ok(Pruned {
            images,
            layers,
            bytes,
        })
    }

    fn remove_unused_layers(&self) -> Result<(usize, u64), Error> {
        let used: BTreeSet<String> = self
            .records()?
            .into_iter()
            .flat_map(|record| {
                record
                    .mounts()
                    .iter()
                    .map(|layer| layer.key.clone())
                    .collect::<Vec<_>>()
            })
            .collect();
        let (mut layers, mut bytes) = (0, 0);
        for key in self.directories.layer_keys()? {
            if used.contains(&key) {
                continue;
            }
            let blob = self.directories.layer_blob(&key);
            bytes += fs::metadata(&blob).map_or(0, |metadata| metadata.len());
            // The record first: without it the blob doesn't count.
            files::remove(&self.directories.layer_record(&key))?;
            files::remove(&blob)?;
            layers += 1;
        }
        Ok((layers, bytes))
    }

    /// An image that is here already, with all it needs.
    fn known(&self, id: &str, progress: &dyn Progress) -> Result<Option<ImageRecord>, Error> {
        let Ok(Some(record)) = self
            .directories
            .read_json::<ImageRecord>(&self.directories.image(id))
        else {
            return Ok(None);
        };
        if record.mounts().len() > self.mounts_max || self.prepare(&record).is_err() {
            return Ok(None);
        }
        for (index, layer) in record.layers.iter().enumerate() {
            let outcome = LayerOutcome::AlreadyPresent {
                size_bytes: layer.size_bytes,
            };
            let digest = layer.digest.to_string();
            progress.event(ProgressEvent::LayerFinished {
                index,
                digest: &digest,
                outcome,
            });
        }
        Ok(Some(record))
    }

    fn set_name(&self, name: &ImageName, id: &str) -> Result<(), Error> {
        self.directories
            .write_file(&self.directories.name(name), id.as_bytes())
    }

    fn find(&self, name_or_id: &str) -> Result<ImageRecord, Error> {
        let not_found = || Error::NotFound {
            name: name_or_id.to_owned(),
        };
        if let Ok(name) = ImageName::parse(name_or_id)
            && let Ok(id) = fs::read_to_string(self.directories.name(&name))
        {
            return self
                .directories
                .read_json(&self.directories.image(id.trim()))?
                .ok_or_else(not_found);
        }
        let prefix = name_or_id.strip_prefix("sha256:").unwrap_or(name_or_id);
        if prefix.len() < 4 || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(not_found());
        }
        let mut found: Vec<String> = self
            .directories
            .image_ids()?
            .into_iter()
            .filter(|id| id.starts_with(prefix))
            .collect();
        match (found.pop(), found.is_empty()) {
            (Some(id), true) => self
                .directories
                .read_json(&self.directories.image(&id))?
                .ok_or_else(not_found),
            (Some(_), false) => Err(Error::AmbiguousId {
                prefix: prefix.to_owned(),
            }),
            (None, _) => Err(not_found()),
        }
    }

    fn records(&self) -> Result<Vec<ImageRecord>, Error> {
        let mut records = Vec::new();
        for id in self.directories.image_ids()? {
            // Another process may just have removed it.
            records.extend(self.directories.read_json(&self.directories.image(&id))?);
        }
        Ok(records)
    }

    /// Names and the ids they stand for.
    fn names(&self) -> Result<Vec<(String, String)>, Error> {
        let mut names = Vec::new();
        for (name, path) in self.directories.names()? {
            if let Ok(id) = fs::read_to_string(path) {
                names.push((name, id.trim().to_owned()));
            }
        }
        names.sort();
        Ok(names)
    }

    fn prepare(&self, record: &ImageRecord) -> Result<PreparedImage, Error> {
        let mut names = self.names()?;
        names.retain(|(_, id)| *id == record.id);
        let mut image = PreparedImage {
            id: record.id.clone(),
            names: names.into_iter().map(|(name, _)| name).collect(),
            manifest_digest: record.manifest_digest.clone(),
            config: record.config.clone(),
            root: crate::layer::RootMetadata::default(),
            layers: Vec::new(),
        };
        for layer in record.mounts() {
            let known = self.directories.layer(&layer.key)?;
            let missing = || Error::MissingLayer {
                image: record.id.clone(),
                diff_id: layer.diff_id.to_string(),
            };
            let LayerRecord {
                root,
                hides_lower,
                size_bytes,
                ..
            } = known.ok_or_else(missing)?;
            if hides_lower {
                // overlayfs merges all layers' roots whatever they are marked with: what is hidden must not be there.
                image.layers.clear();
            }
            image.root = record.root.or(root).unwrap_or(image.root);
            image.layers.push(LayerBlob {
                digest: layer.digest.to_string(),
                diff_id: layer.diff_id.to_string(),
                path: self.directories.layer_blob(&layer.key),
                size_bytes,
            });
        }
        Ok(image)
    }
}
