//! Brings the patched source in line with a series, touching only files whose content changes.
//!
//! `make` goes by file times, so re-unpacking or re-patching the whole tree would recompile all of it. Instead the original
//! of every file a series ever touched is kept in `pristine/`; a new series is applied to copies of those in `staging/`,
//! and what differs is moved into `src/`.
//!
//! Crash-only: `pristine/` is complete before `src/` is touched and never overwritten, and the rest is repeated from it,
//! so a run killed at any point is mended by the next.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, IoContext, Result};
use crate::inputs::InputFile;
use crate::process;
use crate::source::remove_tree;

/// The folders of one build tree.
#[derive(Debug)]
pub(crate) struct Series<'a> {
    pub(crate) source: &'a Path,
    pub(crate) pristine: &'a Path,
    pub(crate) staging: &'a Path,
    pub(crate) log: &'a Path,
}

impl Series<'_> {
    /// Makes `source` be the original with exactly these patches.
    pub(crate) fn apply(&self, patches: &[InputFile]) -> Result<()> {
        let mut touched = BTreeSet::new();
        for patch in patches {
            touched.extend(touched_by(patch)?);
        }
        self.keep_originals(&touched)?;
        touched.extend(files_below(&self.pristine.join("files"))?);
        touched.extend(files_below(&self.pristine.join("absent"))?);
        self.stage(&touched, patches)?;
        for path in &touched {
            self.bring_over(path)?;
        }
        remove_tree(self.staging)
    }

    /// Saves the original of each file, or the fact that there is none, unless that was done before.
    fn keep_originals(&self, touched: &BTreeSet<PathBuf>) -> Result<()> {
        for path in touched {
            let original = self.pristine.join("files").join(path);
            let absent = self.pristine.join("absent").join(path);
            if original.exists() || absent.exists() {
                continue;
            }
            let current = self.source.join(path);
            if current.exists() {
                copy_atomically(&current, &original)?;
            } else {
                create_parent(&absent)?;
                fs::write(&absent, b"").context("write", &absent)?;
            }
        }
        Ok(())
    }

    fn stage(&self, touched: &BTreeSet<PathBuf>, patches: &[InputFile]) -> Result<()> {
        remove_tree(self.staging)?;
        let tree = self.staging.join("tree");
        fs::create_dir_all(&tree).context("create", &tree)?;
        for path in touched {
            let original = self.pristine.join("files").join(path);
            if original.exists() {
                copy_atomically(&original, &tree.join(path))?;
            }
        }
        for patch in patches {
            let file = self.staging.join(&patch.name);
            fs::write(&file, &patch.bytes).context("write", &file)?;
            let mut command = process::tied_to_us("patch");
            command
                .args([
                    "--batch",
                    "--forward",
                    "--strip=1",
                    "--fuzz=0",
                    "--no-backup-if-mismatch",
                    "--silent",
                ])
                .arg("--reject-file=-")
                .arg("--directory")
                .arg(&tree)
                .arg("--input")
                .arg(&file);
            process::run(&mut command, self.log, |_| ()).map_err(|error| match error {
                Error::CommandFailed { tail, .. } => Error::PatchRejected {
                    patch: patch.name.clone(),
                    detail: tail,
                },
                other => other,
            })?;
        }
        Ok(())
    }

    fn bring_over(&self, path: &Path) -> Result<()> {
        let wanted = self.staging.join("tree").join(path);
        let current = self.source.join(path);
        if !wanted.exists() {
            return match fs::remove_file(&current) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).context("remove", &current)
                }
                _ => Ok(()),
            };
        }
        let new = fs::read(&wanted).context("read", &wanted)?;
        if fs::read(&current).is_ok_and(|old| old == new) {
            return Ok(());
        }
        copy_atomically(&wanted, &current)
    }
}

/// The files a patch names, relative to the source.
fn touched_by(patch: &InputFile) -> Result<Vec<PathBuf>> {
    let text = String::from_utf8_lossy(&patch.bytes);
    let mut files = Vec::new();
    for line in text.lines() {
        let named = ["--- a/", "+++ b/", "rename from ", "rename to "]
            .iter()
            .find_map(|prefix| line.strip_prefix(prefix))
            .map(|rest| rest.split('\t').next().unwrap_or(rest));
        let Some(name) = named else { continue };
        let path = PathBuf::from(name);
        if path
            .components()
            .any(|part| !matches!(part, Component::Normal(_)))
        {
            return Err(Error::PatchRejected {
                patch: patch.name.clone(),
                detail: format!("it names {name}, outside the source"),
            });
        }
        files.push(path);
    }
    Ok(files)
}

/// All files below a folder, relative to it; none if it is not there.
fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.context("list", &folder)?,
        };
        for entry in entries {
            let entry = entry.context("list", &folder)?;
            let path = entry.path();
            if entry.file_type().context("look at", &path)?.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "hull-new") {
                // Left by a copy that was killed.
                fs::remove_file(&path).context("remove", &path)?;
            } else if let Ok(relative) = path.strip_prefix(root) {
                found.push(relative.to_owned());
            }
        }
    }
    Ok(found)
}

