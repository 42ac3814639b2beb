//! Pulling into the store: layers are fetched by a few threads and converted here, bottom first, as they arrive.

use super::files::StoreLock;
use super::{Error, ImageName, ImageRecord, PreparedImage, Store, convert, mounts};
use crate::progress::{Progress, ProgressEvent};
use crate::registry::{Client, Credentials, Downloads, Fetching, Reference};

impl Store {
    /// Bring an image from its registry into the store, under `name` or the reference itself.
    ///
    /// Only what is new is fetched; what a pull that failed has fetched is not fetched again.
    ///
    /// # Errors
    /// The registry can't be reached or refuses, the image or one of its layers is refused, or the store can't be written to.
    pub fn pull(
        &self,
        reference: &Reference,
        name: Option<&str>,
        credentials: Option<Credentials>,
        progress: &dyn Progress,
    ) -> Result<PreparedImage, Error> {
        let name = ImageName::parse(name.unwrap_or(&reference.local_name()))?;
        let _lock = StoreLock::shared(&self.directories)?;
        let failed = |source| Error::Pull {
            image: reference.to_string(),
            source,
        };
        let client = Client::new(reference, credentials);
        let downloads = Downloads::new(&self.directories.downloads).map_err(failed)?;
        let image = downloads.image(&client, &self.limits).map_err(failed)?;
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
                let missing = convert::missing(&self.directories, &image);
                let fetching = Fetching::new(&downloads, &client, missing);
                let ready = |index| {
                    let told = |index, done, bytes| progress.fetched(index, done, bytes);
                    fetching.wait_for(index, &told).map_err(failed)
                };
                let layers = fetching
                    .during(|| convert::layers_when(&self.directories, self.limits, &image, progress, &ready))
                    .inspect_err(|error| {
                        // A blob that turned out wrong must be fetched anew.
                        if let Error::Layer { digest, .. } = error
                            && let Ok(digest) = digest.parse()
                        {
                            downloads.forget(&digest);
                        }
                    })?;
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
}
