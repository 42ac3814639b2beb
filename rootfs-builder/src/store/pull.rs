//! Pulling into the store: layers are fetched by a few threads and converted by others as they arrive.

use std::sync::atomic::AtomicBool;

use super::convert::{self, Blobs};
use super::files::StoreLock;
use super::record::ImageLayer;
use super::{Error, ImageName, ImageRecord, PreparedImage, Store, mounts};
use crate::image::{ImageError, OpenImage};
use crate::progress::{Progress, ProgressEvent};
use crate::registry::{Client, Downloads, Fetching, PullOptions, Reference, RegistryError};

/// Layers on their way from a registry.
struct Fetched<'a> {
    fetching: Fetching,
    reference: &'a Reference,
}

impl Blobs for Fetched<'_> {
    fn wait_for(&self, index: usize, stop: &AtomicBool) -> Result<(), Error> {
        self.fetching
            .wait_for(index, stop)
            .map_err(failed(self.reference))
    }

    fn tell(&self, progress: &dyn Progress) {
        self.fetching
            .tell(&|index, done, bytes| progress.fetched(index, done, bytes));
    }
}

/// For `map_err`: a failure to pull this image.
fn failed(reference: &Reference) -> impl Fn(RegistryError) -> Error {
    let image = reference.to_string();
    move |source| Error::Pull {
        image: image.clone(),
        source,
    }
}

impl Store {
    /// Bring an image from its registry into the store, under `name` or the reference itself.
    ///
    /// Only what is new is fetched; what a pull that failed or was killed has fetched is not fetched again.
    ///
    /// # Errors
    /// The registry can't be reached or refuses, the image or one of its layers is refused, or the store can't be written to.
    pub fn pull(
        &self,
        reference: &Reference,
        name: Option<&str>,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<PreparedImage, Error> {
        let result = self.pull_layers(reference, name, options, progress);
        self.tidied(result)
    }

    fn pull_layers(
        &self,
        reference: &Reference,
        name: Option<&str>,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<PreparedImage, Error> {
        let name = ImageName::parse(name.unwrap_or(&reference.local_name()))?;
        let _lock = StoreLock::shared(&self.directories)?;
        let client = Client::new(reference, options).map_err(failed(reference))?;
        let downloads = Downloads::new(&self.directories.downloads).map_err(failed(reference))?;
        let image = downloads
            .image(&client, &self.limits)
            .map_err(failed(reference))?;
        let sizes = image
            .layers
            .iter()
            .filter_map(|layer| layer.blob.as_ref())
            .map(|(_, size)| size);
        progress.event(ProgressEvent::ImageStarted {
            layers: image.layers.len(),
            bytes: sizes.sum(),
        });
        let record = match self.known(image.id.hex(), progress)? {
            Some(known) => known,
            None => {
                // What an earlier pull left may be damaged, or be taken away by one that goes on beside this one: then the blob is
                // fetched anew, once.
                let mut again = false;
                let mut layers = self.fetch(&image, &downloads, client, options, progress, &mut again);
                if again && layers.is_err() {
                    let client = Client::new(reference, options).map_err(failed(reference))?;
                    layers = self.fetch(&image, &downloads, client, options, progress, &mut again);
                }
                let layers = layers?;
                let (mounts, root) = mounts::choose(&self.directories, &layers, self.mounts_max)?;
                ImageRecord::new(&image, layers, mounts, root)
            }
        };
        let repo_digest = image
            .manifest
            .as_ref()
            .map(|digest| format!("{}/{}@{digest}", reference.registry(), reference.repository()));
        let record = self.publish(record, &name, repo_digest)?;
        let documents = image.manifest.iter().chain([&image.id]);
        let blobs = image
            .layers
            .iter()
            .filter_map(|layer| layer.blob.as_ref())
            .map(|(digest, _)| digest);
        documents.chain(blobs).for_each(|digest| downloads.forget(digest));
        progress.event(ProgressEvent::ImageFinished);
        self.prepare(&record)
    }

    /// Fetch and convert what is missing. `again`: whether another attempt may help.
    fn fetch(
        &self,
        image: &OpenImage,
        downloads: &Downloads,
        client: Client,
        options: &PullOptions,
        progress: &dyn Progress,
        again: &mut bool,
    ) -> Result<Vec<ImageLayer>, Error> {
        let reference = client.reference().clone();
        let missing = convert::missing(&self.directories, image);
        let is_missing = convert::is_missing(&self.directories, image);
        let fetching = Fetching::start(downloads.clone(), client, missing, options.parallel, is_missing)
            .map_err(failed(&reference))?;
        let blobs = Fetched {
            fetching,
            reference: &reference,
        };
        convert::layers(&self.directories, self.limits, image, progress, &blobs).inspect_err(|error| {
            *again = match error {
                Error::Layer { digest, .. } => {
                    // A blob that turned out wrong must be fetched anew.
                    if let Ok(digest) = digest.parse() {
                        downloads.forget(&digest);
                    }
                    blobs.fetching.was_resumed(digest)
                }
                Error::Image { source, .. } => matches!(source, ImageError::Missing { .. }),
                _ => false,
            };
        })
    }
}
