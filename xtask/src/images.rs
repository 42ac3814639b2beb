//! `cargo xtask images`: OCI image layouts made from distribution packages, by mmdebstrap and umoci.
//!
//! Owner: tests, benchmarks and the demo, which run what is built here. Runs as root on the developer's machine.
//!
//! A recipe (`images/<name>/`) names packages, a parent and a configuration. Its layout is kept in the user's cache under
//! the hash of everything that goes into it, so a second checkout on the machine builds nothing.
//!
//! Invariants: a layout in the cache is complete (built in a scratch folder beside it, then renamed); two builds of one image
//! at once end with one of them waiting; a child image carries its parent's layers byte for byte.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::process::{check, step, workspace_root};

/// Raised when the way of building changes so that older layouts in the cache are no longer what a recipe means.
const BUILDER_VERSION: u32 = 1;
/// Modification times are clamped to this (2025-01-01), so that the same packages make the same layers.
const SOURCE_DATE_EPOCH: &str = "1735689600";
const SOURCE_DATE: &str = "2025-01-01T00:00:00Z";
/// What `all` builds: parents before children.
const ALL: &[&str] = &["busybox", "debian-minimal", "redis"];

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
    let dir = cache_dir()?;
    let names: Vec<&str> = if args.names.is_empty() {
        ALL.to_vec()
    } else {
        args.names.iter().map(String::as_str).collect()
    };
    for name in names {
        println!("{}", build(name, &dir)?.display());
    }
    Ok(())
}

/// Build whatever is not in the cache; the folder holds a link to each image's layout, by name.
///
/// # Errors
/// As [`main`].
pub fn all() -> Result<PathBuf> {
    let dir = cache_dir()?;
    for name in ALL {
        build(name, &dir)?;
    }
    Ok(dir)
}

/// Build one image below `out_dir` unless it is there; returns the path of its link, `out_dir/<kind>`.
///
/// # Errors
/// As [`main`].
pub fn build(kind: &str, out_dir: &Path) -> Result<PathBuf> {
    let recipe_dir = workspace_root().join("images").join(kind);
    let text = fs::read_to_string(recipe_dir.join("recipe.toml"))
        .with_context(|| format!("no image recipe named {kind} in {}", recipe_dir.display()))?;
    let recipe: Recipe = toml::from_str(&text).with_context(|| format!("images/{kind}/recipe.toml"))?;
    fs::create_dir_all(out_dir).with_context(|| format!("cannot create {}", out_dir.display()))?;
    let hash = recipe_hash(kind)?;
    let layout = out_dir.join(format!("{kind}-{}", &hash[..16]));
    let link = out_dir.join(kind);

    // Parent first: its lock is released again before ours is taken, so no order of locks is needed.
    let parent = recipe
        .parent
        .as_deref()
        .map(|parent| build(parent, out_dir))
        .transpose()?;
    let lock =
        File::create(out_dir.join(format!(".{kind}.lock"))).context("cannot create the image's lock file")?;
    lock.lock().context("cannot lock the image's lock file")?;
    if layout.join("index.json").exists() {
        return point(&link, &layout).map(|()| link);
    }
    step(&format!(
        "image {kind}: {} packages{}",
        recipe.packages.len(),
        if parent.is_some() {
            " on top of its parent"
        } else {
            ""
        }
    ));
    let scratch = tempfile::Builder::new()
        .prefix(&format!(".{kind}-"))
        .tempdir_in(out_dir)?;
    let work = Work {
        kind,
        recipe: &recipe,
        setup: recipe_dir.join("setup.sh"),
        dir: scratch.path(),
    };
    work.build(parent.as_deref())?;
    fs::rename(work.oci(), &layout).with_context(|| format!("cannot publish {}", layout.display()))?;
    point(&link, &layout)?;
    Ok(link)
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

        step(&format!("image {}: fetching and unpacking packages", self.kind));
        let tarball = self.dir.join("packages.tar");
        self.packages(&tarball)?;
        check(
            Command::new("tar")
                .arg("-C")
                .arg(&rootfs)
                .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
                .arg(&tarball),
        )?;
        fs::remove_file(&tarball)?;
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

    /// The packages and what they depend on, unpacked without running their scripts, as one tar archive.
    fn packages(&self, tarball: &Path) -> Result<()> {
        let mut command = Command::new("mmdebstrap");
        command
            .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH)
            .args(["--quiet", "--variant=extract"]);
        if self.merged_usr()? {
            command.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr");
        }
        for excluded in ["man", "locale", "doc", "info", "lintian"] {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{excluded}/*"));
        }
        command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
        command.arg(format!("--include={}", self.recipe.packages.join(",")));
        command.arg(suite()?).arg(tarball);
        command.args(package_sources()?);
        // Its helpers' chatter would bury the progress lines; errors go to standard error.
        command.stdout(std::process::Stdio::null());
        check(&mut command).context("is the package archive reachable?")
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

/// The files this machine's own apt reads its sources from.
fn package_sources() -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    let list = PathBuf::from("/etc/apt/sources.list");
    let mut active = String::new();
    if let Ok(mut file) = File::open(&list) {
        file.read_to_string(&mut active)
            .context("/etc/apt/sources.list")?;
    }
    if active.lines().any(|line| line.trim_start().starts_with("deb ")) {
        sources.push(list);
    }
    let suffixes = [OsStr::new("sources"), OsStr::new("list")];
    for entry in fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|suffix| suffixes.contains(&suffix)) {
            sources.push(path);
        }
    }
    sources.sort();
    if sources.is_empty() {
        bail!("apt has no package sources on this machine (/etc/apt/sources.list, /etc/apt/sources.list.d)");
    }
    Ok(sources)
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
