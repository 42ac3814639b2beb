//! File contents on their way into an image: blocks, holes, and the small rests that go behind inodes.
//!
//! Owner: the thread that builds one image. A second thread, started with the writer, pushes what was written to the disk
//! while more arrives, so that the final flush has little left to wait for.
//!
//! Invariant: data goes to ever higher blocks; a block once handed out is never written again.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::ErofsError;
use super::format::{BLOCK, BLOCK_BYTES, NULL_BLOCK};
use super::tree::{FileData, Place};

/// Files from this size on may have holes; a hole is at least as long and aligned to it.
const HOLE_BYTES: usize = 64 << 10;
const HOLE_BITS: u8 = 16;
/// A chunk table has at most this many entries; larger files get larger chunks.
const CHUNK_TABLE_BITS: u8 = 18;
/// Rests up to this size go behind the inode: one block read for both. Larger ones would only fill up inode blocks.
pub const INLINE_MAX: usize = 2048;
/// Output is handed to the kernel in pieces of this size.
const BUFFER_BYTES: usize = 1 << 20;
/// Rests are kept in memory up to here, then in an unnamed file.
const SPOOL_MEMORY_BYTES: usize = 32 << 20;
/// The disk is asked to start writing whenever this much is new.
const WRITEBACK_BYTES: u64 = 16 << 20;

/// Takes file contents and says where they ended up.
#[derive(Debug)]
pub struct DataWriter {
    output: Output,
    /// The next block nobody has.
    next_block: u32,
    spool: Spool,
    scratch: Box<[u8]>,
    /// Some file got a chunk table.
    pub(super) chunked: bool,
}

impl DataWriter {
    /// Write to `file`, which is empty; unnamed spill files go to `temporary`.
    ///
    /// # Errors
    /// The file can't be written to.
    pub fn new(file: File, temporary: PathBuf) -> Result<Self, ErofsError> {
        Ok(Self {
            output: Output::new(file).map_err(|source| ErofsError::Write { source })?,
            next_block: 1,
            spool: Spool {
                memory: Vec::new(),
                file: None,
                len: 0,
                directory: temporary,
            },
            scratch: vec![0; HOLE_BYTES].into_boxed_slice(),
            chunked: false,
        })
    }

    /// Bytes of the image so far.
    pub fn bytes_used(&self) -> u64 {
        u64::from(self.next_block) * BLOCK_BYTES
    }

    /// Begin a file of `size` bytes; its contents follow in order.
    pub fn file(&mut self, size: u64) -> FileWriter<'_> {
        let size_bits = u8::try_from(u64::BITS - size.saturating_sub(1).leading_zeros()).unwrap_or(64);
        let chunk_bits = size_bits.saturating_sub(CHUNK_TABLE_BITS).max(HOLE_BITS);
        let first_block = self.next_block;
        FileWriter {
            writer: self,
            size,
            position: 0,
            chunk_bits,
            table: Vec::new(),
            chunk: None,
            first_block,
        }
    }

    /// A whole file out of `source`.
    ///
    /// # Errors
    /// The source ends early or fails, or the image can't be written.
    pub fn file_from(&mut self, size: u64, source: &mut dyn Read) -> Result<FileData, ErofsError> {
        let mut file = self.file(size);
        file.data(source, size)?;
        file.finish()
    }

    /// A block of its own for bytes that must not cross one.
    pub(super) fn block_for(&mut self, bytes: &[u8]) -> Result<u32, ErofsError> {
        let block = self.take_blocks(1)?;
        self.output.write_at(u64::from(block) * BLOCK_BYTES, bytes)?;
        Ok(block)
    }

    fn take_blocks(&mut self, count: u64) -> Result<u32, ErofsError> {
        let first = self.next_block;
        let next = u64::from(first) + count;
        // The last address is the mark of a hole.
        self.next_block = u32::try_from(next)
            .ok()
            .filter(|next| *next < NULL_BLOCK)
            .ok_or(ErofsError::TooLarge)?;
        Ok(first)
    }

    /// The parts the writer of the inodes goes on with: output, first free block, spooled rests.
    pub(super) fn into_parts(self) -> (Output, u32, Spool) {
        (self.output, self.next_block, self.spool)
    }
}

/// One file being written. Contents come as data and holes, in order; [`FileWriter::finish`] closes it.
#[derive(Debug)]
pub struct FileWriter<'a> {
    writer: &'a mut DataWriter,
    size: u64,
    position: u64,
    chunk_bits: u8,
    /// Addresses of the chunks that are complete.
    table: Vec<u32>,
    /// First block of the current chunk, once it has one.
    chunk: Option<u32>,
    first_block: u32,
}

