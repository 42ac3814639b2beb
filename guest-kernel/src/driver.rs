//! The build itself: lock, unpack, patch, configure, compile, publish.

use std::fs;
use std::io;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::elf;
use crate::error::{Error, IoContext, Result};
use crate::inputs::{InputFile, Inputs, hex, require_tools};
use crate::kconfig;
use crate::manifest::{Artifact, FORMAT, FileRecord, Manifest};
use crate::process;
use crate::progress::{Progress, ProgressMode};
use crate::series::Series;
use crate::source::{remove_tree, sha256_file};

/// Free space a first build needs: the unpacked source and the objects.
const NEEDED_MIB: u64 = 1900;
/// Free space a build in an existing tree needs.
const NEEDED_AGAIN_MIB: u64 = 300;
/// A failure with less than this left is put down to the disk.
const FULL_MIB: u64 = 8;
/// Tool runs of a first build, for the progress bar; an estimate does.
const FIRST_BUILD_STEPS: u64 = 2030;

/// Fixed, so that the same inputs give the same bytes.
const REPRODUCIBLE: [(&str, &str); 4] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 2026"),
    ("KBUILD_BUILD_USER", "hull"),
    ("KBUILD_BUILD_HOST", "hull"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// Parts of the source no x86 build reads. No Kconfig file is among them: the configuration program opens them all.
const LEFT_OUT: [&str; 5] = [
    "Documentation/*/*",
    "arch/*/boot/dts/*",
    "drivers/gpu/drm/amd/include/*",
    "tools/testing/*",
    "tools/perf/*",
];

/// How to build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Where artifacts and the build tree lie.
    pub cache: Cache,
    /// Compilers at a time.
    pub jobs: NonZero<usize>,
    /// What the person waiting sees.
    pub progress: ProgressMode,
}

impl BuildOptions {
    /// This user's cache, all cores, progress where it can be seen.
    pub fn for_user() -> Result<Self> {
        Ok(Self {
            cache: Cache::of_user()?,
            jobs: std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN),
            progress: ProgressMode::Auto,
        })
    }
}

/// The artifact of these inputs, if this user's cache has it whole.
pub fn locate(inputs: &Inputs, cache: &Cache) -> Option<Artifact> {
    let hash = inputs.hash();
    Artifact::open(&cache.artifact(&hash), hash.as_str())
}

/// The artifact of the inputs this binary carries: from the cache, else built now.
pub fn locate_or_build() -> Result<Artifact> {
    build(&Inputs::embedded()?, &BuildOptions::for_user()?)
}

/// Builds what is not in the cache yet and returns it.
pub fn build(inputs: &Inputs, options: &BuildOptions) -> Result<Artifact> {
    if let Some(artifact) = locate(inputs, &options.cache) {
        return Ok(artifact);
    }
    require_tools()?;
    let mut progress = Progress::new(options.progress);
    let _lock = options
        .cache
        .lock(|| progress.note("another build is running; waiting for it"))?;
    // The build we waited for may have been this one.
    if let Some(artifact) = locate(inputs, &options.cache) {
        return Ok(artifact);
    }
    let build = Build {
        inputs,
        options,
        tree: options.cache.tree(),
    };
    let outcome = build.run(&mut progress);
    drop(progress);
    match outcome {
        Ok(artifact) => Ok(artifact),
        Err(error) => Err(build.blame_the_disk(error)),
    }
}

/// One build in the locked tree.
struct Build<'a> {
    inputs: &'a Inputs,
    options: &'a BuildOptions,
    tree: PathBuf,
}

