//! `cargo xtask images`: OCI image layouts made from distribution packages, by apt and umoci.
//!
//! Owner: tests, benchmarks and the demo, which run what is built here. Runs as root on the developer's machine.
//!
//! A recipe (`images/<name>/`) names packages, sources, a parent and a configuration. Its layout is kept in the user's cache under
//! the hash of everything that goes into it, so a second checkout on the machine builds nothing.
//!
//! Invariants: a layout in the cache is complete (built in a scratch folder beside it, then renamed); two builds of one image
//! at once end with one of them waiting; a child image carries its parent's layers byte for byte.

mod archive;

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result};
use clap::Args;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::process::{check, step, workspace_root};
use archive::Archive;

/// Raised when the way of building changes so that older layouts in the cache are no longer what a recipe means.
const BUILDER_VERSION: u32 = 2;
/// How many images are made at once. Packing is what takes long, and it keeps a core busy.
const WORKERS: usize = 3;
/// Modification times are clamped to this (2025-01-01), so that the same packages make the same layers.
const SOURCE_DATE_EPOCH: &str = "1735689600";
const SOURCE_DATE: &str = "2025-01-01T00:00:00Z";
/// What `all` builds: the slowest first, so that none is left for the end.
const ALL: &[&str] = &[
    "gcc",
    "postgres",
    "node",
    "python",
    "busybox",
    "debian-minimal",
    "sqlite",
    "redis",
    "nginx",
    "openssl",
];

/// Arguments of `cargo xtask images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Images to build (folders of `images/`); all when none is named
    names: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    packages: Vec<String>,
    /// Source packages whose upstream source is put into /usr/src
    #[serde(default)]
    sources: Vec<String>,
    parent: Option<String>,
    #[serde(default)]
    merged_usr: bool,
    #[serde(default)]
    config: RecipeConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RecipeConfig {
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: Vec<String>,
    user: Option<String>,
    working_dir: Option<String>,
    volumes: Vec<String>,
    exposed_ports: Vec<String>,
    stop_signal: Option<String>,
    labels: std::collections::BTreeMap<String, String>,
}

/// Build the named images, or all of them, and print where they are.
///
/// # Errors
/// A recipe is missing or wrong, or one of the programs it needs fails.
pub fn main(args: &ImagesArgs) -> Result<()> {
    let names: Vec<&str> = if args.names.is_empty() {
        ALL.to_vec()
    } else {
        args.names.iter().map(String::as_str).collect()
    };
    for path in Builder::new()?.build_all(&names)? {
        println!("{}", path.display());
    }
    Ok(())
}

/// Build whatever is not in the cache; the folder holds a link to each image's layout, by name.
///
/// # Errors
/// As [`main`].
pub fn all() -> Result<PathBuf> {
    let builder = Builder::new()?;
    builder.build_all(ALL)?;
    Ok(builder.dir)
}

/// Builds images into the cache, several at once.
struct Builder {
    dir: PathBuf,
    /// Opened by the first image that isn't in the cache.
    archive: Mutex<Option<std::sync::Arc<Archive>>>,
}

impl Builder {
    fn new() -> Result<Self> {
        let dir = cache_dir()?;
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self {
            dir,
            archive: Mutex::default(),
        })
    }

    /// Build all of them, a few at a time; the links, in the order of the names.
    fn build_all(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || -> Result<()> {
            loop {
                let Some(name) = names.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) else {
                    return Ok(());
                };
                self.build(name).with_context(|| format!("image {name}"))?;
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .map(|worker| {
                    worker
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect::<Vec<_>>()
        })
        .into_iter()
        .collect::<Result<Vec<()>>>()?;
        Ok(names.iter().map(|name| self.dir.join(name)).collect())
    }

    fn archive(&self) -> Result<std::sync::Arc<Archive>> {
        let mut archive = self
            .archive
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(archive) = archive.as_ref() {
            return Ok(archive.clone());
        }
        let opened = std::sync::Arc::new(Archive::open(&self.dir, &suite()?)?);
        Ok(archive.insert(opened).clone())
    }

    /// Build one image unless it is there; returns the path of its link, `DIR/<kind>`.
    fn build(&self, kind: &str) -> Result<PathBuf> {
        let recipe_dir = workspace_root().join("images").join(kind);
        let text = fs::read_to_string(recipe_dir.join("recipe.toml"))
            .with_context(|| format!("no image recipe named {kind} in {}", recipe_dir.display()))?;
        let recipe: Recipe = toml::from_str(&text).with_context(|| format!("images/{kind}/recipe.toml"))?;
        let hash = recipe_hash(kind)?;
        let layout = self.dir.join(format!("{kind}-{}", &hash[..16]));
        let link = self.dir.join(kind);

        // Parent first: its lock is released again before ours is taken, so no order of locks is needed.
        let parent = recipe
            .parent
            .as_deref()
            .map(|parent| self.build(parent))
            .transpose()?;
        let lock = File::create(self.dir.join(format!(".{kind}.lock")))
            .context("cannot create the image's lock file")?;
        lock.lock().context("cannot lock the image's lock file")?;
        if layout.join("index.json").exists() {
            return point(&link, &layout).map(|()| link);
        }
        let scratch = tempfile::Builder::new()
            .prefix(&format!(".{kind}-"))
            .tempdir_in(&self.dir)?;
        let work = Work {
            kind,
            recipe: &recipe,
            setup: recipe_dir.join("setup.sh"),
            dir: scratch.path(),
            archive: &*self.archive()?,
        };
        let begin = std::time::Instant::now();
        work.build(parent.as_deref())?;
        fs::rename(work.oci(), &layout).with_context(|| format!("cannot publish {}", layout.display()))?;
        point(&link, &layout)?;
        step(&format!(
            "image {kind}: made in {:.0} s",
            begin.elapsed().as_secs_f64()
        ));
        Ok(link)
    }
}

