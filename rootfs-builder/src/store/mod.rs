//! The image store: layers by digest, images by id, names.
//!
//! ```text
//! ROOT/images/
//!   lock              shared while anyone works here, exclusive to clean up
//!   tmp/              half-made files, and a lock for each layer under conversion
//!   layers/KEY.erofs  a converted layer    layers/KEY.json   what is known of it; its presence makes the layer count
//!   images/ID.json    an image             names/NAME        the id an image's name stands for
//!   templates/        empty file systems for writable layers, by size
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
mod inspect;
mod mounts;
mod name;
#[cfg(feature = "registry")]
mod pull;
mod record;
mod removal;
mod templates;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use files::{Directories, StoreLock};
pub use inspect::{HistoryEntry, ImageDetails, LayerDetails};
pub use name::ImageName;
use record::{ImageRecord, LayerRecord};
pub use record::{ImageSummary, LayerBlob, PreparedImage};
pub use removal::{PruneOptions, Pruned, PrunedImage, RemoveOptions, Removed};

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
    #[error("image {name} is used by a container; remove the container first, or force the removal")]
    InUse { id: String, name: String },
    #[error("image {id} goes by several names ({}); remove them one by one, or force the removal", names.join(", "))]
    SeveralNames { id: String, names: Vec<String> },
    #[error("cancelled")]
    Cancelled,
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
        let result = self.import_layers(source, name, progress);
        self.tidied(result)
    }

    fn import_layers(
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
        let record = match self.known(image.id.hex(), progress)? {
            Some(known) => known,
            None => {
                let layers = convert::layers(
                    &self.directories,
                    self.limits,
                    &image,
                    progress,
                    &convert::AllThere,
                )?;
                let (mounts, root) = mounts::choose(&self.directories, &layers, self.mounts_max)?;
                ImageRecord::new(&image, layers, mounts, root)
            }
        };
        let record = self.publish(record, &name, None)?;
        progress.event(ProgressEvent::ImageFinished);
        self.prepare(&record)
    }

    /// Make an image whose layers are all there visible, under a name, and remember what a registry calls it.
    fn publish(
        &self,
        mut record: ImageRecord,
        name: &ImageName,
        repo_digest: Option<String>,
    ) -> Result<ImageRecord, Error> {
        // Whoever removes the image at this moment does it before or after, not in between.
        let _names = self.directories.lock_names()?;
        let path = self.directories.image(&record.id);
        let before = self.directories.read_json::<ImageRecord>(&path).ok().flatten();
        let known = before.iter().flat_map(|before| before.repo_digests.clone());
        record.repo_digests = known.chain(repo_digest).collect();
        record.repo_digests.sort();
        record.repo_digests.dedup();
        let changed = before.is_none_or(|before| {
            before.repo_digests != record.repo_digests || before.mounts() != record.mounts()
        });
        if changed {
            self.directories.write_json(&path, &record)?;
        }
        self.set_name(name, &record.id)?;
        Ok(record)
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

    /// Give an image one more name, taking it from whichever image had it.
    ///
    /// # Errors
    /// There is no such image, or `new` is no name.
    pub fn tag(&self, name_or_id: &str, new: &str) -> Result<(), Error> {
        let new = ImageName::parse(new)?;
        let _lock = StoreLock::shared(&self.directories)?;
        let _names = self.directories.lock_names()?;
        let record = self.find(name_or_id)?;
        self.set_name(&new, &record.id)
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
        let id = self.find_id(name_or_id)?;
        self.directories
            .read_json(&self.directories.image(&id))?
            .ok_or_else(|| Error::NotFound {
                name: name_or_id.to_owned(),
            })
    }

    /// The id of the image of this name, repository digest, id, or beginning of an id.
    fn find_id(&self, name_or_id: &str) -> Result<String, Error> {
        let not_found = || Error::NotFound {
            name: name_or_id.to_owned(),
        };
        if let Ok(name) = ImageName::parse(name_or_id)
            && let Ok(id) = fs::read_to_string(self.directories.name(&name))
        {
            return Ok(id.trim().to_owned());
        }
        if name_or_id.contains('@') {
            let mut records = self.records()?.into_iter();
            let found = records.find(|record| record.repo_digests.iter().any(|digest| digest == name_or_id));
            return found.map(|record| record.id).ok_or_else(not_found);
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
            (Some(id), true) => Ok(id),
            (Some(_), false) => Err(Error::AmbiguousId {
                prefix: prefix.to_owned(),
            }),
            (None, _) => Err(not_found()),
        }
    }

    /// All images whose description can be read.
    fn records(&self) -> Result<Vec<ImageRecord>, Error> {
        let mut records = Vec::new();
        for id in self.directories.image_ids()? {
            // Another process may just have removed it.
            match self.directories.read_json(&self.directories.image(&id)) {
                Ok(record) => records.extend(record),
                Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    fn names_of(&self, id: &str) -> Result<Vec<String>, Error> {
        let names = self.names()?.into_iter().filter(|(_, of)| of == id);
        Ok(names.map(|(name, _)| name).collect())
    }

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
        let mut image = PreparedImage {
            id: record.id.clone(),
            names: self.names_of(&record.id)?,
            repo_digests: record.repo_digests.clone(),
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
