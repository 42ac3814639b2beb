//! Bringing an image's layers into the store: what is there stays, the rest is converted, several layers at a time.
//!
//! Owner: the importing thread, which passes on what the converting threads tell. Those take the layers from the bottom; one that
//! needs the layers below waits for them, so the lowest one under way never waits and there is always progress.
//!
//! Invariant: the lock of a layer covers one chain of layers, and whoever holds it waits for shorter parts of the same chain only,
//! so processes that share layers can't wait for each other in a circle.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
/// How often whoever watches is asked whether to go on.
const TICK: Duration = Duration::from_millis(100);
/// Layers converted at a time; each keeps two processors busy and up to 50 MB of memory.
const WORKERS_MAX: usize = 4;

/// Where layers that are not in the store come from.
pub(super) trait Blobs: Sync {
    /// Wait until the blob of the layer `index` is there, or `stop` is set.
    fn wait_for(&self, index: usize, stop: &AtomicBool) -> Result<(), Error>;

    /// Tell how far they are, on the importing thread.
    fn tell(&self, progress: &dyn Progress);
}

/// They are all there.
pub(super) struct AllThere;

impl Blobs for AllThere {
    fn wait_for(&self, _index: usize, _stop: &AtomicBool) -> Result<(), Error> {
        Ok(())
    }

    fn tell(&self, _progress: &dyn Progress) {}
}