impl FileWriter<'_> {
    /// The next `len` bytes are zeroes.
    ///
    /// # Errors
    /// As [`FileWriter::data`].
    pub fn hole(&mut self, len: u64) -> Result<(), ErofsError> {
        self.check_room(len)?;
        if self.is_small() {
            return self.small(&mut io::repeat(0), len);
        }
        let end = self.position + len;
        while self.position < end {
            let step = self.chunk_end().min(end) - self.position;
            self.advance(step);
        }
        Ok(())
    }

    /// The next `len` bytes come from `source`.
    ///
    /// # Errors
    /// The source ends early or fails, there is more than the file's size, or the image can't be written.
    pub fn data(&mut self, source: &mut dyn Read, len: u64) -> Result<(), ErofsError> {
        self.check_room(len)?;
        if self.is_small() {
            return self.small(source, len);
        }
        let end = self.position + len;
        while self.position < end {
            // Pieces end where a hole could begin, so that each is either written or left out.
            let piece_end = (self.position / HOLE_BYTES as u64 + 1) * HOLE_BYTES as u64;
            let len = usize::try_from(piece_end.min(end) - self.position).unwrap_or(HOLE_BYTES);
            read_full(source, &mut self.writer.scratch[..len], self.size, self.position)?;
            if !is_zero(&self.writer.scratch[..len]) {
                self.write_piece(len)?;
            }
            self.advance(len as u64);
        }
        Ok(())
    }

    /// The file is complete.
    ///
    /// # Errors
    /// Fewer bytes came than the file's size.
    pub fn finish(self) -> Result<FileData, ErofsError> {
        if self.position != self.size {
            return Err(ErofsError::ShortFile {
                declared: self.size,
                read: self.position,
            });
        }
        if self.size == 0 {
            return Ok(FileData::default());
        }
        if self.is_small() {
            return self.finish_small();
        }
        let place = if self.table.contains(&NULL_BLOCK) {
            self.writer.chunked = true;
            Place::Chunks {
                chunk_bits: self.chunk_bits,
                table: self.table.into_boxed_slice(),
            }
        } else {
            // Nothing else took blocks meanwhile, so chunks without a gap are one run.
            Place::Blocks {
                first: self.first_block,
            }
        };
        Ok(FileData {
            size: self.size,
            place,
        })
    }

    const fn is_small(&self) -> bool {
        self.size < HOLE_BYTES as u64
    }

    fn check_room(&self, len: u64) -> Result<(), ErofsError> {
        match self.position.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            end => Err(ErofsError::ShortFile {
                declared: end.unwrap_or(u64::MAX),
                read: self.size,
            }),
        }
    }

    /// A small file gathers in the scratch buffer.
    fn small(&mut self, source: &mut dyn Read, len: u64) -> Result<(), ErofsError> {
        let range = as_index(self.position)..as_index(self.position + len);
        read_full(source, &mut self.writer.scratch[range], self.size, self.position)?;
        self.position += len;
        Ok(())
    }

    fn finish_small(self) -> Result<FileData, ErofsError> {
        let writer = self.writer;
        let size = as_index(self.size);
        let tail = size % BLOCK;
        let inline = tail != 0 && tail <= INLINE_MAX;
        let in_blocks = if inline { size - tail } else { size };
        let first = writer.take_blocks(in_blocks.div_ceil(BLOCK) as u64)?;
        writer
            .output
            .write_at(u64::from(first) * BLOCK_BYTES, &writer.scratch[..in_blocks])?;
        let place = if inline {
            Place::BlocksAndTail {
                first,
                spooled_at: writer.spool.push(&writer.scratch[in_blocks..size])?,
            }
        } else {
            Place::Blocks { first }
        };
        Ok(FileData {
            size: self.size,
            place,
        })
    }

    /// Where the current chunk ends: a multiple of the chunk size, or the file's end.
    fn chunk_end(&self) -> u64 {
        let index = self.position >> self.chunk_bits;
        ((index + 1) << self.chunk_bits).min(self.size)
    }

    fn chunk_start(&self) -> u64 {
        self.position >> self.chunk_bits << self.chunk_bits
    }

    fn write_piece(&mut self, len: usize) -> Result<(), ErofsError> {
        let start = self.chunk_start();
        let chunk = match self.chunk {
            Some(chunk) => chunk,
            None => {
                let chunk = self
                    .writer
                    .take_blocks((self.chunk_end() - start).div_ceil(BLOCK_BYTES))?;
                *self.chunk.insert(chunk)
            }
        };
        let offset = u64::from(chunk) * BLOCK_BYTES + (self.position - start);
        self.writer.output.write_at(offset, &self.writer.scratch[..len])
    }

    /// Move on within the current chunk; at its end it goes into the table.
    fn advance(&mut self, len: u64) {
        let end = self.chunk_end();
        self.position += len;
        if self.position == end {
            self.table.push(self.chunk.take().unwrap_or(NULL_BLOCK));
        }
    }
}

