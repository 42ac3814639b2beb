//! Small images from files the caller names, or from a directory: the agent's root, test images.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::data::INLINE_MAX;
use super::tree::{Directory, InodeId, Metadata, Node, Timestamp, Tree, check_name};
use super::writer::finish;
use super::{DataWriter, ErofsError};

/// The longest target `symlink(2)` takes.
const SYMLINK_MAX: usize = 4095;

/// Puts an image together entry by entry and writes it in one step.
#[derive(Debug)]
pub struct ImageBuilder {
    tree: Tree,
    data: DataWriter,
    temporary: tempfile::NamedTempFile,
    uuid: [u8; 16],
}

impl ImageBuilder {
    /// Begin an image that will be published in `directory`; the root is 0755 root.
    ///
    /// # Errors
    /// `directory` can't be written to.
    pub fn new(directory: &Path) -> Result<Self, ErofsError> {
        let temporary = tempfile::Builder::new()
            .prefix(".erofs-")
            .tempfile_in(directory)
            .map_err(|source| ErofsError::Create {
                path: directory.to_path_buf(),
                source,
            })?;
        let file = temporary
            .reopen()
            .map_err(|source| ErofsError::Write { source })?;
        Ok(Self {
            tree: Tree::new(Metadata::new(0o755)),
            data: DataWriter::new(file, directory.to_path_buf())?,
            temporary,
            uuid: [0; 16],
        })
    }

    /// The root directory's metadata.
    ///
    /// # Errors
    /// An extended attribute can't be stored.
    pub fn root(&mut self, metadata: Metadata) -> Result<(), ErofsError> {
        metadata.check()?;
        self.tree.inode_mut(Tree::ROOT).metadata = metadata;
        Ok(())
    }

    /// A directory; one that is there already only gets the metadata.
    ///
    /// # Errors
    /// As [`ImageBuilder::file`].
    pub fn directory(&mut self, path: &str, metadata: Metadata) -> Result<(), ErofsError> {
        let (parent, name) = self.parent(path.as_bytes())?;
        if let Some(existing) = self
            .tree
            .child(parent, name)
            .filter(|id| self.tree.directory(*id).is_some())
        {
            metadata.check()?;
            self.tree.inode_mut(existing).metadata = metadata;
            return Ok(());
        }
        self.add(path, metadata, Node::Directory(Directory::default()))
    }

    /// A regular file with all that `content` gives.
    ///
    /// # Errors
    /// The path is malformed or taken, the content can't be read, or the image can't be written.
    pub fn file(&mut self, path: &str, metadata: Metadata, content: &mut dyn Read) -> Result<(), ErofsError> {
        let mut bytes = Vec::new();
        content
            .read_to_end(&mut bytes)
            .map_err(|source| ErofsError::Input {
                path: path.into(),
                source,
            })?;
        let data = self.data.file_from(bytes.len() as u64, &mut bytes.as_slice())?;
        self.add(path, metadata, Node::Regular(data))
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// As [`ImageBuilder::file`].
    pub fn symlink(&mut self, path: &str, target: &[u8], metadata: Metadata) -> Result<(), ErofsError> {
        let node = symlink_node(&mut self.data, target)?;
        self.add(
            path,
            Metadata {
                mode: 0o777,
                ..metadata
            },
            node,
        )
    }

    /// A device, fifo or socket (see [`Node::device`]).
    ///
    /// # Errors
    /// As [`ImageBuilder::file`].
    pub fn special(&mut self, path: &str, metadata: Metadata, node: Node) -> Result<(), ErofsError> {
        self.add(path, metadata, node)
    }

    /// A second name for a file that is there.
    ///
    /// # Errors
    /// `existing` isn't there or is a directory, `path` is malformed or taken.
    pub fn hard_link(&mut self, path: &str, existing: &str) -> Result<(), ErofsError> {
        let mut target = Tree::ROOT;
        for name in components(existing.as_bytes()) {
            target = self
                .tree
                .child(target, name)
                .ok_or_else(|| ErofsError::NotFound {
                    path: existing.into(),
                })?;
        }
        if self.tree.directory(target).is_some() {
            return Err(ErofsError::NotFound {
                path: existing.into(),
            });
        }
        self.link(path, target)
    }

    /// A unique id for the superblock; all zeroes unless set.
    pub const fn uuid(&mut self, uuid: [u8; 16]) {
        self.uuid = uuid;
    }

    /// Complete the image and put it in place of whatever `path` is, in one step.
    ///
    /// # Errors
    /// The image can't be written or published.
    pub fn write_to(self, path: &Path) -> Result<u64, ErofsError> {
        let written = finish(&self.tree, self.data, self.uuid)?;
        written
            .file
            .sync_all()
            .map_err(|source| ErofsError::Write { source })?;
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o444);
        written
            .file
            .set_permissions(readable)
            .map_err(|source| ErofsError::Write { source })?;
        self.temporary.persist(path).map_err(|error| ErofsError::Create {
            path: path.to_path_buf(),
            source: error.error,
        })?;
        Ok(written.size_bytes)
    }

