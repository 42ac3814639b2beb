//! The guest kernel: what it is made of, how it is built, and where the result lies.
//!
//! Purpose: one Linux image for every container, made from a pinned source package, our patch series and config
//! fragments, and found again by the hash of all of these.
//! Owner: build time. Nothing here runs beside a container; `sandbox` calls [`locate_or_build`] before it starts a microVM.
//! Thread: the caller's; a build starts `make` and reads its output.
//!
//! States of one artifact in the cache:
//!
//! ```text
//!            build()                      verify               rename
//!   absent ─────────► tree: unpacked ─► patched ─► compiled ─► staged ─────► published (vmlinux + manifest.json)
//!      ▲                    │ crash, Ctrl-C, kill -9: the next build goes on from here
//!      └──── disk full ─────┘ (the tree is removed)                  published but damaged ─► absent
//! ```
//!
//! Invariants:
//! * The cache folder's name is the hash of every input, so a folder is never rewritten: it is there and right, or it is not.
//! * An artifact is published by one rename; no reader ever sees half of it.
//! * The build tree is locked by an `flock` that `make` and its children inherit, so a killed driver does not unlock
//!   a tree that its orphans still write to.
//! * The same inputs give the same bytes: timestamps, user, host and build number are fixed.

mod cache;
mod driver;
mod elf;
mod error;
mod inputs;
mod kconfig;
mod manifest;
mod process;
mod progress;
mod series;
mod source;

pub use cache::Cache;
pub use driver::{BuildOptions, build, locate, locate_or_build};
pub use error::{Error, Result};
pub use inputs::{InputFile, InputHash, Inputs, Toolchain};
pub use kconfig::merge as merge_config;
pub use manifest::{Artifact, FileRecord, Manifest};
pub use progress::ProgressMode;
pub use source::SourcePin;
