//! Where an image is, as people write it on a command line.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{ImageError, OpenImage, Storage, docker_archive, oci};
use crate::limits::Limits;

/// An image outside of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A directory in the OCI image layout.
    OciLayout { dir: PathBuf, tag: Option<String> },
    /// A tar archive of such a directory, perhaps compressed.
    OciArchive { file: PathBuf, tag: Option<String> },
    /// What `docker save` writes, perhaps compressed.
    DockerArchive { file: PathBuf, tag: Option<String> },
}

impl ImageSource {
    /// Read `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker-archive:FILE[:NAME]`, or the path of something that is there.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split_tag(rest);
            return Ok(Self::OciLayout { dir, tag });
        }
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, tag) = split_tag(rest);
            return Ok(Self::OciArchive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, tag) = split_tag(rest);
            return Ok(Self::DockerArchive { file, tag });
        }
        Self::from_path(text).ok_or_else(|| ImageError::Source {
            text: text.to_owned(),
        })
    }

    /// A bare path must lead to something that looks like an image.
    fn from_path(text: &str) -> Option<Self> {
        let (path, tag) = split_tag(text);
        if path.join("index.json").is_file() {
            return Some(Self::OciLayout { dir: path, tag });
        }
        // A name without a slash that happens to be a file here is still meant as a name, unless it says what it is.
        let archive = [".tar", ".tar.gz", ".tgz", ".tar.zst"]
            .iter()
            .any(|suffix| text.ends_with(suffix) || path.ends_with(suffix));
        (archive || text.contains('/')).then_some(())?;
        // Both kinds of archives are told apart when they are opened.
        path.is_file().then_some(Self::OciArchive { file: path, tag })
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        match self {
            Self::OciLayout { dir: path, .. }
            | Self::OciArchive { file: path, .. }
            | Self::DockerArchive { file: path, .. } => path,
        }
    }

    /// Read and check everything but the layers; `scratch` takes an unnamed file if an archive is compressed.
    pub(crate) fn open(&self, limits: &Limits, scratch: &Path) -> Result<OpenImage, ImageError> {
        match self {
            Self::OciLayout { dir, tag } => oci::open(Storage::directory(dir)?, tag.as_deref(), limits),
            Self::OciArchive { file, tag } => {
                let storage = Storage::archive(file, limits, scratch)?;
                // Docker writes both descriptions into its archives nowadays; older ones only have their own.
                if storage.contains("index.json") || !storage.contains(docker_archive::MANIFEST) {
                    oci::open(storage, tag.as_deref(), limits)
                } else {
                    docker_archive::open(storage, tag.as_deref(), limits)
                }
            }
            Self::DockerArchive { file, tag } => {
                docker_archive::open(Storage::archive(file, limits, scratch)?, tag.as_deref(), limits)
            }
        }
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, tag) = match self {
            Self::OciLayout { tag, .. } => ("oci", tag),
            Self::OciArchive { tag, .. } => ("oci-archive", tag),
            Self::DockerArchive { tag, .. } => ("docker-archive", tag),
        };
        write!(formatter, "{kind}:{}", self.path().display())?;
        tag.as_ref().map_or(Ok(()), |tag| write!(formatter, ":{tag}"))
    }
}

impl FromStr for ImageSource {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// A path that exists is taken whole; else what follows a colon behind the last existing part is a tag.
fn split_tag(text: &str) -> (PathBuf, Option<String>) {
    if Path::new(text).exists() {
        return (text.into(), None);
    }
    // A tag of docker-archive is a name with a colon of its own, so colons are tried from the left.
    let split = text
        .char_indices()
        .filter(|(_, char)| *char == ':')
        .find(|(at, _)| Path::new(&text[..*at]).exists());
    let split = split.map(|(at, _)| at).or_else(|| {
        let colon = text.rfind(':')?;
        (!text[colon..].contains('/')).then_some(colon)
    });
    match split {
        Some(at) if at + 1 < text.len() => (text[..at].into(), Some(text[at + 1..].to_owned())),
        _ => (text.trim_end_matches(':').into(), None),
    }
}
