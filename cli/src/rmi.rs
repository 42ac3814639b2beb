//! `hull rmi`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::image;

/// Remove images from the store. Layers that no other image needs go with them.
#[derive(Debug, Args)]
pub struct Rmi {
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
}

impl Rmi {
    /// Removes them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let store = image::open_store(&directories)?;
        let mut code = 0;
        for name in &self.images {
            let used_by = store.resolve(name).ok().and_then(|image| {
                let records = runtime.list().unwrap_or_default();
                records.into_iter().find(|record| record.image_id == image.id)
            });
            if let Some(record) = used_by {
                eprintln!(
                    "hull: image {name} is used by container {}; stop it first",
                    record.name
                );
                code = 1;
                continue;
            }
            match store.remove(name) {
                Ok(removed) => {
                    removed
                        .untagged
                        .iter()
                        .for_each(|name| println!("Untagged: {name}"));
                    if let Some(id) = removed.deleted {
                        println!("Deleted: {id}");
                    }
                }
                Err(error) => {
                    eprintln!("hull: {:#}", anyhow::Error::from(error));
                    code = 1;
                }
            }
        }
        Ok(code)
    }
}
