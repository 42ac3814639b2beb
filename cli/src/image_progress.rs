//! Bars for images on their way into the store: one for each layer, on a terminal; elsewhere nothing.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use rootfs_builder::{LayerOutcome, Progress, ProgressEvent};

/// Shows how far each layer is, on stderr.
#[derive(Debug)]
pub struct Bars {
    all: Option<MultiProgress>,
    layers: RefCell<BTreeMap<usize, ProgressBar>>,
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

const BUSY: &str = "{prefix}: {msg:<11} [{bar:40}] {bytes}/{total_bytes}";
const DONE: &str = "{prefix}: {msg}";

impl Bars {
    /// Bars where somebody looks, and nothing where nobody does or `quiet` was asked for.
    pub fn new(quiet: bool) -> Self {
        let shown = !quiet && std::io::stderr().is_terminal();
        Self {
            all: shown.then(MultiProgress::new),
            layers: RefCell::default(),
        }
    }

    /// The bar of a layer, made when it is first spoken of.
    fn with_bar(&self, index: usize, act: impl FnOnce(&ProgressBar)) {
        let Some(all) = &self.all else { return };
        let mut layers = self.layers.borrow_mut();
        let bar = layers.entry(index).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(0).with_style(style(BUSY)));
            bar.set_prefix(format!("layer {:>2}", index + 1));
            bar
        });
        act(bar);
    }
}

impl Progress for Bars {
    fn event(&self, event: ProgressEvent<'_>) {
        match event {
            ProgressEvent::LayerStarted { index, digest, bytes } => self.with_bar(index, |bar| {
                bar.set_prefix(short(digest));
                bar.set_length(bytes);
                bar.set_position(0);
                bar.set_message("Converting");
            }),
            ProgressEvent::LayerAdvanced { index, bytes_done } => {
                self.with_bar(index, |bar| bar.set_position(bytes_done));
            }
            ProgressEvent::LayerFinished {
                index,
                digest,
                outcome,
            } => self.with_bar(index, |bar| {
                bar.set_prefix(short(digest));
                bar.set_style(style(DONE));
                bar.finish_with_message(match outcome {
                    LayerOutcome::Converted { .. } => "Complete",
                    LayerOutcome::AlreadyPresent { .. } => "Already exists",
                });
            }),
            ProgressEvent::ImageStarted { .. } | ProgressEvent::ImageFinished => {}
        }
    }

    fn fetched(&self, index: usize, bytes_done: u64, bytes: u64) {
        self.with_bar(index, |bar| {
            // Layers are converted while others still come: only what isn't being converted yet is shown as downloading.
            if !bar.is_finished() && bar.message() != "Converting" {
                bar.set_length(bytes);
                bar.set_position(bytes_done);
                bar.set_message(if bytes_done < bytes {
                    "Downloading"
                } else {
                    "Downloaded"
                });
            }
        });
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        // What broke off stays visible as it was; a line break keeps the error that follows apart from it.
        let unfinished = self.layers.borrow().values().any(|bar| !bar.is_finished());
        if unfinished {
            self.layers.borrow().values().for_each(ProgressBar::abandon);
            drop(writeln!(std::io::stderr()));
        }
    }
}

fn short(digest: &str) -> String {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.chars().take(12).collect()
}
