//! A layer's blob on its way to the tar reader: hashed, decompressed and hashed again, on a thread of its own.
//!
//! The thread reads the blob, checks its digest and size and decompresses it into buffers; the reader, on the converting
//! thread, hashes them for the layer's `diff_id` and hands them on. Two buffers are under way at a time and come back to be filled
//! again, so memory is bounded and both cores work.
//!
//! Invariant: [`Decoder::finish`] reads to the blob's very end, so that what the digests cover is everything there is.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use crate::digest::{Algorithm, Digest, Hasher};
use crate::limits::Limits;
use crate::tar::Source;

use super::LayerError;

const BUFFER_BYTES: usize = 256 << 10;
const BUFFERS: usize = 6;

/// What a blob must turn out to be.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Digest and size of the blob as stored, if the image's format has them.
    pub blob: Option<(Digest, u64)>,
    /// Digest of the decompressed archive.
    pub diff_id: Digest,
}

/// The converting thread's end: a reader of the decompressed archive.
pub struct Decoder<'p> {
    filled: Option<Receiver<io::Result<Vec<u8>>>>,
    empty: Option<SyncSender<Vec<u8>>>,
    current: Vec<u8>,
    at: usize,
    hasher: Hasher,
    expected: Digest,
    thread: Option<JoinHandle<Result<u64, LayerError>>>,
    bytes: u64,
    /// Compressed bytes read so far: the thread counts, this end reports.
    consumed: Arc<AtomicU64>,
    progress: &'p dyn Fn(u64) -> bool,
}

impl<'p> Decoder<'p> {
    /// Start decompressing `blob`; `progress` gets the compressed bytes read so far, on the thread that reads, and says whether to
    /// go on.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start(
        blob: Box<dyn Read + Send>,
        expected: &Expected,
        limits: Limits,
        progress: &'p dyn Fn(u64) -> bool,
    ) -> Result<Self, LayerError> {
        let (filled_sender, filled) = mpsc::sync_channel(BUFFERS);
        let (empty, empty_receiver) = mpsc::sync_channel(BUFFERS);
        for _ in 0..BUFFERS {
            // The channel has room for all of them.
            let _ = empty.try_send(Vec::with_capacity(BUFFER_BYTES));
        }
        let declared = expected.blob.clone();
        let consumed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&consumed);
        let thread = std::thread::Builder::new()
            .name("layer-decode".into())
            .spawn(move || {
                let input = CountingReader::new(blob, declared, counter);
                Worker {
                    input: Some(input),
                    limits,
                    filled: filled_sender,
                    empty: empty_receiver,
                }
                .run()
            })
            .map_err(|source| LayerError::Thread { source })?;
        Ok(Self {
            filled: Some(filled),
            empty: Some(empty),
            current: Vec::new(),
            at: 0,
            hasher: Hasher::new(expected.diff_id.algorithm()),
            expected: expected.diff_id.clone(),
            thread: Some(thread),
            bytes: 0,
            consumed,
            progress,
        })
    }

    /// Read what is left, wait for the thread, and compare digests and sizes. Returns the archive's length.
    ///
    /// # Errors
    /// The blob was damaged, too large, or isn't what the image's manifest says.
    pub fn finish(mut self) -> Result<u64, LayerError> {
        while self.refill().is_ok_and(|more| more) {}
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let actual = self.hasher.clone().finish();
        if actual == self.expected {
            return Ok(self.bytes);
        }
        Err(LayerError::WrongDiffId {
            expected: self.expected.clone(),
            actual,
        })
    }

    /// The thread's error, if it had one: it explains whatever the tar reader saw.
    pub fn failure(&mut self) -> Option<LayerError> {
        // The thread may be waiting for a reader or for an empty buffer: both waits end when this side is gone.
        self.filled = None;
        self.empty = None;
        match self.thread.take()?.join() {
            Ok(Ok(_)) => None,
            Ok(Err(LayerError::Stopped)) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => Some(LayerError::Stopped),
        }
    }

    /// Get the next buffer; `false` at the end.
    fn refill(&mut self) -> io::Result<bool> {
        let Some(filled) = &self.filled else {
            return Ok(false);
        };
        let next = match filled.recv() {
            Ok(next) => next?,
            Err(_) => return Ok(false),
        };
        let used = std::mem::replace(&mut self.current, next);
        // A thread that has finished needs no more buffers.
        if let Some(empty) = &self.empty {
            let _ = empty.try_send(used);
        }
        self.at = 0;
        self.bytes += self.current.len() as u64;
        self.hasher.update(&self.current);
        if (self.progress)(self.consumed.load(Ordering::Relaxed)) {
            Ok(true)
        } else {
            Err(io::Error::other(LayerError::Stopped))
        }
    }
}

impl fmt::Debug for Decoder<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Decoder")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        // Without its receiver the thread stops at its next buffer.
        self.failure();
    }
}

