//! Images by name: from the store, imported or pulled first where they aren't there.

use anyhow::{Context as _, bail};
use rootfs_builder::{ImageConfig, ImageSource, PreparedImage, Store, registry::Reference};
use sandbox::{Directories, ImageDefaults, Runtime};

use crate::{container_options, import, pull};

/// Opens the image store.
pub fn open_store(directories: &Directories) -> anyhow::Result<Store> {
    Ok(Store::open(&directories.root)?)
}

/// Finds an image as `--pull` says: in the store, or where its name says it is.
pub fn obtain(
    directories: &Directories,
    name: &str,
    policy: container_options::Pull,
) -> anyhow::Result<PreparedImage> {
    use container_options::Pull;
    let store = open_store(directories)?;
    if let Some(source) = explicit_source(name) {
        return import::import(&store, &source, None);
    }
    let found = match store.resolve(name) {
        Err(rootfs_builder::Error::NotFound { .. }) => None,
        Err(rootfs_builder::Error::Name { problem, .. }) if !name.contains('@') => {
            bail!("invalid reference format: {name:?}: {problem}")
        }
        // A name with a digest is one for the registry only.
        Err(rootfs_builder::Error::Name { .. }) => None,
        found => Some(found?),
    };
    let candidates = Reference::candidates(name).unwrap_or_default();
    let here = candidates
        .iter()
        .find_map(|candidate| store.resolve(&candidate.local_name()).ok());
    match (found.or(here), policy) {
        (Some(image), Pull::Missing | Pull::Never) => Ok(image),
        // Imported, not pulled: there is nothing newer.
        (Some(image), Pull::Always) if candidates.is_empty() => Ok(image),
        (None, _) if policy == Pull::Never || candidates.is_empty() => bail!(
            "unable to find image {name:?}; `hull images` lists what there is, `hull import oci:DIR:TAG {name}` adds one, `hull pull HOST/{name}` fetches one"
        ),
        (found, _) => {
            if found.is_none() {
                eprintln!("Unable to find image '{name}' locally; pulling it");
            }
            pull::pull(&store, &candidates, &pull::Access::default(), false)
                .with_context(|| format!("unable to pull image {name:?}"))
        }
    }
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

/// Ids of the images that containers were made from.
pub fn ids_in_use(runtime: &Runtime) -> anyhow::Result<Vec<String>> {
    let records = runtime.list()?;
    Ok(records.into_iter().map(|record| record.spec.image_id).collect())
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

/// A name's repository and its tag. The port of a registry is no tag.
pub fn split_name(name: &str) -> (&str, &str) {
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (name, "latest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_of_a_registry_is_not_a_tag() {
        assert_eq!(split_name("a:5000/b"), ("a:5000/b", "latest"));
        assert_eq!(split_name("b:1.2"), ("b", "1.2"));
    }
}
