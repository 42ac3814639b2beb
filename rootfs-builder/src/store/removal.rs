//! Taking images out of the store: names, images nobody wants, layers no image has.
//!
//! Images that containers were made from are the caller's to name ([`RemoveOptions::in_use`], [`PruneOptions::in_use`]): the store
//! knows of no containers.
//!
//! Order: name, then image, then its layers' records, then their blobs. Whoever is killed in between leaves at most something that
//! the next clean-up takes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::files::{self, StoreLock};
use super::record::{ImageRecord, LayerRecord};
use super::{Error, ImageName, Store};

/// How careful a removal is.
#[derive(Debug, Clone, Copy, Default)]
pub struct RemoveOptions<'a> {
    /// Ids of images that must stay because something was made from them.
    pub in_use: &'a [String],
    /// Take an image's names even if there are several, or it is in use; one in use then stays without a name.
    pub force: bool,
}

/// What removing an image did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// The id of the image, if nothing refers to it any more.
    pub deleted: Option<String>,
    /// Layers that went with it, by the digests of their archives.
    pub layers: Vec<String>,
    /// Space that is free now. Nothing, if somebody was using the store: then the next clean-up frees it.
    pub bytes: u64,
}

/// What a clean-up is to take.
#[derive(Debug, Clone, Copy, Default)]
pub struct PruneOptions<'a> {
    /// Ids of images that must stay.
    pub in_use: &'a [String],
    /// Take images that have a name, too.
    pub all: bool,
    /// Only say what would go.
    pub dry_run: bool,
}

/// What a clean-up removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pruned {
    pub images: Vec<PrunedImage>,
    pub layers: usize,
    /// Of layers, of parts of layers that pulls which broke off had fetched, and of templates for writable layers.
    pub bytes: u64,
}

/// An image a clean-up removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PrunedImage {
    pub id: String,
    pub names: Vec<String>,
}

/// What goes, by key: the digest of its archive and its space.
type UnusedLayers = BTreeMap<String, (String, u64)>;

impl Store {
    /// Take a name from its image, and the image away with its last name; an id takes all names.
    ///
    /// # Errors
    /// There is no such image.
    pub fn remove(&self, name_or_id: &str) -> Result<Removed, Error> {
        let options = RemoveOptions {
            in_use: &[],
            force: true,
        };
        self.remove_with(name_or_id, &options)
    }

    /// As [`Store::remove`], but not what is in use, and not several names at once, unless forced.
    ///
    /// # Errors
    /// There is no such image, or it is kept for one of these reasons; nothing was changed then.
    pub fn remove_with(&self, name_or_id: &str, options: &RemoveOptions<'_>) -> Result<Removed, Error> {
        let lock = StoreLock::shared(&self.directories)?;
        let names_lock = self.directories.lock_names()?;
        let id = self.find_id(name_or_id)?;
        let of_image = self.names_of(&id)?;
        let wanted = ImageName::parse(name_or_id).ok().map(|name| name.to_string());
        let by_name: Vec<String> = of_image
            .iter()
            .filter(|name| Some(*name) == wanted.as_ref())
            .cloned()
            .collect();
        if by_name.is_empty() && of_image.len() > 1 && !options.force {
            return Err(Error::SeveralNames { id, names: of_image });
        }
        let going = if by_name.is_empty() { &of_image } else { &by_name };
        let in_use = options.in_use.contains(&id);
        if in_use && !options.force && going.len() == of_image.len() {
            return Err(Error::InUse {
                id,
                name: name_or_id.to_owned(),
            });
        }
        let mut removed = Removed::default();
        for name in going {
            files::remove(&self.directories.name(&ImageName::parse(name)?))?;
            removed.untagged.push(name.clone());
        }
        if going.len() == of_image.len() && !in_use {
            files::remove(&self.directories.image(&id))?;
            removed.deleted = Some(id);
        }
        drop((names_lock, lock));
        if removed.deleted.is_some() {
            let unused = self.remove_unused_layers()?;
            removed.bytes = unused.values().map(|(_, bytes)| bytes).sum();
            removed.layers = unused.into_values().map(|(diff_id, _)| diff_id).collect();
        }
        Ok(removed)
    }

