//! What the layers below the one being converted show: needed where an archive leaves something to them.
//!
//! An archive may put `a/b` without an entry for `a` (whose mode and owner then come from below), may reach a file through a
//! symbolic link of a lower layer, and may hard link to a file of one. The answers are those overlayfs would give.

use std::cell::OnceCell;
use std::fmt;
use std::fs::File;
use std::path::PathBuf;

use super::LayerError;
use crate::erofs::{ErofsError, FileKind, Reader, Stat};

/// The attribute by which a directory hides those below it.
pub const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// How to get at the layers below, top one first; may wait until they are finished.
type Open<'a> = Box<dyn Fn() -> Result<Vec<Reader>, LayerError> + 'a>;

/// The layers below, looked for when they are asked for the first time.
#[derive(Default)]
pub struct Lower<'a> {
    open: Option<Open<'a>>,
    layers: OnceCell<Vec<Reader>>,
}

/// A file of the layers below.
#[derive(Debug)]
pub struct Found<'a> {
    pub reader: &'a Reader,
    pub stat: Stat,
}

impl fmt::Debug for Lower<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Lower")
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

impl<'a> Lower<'a> {
    /// Layers whose images `paths` gives, bottom one first, once they are needed.
    pub fn when_needed(paths: impl Fn() -> Result<Vec<PathBuf>, LayerError> + 'a) -> Self {
        let open = move || {
            let mut layers = Vec::new();
            for path in paths()?.into_iter().rev() {
                let file = File::open(&path).map_err(|source| ErofsError::Input { path, source })?;
                layers.push(Reader::open(file)?);
            }
            Ok(layers)
        };
        Self {
            open: Some(Box::new(open)),
            layers: OnceCell::new(),
        }
    }

    fn layers(&self) -> Result<&[Reader], LayerError> {
        if let Some(layers) = self.layers.get() {
            return Ok(layers);
        }
        let layers = self.open.as_ref().map_or_else(|| Ok(Vec::new()), |open| open())?;
        Ok(self.layers.get_or_init(|| layers))
    }

    /// What is at `path`, whose directories are all taken literally (links in them were resolved by the caller).
    ///
    /// # Errors
    /// An image is damaged or can't be read.
    pub fn find(&self, path: &[&[u8]]) -> Result<Option<Found<'_>>, LayerError> {
        'layers: for reader in self.layers()? {
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
