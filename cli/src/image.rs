//! Images by name: from the store, or imported first.

use rootfs_builder::{ImageConfig, ImageSource, PreparedImage, Store};
use sandbox::{Directories, ImageDefaults};

use crate::import;

/// Opens the image store.
pub fn open_store(directories: &Directories) -> anyhow::Result<Store> {
    Ok(Store::open(&directories.root)?)
}

/// Finds an image in the store; imports it first if the name says where it is.
pub fn find_or_import(directories: &Directories, name: &str) -> anyhow::Result<PreparedImage> {
    let store = open_store(directories)?;
    if let Some(source) = explicit_source(name) {
        return import::import(&store, &source, None);
    }
    store.resolve(name).map_err(|error| match error {
        rootfs_builder::Error::NotFound { .. } => anyhow::anyhow!(
            "unable to find image {name:?}; `hull images` lists what there is, `hull import oci:DIR:TAG {name}` adds one"
        ),
        error => error.into(),
    })
}

/// A name that says by its prefix where the image is.
fn explicit_source(name: &str) -> Option<ImageSource> {
    const PREFIXES: [&str; 3] = ["oci:", "oci-archive:", "docker-archive:"];
    PREFIXES
        .iter()
        .any(|prefix| name.starts_with(prefix))
        .then(|| ImageSource::parse(name).ok())
        .flatten()
}

/// What an image says about its process.
pub fn defaults(config: &ImageConfig) -> ImageDefaults {
    ImageDefaults {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        working_dir: config.working_dir.clone(),
        user: config.user.clone(),
    }
}