impl Read for Decoder<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            if !self.refill()? {
                return Ok(0);
            }
        }
        let count = buffer.len().min(self.current.len() - self.at);
        buffer[..count].copy_from_slice(&self.current[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

impl Source for Decoder<'_> {
    fn skip(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            let here = (self.current.len() - self.at).min(usize::try_from(count).unwrap_or(usize::MAX));
            self.at += here;
            count -= here as u64;
            if count > 0 && !self.refill()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

/// The decompressing thread.
struct Worker {
    input: Option<CountingReader>,
    limits: Limits,
    filled: SyncSender<io::Result<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
}

impl Worker {
    fn run(mut self) -> Result<u64, LayerError> {
        let result = self.decode();
        if let Err(error) = &result {
            // The reader stops with this; the true error is this thread's result.
            let _ = self.filled.send(Err(io::Error::other(error.to_string())));
        }
        result
    }

    fn decode(&mut self) -> Result<u64, LayerError> {
        let Some(input) = self.input.take() else {
            return Err(LayerError::Stopped);
        };
        let mut buffered = BufReader::with_capacity(128 << 10, input);
        let magic = buffered
            .fill_buf()
            .map_err(|source| LayerError::Read { source })?;
        match Compression::detect(magic)? {
            Compression::None => {
                let total = self.pump(&mut buffered, |source| source.get_ref().bytes)?;
                buffered.into_inner().check().map(|()| total)
            }
            Compression::Gzip => {
                let mut decoder = flate2::bufread::MultiGzDecoder::new(buffered);
                let total = self.pump(&mut decoder, |decoder| decoder.get_ref().get_ref().bytes)?;
                decoder.into_inner().into_inner().check().map(|()| total)
            }
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered)
                    .map_err(|source| LayerError::Decompress { source })?;
                let total = self.pump(&mut decoder, |decoder| decoder.get_ref().get_ref().bytes)?;
                decoder.finish().into_inner().check().map(|()| total)
            }
        }
    }

    /// Fill buffers until the decoder has no more.
    fn pump<D: Read>(&mut self, decoder: &mut D, consumed: impl Fn(&D) -> u64) -> Result<u64, LayerError> {
        let mut total = 0;
        loop {
            let mut buffer = self.empty.recv().map_err(|_| LayerError::Stopped)?;
            buffer.clear();
            let count = decoder
                .by_ref()
                .take(BUFFER_BYTES as u64)
                .read_to_end(&mut buffer)
                .map_err(decode_error)?;
            if count == 0 {
                return Ok(total);
            }
            total += count as u64;
            self.check_size(total, consumed(decoder))?;
            self.filled.send(Ok(buffer)).map_err(|_| LayerError::Stopped)?;
        }
    }

    const fn check_size(&self, total: u64, compressed: u64) -> Result<(), LayerError> {
        if total > self.limits.layer_bytes {
            return Err(LayerError::TooLarge {
                limit: self.limits.layer_bytes,
            });
        }
        if total > self.limits.ratio_free_bytes
            && total / if compressed == 0 { 1 } else { compressed } > self.limits.compression_ratio
        {
            return Err(LayerError::Bomb {
                compressed,
                decompressed: total,
                limit: self.limits.compression_ratio,
            });
        }
        Ok(())
    }
}

fn decode_error(source: io::Error) -> LayerError {
    if source.kind() == io::ErrorKind::UnexpectedEof {
        return LayerError::Truncated;
    }
    match source.downcast::<LayerError>() {
        Ok(error) => error,
        Err(source) => LayerError::Decompress { source },
    }
}

/// What the blob's first bytes say; media types are not always right about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn detect(start: &[u8]) -> Result<Self, LayerError> {
        match start {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Self::Zstd),
            // A skippable frame may come first.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Self::Zstd),
            [b'B', b'Z', b'h', ..] => Err(LayerError::UnknownCompression { name: "bzip2" }),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Err(LayerError::UnknownCompression { name: "xz" }),
            _ => Ok(Self::None),
        }
    }
}

/// Counts and hashes what is read, and never reads more than the blob is said to have.
struct CountingReader {
    blob: Box<dyn Read + Send>,
    declared: Option<(Digest, u64)>,
    hasher: Hasher,
    bytes: u64,
    consumed: Arc<AtomicU64>,
}

impl CountingReader {
    fn new(blob: Box<dyn Read + Send>, declared: Option<(Digest, u64)>, consumed: Arc<AtomicU64>) -> Self {
        let algorithm = declared
            .as_ref()
            .map_or(Algorithm::Sha256, |(digest, _)| digest.algorithm());
        Self {
            blob,
            declared,
            hasher: Hasher::new(algorithm),
            bytes: 0,
            consumed,
        }
    }

    /// Read what the decoder left, then compare.
    fn check(mut self) -> Result<(), LayerError> {
        io::copy(&mut self, &mut io::sink()).map_err(decode_error)?;
        let Some((expected, size)) = self.declared else {
            return Ok(());
        };
        if self.bytes != size {
            return Err(LayerError::WrongSize {
                expected: size,
                actual: self.bytes,
            });
        }
        let actual = self.hasher.finish();
        if actual == expected {
            Ok(())
        } else {
            Err(LayerError::WrongDigest { actual })
        }
    }
}

impl Read for CountingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.blob.read(buffer)?;
        self.bytes += count as u64;
        if let Some((_, size)) = &self.declared
            && self.bytes > *size
        {
            return Err(io::Error::other(LayerError::WrongSize {
                expected: *size,
                actual: self.bytes,
            }));
        }
        // A blob without a digest of its own is vouched for by its diff_id.
        if self.declared.is_some() {
            self.hasher.update(&buffer[..count]);
        }
        self.consumed.store(self.bytes, Ordering::Relaxed);
        Ok(count)
    }
}