/// The image file behind a buffer. Writes go forward; what is skipped stays a hole that reads as zeroes.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    buffer: Vec<u8>,
    /// Where in the file the buffer belongs.
    buffer_at: u64,
    unwritten_back: u64,
    writeback: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Output {
    fn new(file: File) -> io::Result<Self> {
        let (sender, wanted) = mpsc::channel::<()>();
        let handle = file.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("writeback".into())
            .spawn(move || {
                while wanted.recv().is_ok() {
                    while wanted.try_recv().is_ok() {}
                    // Only a head start: the flush before publishing reports errors.
                    let _ = handle.sync_data();
                }
            })?;
        Ok(Self {
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            buffer_at: 0,
            unwritten_back: 0,
            writeback: Some((sender, thread)),
        })
    }

    pub(super) fn write_at(&mut self, at: u64, mut bytes: &[u8]) -> Result<(), ErofsError> {
        if at != self.buffer_at + self.buffer.len() as u64 {
            self.pad_or_move(at)?;
        }
        while !bytes.is_empty() {
            let room = BUFFER_BYTES - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Padding up to a block is cheaper than a write of its own.
    fn pad_or_move(&mut self, at: u64) -> Result<(), ErofsError> {
        let end = self.buffer_at + self.buffer.len() as u64;
        let gap = at.checked_sub(end).filter(|gap| *gap < BLOCK_BYTES).map(as_index);
        match gap.filter(|gap| self.buffer.len() + gap < BUFFER_BYTES) {
            Some(gap) => self.buffer.resize(self.buffer.len() + gap, 0),
            None => {
                self.flush()?;
                self.buffer_at = at;
            }
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<(), ErofsError> {
        self.file
            .write_all_at(&self.buffer, self.buffer_at)
            .map_err(|source| ErofsError::Write { source })?;
        self.buffer_at += self.buffer.len() as u64;
        self.unwritten_back += self.buffer.len() as u64;
        self.buffer.clear();
        if self.unwritten_back >= WRITEBACK_BYTES {
            self.unwritten_back = 0;
            if let Some((sender, _)) = &self.writeback {
                // A thread that is gone only costs the head start.
                let _ = sender.send(());
            }
        }
        Ok(())
    }

    /// Write what is left, give the file its length, and let go of it.
    pub(super) fn finish(mut self, len: u64) -> Result<File, ErofsError> {
        self.flush()?;
        self.stop();
        self.file
            .set_len(len)
            .map_err(|source| ErofsError::Write { source })?;
        self.file
            .try_clone()
            .map_err(|source| ErofsError::Write { source })
    }

    fn stop(&mut self) {
        if let Some((sender, thread)) = self.writeback.take() {
            drop(sender);
            // It returns nothing and cannot panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Rests of files, waiting for their inodes.
#[derive(Debug)]
pub(super) struct Spool {
    memory: Vec<u8>,
    file: Option<File>,
    len: u64,
    directory: PathBuf,
}

impl Spool {
    fn push(&mut self, bytes: &[u8]) -> Result<u64, ErofsError> {
        let at = self.len;
        self.len += bytes.len() as u64;
        if self.file.is_none() && self.memory.len() + bytes.len() <= SPOOL_MEMORY_BYTES {
            self.memory.extend_from_slice(bytes);
            return Ok(at);
        }
        let file =
            match &mut self.file {
                Some(file) => file,
                none => none.insert(tempfile::tempfile_in(&self.directory).map_err(|source| {
                    ErofsError::Create {
                        path: self.directory.clone(),
                        source,
                    }
                })?),
            };
        file.write_all_at(bytes, at - self.memory.len() as u64)
            .map_err(|source| ErofsError::Write { source })?;
        Ok(at)
    }

    /// Append `len` bytes of the rest at `at` to `out`.
    pub(super) fn read(&self, at: u64, len: usize, out: &mut Vec<u8>) -> Result<(), ErofsError> {
        let in_memory = self.memory.len() as u64;
        if at < in_memory {
            let at = as_index(at);
            out.extend_from_slice(&self.memory[at..at + len]);
            return Ok(());
        }
        let start = out.len();
        out.resize(start + len, 0);
        let file = self.file.as_ref().ok_or(ErofsError::Corrupt {
            problem: "a spooled rest has no file",
        })?;
        file.read_exact_at(&mut out[start..], at - in_memory)
            .map_err(|source| ErofsError::Read { source })
    }
}

fn read_full(source: &mut dyn Read, buffer: &mut [u8], declared: u64, before: u64) -> Result<(), ErofsError> {
    source.read_exact(buffer).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => ErofsError::ShortFile {
            declared,
            read: before,
        },
        _ => ErofsError::Read { source },
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    // Most data differs from zero in its first bytes.
    let (head, rest) = bytes.split_at(bytes.len().min(16));
    head.iter().all(|byte| *byte == 0)
        && rest
            .chunks(256)
            .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Positions inside buffers are small by construction.
fn as_index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