impl Build<'_> {
    fn run(&self, progress: &mut Progress) -> Result<Artifact> {
        let begin = Instant::now();
        let (source, out, log) = (
            self.tree.join("src"),
            self.tree.join("out"),
            self.tree.join("build.log"),
        );
        self.require_space(&source)?;
        fs::create_dir_all(&self.tree).context("create", &self.tree)?;
        fs::write(&log, b"").context("write", &log)?;
        self.unpack(&source, &log, progress)?;
        progress.phase("applying the patch series", None);
        Series {
            source: &source,
            pristine: &self.tree.join("pristine"),
            staging: &self.tree.join("staging"),
            log: &log,
        }
        .apply(&self.inputs.patches)?;
        drop_half_written(&out)?;
        progress.phase("configuring", None);
        kconfig::merge(&source, &out, &self.inputs.fragments, &log)?;
        self.compile(&source, &out, &log, progress)?;
        let steps = progress.done();
        progress.phase("publishing", None);
        self.publish(&out, &log, steps, begin.elapsed())
    }

    fn require_space(&self, source: &Path) -> Result<()> {
        let needed_mib = if source.exists() {
            NEEDED_AGAIN_MIB
        } else {
            NEEDED_MIB
        };
        let free_mib = self.options.cache.free_mib()?;
        if free_mib >= needed_mib {
            return Ok(());
        }
        Err(Error::DiskFull {
            path: self.options.cache.root().to_owned(),
            needed_mib,
            free_mib,
        })
    }

    /// Unpacks the source once; another source replaces the tree as a whole.
    fn unpack(&self, source: &Path, log: &Path, progress: &mut Progress) -> Result<()> {
        let stamp = source.join(".hull-source");
        if fs::read_to_string(&stamp).is_ok_and(|found| found == self.inputs.source.sha256) {
            return Ok(());
        }
        progress.phase("obtaining the source package", None);
        let tarball = self.inputs.source.obtain(&self.options.cache.sources())?;
        progress.phase("unpacking the source", None);
        for stale in ["src", "out", "pristine", "staging", "src.partial"] {
            remove_tree(&self.tree.join(stale))?;
        }
        let partial = self.tree.join("src.partial");
        fs::create_dir(&partial).context("create", &partial)?;
        let top = self.inputs.source.top_folder;
        let mut command = process::tied_to_us("tar");
        command
            .arg("--extract")
            .arg("--xz")
            .arg("--file")
            .arg(&tarball)
            .arg("--directory")
            .arg(&partial);
        command.args([
            "--strip-components=1",
            "--no-same-owner",
            "--wildcards",
            "--no-wildcards-match-slash",
        ]);
        command.args(
            LEFT_OUT
                .iter()
                .map(|pattern| format!("--exclude={top}/{pattern}")),
        );
        process::run(&mut command, log, |_| ())?;
        let stamp = partial.join(".hull-source");
        fs::write(&stamp, self.inputs.source.sha256).context("write", &stamp)?;
        fs::rename(&partial, source).context("move into place", source)
    }

    fn compile(&self, source: &Path, out: &Path, log: &Path, progress: &mut Progress) -> Result<()> {
        let expected = (!out.join("vmlinux").exists()).then_some(FIRST_BUILD_STEPS);
        progress.phase("compiling", expected);
        let mut command = process::tied_to_us("make");
        command
            .arg(format!("-j{}", self.options.jobs))
            .arg("-C")
            .arg(source)
            .arg(format!("O={}", out.display()))
            .arg("vmlinux")
            .envs(REPRODUCIBLE)
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL");
        process::run(&mut command, log, |line| {
            // Kbuild's short form: two blanks, the tool in capitals, the file.
            let mut words = line.split_whitespace();
            if let (true, Some(tool), Some(file)) = (line.starts_with("  "), words.next(), words.next())
                && tool.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
            {
                progress.step(file);
            }
        })
    }

    /// Strips, describes and publishes by one rename.
    fn publish(&self, out: &Path, log: &Path, steps: u64, duration: Duration) -> Result<Artifact> {
        let hash = self.inputs.hash();
        let staged = self.tree.join("publish");
        remove_tree(&staged)?;
        fs::create_dir(&staged).context("create", &staged)?;
        let image = staged.join("vmlinux");
        let mut strip = process::tied_to_us("strip");
        strip
            .arg("--strip-all")
            .arg("-o")
            .arg(&image)
            .arg(out.join("vmlinux"));
        process::run(&mut strip, log, |_| ())?;
        for (from, to) in [(".config", "config"), ("System.map", "System.map")] {
            let (from, to) = (out.join(from), staged.join(to));
            fs::copy(&from, &to).context("copy", &from)?;
        }
        let bytes = fs::read(&image).context("read", &image)?;
        let facts = elf::inspect(&bytes, &image)?;
        let manifest = Manifest {
            format: FORMAT,
            input_hash: hash.as_str().to_owned(),
            linux_version: self.inputs.source.linux_version.to_owned(),
            source_package: format!("{}={}", self.inputs.source.package, self.inputs.source.version),
            source_sha256: self.inputs.source.sha256.to_owned(),
            patches_sha256: self.inputs.patches_sha256(),
            patches: records(&self.inputs.patches),
            fragments_sha256: self.inputs.fragments_sha256(),
            fragments: records(&self.inputs.fragments),
            config: record_of(&staged.join("config"))?,
            vmlinux: record_of(&image)?,
            loaded_size_bytes: facts.loaded_size_bytes,
            build_id: facts.build_id,
            compiler: self.inputs.toolchain.compiler.clone(),
            linker: self.inputs.toolchain.linker.clone(),
            build_duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            build_steps: steps,
        };
        let manifest_path = staged.join("manifest.json");
        let text = serde_json::to_vec_pretty(&manifest).map_err(|source| Error::BadManifest {
            path: manifest_path.clone(),
            source,
        })?;
        fs::write(&manifest_path, text).context("write", &manifest_path)?;
        sync(&staged)?;
        let folder = self.options.cache.artifact(&hash);
        // Only a damaged artifact can be there: a whole one would have been returned before.
        remove_tree(&folder)?;
        fs::rename(&staged, &folder).context("publish", &folder)?;
        Ok(Artifact {
            vmlinux: folder.join("vmlinux"),
            manifest_path: folder.join("manifest.json"),
            manifest,
        })
    }

    /// A tool that ran out of space says so in its own words; the person gets ours, and the space back.
    fn blame_the_disk(&self, error: Error) -> Error {
        let said_so = match &error {
            Error::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            Error::CommandFailed { tail, .. } => tail.contains("No space left on device"),
            Error::DiskFull { .. } => return error,
            _ => false,
        };
        let free_mib = self.options.cache.free_mib().unwrap_or(0);
        if !said_so && free_mib >= FULL_MIB {
            return error;
        }
        // What is half done is worth less than the space: someone may need it to make room.
        let _ = remove_tree(&self.tree);
        Error::DiskFull {
            path: self.options.cache.root().to_owned(),
            needed_mib: NEEDED_MIB,
            free_mib,
        }
    }
}

