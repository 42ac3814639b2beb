//! Embeds the patch series and the config fragments, so that an installed binary can build the kernel it needs and
//! knows the hash of its inputs without a source tree beside it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let mut code = String::new();
    for (constant, folder, extension) in [("PATCHES", "patches", "patch"), ("FRAGMENTS", "config", "config")]
    {
        println!("cargo::rerun-if-changed={}", root.join(folder).display());
        let _ = writeln!(code, "pub(crate) const {constant}: &[(&str, &[u8])] = &[");
        for path in files_of(&root.join(folder), extension)? {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let _ = writeln!(
                code,
                "    ({name:?}, include_bytes!({:?})),",
                path.display().to_string()
            );
        }
        code.push_str("];\n");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("embedded.rs"), code)
}

/// The files of `folder` with this extension in name order; a folder that is not there is an empty series.
fn files_of(folder: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
