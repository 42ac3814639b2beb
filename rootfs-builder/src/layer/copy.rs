//! Taking files over from a finished layer into one being made, and what all layers being made have in common.

use super::lower::OPAQUE_XATTR;
use crate::erofs::format::split_xattr_name;
use crate::erofs::{
    DataWriter, Directory, ErofsError, FileKind, InodeId, Metadata, Node, Reader, Stat, Tree, symlink_node,
};

/// A file's node, its contents copied. A directory comes empty.
pub(super) fn node(reader: &Reader, stat: &Stat, data: &mut DataWriter) -> Result<Node, ErofsError> {
    let device = |is_char, major, minor| {
        Node::device(is_char, major, minor).ok_or(ErofsError::Device { major, minor })
    };
    match stat.kind {
        FileKind::Directory => Ok(Node::Directory(Directory::default())),
        FileKind::Regular => contents(reader, stat, data),
        FileKind::Symlink => symlink_node(data, &reader.link_target(stat)?),
        FileKind::CharDevice { major: 0, minor: 0 } => Ok(Node::Whiteout),
        FileKind::CharDevice { major, minor } => device(true, major, minor),
        FileKind::BlockDevice { major, minor } => device(false, major, minor),
        FileKind::Fifo => Ok(Node::Fifo),
        FileKind::Socket => Ok(Node::Socket),
    }
}

fn contents(reader: &Reader, stat: &Stat, data: &mut DataWriter) -> Result<Node, ErofsError> {
    let mut source = reader.data(stat);
    let mut file = data.file(stat.size);
    let mut position = 0;
    while position < stat.size {
        let (is_hole, len) = reader.run_at(stat, position)?;
        if is_hole {
            file.hole(len)?;
        } else {
            source.seek_to(position);
            file.data(&mut source, len)?;
        }
        position += len;
    }
    Ok(Node::Regular(file.finish()?))
}

/// A file's metadata without the marks overlayfs left on it.
pub(super) fn metadata(stat: &Stat) -> Metadata {
    let mut metadata = stat.metadata.clone();
    metadata.xattrs.retain(|name, _| is_kept(name));
    metadata
}

/// Whether an image's extended attribute is kept: not those by which overlayfs marks its own files, nor those of
/// namespaces EROFS doesn't have.
pub(super) fn is_kept(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.overlay.") && split_xattr_name(name).is_some()
}

/// Mark what must not merge with the layers below; says whether the root is such a directory.
pub(super) fn seal_opaque_directories(tree: &mut Tree) -> bool {
    let mut todo = vec![Tree::ROOT];
    while let Some(id) = todo.pop() {
        let Some(directory) = tree.directory(id) else {
            continue;
        };
        let opaque = directory.opaque;
        let children: Vec<(Box<[u8]>, InodeId)> = directory
            .entries
            .iter()
            .map(|(name, child)| (name.clone(), *child))
            .collect();
        for (name, child) in children {
            match &tree.inode(child).node {
                Node::Directory(_) => todo.push(child),
                // Nothing is left to hide, so the mark itself would show.
                Node::Whiteout if opaque => {
                    if let Some(directory) = tree.directory_mut(id) {
                        directory.entries.remove(&name);
                    }
                }
                _ => {}
            }
        }
        if opaque {
            tree.inode_mut(id)
                .metadata
                .xattrs
                .insert(OPAQUE_XATTR.into(), (*b"y").into());
        }
    }
    tree.directory(Tree::ROOT).is_some_and(|root| root.opaque)
}
