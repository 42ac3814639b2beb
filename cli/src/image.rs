//! Images by name: from the store, imported or pulled first where they aren't there.

use anyhow::Context as _;
use rootfs_builder::{ImageConfig, ImageSource, PreparedImage, Store};
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
    let fetch = || {
        let reference = pull::parse_reference(name)?;
        eprintln!("Unable to find image '{name}' locally; pulling it");
        pull::pull(&store, &reference, &pull::Access::default(), false)
    };
    if policy == Pull::Always && has_registry(name) {
        return pull::pull(
            &store,
            &pull::parse_reference(name)?,
            &pull::Access::default(),
            false,
        );
    }
    match store.resolve(name) {
        Err(rootfs_builder::Error::NotFound { .. }) if policy != Pull::Never && has_registry(name) => {
            fetch().with_context(|| format!("unable to find image {name:?}, or to pull it"))
        }
        Err(rootfs_builder::Error::NotFound { .. }) => Err(anyhow::anyhow!(
            "unable to find image {name:?}; `hull images` lists what there is, `hull import oci:DIR:TAG {name}` adds one, `hull pull HOST/{name}` fetches one"
        )),
        Err(rootfs_builder::Error::Name { problem, .. }) => {
            Err(anyhow::anyhow!("invalid reference format: {name:?}: {problem}"))
        }
        found => Ok(found?),
    }
}

/// Whether a name says which registry its image comes from.
fn has_registry(name: &str) -> bool {
    name.split_once('/')
        .is_some_and(|(first, _)| pull::is_host(first))
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

    #[test]
    fn only_a_name_with_a_host_is_pulled() {
        assert!(has_registry("localhost:5000/x"));
        assert!(has_registry("registry.test/x:1"));
        assert!(!has_registry("team/x"));
        assert!(!has_registry("x:5000"));
    }
}
