//! `hull pull`

use anyhow::bail;
use clap::Args;
use rootfs_builder::{
    PreparedImage, Store,
    registry::{Credentials, PullOptions, Reference, RegistryError},
};
use sandbox::Directories;

use crate::{image, image_progress::Bars};

/// Bring an image from its registry into the store.
///
/// Layers that are here already are not fetched again, and a pull that broke off goes on where it stopped.
#[derive(Debug, Args)]
pub struct Pull {
    /// Say nothing but the image's id
    #[arg(short, long)]
    quiet: bool,
    /// Fetch all tags of the repository; not supported
    #[arg(short, long, hide = true)]
    all_tags: bool,
    /// Fetch the image of every platform; not possible here, as only this machine's can run
    #[arg(long, hide = true)]
    all_platforms: bool,
    /// Platform of the image; this machine's is the only one that can run
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<String>,
    #[command(flatten)]
    access: Access,
    /// HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]
    reference: String,
}

/// How a registry is spoken to.
#[derive(Debug, Clone, Args)]
pub struct Access {
    /// Whether the registry must prove who it is; without, any certificate and plain HTTP will do
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub tls_verify: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self { tls_verify: true }
    }
}

/// What this machine's images say they are for.
fn own_platforms() -> [&'static str; 3] {
    if cfg!(target_arch = "aarch64") {
        ["linux/arm64", "linux/aarch64", "linux/arm64/v8"]
    } else {
        ["linux/amd64", "linux/x86_64", "linux/amd64/v1"]
    }
}

/// Fetches an image, with bars if somebody looks: the first of several references that there is.
///
/// # Errors
/// As [`Store::pull`], of the last one.
pub fn pull(
    store: &Store,
    references: &[Reference],
    access: &Access,
    quiet: bool,
) -> anyhow::Result<PreparedImage> {
    let mut result = Err(anyhow::anyhow!("no registry to pull it from"));
    for reference in references {
        let options = PullOptions::new()
            .credentials(Credentials::find_for(reference)?)
            .tls_verify(access.tls_verify);
        let pulled = store.pull(reference, None, &options, &Bars::new(quiet));
        let is_missing = matches!(
            &pulled,
            Err(rootfs_builder::Error::Pull {
                source: RegistryError::NotFound { .. },
                ..
            })
        );
        result = pulled.map_err(Into::into);
        if !is_missing {
            break;
        }
    }
    result
}

impl Pull {
    /// Fetches it and prints its id.
    pub fn execute(self) -> anyhow::Result<u8> {
        if self.all_platforms {
            bail!("--all-platforms: images of other platforms can't run here; leave it out");
        }
        if self.all_tags {
            bail!("--all-tags is not supported; pull the tags you need by name");
        }
        if let Some(platform) = &self.platform
            && !own_platforms().contains(&platform.as_str())
        {
            bail!(
                "--platform {platform}: only images for {} can run here",
                own_platforms()[0]
            );
        }
        let references = Reference::candidates(&self.reference)?;
        let store = image::open_store(&Directories::from_environment())?;
        let image = pull(&store, &references, &self.access, self.quiet)?;
        if !self.quiet && !image.manifest_digest.is_empty() {
            eprintln!("Digest: {}", image.manifest_digest);
        }
        println!("{}", image.id);
        Ok(0)
    }
}
