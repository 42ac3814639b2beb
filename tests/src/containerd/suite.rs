//! Which containerd a test runs: the machine's own, or that of another suite of the distribution, unpacked into a cache.
//!
//! A newer suite's package is fetched by name with an apt whose lists and state are the cache's, so the machine's stay as they
//! are, and unpacked without running any script of it. Its programs need no more than the C library that is there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How old an unpacked package may become until the suite is asked for a newer one.
const MAX_AGE_DAYS: u64 = 30;
const SECONDS_PER_DAY: u64 = 86_400;

/// The folder that holds `containerd` and `ctr`, and how they want to be used.
#[derive(Debug, Clone)]
pub struct Programs {
    pub folder: PathBuf,
    /// `ctr images import` needs `--local`, since the newer transfer service doesn't know `--base-name`'s archives.
    pub imports_locally: bool,
}

impl Programs {
    /// Those the distribution's package has installed.
    pub fn installed() -> Self {
        Self {
            folder: PathBuf::from("/usr/bin"),
            imports_locally: false,
        }
    }

    /// Those of a suite such as `trixie` or `sid`; `None`, said on standard error, where it can't be had.
    pub fn of_suite(suite: &str) -> Option<Self> {
        let folder = match unpacked(suite) {
            Ok(folder) => folder,
            Err(why) => {
                eprintln!("skipped: containerd of {suite} can't be had: {why}");
                return None;
            }
        };
        let version = Command::new(folder.join("containerd")).arg("--version").output();
        let version = match version {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
            other => {
                eprintln!("skipped: containerd of {suite} does not run here: {other:?}");
                return None;
            }
        };
        eprintln!("containerd of {suite}: {}", version.trim());
        let major = version.split_whitespace().find_map(|word| {
            word.trim_start_matches('v')
                .split_once('.')?
                .0
                .parse::<u32>()
                .ok()
        });
        Some(Self {
            folder,
            imports_locally: major.is_some_and(|major| major >= 2),
        })
    }
}

fn cache() -> Result<PathBuf, String> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").ok_or("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("hull/containerd"))
}

/// The folder of a suite's programs, fetched if it isn't there or is old.
fn unpacked(suite: &str) -> Result<PathBuf, String> {
    let home = cache()?.join(suite);
    fs::create_dir_all(&home).map_err(|error| format!("{}: {error}", home.display()))?;
    let lock = File::create(home.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    let programs = home.join("root/usr/bin");
    let age = fs::metadata(programs.join("containerd"))
        .and_then(|found| found.created())
        .ok()
        .and_then(|made| made.elapsed().ok());
    if age.is_some_and(|age| age.as_secs() < MAX_AGE_DAYS * SECONDS_PER_DAY) {
        return Ok(programs);
    }
    match fetch(suite, &home) {
        // What is there is better than nothing.
        Err(_) if age.is_some() => Ok(programs),
        result => result.map(|()| programs),
    }
}

fn fetch(suite: &str, home: &Path) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let work = tempfile::tempdir_in(home).map_err(text)?;
    let path = |name: &str| work.path().join(name);
    fs::create_dir_all(path("lists/partial")).map_err(text)?;
    let (address, keyring) = archive().ok_or("the machine's package sources name no archive")?;
    let source = format!("deb [signed-by={keyring}] {address} {suite} main\n");
    fs::write(path("suite.list"), source).map_err(text)?;
    File::create(path("status")).map_err(text)?;
    let apt = |arguments: &[&str]| -> Result<(), String> {
        let option = |name: &str, value: PathBuf| format!("{name}={}", value.display());
        let mut command = Command::new("apt-get");
        for setting in [
            option("Dir::Etc::sourcelist", path("suite.list")),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            option("Dir::State::lists", path("lists")),
            // Nothing is installed, or apt would want the version that is.
            option("Dir::State::status", path("status")),
            option("Dir::Cache", path("cache")),
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &setting]);
        }
        done(command.arg("-qq").args(arguments).current_dir(work.path()))
    };
    fs::create_dir_all(path("cache/archives/partial")).map_err(text)?;
    apt(&["update"])?;
    apt(&["download", "containerd"])?;
    let package = fs::read_dir(work.path())
        .map_err(text)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "deb"))
        .ok_or("apt-get downloaded nothing")?;
    done(Command::new("dpkg").arg("-x").arg(&package).arg(path("root")))?;
    let root = home.join("root");
    if root.exists() {
        fs::remove_dir_all(&root).map_err(text)?;
    }
    fs::rename(path("root"), root).map_err(text)
}

fn done(command: &mut Command) -> Result<(), String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(format!("{}: {complaint}", command.get_program().display()))
}

/// The first archive the machine takes packages from, and the keys that sign it.
fn archive() -> Option<(String, String)> {
    let folder = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten();
    let mut files: Vec<PathBuf> = folder.flatten().map(|entry| entry.path()).collect();
    files.push(PathBuf::from("/etc/apt/sources.list"));
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name))?;
            value.split_whitespace().next().map(str::to_owned)
        };
        let address = field("URIs:").or_else(|| {
            let line = text.lines().find(|line| line.starts_with("deb "))?;
            line.split_whitespace()
                .find(|word| word.contains("://"))
                .map(str::to_owned)
        })?;
        let keyring = field("Signed-By:")
            .unwrap_or_else(|| "/usr/share/keyrings/debian-archive-keyring.gpg".to_owned());
        Some((address, keyring))
    })
}
