//! Pulling images from a registry, over the OCI distribution protocol.
//!
//! Owner: the process that pulls; a few threads fetch layers while the importing thread converts those that are there. Nothing a
//! registry says is trusted more than an image file: documents are bounded and checked against their digests before they are read,
//! layers while they are converted.
//!
//! A layer that was fetched in part stays in the store's `downloads/`, and the next pull goes on where it stopped.
//!
//! There is no default registry: a reference names its host, or `registries.conf` says where to look.

mod auth;
mod client;
mod configuration;
mod credential_helper;
mod download;
mod reference;
mod transport;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use auth::Credentials;
pub(crate) use client::Client;
pub use client::log_in;
pub(crate) use configuration::Configuration;
pub(crate) use download::{Downloads, Fetching};
pub use reference::Reference;

use crate::image::ImageError;

/// A path the environment gives; an empty one counts as none.
fn path_variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

/// How to pull.
#[derive(Debug, Clone)]
pub struct PullOptions {
    pub(crate) credentials: Option<Credentials>,
    pub(crate) tls_verify: bool,
    pub(crate) parallel: usize,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            credentials: None,
            tls_verify: true,
            parallel: 4,
        }
    }
}

impl PullOptions {
    pub fn new() -> Self {
        Self::default()
    }

    /// Who asks, if the registry wants to know.
    #[must_use]
    pub fn credentials(mut self, credentials: Option<Credentials>) -> Self {
        self.credentials = credentials;
        self
    }

    /// Whether to insist on HTTPS and a certificate this machine trusts; a registry on this machine may always speak plain HTTP.
    #[must_use]
    pub const fn tls_verify(mut self, verify: bool) -> Self {
        self.tls_verify = verify;
        self
    }

    /// How many layers are fetched at a time, at least one.
    #[must_use]
    pub const fn parallel(mut self, layers: usize) -> Self {
        self.parallel = if layers == 0 { 1 } else { layers };
        self
    }
}

/// Why an image can't be pulled.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error("{text:?} is no reference to an image in a registry: {problem}")]
    Reference { text: String, problem: &'static str },
    #[error("cannot reach {registry}")]
    Connect {
        registry: String,
        source: Box<ureq::Error>,
    },
    #[error("{registry} wants credentials: log in first")]
    LoginNeeded { registry: String },
    #[error("{registry} refuses the credentials, or access to {repository}")]
    Denied { registry: String, repository: String },
    #[error("{registry} does not have {what}")]
    NotFound { registry: String, what: String },
    #[error("{registry} answered {status} to a request for {what}")]
    Status {
        registry: String,
        status: u16,
        what: String,
        /// How long the registry wants to be left alone.
        retry_after: Option<Duration>,
    },
    #[error("{registry} answered something that makes no sense: {problem}")]
    Answer { registry: String, problem: &'static str },
    #[error("{registry} would have credentials sent unprotected to {realm:?}")]
    UnprotectedCredentials { registry: String, realm: String },
    #[error("{registry} would have a request sent on unprotected to {target:?}")]
    UnprotectedRedirect { registry: String, target: String },
    #[error("{what} broke off after {bytes} bytes")]
    Interrupted {
        what: String,
        bytes: u64,
        source: io::Error,
    },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read the credentials in {path}: {problem}")]
    CredentialsFile { path: PathBuf, problem: String },
    #[error("the credential helper {program} {problem}")]
    CredentialHelper { program: String, problem: String },
    #[error("the image in the registry is unusable")]
    Image {
        #[from]
        source: ImageError,
    },
    #[error("cannot read {path}: {problem}")]
    Configuration { path: PathBuf, problem: String },
    #[error(
        "{name:?} names no registry: put one in front, as in HOST/{name}, or say where to look in {path}: \
         unqualified-search-registries = [\"HOST\"]"
    )]
    ShortName { name: String, path: PathBuf },
    #[error("{image} is blocked by registries.conf")]
    Blocked { image: String },
    #[error("cannot start a thread")]
    Thread { source: io::Error },
    #[error("fetching was stopped because another layer failed")]
    Stopped,
}