fn copy_atomically(from: &Path, to: &Path) -> Result<()> {
    create_parent(to)?;
    let mut name = to.as_os_str().to_owned();
    name.push(".hull-new");
    let new = PathBuf::from(name);
    let bytes = fs::read(from).context("read", from)?;
    // Written rather than copied, so that the time is now and `make` sees the change.
    fs::write(&new, bytes).context("write", &new)?;
    let permissions = fs::metadata(from).context("look at", from)?.permissions();
    fs::set_permissions(&new, permissions).context("set the mode of", &new)?;
    fs::rename(&new, to).context("move into place", to)
}

fn create_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| {
        fs::create_dir_all(parent).context("create", parent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree {
        folder: tempfile::TempDir,
    }

    impl Tree {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir_all(folder.path().join("src/kernel")).unwrap();
            fs::write(folder.path().join("src/kernel/a.c"), "one\ntwo\nthree\n").unwrap();
            fs::write(folder.path().join("src/kernel/b.c"), "b\n").unwrap();
            Self { folder }
        }

        fn apply(&self, patches: &[InputFile]) -> Result<()> {
            let root = self.folder.path();
            Series {
                source: &root.join("src"),
                pristine: &root.join("pristine"),
                staging: &root.join("staging"),
                log: &root.join("log"),
            }
            .apply(patches)
        }

        fn read(&self, file: &str) -> Option<String> {
            fs::read_to_string(self.folder.path().join("src").join(file)).ok()
        }

        fn time(&self, file: &str) -> std::time::SystemTime {
            fs::metadata(self.folder.path().join("src").join(file))
                .unwrap()
                .modified()
                .unwrap()
        }
    }

    fn patch(name: &str, text: &str) -> InputFile {
        InputFile {
            name: name.into(),
            bytes: text.into(),
        }
    }

    fn change(from: &str, to: &str) -> InputFile {
        let text =
            format!("--- a/kernel/a.c\n+++ b/kernel/a.c\n@@ -1,3 +1,3 @@\n one\n-{from}\n+{to}\n three\n");
        patch(&format!("0001-{to}.patch"), &text)
    }

    fn addition() -> InputFile {
        patch(
            "0002-new.patch",
            "--- /dev/null\n+++ b/kernel/new.c\n@@ -0,0 +1 @@\n+new\n",
        )
    }

    #[test]
    fn series_is_applied_in_order() {
        let tree = Tree::new();
        tree.apply(&[change("two", "2"), change("2", "zwei"), addition()])
            .unwrap();
        assert_eq!(tree.read("kernel/a.c").unwrap(), "one\nzwei\nthree\n");
        assert_eq!(tree.read("kernel/new.c").unwrap(), "new\n");
    }

    #[test]
    fn another_series_starts_from_the_original_again() {
        let tree = Tree::new();
        tree.apply(&[change("two", "2"), addition()]).unwrap();
        tree.apply(&[change("two", "II")]).unwrap();
        assert_eq!(tree.read("kernel/a.c").unwrap(), "one\nII\nthree\n");
        assert_eq!(tree.read("kernel/new.c"), None);
        tree.apply(&[]).unwrap();
        assert_eq!(tree.read("kernel/a.c").unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn unchanged_files_keep_their_time() {
        let tree = Tree::new();
        tree.apply(&[change("two", "2"), addition()]).unwrap();
        let before = tree.time("kernel/a.c");
        tree.apply(&[change("two", "2")]).unwrap();
        assert_eq!(tree.time("kernel/a.c"), before);
    }

    #[test]
    fn run_killed_while_bringing_files_over_is_mended_by_the_next() {
        let tree = Tree::new();
        tree.apply(&[change("two", "2")]).unwrap();
        // As if a later series had been brought over in part.
        fs::write(tree.folder.path().join("src/kernel/a.c"), "half").unwrap();
        fs::create_dir_all(tree.folder.path().join("staging/tree")).unwrap();
        tree.apply(&[change("two", "II")]).unwrap();
        assert_eq!(tree.read("kernel/a.c").unwrap(), "one\nII\nthree\n");
    }

    #[test]
    fn patch_that_does_not_apply_is_named_and_changes_nothing() {
        let tree = Tree::new();
        let error = tree.apply(&[change("zwei", "2")]).unwrap_err();
        assert!(
            matches!(&error, Error::PatchRejected { patch, .. } if patch == "0001-2.patch"),
            "{error}"
        );
        assert_eq!(tree.read("kernel/a.c").unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn patch_that_leaves_the_source_is_refused() {
        let tree = Tree::new();
        let evil = patch(
            "0001-evil.patch",
            "--- /dev/null\n+++ b/../../evil\n@@ -0,0 +1 @@\n+x\n",
        );
        let error = tree.apply(&[evil]).unwrap_err();
        assert!(error.to_string().contains("outside the source"), "{error}");
    }
}