/// Make sure that all of the image's layers are in the store.
pub(super) fn layers(
    directories: &Directories,
    limits: Limits,
    image: &OpenImage,
    progress: &dyn Progress,
    blobs: &dyn Blobs,
) -> Result<Vec<ImageLayer>, Error> {
    let work = Work {
        directories,
        limits,
        image,
        blobs,
        chains: chains(image),
        next: AtomicUsize::new(0),
        done: Mutex::new(image.layers.iter().map(|_| None).collect()),
        error: Mutex::new(None),
        changed: Condvar::new(),
        stop: AtomicBool::new(false),
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = processors.min(WORKERS_MAX).min(image.layers.len());
    std::thread::scope(|scope| {
        let (sender, told) = mpsc::channel();
        for _ in 0..workers {
            let (work, sender) = (&work, sender.clone());
            let worker = std::thread::Builder::new()
                .name("layer-convert".into())
                .spawn_scoped(scope, move || work.run(&sender));
            if let Err(source) = worker {
                work.fail(thread_error(image, source));
            }
        }
        drop(sender);
        let mut ticked = Instant::now();
        loop {
            match told.recv_timeout(TICK) {
                Ok(told) => told.pass_on(image, progress),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if ticked.elapsed() >= TICK {
                blobs.tell(progress);
                if progress.cancelled() {
                    work.fail(Error::Cancelled);
                }
                ticked = Instant::now();
            }
        }
        // However quick it was: the end is seen.
        blobs.tell(progress);
    });
    work.result()
}

fn thread_error(image: &OpenImage, source: std::io::Error) -> Error {
    Error::Layer {
        digest: image
            .layers
            .first()
            .map_or_else(String::new, |layer| layer.digest().to_string()),
        source: LayerError::Thread { source },
    }
}

/// The layers that are not in the store: index in the image, blob's digest and size.
#[cfg(feature = "registry")]
pub(super) fn missing(directories: &Directories, image: &OpenImage) -> Vec<(usize, Digest, u64)> {
    let mut missing: Vec<(usize, Digest, u64)> = Vec::new();
    for (index, (source, chain)) in image.layers.iter().zip(chains(image)).enumerate() {
        let listed = |wanted: &Digest| missing.iter().any(|(_, digest, _)| digest == wanted);
        if let Some((digest, size)) = &source.blob
            && !listed(digest)
            && find(directories, &source.diff_id, &chain).is_none()
        {
            missing.push((index, digest.clone(), *size));
        }
    }
    missing
}

/// Tells whether a layer, by its index, is still missing.
#[cfg(feature = "registry")]
pub(super) fn is_missing(
    directories: &Directories,
    image: &OpenImage,
) -> Box<dyn Fn(usize) -> bool + Send + Sync> {
    let directories = directories.clone();
    let diff_ids = image.layers.iter().map(|layer| layer.diff_id.clone());
    let layers: Vec<(Digest, Digest)> = diff_ids.zip(chains(image)).collect();
    Box::new(move |index| {
        layers
            .get(index)
            .is_none_or(|(diff_id, chain)| find(&directories, diff_id, chain).is_none())
    })
}

/// For each layer the id of the chain it ends, as the image specification defines it.
fn chains(image: &OpenImage) -> Vec<Digest> {
    let mut chains: Vec<Digest> = Vec::with_capacity(image.layers.len());
    for layer in &image.layers {
        let diff_id = &layer.diff_id;
        chains.push(match chains.last() {
            None => diff_id.clone(),
            Some(below) => Digest::sha256_of(format!("{below} {diff_id}").as_bytes()),
        });
    }
    chains
}

/// The key of a layer that depends on nothing but itself.
fn own_key(diff_id: &Digest) -> String {
    format!("{}-{}", diff_id.algorithm_name(), diff_id.hex())
}

/// The key of a layer that depends on those below.
fn chain_key(chain: &Digest) -> String {
    format!("chain-{}", chain.hex())
}

/// A layer that is in the store. A record that can't be read counts as none: the layer is converted again.
fn find(directories: &Directories, diff_id: &Digest, chain: &Digest) -> Option<Found> {
    [own_key(diff_id), chain_key(chain)]
        .into_iter()
        .find_map(|key| Some((directories.layer(&key).ok()??, key)))
        .map(|(record, key)| Found { key, record })
}

/// A layer in the store.
#[derive(Debug, Clone)]
struct Found {
    key: String,
    record: LayerRecord,
}

/// What a converting thread tells the importing one.
enum Told {
    Started { index: usize },
    Advanced { index: usize, bytes_done: u64 },
    Finished { index: usize, outcome: LayerOutcome },
}

impl Told {
    fn pass_on(self, image: &OpenImage, progress: &dyn Progress) {
        let digest = |index: usize| image.layers[index].digest().to_string();
        match self {
            Self::Started { index } => progress.event(ProgressEvent::LayerStarted {
                index,
                digest: &digest(index),
                bytes: image.layers[index].blob.as_ref().map_or(0, |(_, size)| *size),
            }),
            Self::Advanced { index, bytes_done } => {
                progress.event(ProgressEvent::LayerAdvanced { index, bytes_done });
            }
            Self::Finished { index, outcome } => progress.event(ProgressEvent::LayerFinished {
                index,
                digest: &digest(index),
                outcome,
            }),
        }
    }
}

/// The layers of an image, on their way into the store.
struct Work<'a> {
    directories: &'a Directories,
    limits: Limits,
    image: &'a OpenImage,
    blobs: &'a dyn Blobs,
    chains: Vec<Digest>,
    next: AtomicUsize,
    done: Mutex<Vec<Option<Found>>>,
    error: Mutex<Option<Error>>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Work<'_> {
    fn run(&self, tell: &Sender<Told>) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.image.layers.len() || self.stopped() {
                return;
            }
            match self.layer(index, tell) {
                Ok(found) => {
                    self.done.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(found);
                    self.changed.notify_all();
                }
                Err(error) => self.fail(error),
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Give up. What fails after that only fails because of it.
    fn fail(&self, error: Error) {
        if !self.stop.swap(true, Ordering::Relaxed) {
            *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        // Under the lock, or a thread that is about to wait would miss it.
        let _done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }

    fn result(self) -> Result<Vec<ImageLayer>, Error> {
        if let Some(error) = self.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let done = self.done.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut layers = Vec::with_capacity(done.len());
        for (source, found) in self.image.layers.iter().zip(done) {
            let found = found.ok_or(Error::Cancelled)?;
            layers.push(ImageLayer {
                key: found.key,
                digest: source.digest().clone(),
                diff_id: source.diff_id.clone(),
                size_bytes: found.record.size_bytes,
                blob_bytes: source.blob.as_ref().map(|(_, size)| *size),
            });
        }
        Ok(layers)
    }

    /// The images of all layers below `index`, once they are finished.
    fn below(&self, index: usize) -> Result<Vec<PathBuf>, LayerError> {
        self.wait_until(|done| {
            let layers = done[..index].iter();
            layers
                .map(|layer| Some(self.directories.layer_blob(&layer.as_ref()?.key)))
                .collect()
        })
    }

    /// Wait for the same layer further down, if the image has it more than once: it is fetched and converted once.
    fn same_below(&self, index: usize) -> Result<(), LayerError> {
        let mut below = self.image.layers[..index].iter();
        let diff_id = &self.image.layers[index].diff_id;
        let Some(same) = below.position(|layer| layer.diff_id == *diff_id) else {
            return Ok(());
        };
        self.wait_until(|done| done[same].as_ref().map(|_| ()))
    }

    /// Wait for finished layers, or until it is time to stop.
    fn wait_until<T>(&self, ready: impl Fn(&[Option<Found>]) -> Option<T>) -> Result<T, LayerError> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.stopped() {
                return Err(LayerError::Stopped);
            }
            if let Some(found) = ready(&done) {
                return Ok(found);
            }
            done = self.changed.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Find one layer, or convert it.
    fn layer(&self, index: usize, tell: &Sender<Told>) -> Result<Found, Error> {
        let source = &self.image.layers[index];
        let say = |told| {
            // The importing thread listens for as long as this one lives.
            let _ = tell.send(told);
        };
        let present = || {
            let found = find(self.directories, &source.diff_id, &self.chains[index])?;
            let size_bytes = found.record.size_bytes;
            let outcome = LayerOutcome::AlreadyPresent { size_bytes };
            say(Told::Finished { index, outcome });
            Some(found)
        };
        self.same_below(index).map_err(|_| Error::Cancelled)?;
        if let Some(found) = present() {
            return Ok(found);
        }
        self.blobs.wait_for(index, &self.stop)?;
        // One process converts, others who want the same layer wait and then find it.
        let _lock = self
            .directories
            .lock_layer_unless(&chain_key(&self.chains[index]), &self.stop)?
            .ok_or(Error::Cancelled)?;
        if let Some(found) = present() {
            return Ok(found);
        }
        say(Told::Started { index });
        let found = self.convert(index, source, &say)?;
        let size_bytes = found.record.size_bytes;
        let outcome = LayerOutcome::Converted { size_bytes };
        say(Told::Finished { index, outcome });
        Ok(found)
    }

    fn convert(&self, index: usize, source: &LayerSource, say: &dyn Fn(Told)) -> Result<Found, Error> {
        let refused = |error: LayerError| Error::Layer {
            digest: source.digest().to_string(),
            source: error,
        };
        let missing = |error| Error::Image {
            image: self.image.suggested_name.clone(),
            source: error,
        };
        let (blob, size) = self.image.storage.open(&source.name).map_err(missing)?;
        if let Some((_, expected)) = &source.blob
            && *expected != size
        {
            return Err(refused(LayerError::WrongSize {
                expected: *expected,
                actual: size,
            }));
        }
        let lower = Lower::when_needed(|| self.below(index));
        let output = self.directories.temporary_file()?;
        let file = output.reopen().map_err(at(output.path()))?;
        let expected = Expected {
            blob: source.blob.clone(),
            diff_id: source.diff_id.clone(),
        };
        let reported = AtomicU64::new(0);
        let report = |bytes_done: u64| {
            if bytes_done - reported.load(Ordering::Relaxed).min(bytes_done) >= REPORT_BYTES {
                reported.store(bytes_done, Ordering::Relaxed);
                say(Told::Advanced { index, bytes_done });
            }
            !self.stopped()
        };
        let temporary = self.directories.temporary.as_path();
        let conversion = layer::convert(blob, &expected, &lower, self.limits, (file, temporary), &report)
            .map_err(refused)?;

        let key = if conversion.depends_on_lower {
            chain_key(&self.chains[index])
        } else {
            own_key(&source.diff_id)
        };
        let record = LayerRecord::new(&source.diff_id, &conversion);
        self.directories
            .publish(output, &self.directories.layer_blob(&key), 0o444)?;
        self.directories
            .write_json(&self.directories.layer_record(&key), &record)?;
        Ok(Found { key, record })
    }
}
