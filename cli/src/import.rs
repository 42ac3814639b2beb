//! `hull import`

use std::{cell::RefCell, io::IsTerminal as _};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use rootfs_builder::{ImageSource, LayerOutcome, PreparedImage, Progress, ProgressEvent, Store};
use sandbox::Directories;

use crate::image;

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

/// Shows an import on a terminal; elsewhere nothing.
struct Bars {
    current: RefCell<Option<ProgressBar>>,
    shown: bool,
}

impl Progress for Bars {
    fn event(&self, event: ProgressEvent<'_>) {
        if !self.shown {
            return;
        }
        match event {
            ProgressEvent::LayerStarted { digest, bytes, .. } => {
                let bar = ProgressBar::new(bytes);
                if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {bytes:>10}/{total_bytes}")
                {
                    bar.set_style(style);
                }
                let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
                bar.set_prefix(hex.chars().take(12).collect::<String>());
                *self.current.borrow_mut() = Some(bar);
            }
            ProgressEvent::LayerAdvanced { bytes_done, .. } => {
                if let Some(bar) = &*self.current.borrow() {
                    bar.set_position(bytes_done);
                }
            }
            ProgressEvent::LayerFinished { outcome, .. } => {
                if let Some(bar) = self.current.borrow_mut().take() {
                    match outcome {
                        LayerOutcome::Converted { .. } => bar.finish(),
                        LayerOutcome::AlreadyPresent { .. } => bar.finish_and_clear(),
                    }
                }
            }
            ProgressEvent::ImageStarted { .. } | ProgressEvent::ImageFinished => {}
        }
    }
}

/// Imports an image, with its progress shown if somebody looks.
pub fn import(store: &Store, source: &ImageSource, name: Option<&str>) -> anyhow::Result<PreparedImage> {
    let bars = Bars {
        current: RefCell::new(None),
        shown: std::io::stderr().is_terminal(),
    };
    Ok(store.import(source, name, &bars)?)
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