    /// Pass on how bringing in an image ended; of a refused one, the layers that were fine go as well.
    pub(super) fn tidied<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(Error::Layer { .. }) = &result {
            // The refusal is what matters; what can't be removed now goes with the next clean-up.
            let _ = self.remove_unused_layers();
        }
        result
    }

    /// Remove layers no image has, unless someone is just using the store: then the next clean-up takes them.
    fn remove_unused_layers(&self) -> Result<UnusedLayers, Error> {
        let Some(_lock) = StoreLock::try_exclusive(&self.directories)? else {
            return Ok(UnusedLayers::new());
        };
        let unused = self.unused_layers(&self.records()?)?;
        self.remove_layers(&unused)?;
        Ok(unused)
    }

    /// Take a name from its image, which stays.
    ///
    /// # Errors
    /// Nothing goes by this name.
    pub fn untag(&self, name: &str) -> Result<(), Error> {
        let _lock = StoreLock::shared(&self.directories)?;
        let _names = self.directories.lock_names()?;
        let parsed = ImageName::parse(name)?;
        let path = self.directories.name(&parsed);
        if !path.exists() {
            return Err(Error::NotFound {
                name: name.to_owned(),
            });
        }
        files::remove(&path)
    }

    /// Remove images nobody needs, layers no image has, and what pulls that broke off left. Waits for others to finish.
    ///
    /// # Errors
    /// The store can't be read or written to.
    pub fn prune(&self, options: &PruneOptions<'_>) -> Result<Pruned, Error> {
        let _lock = StoreLock::exclusive(&self.directories)?;
        let named: BTreeSet<String> = self.names()?.into_iter().map(|(_, id)| id).collect();
        let mut kept = Vec::new();
        let mut pruned = Pruned::default();
        for id in self.directories.image_ids()? {
            let record = self
                .directories
                .read_json::<ImageRecord>(&self.directories.image(&id));
            let wanted = options.in_use.contains(&id) || (named.contains(&id) && !options.all);
            match record {
                Ok(Some(record)) if wanted => kept.push(record),
                // One that can't be read is of no use to a container either.
                _ => pruned.images.push(PrunedImage {
                    names: self.names_of(&id)?,
                    id,
                }),
            }
        }
        let unused = self.unused_layers(&kept)?;
        pruned.layers = unused.len();
        pruned.bytes = unused.values().map(|(_, bytes)| bytes).sum();
        let leftovers = [&self.directories.downloads, &self.directories.templates];
        for directory in leftovers {
            pruned.bytes += files::bytes_below(directory)?;
        }
        if options.dry_run {
            return Ok(pruned);
        }
        for image in &pruned.images {
            for name in &image.names {
                files::remove(&self.directories.name(&ImageName::parse(name)?))?;
            }
            files::remove(&self.directories.image(&image.id))?;
        }
        self.remove_layers(&unused)?;
        files::remove_leftovers(&self.directories)?;
        for directory in leftovers {
            files::remove_below(directory)?;
        }
        Ok(pruned)
    }

    /// The layers that none of these images mounts.
    fn unused_layers(&self, images: &[ImageRecord]) -> Result<UnusedLayers, Error> {
        let used: BTreeSet<&str> = images
            .iter()
            .flat_map(ImageRecord::mounts)
            .map(|layer| layer.key.as_str())
            .collect();
        let mut unused = UnusedLayers::new();
        for key in self.directories.layer_keys()? {
            if used.contains(key.as_str()) {
                continue;
            }
            let bytes = fs::metadata(self.directories.layer_blob(&key)).map_or(0, |blob| blob.len());
            let record = self
                .directories
                .read_json::<LayerRecord>(&self.directories.layer_record(&key));
            let diff_id = match record {
                Ok(Some(record)) => record.diff_id.to_string(),
                _ => key.clone(),
            };
            unused.insert(key, (diff_id, bytes));
        }
        Ok(unused)
    }

    fn remove_layers(&self, unused: &UnusedLayers) -> Result<(), Error> {
        for key in unused.keys() {
            // The record first: without it the blob doesn't count.
            files::remove(&self.directories.layer_record(key))?;
            files::remove(&self.directories.layer_blob(key))?;
        }
        Ok(())
    }
}
