//! `hull import`

use clap::Args;
use rootfs_builder::{ImageSource, PreparedImage, Store};
use sandbox::Directories;

use crate::{image, image_progress::Bars};

/// Bring an image into the store.
///
/// SOURCE is oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], or a path to one of these.
#[derive(Debug, Args)]
pub struct Import {
    /// Say nothing but the image's id
    #[arg(short, long)]
    quiet: bool,
    /// Where the image is
    source: String,
    /// Its name in the store; from the source where none is given
    name: Option<String>,
}

/// Imports an image, with its progress shown if somebody looks.
pub fn import(store: &Store, source: &ImageSource, name: Option<&str>) -> anyhow::Result<PreparedImage> {
    Ok(store.import(source, name, &Bars::new(false))?)
}

impl Import {
    /// Imports and prints the image's id.
    pub fn execute(self) -> anyhow::Result<u8> {
        let source = ImageSource::parse(&self.source)?;
        let store = image::open_store(&Directories::from_environment())?;
        let image = if self.quiet {
            store.import(&source, self.name.as_deref(), &rootfs_builder::NoProgress)?
        } else {
            import(&store, &source, self.name.as_deref())?
        };
        println!("{}", image.id);
        Ok(0)
    }
}
