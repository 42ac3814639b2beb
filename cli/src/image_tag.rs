//! `hull tag`, `hull image tag` and `hull image untag`

use clap::Args;
use sandbox::Directories;

use crate::image;

/// Give an image one more name.
#[derive(Debug, Args)]
pub struct Tag {
    /// Name or id of the image
    image: String,
    /// The new name; taken from the image that has it, if there is one
    name: String,
}

impl Tag {
    /// Does it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let store = image::open_store(&Directories::from_environment())?;
        store.tag(&self.image, &self.name)?;
        Ok(0)
    }
}

/// Take names from their images, which stay.
#[derive(Debug, Args)]
pub struct Untag {
    /// Names
    #[arg(required = true)]
    names: Vec<String>,
}

impl Untag {
    /// Does it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let store = image::open_store(&Directories::from_environment())?;
        for name in &self.names {
            store.untag(name)?;
            println!("Untagged: {name}");
        }
        Ok(0)
    }
}
