//! Archive entries become a file tree: what an extractor would do to a directory, done to a layer of an overlay.
//!
//! Owner: the converting thread. The rules are those of the OCI image specification ("layer.md") as umoci carries them out:
//!
//! - A later entry replaces an earlier one; a directory over a directory only changes its metadata.
//! - `.wh.NAME` hides NAME of the layers below, `.wh..wh..opq` everything below its directory; neither touches the same
//!   layer's files, in whatever order they come.
//! - Links in a path's directories are followed, below the root, across layers.
//! - What has no entry (implied parent directories, targets of hard links) is taken from the layers below.
//!
//! Invariant: a directory of this layer that must not merge with one below is marked opaque.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::copy;
use super::lower::Lower;
use super::path::{components, shown};
use super::{Conversion, LayerError, RootMetadata};
use crate::erofs::{
    DataWriter, Directory, FileKind, InodeId, Metadata, Node, Timestamp, Tree, finish, symlink_node,
};
use crate::limits::Limits;
use crate::tar::{Entry, EntryKind};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Other names of aufs, which means nothing to us.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
/// As many links as Linux follows would be 40; umoci's path joining gives up after 255.
const LINKS_MAX: usize = 255;
/// Free space is looked at whenever this much was written.
const SPACE_CHECK_BYTES: u64 = 64 << 20;

/// A layer's tree in the making.
#[derive(Debug)]
pub(super) struct Applier<'a> {
    tree: Tree,
    data: DataWriter,
    lower: &'a Lower<'a>,
    limits: Limits,
    store: PathBuf,
    entries: u64,
    metadata_bytes: u64,
    space_checked_at: Option<u64>,
    has_root: bool,
    depends_on_lower: bool,
}

/// A directory of this layer and where it is: `path` is only there if links were followed to it.
struct Place {
    id: InodeId,
    path: Option<Vec<Vec<u8>>>,
}

/// What a name in a path's directories turned out to be.
enum Step {
    Enter(InodeId),
    Follow(Vec<u8>),
    /// `is_below`: the layers below have it.
    Make {
        metadata: Metadata,
        opaque: bool,
        is_below: bool,
    },
}

impl<'a> Applier<'a> {
    pub fn new(data: DataWriter, lower: &'a Lower<'a>, limits: Limits, store: &Path) -> Self {
        Self {
            tree: Tree::new(Metadata::new(0o755)),
            data,
            lower,
            limits,
            store: store.to_path_buf(),
            entries: 0,
            metadata_bytes: 0,
            space_checked_at: None,
            has_root: false,
            depends_on_lower: false,
        }
    }

