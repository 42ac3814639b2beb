//! Bringing an image's layers into the store: what is there stays, the rest is converted, bottom first.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Error;
use super::files::{Directories, at};
use super::record::{ImageLayer, LayerRecord};
use crate::digest::Digest;
use crate::image::{LayerSource, OpenImage};
use crate::layer::{self, Expected, LayerError, Lower};
use crate::limits::Limits;
use crate::progress::{LayerOutcome, Progress, ProgressEvent};

/// Progress is reported whenever so much more of a layer was read.
const REPORT_BYTES: u64 = 1 << 20;

/// Make sure that all of the image's layers are in the store.
pub(super) fn layers(
    directories: &Directories,
    limits: Limits,
    image: &OpenImage,
    progress: &dyn Progress,
) -> Result<Vec<ImageLayer>, Error> {
    layers_when(directories, limits, image, progress, &|_| Ok(()))
}

/// As [`layers`], where a layer's blob is only there once `ready` returned for it.
pub(super) fn layers_when(
    directories: &Directories,
    limits: Limits,
    image: &OpenImage,
    progress: &dyn Progress,
    ready: &dyn Fn(usize) -> Result<(), Error>,
) -> Result<Vec<ImageLayer>, Error> {
    let mut done: Vec<ImageLayer> = Vec::with_capacity(image.layers.len());
    let mut chain: Option<Digest> = None;
    for (index, source) in image.layers.iter().enumerate() {
        let chained = chain_id(chain.as_ref(), &source.diff_id);
        let job = Job {
            directories,
            limits,
            image,
            source,
            index,
            chain: &chained,
            progress,
            ready,
        };
        let (key, record) = job.run(&done)?;
        done.push(ImageLayer {
            key,
            digest: source.digest().clone(),
            diff_id: source.diff_id.clone(),
            size_bytes: record.size_bytes,
            blob_bytes: source.blob.as_ref().map(|(_, size)| *size),
        });
        chain = Some(chained);
    }
    Ok(done)
}

/// The layers that are not in the store: index in the image, blob's digest and size.
#[cfg(feature = "registry")]
pub(super) fn missing(directories: &Directories, image: &OpenImage) -> Vec<(usize, Digest, u64)> {
    let mut missing = Vec::new();
    let mut chain: Option<Digest> = None;
    for (index, source) in image.layers.iter().enumerate() {
        let chained = chain_id(chain.as_ref(), &source.diff_id);
        let keys = [own_key(&source.diff_id), chain_key(&chained)];
        let present = keys
            .iter()
            .any(|key| matches!(directories.layer(key), Ok(Some(_))));
        chain = Some(chained);
        let listed = missing
            .iter()
            .any(|(_, digest, _)| Some(digest) == source.blob.as_ref().map(|(digest, _)| digest));
        if let Some((digest, size)) = source.blob.as_ref().filter(|_| !present && !listed) {
            missing.push((index, digest.clone(), *size));
        }
    }
    missing
}

/// A chain's id, as the image specification defines it.
fn chain_id(below: Option<&Digest>, diff_id: &Digest) -> Digest {
    match below {
        None => diff_id.clone(),
        Some(below) => Digest::sha256_of(format!("{below} {diff_id}").as_bytes()),
    }
}

/// The key of a layer that depends on nothing but itself.
fn own_key(diff_id: &Digest) -> String {
    format!("{}-{}", diff_id.algorithm_name(), diff_id.hex())
}

/// The key of a layer that depends on those below.
fn chain_key(chain: &Digest) -> String {
    format!("chain-{}", chain.hex())
}

/// One layer of an image.
struct Job<'a> {
    directories: &'a Directories,
    limits: Limits,
    image: &'a OpenImage,
    source: &'a LayerSource,
    index: usize,
    chain: &'a Digest,
    progress: &'a dyn Progress,
    ready: &'a dyn Fn(usize) -> Result<(), Error>,
}

impl Job<'_> {
    fn run(&self, below: &[ImageLayer]) -> Result<(String, LayerRecord), Error> {
        if let Some(found) = self.present()? {
            return Ok(found);
        }
        (self.ready)(self.index)?;
        // One process converts, others who want the same layer wait and then find it.
        let _lock = self.directories.lock_layer(&own_key(&self.source.diff_id))?;
        if let Some(found) = self.present()? {
            return Ok(found);
        }
        let digest = self.source.digest().to_string();
        let bytes = self.source.blob.as_ref().map_or(0, |(_, size)| *size);
        self.progress.event(ProgressEvent::LayerStarted {
            index: self.index,
            digest: &digest,
            bytes,
        });
        let found = self.convert(below)?;
        let outcome = LayerOutcome::Converted {
            size_bytes: found.1.size_bytes,
        };
        self.progress.event(ProgressEvent::LayerFinished {
            index: self.index,
            digest: &digest,
            outcome,
        });
        Ok(found)
    }

    fn present(&self) -> Result<Option<(String, LayerRecord)>, Error> {
        for key in [own_key(&self.source.diff_id), chain_key(self.chain)] {
            // A record that can't be read counts as none: the layer is converted again.
            if let Ok(Some(record)) = self.directories.layer(&key) {
                let digest = self.source.digest().to_string();
                let outcome = LayerOutcome::AlreadyPresent {
                    size_bytes: record.size_bytes,
                };
                self.progress.event(ProgressEvent::LayerFinished {
                    index: self.index,
                    digest: &digest,
                    outcome,
                });
                return Ok(Some((key, record)));
            }
        }
        Ok(None)
    }

    fn convert(&self, below: &[ImageLayer]) -> Result<(String, LayerRecord), Error> {
        let refused = |source: LayerError| Error::Layer {
            digest: self.source.digest().to_string(),
            source,
        };
        let missing = |source| Error::Image {
            image: self.image.suggested_name.clone(),
            source,
        };
        let (blob, size) = self.image.storage.open(&self.source.name).map_err(missing)?;
        if let Some((_, expected)) = &self.source.blob
            && *expected != size
        {
            return Err(refused(LayerError::WrongSize {
                expected: *expected,
                actual: size,
            }));
        }
        let paths: Vec<PathBuf> = below
            .iter()
            .map(|layer| self.directories.layer_blob(&layer.key))
            .collect();
        let lower = Lower::open(paths.iter().map(PathBuf::as_path))
            .map_err(LayerError::from)
            .map_err(refused)?;

        let output = self.directories.temporary_file()?;
        let file = output.reopen().map_err(at(output.path()))?;
        let expected = Expected {
            blob: self.source.blob.clone(),
            diff_id: self.source.diff_id.clone(),
        };
        let reported = AtomicU64::new(0);
        let report = |bytes_done: u64| {
            if bytes_done - reported.load(Ordering::Relaxed).min(bytes_done) >= REPORT_BYTES {
                reported.store(bytes_done, Ordering::Relaxed);
                self.progress.event(ProgressEvent::LayerAdvanced {
                    index: self.index,
                    bytes_done,
                });
            }
        };
        let temporary = self.directories.temporary.as_path();
        let conversion = layer::convert(blob, &expected, &lower, self.limits, (file, temporary), &report)
            .map_err(refused)?;

        let key = if conversion.depends_on_lower {
            chain_key(self.chain)
        } else {
            own_key(&self.source.diff_id)
        };
        let record = LayerRecord::new(&self.source.diff_id, &conversion);
        self.directories
            .publish(output, &self.directories.layer_blob(&key), 0o444)?;
        self.directories
            .write_json(&self.directories.layer_record(&key), &record)?;
        Ok((key, record))
    }
}
