//! Several neighbouring layers made into one.
//!
//! A microVM gets a disk for each layer and has room for a limited number of them; images may have a hundred layers. The
//! result shows over whatever is below what the single layers, put on top of each other by overlayfs, would show.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;

use super::copy;
use super::lower::is_opaque;
use crate::erofs::{DataWriter, ErofsError, FileKind, InodeId, Node, Reader, Stat, Tree, Written, finish};

/// Merge layers, bottom one first, into the empty file `output`.
///
/// `is_bottom`: nothing will be below the result, so marks that hide things can go.
///
/// # Errors
/// A layer is damaged or the image can't be written.
pub fn merge(
    bottom_up: &[Reader],
    is_bottom: bool,
    (output, temporary): (File, &Path),
    uuid: [u8; 16],
) -> Result<Written, ErofsError> {
    let mut merger = Merger {
        layers: bottom_up,
        is_bottom,
        data: DataWriter::new(output, temporary.to_path_buf())?,
        inodes: HashMap::new(),
    };
    let mut roots = Vec::new();
    for (layer, reader) in bottom_up.iter().enumerate().rev() {
        roots.push(Part {
            layer,
            stat: reader.root()?,
        });
    }
    let metadata = roots
        .first()
        .map(|part| copy::metadata(&part.stat))
        .unwrap_or_default();
    let mut tree = Tree::new(metadata);
    let mut todo = vec![(Tree::ROOT, roots)];
    while let Some((id, parts)) = todo.pop() {
        merger.directory(&mut tree, id, &parts, &mut todo)?;
    }
    copy::seal_opaque_directories(&mut tree);
    finish(&tree, merger.data, uuid)
}

/// A directory as one of the layers has it.
struct Part {
    layer: usize,
    stat: Stat,
}

struct Merger<'a> {
    layers: &'a [Reader],
    is_bottom: bool,
    data: DataWriter,
    /// Files that were taken over, so that further names of theirs become hard links.
    inodes: HashMap<(usize, u64), InodeId>,
}

impl Merger<'_> {
    /// Fill a directory from its parts, top one first; its subdirectories go to `todo`.
    fn directory(
        &mut self,
        tree: &mut Tree,
        id: InodeId,
        parts: &[Part],
        todo: &mut Vec<(InodeId, Vec<Part>)>,
    ) -> Result<(), ErofsError> {
        // By name, top one first: what each layer has there.
        let mut names: BTreeMap<Vec<u8>, Vec<Part>> = BTreeMap::new();
        for part in parts {
            let reader = &self.layers[part.layer];
            for entry in reader.entries(&part.stat)? {
                let stat = reader.stat(entry.nid)?;
                names.entry(entry.name).or_default().push(Part {
                    layer: part.layer,
                    stat,
                });
            }
        }
        for (name, found) in names {
            let mut found = found.into_iter();
            let Some(top) = found.next() else { continue };
            if top.stat.kind != FileKind::Directory {
                self.file(tree, id, &name, &top)?;
                continue;
            }
            let (merged, hides_lower) = visible_parts(top, found);
            let metadata = merged
                .first()
                .map(|part| copy::metadata(&part.stat))
                .unwrap_or_default();
            let child = tree.add(metadata, Node::Directory(crate::erofs::Directory::default()))?;
            if let Some(directory) = tree.directory_mut(child) {
                directory.opaque = hides_lower && !self.is_bottom;
            }
            tree.link(id, &name, child)?;
            todo.push((child, merged));
        }
        Ok(())
    }

    fn file(&mut self, tree: &mut Tree, parent: InodeId, name: &[u8], part: &Part) -> Result<(), ErofsError> {
        let reader = &self.layers[part.layer];
        let key = (part.layer, part.stat.nid);
        let id = match self.inodes.get(&key) {
            Some(id) => *id,
            None => {
                let node = copy::node(reader, &part.stat, &mut self.data)?;
                if node == Node::Whiteout && self.is_bottom {
                    return Ok(());
                }
                let id = tree.add(copy::metadata(&part.stat), node)?;
                if part.stat.nlink > 1 {
                    self.inodes.insert(key, id);
                }
                id
            }
        };
        tree.link(parent, name, id)
    }
}

/// The parts of a directory that show, top one first, and whether what is below all of these layers is hidden.
fn visible_parts(top: Part, below: impl Iterator<Item = Part>) -> (Vec<Part>, bool) {
    let mut hides = is_opaque(&top.stat);
    let mut parts = vec![top];
    for part in below {
        if hides {
            break;
        }
        if part.stat.kind != FileKind::Directory {
            hides = true;
            break;
        }
        hides = is_opaque(&part.stat);
        parts.push(part);
    }
    (parts, hides)
}