    /// Take one entry; `contents` gives its stored bytes.
    pub fn apply(&mut self, entry: &Entry, contents: &mut dyn Read) -> Result<(), LayerError> {
        self.account(entry)?;
        let names = components(&entry.path)?;
        let Some((name, parents)) = names.split_last() else {
            return self.root(entry);
        };
        if parents.iter().any(|name| name.starts_with(WHITEOUT_PREFIX)) {
            return self.below_whiteout(entry, parents);
        }
        if *name == OPAQUE_NAME {
            if let Some(place) = self.existing_parent(parents, &entry.path)? {
                self.set_opaque(place.id);
            }
            return Ok(());
        }
        if name.starts_with(AUFS_PREFIX) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.whiteout(parents, hidden, &entry.path);
        }
        let parent = self.parent(parents, &entry.path)?.id;
        match &entry.kind {
            EntryKind::Directory => self.directory(parent, name, entry),
            EntryKind::HardLink { target } => self.hard_link(parent, name, target, entry),
            _ => {
                let mut metadata = metadata_of(entry);
                let node = self.node(entry, contents)?;
                if matches!(node, Node::Symlink { .. }) {
                    metadata.mode = 0o777;
                }
                let id = self.tree.add(metadata, node)?;
                Ok(self.tree.link(parent, name, id)?)
            }
        }
    }

    /// Write everything that isn't written yet.
    pub fn finish(mut self, uuid: [u8; 16], archive_bytes: u64) -> Result<Conversion, LayerError> {
        let hides_lower = copy::seal_opaque_directories(&mut self.tree);
        let metadata = &self.tree.inode(Tree::ROOT).metadata;
        let root = RootMetadata {
            mode: metadata.mode,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime: metadata.mtime,
        };
        let written = finish(&self.tree, self.data, uuid)?;
        Ok(Conversion {
            file: written.file,
            size_bytes: written.size_bytes,
            archive_bytes,
            entries: self.entries,
            inodes: written.inodes,
            root: self.has_root.then_some(root),
            hides_lower,
            depends_on_lower: self.depends_on_lower,
        })
    }

    fn account(&mut self, entry: &Entry) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.limits.layer_entries {
            return Err(LayerError::TooManyEntries {
                limit: self.limits.layer_entries,
            });
        }
        let target = match &entry.kind {
            EntryKind::Symlink { target } | EntryKind::HardLink { target } => target.len(),
            _ => 0,
        };
        let xattrs: usize = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        self.metadata_bytes += (entry.path.len() + target + xattrs) as u64;
        if self.metadata_bytes > self.limits.layer_metadata_bytes {
            return Err(LayerError::TooMuchMetadata {
                limit: self.limits.layer_metadata_bytes,
            });
        }
        if entry.size > self.limits.file_bytes {
            return Err(LayerError::FileTooLarge {
                path: shown(&entry.path),
                bytes: entry.size,
                limit: self.limits.file_bytes,
            });
        }
        self.check_space()
    }

    fn check_space(&mut self) -> Result<(), LayerError> {
        let used = self.data.bytes_used();
        if self
            .space_checked_at
            .is_some_and(|before| used - before < SPACE_CHECK_BYTES)
        {
            return Ok(());
        }
        self.space_checked_at = Some(used);
        // If it can't be told, writing will.
        let Ok(status) = rustix::fs::statvfs(&self.store) else {
            return Ok(());
        };
        let available = status.f_bavail.saturating_mul(status.f_frsize);
        if available < self.limits.reserve_bytes {
            return Err(LayerError::NoSpace { available });
        }
        Ok(())
    }

    fn root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != EntryKind::Directory {
            let problem = "the root can only be a directory";
            return Err(LayerError::Entry {
                path: shown(&entry.path),
                problem,
            });
        }
        let metadata = metadata_of(entry);
        metadata.check()?;
        self.tree.inode_mut(Tree::ROOT).metadata = metadata;
        self.has_root = true;
        Ok(())
    }

    /// Something below a name that means a whiteout: aufs's own folders are passed over, the rest makes no sense.
    fn below_whiteout(&self, entry: &Entry, parents: &[&[u8]]) -> Result<(), LayerError> {
        if parents.iter().any(|name| name.starts_with(AUFS_PREFIX)) {
            return Ok(());
        }
        Err(LayerError::Entry {
            path: shown(&entry.path),
            problem: "a whiteout cannot have anything below it",
        })
    }

    fn directory(&mut self, parent: InodeId, name: &[u8], entry: &Entry) -> Result<(), LayerError> {
        let metadata = metadata_of(entry);
        let opaque = match self.tree.child(parent, name) {
            Some(existing) if self.tree.directory(existing).is_some() => {
                metadata.check()?;
                self.tree.inode_mut(existing).metadata = metadata;
                return Ok(());
            }
            // What was here replaced, or hid, whatever is below: so does the directory that replaces it.
            Some(_) => true,
            None => false,
        };
        let id = self.tree.add(
            metadata,
            Node::Directory(Directory {
                opaque,
                ..Directory::default()
            }),
        )?;
        Ok(self.tree.link(parent, name, id)?)
    }

    fn node(&mut self, entry: &Entry, contents: &mut dyn Read) -> Result<Node, LayerError> {
        let device = |is_char, major, minor| {
            let problem = "there is no such device number on Linux";
            Node::device(is_char, major, minor).ok_or_else(|| LayerError::Entry {
                path: shown(&entry.path),
                problem,
            })
        };
        match &entry.kind {
            EntryKind::Symlink { target } => Ok(symlink_node(&mut self.data, target)?),
            EntryKind::CharDevice { major, minor } => device(true, *major, *minor),
            EntryKind::BlockDevice { major, minor } => device(false, *major, *minor),
            EntryKind::Fifo => Ok(Node::Fifo),
            EntryKind::Regular | EntryKind::Directory | EntryKind::HardLink { .. } => {
                let mut file = self.data.file(entry.size);
                let mut position = 0;
                for segment in &entry.segments {
                    file.hole(segment.offset - position)?;
                    file.data(contents, segment.len)?;
                    position = segment.offset + segment.len;
                }
                file.hole(entry.size - position)?;
                Ok(Node::Regular(file.finish()?))
            }
        }
    }

    fn whiteout(&mut self, parents: &[&[u8]], hidden: &[u8], path: &[u8]) -> Result<(), LayerError> {
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(LayerError::Entry {
                path: shown(path),
                problem: "a whiteout of nothing",
            });
        }
        // Where there is no directory there is nothing to hide.
        let Some(place) = self.existing_parent(parents, path)? else {
            return Ok(());
        };
        match self.tree.child(place.id, hidden) {
            // The same layer's directory stays, without what is below it.
            Some(existing) => self.set_opaque(existing),
            None => {
                self.depends_on_lower = true;
                if self.hides_nothing(&place, parents)? {
                    return Ok(());
                }
                let id = self.tree.add(Metadata::default(), Node::Whiteout)?;
                self.tree.link(place.id, hidden, id)?;
            }
        }
        Ok(())
    }

    /// Whether the layers below lack the directory: a whiteout would then show up as a file in its listing.
    fn hides_nothing(&self, place: &Place, literal: &[&[u8]]) -> Result<bool, LayerError> {
        let resolved: Option<Vec<&[u8]>> = place
            .path
            .as_ref()
            .map(|path| path.iter().map(Vec::as_slice).collect());
        let found = self.lower.find(resolved.as_deref().unwrap_or(literal))?;
        Ok(found.is_none_or(|found| found.stat.kind != FileKind::Directory))
    }

    fn set_opaque(&mut self, id: InodeId) {
        if let Some(directory) = self.tree.directory_mut(id) {
            directory.opaque = true;
        }
    }

    fn hard_link(
        &mut self,
        parent: InodeId,
        name: &[u8],
        target: &[u8],
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let missing = || LayerError::LinkTarget {
            path: shown(&entry.path),
            target: shown(target),
        };
        let names = components(target)?;
        let (last, parents) = names.split_last().ok_or_else(missing)?;
        let place = self.parent(parents, target)?;
        let id = match self.tree.child(place.id, last) {
            Some(id) => id,
            None => self.copy_up(&place, parents, last)?.ok_or_else(missing)?,
        };
        match &self.tree.inode(id).node {
            Node::Whiteout => return Err(missing()),
            Node::Directory(_) => {
                let problem = "a hard link to a directory";
                return Err(LayerError::Entry {
                    path: shown(&entry.path),
                    problem,
                });
            }
            _ => {}
        }
        Ok(self.tree.link(parent, name, id)?)
    }

    /// Bring a file of the layers below into this one, so that both names can share an inode.
    fn copy_up(
        &mut self,
        place: &Place,
        parents: &[&[u8]],
        name: &[u8],
    ) -> Result<Option<InodeId>, LayerError> {
        self.depends_on_lower = true;
        let lower = self.lower;
        let mut path: Vec<&[u8]> = match &place.path {
            Some(path) => path.iter().map(Vec::as_slice).collect(),
            None => parents.to_vec(),
        };
        if self.is_hidden(&path) {
            return Ok(None);
        }
        path.push(name);
        let Some(found) = lower.find(&path)? else {
            return Ok(None);
        };
        let node = copy::node(found.reader, &found.stat, &mut self.data)?;
        let id = self.tree.add(copy::metadata(&found.stat), node)?;
        self.tree.link(place.id, name, id)?;
        Ok(Some(id))
    }

    /// The directory an entry goes to, made if need be. `path` is the entry's, for errors.
    fn parent(&mut self, names: &[&[u8]], path: &[u8]) -> Result<Place, LayerError> {
        let missing = LayerError::Path {
            path: shown(path),
            problem: "has no directory to be in",
        };
        self.walk(names, path, true)?.ok_or(missing)
    }

    /// The directory a mark is in, if this layer or one below has it.
    fn existing_parent(&mut self, names: &[&[u8]], path: &[u8]) -> Result<Option<Place>, LayerError> {
        match self.walk(names, path, false) {
            // A mark below a file marks nothing.
            Err(LayerError::NotADirectory { .. }) => Ok(None),
            result => result,
        }
    }

    fn walk(&mut self, names: &[&[u8]], path: &[u8], make: bool) -> Result<Option<Place>, LayerError> {
        let mut id = Tree::ROOT;
        for name in names {
            match self.tree.child(id, name) {
                Some(child) if self.tree.directory(child).is_some() => id = child,
                _ => return self.walk_step_by_step(names, path, make),
            }
        }
        Ok(Some(Place { id, path: None }))
    }

    /// As [`Self::walk`], where something is missing or a link.
    fn walk_step_by_step(
        &mut self,
        names: &[&[u8]],
        path: &[u8],
        make: bool,
    ) -> Result<Option<Place>, LayerError> {
        let mut todo: Vec<Vec<u8>> = names.iter().rev().map(|name| name.to_vec()).collect();
        let mut at: Vec<(Vec<u8>, InodeId)> = Vec::new();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            if name == b".." {
                // Going up from the root stays there, as it does for the kernel.
                at.pop();
                continue;
            }
            let here = at.last().map_or(Tree::ROOT, |(_, id)| *id);
            match self.step(&at, here, &name, path)? {
                Step::Enter(id) => at.push((name, id)),
                Step::Make { is_below: false, .. } if !make => return Ok(None),
                Step::Make { metadata, opaque, .. } => {
                    let id = self.tree.add(
                        metadata,
                        Node::Directory(Directory {
                            opaque,
                            ..Directory::default()
                        }),
                    )?;
                    self.tree.link(here, &name, id)?;
                    at.push((name, id));
                }
                Step::Follow(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(LayerError::Path {
                            path: shown(path),
                            problem: "goes through too many links",
                        });
                    }
                    if target.starts_with(b"/") {
                        at.clear();
                    }
                    let names = target
                        .split(|byte| *byte == b'/')
                        .filter(|name| !name.is_empty() && *name != b".");
                    todo.extend(names.map(<[u8]>::to_vec).rev());
                }
            }
        }
        let id = at.last().map_or(Tree::ROOT, |(_, id)| *id);
        Ok(Some(Place {
            id,
            path: Some(at.into_iter().map(|(name, _)| name).collect()),
        }))
    }

    fn step(
        &mut self,
        at: &[(Vec<u8>, InodeId)],
        here: InodeId,
        name: &[u8],
        path: &[u8],
    ) -> Result<Step, LayerError> {
        let not_a_directory = || LayerError::NotADirectory { path: shown(path) };
        if let Some(child) = self.tree.child(here, name) {
            return match &self.tree.inode(child).node {
                Node::Directory(_) => Ok(Step::Enter(child)),
                Node::Symlink { target, .. } => Ok(Step::Follow(target.to_vec())),
                Node::Whiteout => Ok(Step::Make {
                    metadata: self.implied(here),
                    opaque: true,
                    is_below: false,
                }),
                _ => Err(not_a_directory()),
            };
        }
        crate::erofs::check_name(name)?;
        let mut below: Vec<&[u8]> = at.iter().map(|(name, _)| name.as_slice()).collect();
        let hidden = self.is_hidden(&below);
        below.push(name);
        let lower = self.lower;
        let found = if hidden { None } else { lower.find(&below)? };
        self.depends_on_lower |= !hidden;
        match found {
            None => Ok(Step::Make {
                metadata: self.implied(here),
                opaque: false,
                is_below: false,
            }),
            Some(found) => match found.stat.kind {
                FileKind::Directory => Ok(Step::Make {
                    metadata: copy::metadata(&found.stat),
                    opaque: false,
                    is_below: true,
                }),
                FileKind::Symlink => Ok(Step::Follow(found.reader.link_target(&found.stat)?)),
                _ => Err(not_a_directory()),
            },
        }
    }

    /// What `mkdir` in the directory makes: the group is inherited if the parent says so.
    fn implied(&self, parent: InodeId) -> Metadata {
        let parent = &self.tree.inode(parent).metadata;
        let mut metadata = Metadata::new(0o755 | parent.mode & 0o2000);
        if parent.mode & 0o2000 != 0 {
            metadata.gid = parent.gid;
        }
        metadata
    }

    /// Whether a directory on the way hides the layers below.
    fn is_hidden(&self, path: &[&[u8]]) -> bool {
        let mut id = Tree::ROOT;
        let opaque = |id| {
            self.tree
                .directory(id)
                .is_some_and(|directory: &Directory| directory.opaque)
        };
        if opaque(id) {
            return true;
        }
        for name in path {
            match self.tree.child(id, name) {
                Some(child) if opaque(child) => return true,
                Some(child) => id = child,
                None => return false,
            }
        }
        false
    }
}

/// An entry's metadata without what cannot or must not be kept: attributes of namespaces EROFS doesn't have, and those by
/// which overlayfs marks its own files.
fn metadata_of(entry: &Entry) -> Metadata {
    let xattrs = entry.xattrs.iter().filter(|(name, _)| copy::is_kept(name));
    Metadata {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: Timestamp { ..entry.mtime },
        xattrs: xattrs
            .map(|(name, value)| (name.as_slice().into(), value.as_slice().into()))
            .collect(),
    }
}
