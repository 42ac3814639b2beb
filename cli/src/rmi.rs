//! `hull rmi`

use clap::Args;
use rootfs_builder::{RemoveOptions, Removed};
use sandbox::{Directories, Runtime};

use crate::image;

/// Remove images from the store. Layers that no other image needs go with them.
#[derive(Debug, Args)]
pub struct Rmi {
    /// Take an image's names even if there are several, or containers were made from it
    #[arg(short, long)]
    force: bool,
    /// All images
    #[arg(short, long, conflicts_with = "images")]
    all: bool,
    /// Names or ids
    #[arg(required_unless_present = "all")]
    images: Vec<String>,
}

fn print_removed(removed: &Removed) {
    for name in &removed.untagged {
        println!("Untagged: {name}");
    }
    if let Some(id) = &removed.deleted {
        println!("Deleted: sha256:{id}");
    }
    for digest in &removed.layers {
        println!("Deleted: {digest}");
    }
}

impl Rmi {
    /// Removes them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let store = image::open_store(&directories)?;
        let in_use = image::ids_in_use(&runtime)?;
        let images = if self.all {
            store.list()?.into_iter().map(|image| image.id).collect()
        } else {
            self.images
        };
        let options = RemoveOptions {
            in_use: &in_use,
            force: self.force || self.all,
        };
        let mut code = 0;
        for name in &images {
            match store.remove_with(name, &options) {
                Ok(removed) => print_removed(&removed),
                Err(error) => {
                    eprintln!("hull: {:#}", explain(&runtime, error));
                    code = 1;
                }
            }
        }
        Ok(code)
    }
}

/// Names the containers that keep an image.
fn explain(runtime: &Runtime, error: rootfs_builder::Error) -> anyhow::Error {
    let rootfs_builder::Error::InUse { id, name } = &error else {
        return error.into();
    };
    let users: Vec<String> = runtime
        .list()
        .unwrap_or_default()
        .into_iter()
        .filter(|record| record.spec.image_id == *id)
        .map(|record| record.name)
        .collect();
    anyhow::anyhow!(
        "image {name} is used by container {}; remove it first (`hull rm`), or use --force",
        users.join(", ")
    )
}
