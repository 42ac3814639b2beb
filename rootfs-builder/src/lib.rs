//! OCI images become root file systems: one shared, read-only EROFS image for each layer.
//!
//! ```text
//! image source ─► image (manifest, configuration, checked) ─► layer (archive → EROFS) ─► store (published by digest)
//! ```
//!
//! Runs on the host, in whichever program imports or starts a container; there is no daemon. Everything an image contains is
//! hostile input: see [`Limits`] for what is bounded and [`layer::LayerError`] for what is refused.
//!
//! Invariants: nothing half-made is ever visible in the store; a layer is converted once and shared by every image and every
//! microVM that has it; this crate never mounts anything and needs no privileges.

pub mod digest;
pub mod erofs;
mod image;
pub mod layer;
mod limits;
mod progress;
#[cfg(feature = "registry")]
pub mod registry;
mod store;
pub mod tar;
pub mod writable;

pub use image::{ImageConfig, ImageError, ImageSource};
pub use layer::RootMetadata;
pub use limits::Limits;
pub use progress::{LayerOutcome, NoProgress, Progress, ProgressEvent};
pub use store::{
    Error, HistoryEntry, ImageDetails, ImageName, ImageSummary, LayerBlob, LayerDetails, PreparedImage,
    PruneOptions, Pruned, PrunedImage, RemoveOptions, Removed, Store,
};