/// Everything that decides an image's bytes, apart from the package versions of the day.
fn recipe_hash(kind: &str) -> Result<String> {
    let dir = workspace_root().join("images").join(kind);
    let mut hasher = Sha256::new();
    hasher.update(BUILDER_VERSION.to_le_bytes());
    for file in ["recipe.toml", "setup.sh"] {
        let bytes =
            fs::read(dir.join(file)).with_context(|| format!("images/{kind}/{file} cannot be read"))?;
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    hasher.update(suite()?.as_bytes());
    let recipe: Recipe = toml::from_str(&fs::read_to_string(dir.join("recipe.toml"))?)?;
    if let Some(parent) = recipe.parent {
        hasher.update(recipe_hash(&parent)?.as_bytes());
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// One image being built in a scratch folder that vanishes with it.
struct Work<'a> {
    kind: &'a str,
    recipe: &'a Recipe,
    setup: PathBuf,
    dir: &'a Path,
    archive: &'a Archive,
}

impl Work<'_> {
    fn oci(&self) -> PathBuf {
        self.dir.join("oci")
    }

    fn build(&self, parent: Option<&Path>) -> Result<()> {
        let oci = self.oci();
        let image = format!("{}:latest", oci.display());
        match parent {
            Some(parent) => check(
                Command::new("cp")
                    .arg("-a")
                    .arg("--")
                    .arg(parent.canonicalize()?)
                    .arg(&oci),
            )?,
            None => {
                check(umoci("init").arg("--layout").arg(&oci))?;
                check(umoci("new").args(["--image", &image]))?;
            }
        }
        let bundle = self.dir.join("bundle");
        check(umoci("unpack").args(["--image", &image]).arg(&bundle))?;
        let rootfs = bundle.join("rootfs");

        step(&format!(
            "image {}: fetching and unpacking {}",
            self.kind,
            self.recipe.packages.join(" ")
        ));
        self.archive
            .install(&self.recipe.packages, &rootfs, self.merged_usr()?)?;
        for source in &self.recipe.sources {
            self.archive
                .source(source, &rootfs.join("usr/src").join(source))?;
        }
        check(
            Command::new("sh")
                .arg("-eu")
                .arg(&self.setup)
                .current_dir(&rootfs),
        )?;
        clamp_times(&rootfs)?;

        step(&format!("image {}: packing", self.kind));
        check(
            umoci("repack")
                .args(["--image", &image, "--history.created", SOURCE_DATE])
                .args(["--history.created_by", self.kind])
                .arg(&bundle),
        )?;
        self.configure(&image)?;
        check(umoci("gc").arg("--layout").arg(&oci))
    }

    /// A child's packages must land in the directories its parent has.
    fn merged_usr(&self) -> Result<bool> {
        let Some(parent) = &self.recipe.parent else {
            return Ok(self.recipe.merged_usr);
        };
        let path = workspace_root().join("images").join(parent).join("recipe.toml");
        let parent: Recipe = toml::from_str(&fs::read_to_string(path)?)?;
        Ok(parent.merged_usr)
    }

    fn configure(&self, image: &str) -> Result<()> {
        let config = &self.recipe.config;
        let mut command = umoci("config");
        command.args(["--image", image, "--no-history", "--created", SOURCE_DATE]);
        // The command line and the environment are an image's own, never its parent's.
        for cleared in ["config.entrypoint", "config.cmd", "config.env"] {
            command.args(["--clear", cleared]);
        }
        let repeated = [
            ("--config.entrypoint", &config.entrypoint),
            ("--config.cmd", &config.cmd),
            ("--config.env", &config.env),
            ("--config.volume", &config.volumes),
            ("--config.exposedports", &config.exposed_ports),
        ];
        for (flag, values) in repeated {
            for value in values {
                command.args([flag, value]);
            }
        }
        let single = [
            ("--config.user", &config.user),
            ("--config.workingdir", &config.working_dir),
            ("--config.stopsignal", &config.stop_signal),
        ];
        for (flag, value) in single {
            if let Some(value) = value {
                command.args([flag, value]);
            }
        }
        for (key, value) in &config.labels {
            command.args(["--config.label", &format!("{key}={value}")]);
        }
        check(&mut command)
    }
}

fn umoci(verb: &str) -> Command {
    let mut command = Command::new("umoci");
    command.arg(verb);
    command
}

/// Times later than the epoch are those of this build; clamp them, so that the next build makes the same bytes.
fn clamp_times(rootfs: &Path) -> Result<()> {
    let later = format!("@{SOURCE_DATE_EPOCH}");
    check(Command::new("find").arg(rootfs).args([
        "-depth",
        "-newermt",
        &later,
        "-exec",
        "touch",
        "--no-dereference",
        "--date",
        &later,
        "{}",
        "+",
    ]))
}

/// The distribution's code name: the suite packages are taken from.
fn suite() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no VERSION_CODENAME: images are made from Debian packages")
}

/// Make `link` point to `target` beside it, replacing what was there in one step.
fn point(link: &Path, target: &Path) -> Result<()> {
    let name = target
        .file_name()
        .context("a layout's path has a last component")?;
    if fs::read_link(link).is_ok_and(|current| current == Path::new(name)) {
        return Ok(());
    }
    let temporary = link.with_extension(format!("link-{}", std::process::id()));
    symlink(name, &temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    fs::rename(&temporary, link).with_context(|| format!("cannot publish {}", link.display()))
}

fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("hull/images"))
}
