//! `hull create`

use clap::Args;
use sandbox::{Directories, Runtime};

use crate::container_options::ContainerOptions;

/// Make a container without starting it; `hull start` does that.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    container: ContainerOptions,
}

impl Create {
    /// Makes it and prints its id.
    pub fn execute(self) -> anyhow::Result<u8> {
        self.container.check()?;
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let spec = self.container.spec(&directories)?;
        let id_file = self.container.id_file()?;
        let record = runtime.create(&spec)?;
        if let Some(file) = id_file {
            file.write(&record.id)?;
        }
        println!("{}", record.id);
        Ok(0)
    }
}
