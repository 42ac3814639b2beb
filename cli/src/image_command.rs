//! `hull image …`: what the verbs `images`, `pull`, `rmi` and `import` do, and what only images have.

use clap::{Args, Subcommand};

use crate::{image_history, image_inspect, image_tag, images, import, prune, pull, rmi};

/// Manage images.
#[derive(Debug, Args)]
pub struct Image {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    #[command(visible_alias = "list")]
    Ls(images::Images),
    Inspect(image_inspect::ImageInspect),
    History(image_history::ImageHistory),
    Pull(pull::Pull),
    Import(import::Import),
    Tag(image_tag::Tag),
    Untag(image_tag::Untag),
    #[command(visible_alias = "remove")]
    Rm(rmi::Rmi),
    Prune(prune::ImagePrune),
}

impl Image {
    /// Does what was asked for.
    pub fn execute(self) -> anyhow::Result<u8> {
        match self.verb {
            Verb::Ls(verb) => verb.execute(),
            Verb::Inspect(verb) => verb.execute(),
            Verb::History(verb) => verb.execute(),
            Verb::Pull(verb) => verb.execute(),
            Verb::Import(verb) => verb.execute(),
            Verb::Tag(verb) => verb.execute(),
            Verb::Untag(verb) => verb.execute(),
            Verb::Rm(verb) => verb.execute(),
            Verb::Prune(verb) => verb.execute(),
        }
    }
}