/// After a kill: removes targets that were being written.
///
/// Kbuild records each finished target in a `.NAME.cmd` file written after it. A target newer than its record was under
/// construction; by its time alone `make` would take it for finished. (A target without a record is rebuilt anyway.)
fn drop_half_written(out: &Path) -> Result<()> {
    let mut folders = vec![out.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.context("list", &folder)?,
        };
        for entry in entries {
            let path = entry.context("list", &folder)?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Some(record) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let Some(target) = record
                .strip_prefix('.')
                .and_then(|name| name.strip_suffix(".cmd"))
            else {
                continue;
            };
            let target = folder.join(target);
            let (Ok(target_time), Ok(record_time)) = (modified(&target), modified(&path)) else {
                continue;
            };
            if target_time > record_time {
                fs::remove_file(&target).context("remove", &target)?;
            }
        }
    }
    Ok(())
}

fn modified(path: &Path) -> io::Result<std::time::SystemTime> {
    fs::metadata(path)?.modified()
}

fn records(files: &[InputFile]) -> Vec<FileRecord> {
    use sha2::{Digest, Sha256};
    files
        .iter()
        .map(|file| FileRecord {
            name: file.name.clone(),
            size_bytes: file.bytes.len() as u64,
            sha256: hex(&Sha256::digest(&file.bytes)),
        })
        .collect()
}

fn record_of(path: &Path) -> Result<FileRecord> {
    Ok(FileRecord {
        name: path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        size_bytes: fs::metadata(path).context("look at", path)?.len(),
        sha256: sha256_file(path)?,
    })
}

/// The content is on the disk before the name is: a power cut must not publish empty files.
fn sync(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context("list", folder)? {
        let path = entry.context("list", folder)?.path();
        fs::File::open(&path)
            .and_then(|file| file.sync_all())
            .context("sync", &path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::inputs::Toolchain;
    use crate::source::SourcePin;

    const ABSENT: SourcePin = SourcePin {
        package: "linux-source-0.0-absent",
        version: "0.0-1",
        linux_version: "0.0",
        tarball: "linux-source-0.0.tar.xz",
        installed_in: "/nonexistent",
        top_folder: "linux-source-0.0",
        sha256: "0000000000000000000000000000000000000000000000000000000000000000",
    };

    fn inputs() -> Inputs {
        Inputs {
            source: ABSENT,
            patches: Vec::new(),
            fragments: vec![InputFile {
                name: "a.config".into(),
                bytes: b"CONFIG_SMP=y\n".to_vec(),
            }],
            toolchain: Toolchain {
                compiler: "gcc".into(),
                linker: "ld".into(),
            },
        }
    }

    fn options(cache: &Path) -> BuildOptions {
        BuildOptions {
            cache: Cache::at(cache),
            jobs: NonZero::<usize>::MIN,
            progress: ProgressMode::Silent,
        }
    }

    #[test]
    fn source_that_is_not_to_be_had_publishes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let error = build(&inputs(), &options(folder.path())).unwrap_err();
        assert!(
            matches!(error, Error::SourceUnavailable { .. } | Error::DiskFull { .. }),
            "{error}"
        );
        assert!(locate(&inputs(), &Cache::at(folder.path())).is_none());
        assert!(!folder.path().join(inputs().hash().as_str()).exists());
    }

    #[test]
    fn target_newer_than_its_record_is_dropped_and_a_finished_one_kept() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, seconds: u64| {
            let path = folder.path().join(name);
            fs::write(&path, name).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_modified(time)
                .unwrap();
        };
        write("half.o", 20);
        write(".half.o.cmd", 10);
        write("done.o", 10);
        write(".done.o.cmd", 20);
        drop_half_written(folder.path()).unwrap();
        assert!(!folder.path().join("half.o").exists());
        assert!(folder.path().join("done.o").exists());
    }

    #[test]
    fn tool_that_ran_out_of_space_becomes_one_clear_error_and_gives_the_space_back() {
        let folder = tempfile::tempdir().unwrap();
        let (inputs, options) = (inputs(), options(folder.path()));
        let build = Build {
            inputs: &inputs,
            options: &options,
            tree: options.cache.tree(),
        };
        fs::create_dir_all(build.tree.join("src")).unwrap();
        let error = build.blame_the_disk(Error::CommandFailed {
            command: "make vmlinux".into(),
            status: "exit status: 2".into(),
            log: folder.path().join("log"),
            tail: "cc1: fatal error: error writing to x.s: No space left on device".into(),
        });
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        assert!(!build.tree.exists());
    }
}
