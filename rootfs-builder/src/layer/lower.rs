//! What the layers below the one being converted show: needed where an archive leaves something to them.
//!
//! An archive may put `a/b` without an entry for `a` (whose mode and owner then come from below), may reach a file through a
//! symbolic link of a lower layer, and may hard link to a file of one. The answers are those overlayfs would give.

use std::fs::File;
use std::path::Path;

use crate::erofs::{ErofsError, FileKind, Reader, Stat};

/// The attribute by which a directory hides those below it.
pub const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// The finished layers below, top one first.
#[derive(Debug, Default)]
pub struct Lower {
    layers: Vec<Reader>,
}

/// A file of the layers below.
#[derive(Debug)]
pub struct Found<'a> {
    pub reader: &'a Reader,
    pub stat: Stat,
}

impl Lower {
    /// Open the given images, bottom one first.
    ///
    /// # Errors
    /// An image can't be opened or is damaged.
    pub fn open<'a>(bottom_up: impl Iterator<Item = &'a Path>) -> Result<Self, ErofsError> {
        let mut layers = Vec::new();
        for path in bottom_up {
            let file = File::open(path).map_err(|source| ErofsError::Input {
                path: path.to_path_buf(),
                source,
            })?;
            layers.push(Reader::open(file)?);
        }
        layers.reverse();
        Ok(Self { layers })
    }

    /// Whether there is nothing below.
    pub const fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// What is at `path`, whose directories are all taken literally (links in them were resolved by the caller).
    ///
    /// # Errors
    /// An image is damaged or can't be read.
    pub fn find(&self, path: &[&[u8]]) -> Result<Option<Found<'_>>, ErofsError> {
        'layers: for reader in &self.layers {
            let mut stat = reader.root()?;
            let mut hides = is_opaque(&stat);
            for name in path {
                match reader.lookup(&stat, name)? {
                    // A layer without the directory has no say, unless a parent of it hid what is below.
                    None if hides => return Ok(None),
                    None if stat.kind == FileKind::Directory => continue 'layers,
                    None => return Ok(None),
                    Some(child) if is_whiteout(&child) => return Ok(None),
                    Some(child) => {
                        hides |= is_opaque(&child);
                        stat = child;
                    }
                }
            }
            return Ok(Some(Found { reader, stat }));
        }
        Ok(None)
    }
}

fn is_whiteout(stat: &Stat) -> bool {
    stat.kind == FileKind::CharDevice { major: 0, minor: 0 }
}

pub(super) fn is_opaque(stat: &Stat) -> bool {
    stat.metadata
        .xattrs
        .get(OPAQUE_XATTR)
        .is_some_and(|value| value.as_ref() == b"y")
}
