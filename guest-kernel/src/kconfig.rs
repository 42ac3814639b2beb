//! From fragments to a complete configuration, and the check that nothing asked for was dropped on the way.
//!
//! The base is `allnoconfig`: a symbol is in the image because a fragment asks for it or because one that was asked for
//! selects it. Kconfig silently drops a request whose dependencies are not met; here that is an error with the list.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::error::{Error, IoContext, Result};
use crate::inputs::InputFile;
use crate::process;

/// Writes `out/.config` from the fragments and checks it.
pub fn merge(source: &Path, out: &Path, fragments: &[InputFile], log: &Path) -> Result<()> {
    if fragments.is_empty() {
        return Err(Error::NoFragments);
    }
    fs::create_dir_all(out).context("create", out)?;
    let wanted = requests(fragments);
    let mut text = String::new();
    for (symbol, value) in &wanted {
        // Writing to a String cannot fail.
        let _ = match value.as_str() {
            "n" => writeln!(text, "# {symbol} is not set"),
            value => writeln!(text, "{symbol}={value}"),
        };
    }
    let fragment = out.join("hull.fragment");
    fs::write(&fragment, text).context("write", &fragment)?;

    let mut command = process::tied_to_us("make");
    command
        .arg("-s")
        .arg("-C")
        .arg(source)
        .arg(format!("O={}", out.display()))
        .arg(format!("KCONFIG_ALLCONFIG={}", fragment.display()))
        .arg("allnoconfig");
    process::run(&mut command, log, |_| ())?;

    let path = out.join(".config");
    let result = fs::read_to_string(&path).context("read", &path)?;
    let dropped = dropped(&wanted, &result);
    if dropped.is_empty() {
        Ok(())
    } else {
        Err(Error::ConfigDropped { dropped })
    }
}

/// What the fragments ask for; a later line wins.
fn requests(fragments: &[InputFile]) -> BTreeMap<String, String> {
    let mut wanted = BTreeMap::new();
    for fragment in fragments {
        let text = String::from_utf8_lossy(&fragment.bytes);
        for line in text.lines().map(str::trim) {
            let unset = line
                .strip_prefix("# ")
                .and_then(|rest| rest.strip_suffix(" is not set"));
            let request = match (unset, line.split_once('=')) {
                (Some(symbol), _) => Some((symbol, "n")),
                (None, Some((symbol, value))) if symbol.starts_with("CONFIG_") => Some((symbol, value)),
                _ => None,
            };
            if let Some((symbol, value)) = request {
                wanted.insert(symbol.to_owned(), value.to_owned());
            }
        }
    }
    wanted
}

/// Requests that the result does not honour, as readable text.
fn dropped(wanted: &BTreeMap<String, String>, result: &str) -> Vec<String> {
    let got: BTreeMap<&str, &str> = result.lines().filter_map(|line| line.split_once('=')).collect();
    wanted
        .iter()
        .filter_map(|(symbol, value)| {
            let found = got.get(symbol.as_str()).copied().unwrap_or("n");
            (found != value).then(|| format!("{symbol} (asked for {value}, got {found})"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(name: &str, text: &str) -> InputFile {
        InputFile {
            name: name.into(),
            bytes: text.into(),
        }
    }

    #[test]
    fn later_fragment_wins_and_comments_are_not_requests() {
        let wanted = requests(&[
            fragment("1", "# CONFIG_A=y is why\nCONFIG_A=y\nCONFIG_B=\"x=y\"\n"),
            fragment("2", "CONFIG_A=n\n# CONFIG_C is not set\n"),
        ]);
        let expected = [("CONFIG_A", "n"), ("CONFIG_B", "\"x=y\""), ("CONFIG_C", "n")];
        assert_eq!(
            wanted,
            expected
                .map(|(symbol, value)| (symbol.to_owned(), value.to_owned()))
                .into()
        );
    }

    #[test]
    fn dropped_requests_are_listed_with_what_came_instead() {
        let wanted = requests(&[fragment(
            "1",
            "CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\nCONFIG_D=16\nCONFIG_E=n\n",
        )]);
        let result = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_D=8\n";
        let dropped = dropped(&wanted, result);
        assert_eq!(
            dropped,
            [
                "CONFIG_B (asked for y, got n)",
                "CONFIG_C (asked for n, got y)",
                "CONFIG_D (asked for 16, got 8)"
            ]
        );
    }

    #[test]
    fn no_fragments_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = merge(folder.path(), folder.path(), &[], &folder.path().join("log")).unwrap_err();
        assert!(matches!(error, Error::NoFragments));
    }
}