    fn add(&mut self, path: &str, metadata: Metadata, node: Node) -> Result<(), ErofsError> {
        let id = self.tree.add(metadata, node)?;
        self.link(path, id)
    }

    fn link(&mut self, path: &str, id: InodeId) -> Result<(), ErofsError> {
        let (parent, name) = self.parent(path.as_bytes())?;
        if self.tree.child(parent, name).is_some() {
            return Err(ErofsError::Exists { path: path.into() });
        }
        self.tree.link(parent, name, id)
    }

    /// The directory an entry goes to, made on the way, and the entry's name.
    fn parent<'a>(&mut self, path: &'a [u8]) -> Result<(InodeId, &'a [u8]), ErofsError> {
        let mut names: Vec<&[u8]> = components(path).collect();
        let last = names
            .pop()
            .ok_or_else(|| ErofsError::Name { name: String::new() })?;
        check_name(last)?;
        let mut directory = Tree::ROOT;
        for name in names {
            directory = match self.tree.child(directory, name) {
                Some(child) if self.tree.directory(child).is_some() => child,
                Some(_) => return Err(ErofsError::NotADirectory),
                None => {
                    let child = self
                        .tree
                        .add(Metadata::new(0o755), Node::Directory(Directory::default()))?;
                    self.tree.link(directory, name, child)?;
                    child
                }
            };
        }
        Ok((directory, last))
    }
}

/// Which extended attributes of a directory's files an image gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attributes {
    /// All.
    All,
    /// Those that a file of a layer can be copied up with in a microVM: `user.*`, `security.capability` and overlayfs' own.
    /// Labels of the host's security modules are left out; anything else, an access control list above all, is an error.
    OfLayer,
}

impl Attributes {
    fn has(self, name: &[u8]) -> Result<bool, ErofsError> {
        let begins = |prefix: &str| name.starts_with(prefix.as_bytes());
        if self == Self::All
            || begins("user.")
            || begins("trusted.overlay.")
            || name == b"security.capability"
        {
            return Ok(true);
        }
        if begins("security.") {
            return Ok(false);
        }
        Err(ErofsError::Xattr {
            name: String::from_utf8_lossy(name).into_owned(),
        })
    }
}

