//! The distribution's package archive, read through an apt of its own: which packages an image needs beyond its parent's,
//! their files, and sources.
//!
//! Owner: [`super`]. All state (lists, downloaded files) is in one folder of the image cache, so packages that images share are
//! fetched once; the machine's own apt and dpkg are only asked where the archive is and by which keys it is signed.
//!
//! Invariants: every file comes through apt, which checks it against the archive's signature; one build asks apt at a time, as
//! apt locks its folder without waiting; no script of a package is run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{check, output, shown, step};

/// What an image does without: it makes half of a package and no program opens it.
const LEFT_OUT: &[&str] = &["man", "locale", "info", "lintian"];
/// Root directories that are links into `/usr` where that is merged.
const MERGED: &[&str] = &["bin", "lib", "lib64", "sbin"];

/// The machine's package archive.
#[derive(Debug)]
pub struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// Prepare the private state below `cache` and fetch the archive's current lists.
    ///
    /// # Errors
    /// The machine names no archive of `suite`, or it is not reachable.
    pub fn open(cache: &Path, suite: &str) -> Result<Self> {
        let archive = Self {
            dir: cache.join(".packages"),
        };
        for folder in ["archives/partial", "lists/partial", "sources", "state"] {
            let path = archive.dir.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
        let _lock = archive.lock()?;
        write_sources(suite, &archive.dir.join("sources"))?;
        let none = archive.dir.join("state/status");
        File::create(&none).with_context(|| format!("cannot create {}", none.display()))?;
        step("images: reading the package archive's lists");
        check(archive.apt(&none).args(["-qq", "update"])).context("is the package archive reachable?")?;
        Ok(archive)
    }

    fn lock(&self) -> Result<File> {
        let path = self.dir.join("lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        file.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }

    /// `apt-get` on our own state, for which exactly what `status` lists is installed.
    fn apt(&self, status: &Path) -> Command {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        let mut option = |name: &str, value: &str| {
            command.arg("-o").arg(format!("{name}={value}"));
        };
        let path = |name: &str| self.dir.join(name).display().to_string();
        option("Dir::Etc::sourcelist", "/dev/null");
        option("Dir::Etc::sourceparts", &path("sources"));
        option("Dir::Cache", &path(""));
        option("Dir::State", &path("state"));
        option("Dir::State::lists", &path("lists"));
        option("Dir::State::status", &status.display().to_string());
        option("APT::Install-Recommends", "false");
        // The folder may be one that apt's own user can't enter.
        option("APT::Sandbox::User", "root");
        command
    }

    /// Unpack what `packages` need and `rootfs` doesn't have into it; nothing of them is run.
    ///
    /// # Errors
    /// A package is unknown, or can't be fetched or unpacked.
    pub fn install(&self, packages: &[String], rootfs: &Path, merged_usr: bool) -> Result<()> {
        let status = rootfs.join("var/lib/dpkg/status");
        if merged_usr {
            for name in MERGED {
                let target = rootfs.join("usr").join(name);
                fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
                let link = rootfs.join(name);
                if link.symlink_metadata().is_err() {
                    std::os::unix::fs::symlink(Path::new("usr").join(name), &link)
                        .with_context(|| format!("cannot link {}", link.display()))?;
                }
            }
        }
        let files = self.fetch(packages, &status, merged_usr)?;
        for file in &files {
            unpack(file, rootfs).with_context(|| format!("cannot unpack {}", file.display()))?;
        }
        prune(rootfs)?;
        record(&files, &status)
    }

    fn fetch(&self, packages: &[String], installed: &Path, merged_usr: bool) -> Result<Vec<PathBuf>> {
        // apt leaves lock files beside the status it reads.
        let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
        let status = scratch.path().join("status");
        let known = fs::read(installed).unwrap_or_default();
        fs::write(&status, known).with_context(|| format!("cannot write {}", status.display()))?;
        let _lock = self.lock()?;
        let wanted = |command: &mut Command| {
            command.args(["install", "-qq", "-y"]);
            // Says that the directories are merged; otherwise apt would choose the package that merges them, and perl with it.
            if merged_usr {
                command.arg("usr-is-merged");
            }
            command.args(packages);
        };
        let mut list = self.apt(&status);
        // A file that is already there would not be listed, so ask about a cache that has none.
        let empty = scratch.path().join("archives/partial");
        fs::create_dir_all(&empty).with_context(|| format!("cannot create {}", empty.display()))?;
        list.arg("-o").arg(format!(
            "Dir::Cache::archives={}",
            scratch.path().join("archives").display()
        ));
        wanted(list.arg("--print-uris"));
        let listed = output(&mut list).context("do all these packages exist in this suite?")?;
        let mut names = Vec::new();
        for line in listed.lines() {
            // 'ADDRESS' FILE SIZE HASH
            let name = line.split_whitespace().nth(1);
            names.push(name.with_context(|| format!("apt-get printed {line:?}, which names no file"))?);
        }
        let mut fetch = self.apt(&status);
        wanted(fetch.arg("--download-only"));
        check(fetch.stdout(Stdio::null())).context("is the package archive reachable?")?;
        let archives = self.dir.join("archives");
        let mut files: Vec<PathBuf> = names.iter().map(|name| archives.join(name)).collect();
        files.sort();
        Ok(files)
    }

    /// Unpack the upstream source of a source package into `into`.
    ///
    /// # Errors
    /// The source is unknown, or can't be fetched or unpacked.
    pub fn source(&self, package: &str, into: &Path) -> Result<()> {
        let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
        {
            let _lock = self.lock()?;
            let mut fetch = self.apt(&self.dir.join("state/status"));
            fetch
                .args(["source", "-qq", "--download-only", "--only-source", package])
                .current_dir(scratch.path());
            check(fetch.stdout(Stdio::null()))
                .with_context(|| format!("is there a source package {package}?"))?;
        }
        let mut tarballs = Vec::new();
        for entry in fs::read_dir(scratch.path())? {
            let path = entry?.path();
            if path.to_string_lossy().contains(".orig.tar.")
                && path.extension().is_some_and(|end| end != "asc")
            {
                tarballs.push(path);
            }
        }
        let [tarball] = tarballs.as_slice() else {
            bail!(
                "the source package {package} has {} upstream archives, not one",
                tarballs.len()
            );
        };
        fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
        check(
            Command::new("tar")
                .arg("-C")
                .arg(into)
                .args(["--strip-components=1", "--no-same-owner", "-xf"])
                .arg(tarball),
        )
    }
}

/// Copy the machine's own package sources, those of the distribution's suite and no others, with sources of packages too.
fn write_sources(suite: &str, into: &Path) -> Result<()> {
    for old in fs::read_dir(into)? {
        fs::remove_file(old?.path())?;
    }
    let mut found = vec![PathBuf::from("/etc/apt/sources.list")];
    for entry in fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten() {
        found.push(entry?.path());
    }
    let mut written = 0;
    for path in found {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let kept = match path.extension().and_then(|end| end.to_str()) {
            Some("sources") => stanzas_of(&text, suite),
            Some("list") => lines_of(&text, suite),
            _ => continue,
        };
        if let (false, Some(name)) = (kept.is_empty(), path.file_name()) {
            fs::write(into.join(name), kept)?;
            written += 1;
        }
    }
    if written == 0 {
        bail!(
            "apt has no package source of {suite} on this machine (/etc/apt/sources.list, /etc/apt/sources.list.d)"
        );
    }
    Ok(())
}

/// Whether a word of an apt source names the suite, its updates or its security fixes.
fn is_of(word: &str, suite: &str) -> bool {
    word.strip_prefix(suite)
        .is_some_and(|rest| matches!(rest, "" | "-updates" | "-security" | "/updates"))
}

/// The stanzas of a deb822 file that are of the suite.
fn stanzas_of(text: &str, suite: &str) -> String {
    let mut kept = String::new();
    for stanza in text.split("\n\n") {
        let suites = stanza.lines().find_map(|line| line.strip_prefix("Suites:"));
        let words: Vec<&str> = suites
            .unwrap_or_default()
            .split_whitespace()
            .filter(|word| is_of(word, suite))
            .collect();
        if words.is_empty() {
            continue;
        }
        for line in stanza.lines().filter(|line| !line.trim().is_empty()) {
            if line.starts_with("Types:") {
                kept.push_str("Types: deb deb-src");
            } else if line.starts_with("Suites:") {
                kept.push_str("Suites: ");
                kept.push_str(&words.join(" "));
            } else {
                kept.push_str(line);
            }
            kept.push('\n');
        }
        kept.push('\n');
    }
    kept
}

/// The lines of a one-line-style file that are of the suite.
fn lines_of(text: &str, suite: &str) -> String {
    let mut kept = String::new();
    for line in text.lines() {
        if let Some(rest) = line.trim_start().strip_prefix("deb ")
            && rest.split_whitespace().any(|word| is_of(word, suite))
        {
            kept.push_str(&format!("deb {rest}\ndeb-src {rest}\n"));
        }
    }
    kept
}

fn unpack(file: &Path, rootfs: &Path) -> Result<()> {
    let mut read = Command::new("dpkg-deb");
    read.arg("--fsys-tarfile").arg(file).stdout(Stdio::piped());
    let mut reader = read
        .spawn()
        .with_context(|| format!("cannot start {}", shown(&read)))?;
    let mut write = Command::new("tar");
    write.arg("-C").arg(rootfs).args([
        "--numeric-owner",
        // A merged /bin stays the link it is.
        "--keep-directory-symlink",
        "-xpf",
        "-",
    ]);
    for name in LEFT_OUT {
        write.arg(format!("--exclude=./usr/share/{name}/*"));
    }
    if let Some(stream) = reader.stdout.take() {
        write.stdin(stream);
    }
    check(&mut write)?;
    if !reader.wait()?.success() {
        bail!("{} failed", shown(&read));
    }
    Ok(())
}

/// Of the documentation only the licences stay.
fn prune(rootfs: &Path) -> Result<()> {
    let doc = rootfs.join("usr/share/doc");
    if !doc.is_dir() {
        return Ok(());
    }
    check(
        Command::new("find")
            .arg(&doc)
            .args(["!", "-type", "d", "!", "-name", "copyright", "-delete"]),
    )?;
    check(
        Command::new("find")
            .arg(&doc)
            .args(["-type", "d", "-empty", "-delete"]),
    )
}

/// Add the packages to what dpkg knows to be installed: so a child image doesn't carry them again, and scanners see them.
fn record(files: &[PathBuf], status: &Path) -> Result<()> {
    let mut text = fs::read_to_string(status).unwrap_or_default();
    for file in files {
        let control = output(Command::new("dpkg-deb").arg("--field").arg(file))?;
        for line in control.lines() {
            text.push_str(line);
            text.push('\n');
            if line.starts_with("Package:") {
                text.push_str("Status: install ok installed\n");
            }
        }
        text.push('\n');
    }
    if let Some(parent) = status.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    }
    fs::write(status, text).with_context(|| format!("cannot write {}", status.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "Types: deb\nURIs: http://a\nSuites: trixie trixie-updates trixie-backports\nComponents: main\n\n\
                          Types: deb\nURIs: http://b\nSuites: nodistro\nComponents: main\n";

    #[test]
    fn other_archives_and_backports_are_left_out() {
        let kept = stanzas_of(DEB822, "trixie");
        assert!(kept.contains("Suites: trixie trixie-updates\n"), "{kept}");
        assert!(kept.contains("Types: deb deb-src\n"), "{kept}");
        assert!(
            !kept.contains("nodistro") && !kept.contains("backports"),
            "{kept}"
        );
        let text = "deb http://a trixie main\n# deb http://a trixie main\ndeb http://b cloud-trixie main\n";
        assert_eq!(
            lines_of(text, "trixie"),
            "deb http://a trixie main\ndeb-src http://a trixie main\n"
        );
    }
}
