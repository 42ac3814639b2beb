//! What the end-to-end tests share: driving the programs that are shipped, in worlds of their own, on real microVMs.
//!
//! Owner: `cargo xtask test`, which builds the products and names them in the environment. Nothing here is linked by a
//! product.

pub mod containerd;
pub mod cri;
pub mod docker;
pub mod enclosure;
pub mod footprint;
pub mod hull;
pub mod initramfs;
pub mod kernel_guest;
pub mod kernel_vm;
pub mod netns;
pub mod oci;
pub mod oci_guest;
pub mod outer_vm;
pub mod podman;
pub mod pty;
pub mod registry;
pub mod relay;
pub mod runc;
pub mod soak_root;