/// Turn a whole directory into an image, with owners, modes, times, extended attributes, hard links and holes.
///
/// # Errors
/// The directory can't be read, has attributes the image shall not have, or the image can't be written.
pub fn image_from_directory(
    directory: &Path,
    image: &Path,
    attributes: Attributes,
) -> Result<u64, ErofsError> {
    let parent = image
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut builder = ImageBuilder::new(parent)?;
    let input = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ErofsError::Input { path, source }
    };
    let root = fs::metadata(directory).map_err(input(directory))?;
    builder.root(metadata_of(directory, &root, attributes)?)?;
    let mut seen: HashMap<(u64, u64), InodeId> = HashMap::new();
    let mut todo: Vec<(PathBuf, InodeId)> = vec![(directory.to_path_buf(), Tree::ROOT)];
    while let Some((path, id)) = todo.pop() {
        let mut names: Vec<_> = Vec::new();
        for entry in fs::read_dir(&path).map_err(input(&path))? {
            names.push(entry.map_err(input(&path))?.file_name());
        }
        names.sort();
        for name in names {
            let path = path.join(&name);
            let status = fs::symlink_metadata(&path).map_err(input(&path))?;
            let key = (status.dev(), status.ino());
            let child = match seen.get(&key) {
                Some(child) => *child,
                None => {
                    let node = builder.node_of(&path, &status)?;
                    let child = builder.tree.add(metadata_of(&path, &status, attributes)?, node)?;
                    if status.is_dir() {
                        todo.push((path, child));
                    } else if status.nlink() > 1 {
                        seen.insert(key, child);
                    }
                    child
                }
            };
            builder.tree.link(id, name.as_bytes(), child)?;
        }
    }
    builder.write_to(image)
}

impl ImageBuilder {
    fn node_of(&mut self, path: &Path, status: &fs::Metadata) -> Result<Node, ErofsError> {
        let kind = status.file_type();
        let device = |is_char| {
            // The device number's parts are at most 32 bits wide.
            let (major, minor) = (
                nix::sys::stat::major(status.rdev()),
                nix::sys::stat::minor(status.rdev()),
            );
            let (major, minor) = (
                u32::try_from(major).unwrap_or(u32::MAX),
                u32::try_from(minor).unwrap_or(u32::MAX),
            );
            Node::device(is_char, major, minor).ok_or(ErofsError::Device { major, minor })
        };
        let input = |source| ErofsError::Input {
            path: path.to_path_buf(),
            source,
        };
        if kind.is_dir() {
            Ok(Node::Directory(Directory::default()))
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(input)?.into_os_string().into_vec();
            symlink_node(&mut self.data, &target)
        } else if kind.is_char_device() {
            device(true)
        } else if kind.is_block_device() {
            device(false)
        } else if kind.is_fifo() {
            Ok(Node::Fifo)
        } else if kind.is_socket() {
            Ok(Node::Socket)
        } else {
            let mut file = File::open(path).map_err(input)?;
            Ok(Node::Regular(self.data.file_from(status.len(), &mut file)?))
        }
    }
}

/// A link's node: its target goes behind the inode, or into a block of its own if it is long.
pub(crate) fn symlink_node(data: &mut DataWriter, target: &[u8]) -> Result<Node, ErofsError> {
    if target.is_empty() || target.len() > SYMLINK_MAX {
        return Err(ErofsError::SymlinkTarget { bytes: target.len() });
    }
    let block = if target.len() > INLINE_MAX {
        Some(data.block_for(target)?)
    } else {
        None
    };
    Ok(Node::Symlink {
        target: target.into(),
        block,
    })
}

fn metadata_of(path: &Path, status: &fs::Metadata, attributes: Attributes) -> Result<Metadata, ErofsError> {
    let mut metadata = Metadata::new(u16::try_from(status.mode() & 0o7777).unwrap_or(0))
        .owned_by(status.uid(), status.gid());
    metadata.mtime = Timestamp {
        secs: status.mtime(),
        nanos: u32::try_from(status.mtime_nsec()).unwrap_or(0),
    };
    let input = |source| ErofsError::Input {
        path: path.to_path_buf(),
        source,
    };
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(metadata),
        Err(error) => return Err(input(error)),
    };
    for name in names {
        if attributes.has(name.as_bytes())?
            && let Some(value) = xattr::get(path, &name).map_err(input)?
        {
            metadata.xattrs.insert(name.as_bytes().into(), value.into());
        }
    }
    Ok(metadata)
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
}
