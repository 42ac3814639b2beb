//! Paths of archive members, taken apart.

use super::LayerError;

/// The longest path an entry may have; Linux itself takes 4096 at a time.
const PATH_MAX_BYTES: usize = 32 << 10;

/// A member's path as names below the root: no empty ones, no `.`, no `..`.
///
/// An absolute path counts from the root, as every extractor takes it. A path that leaves the root is refused; one that only
/// goes up within it is shortened.
///
/// # Errors
/// The path leaves the root, is too long, or has a name Linux can't have.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, LayerError> {
    let wrong = |problem| LayerError::Path {
        path: shown(path),
        problem,
    };
    if path.len() > PATH_MAX_BYTES {
        return Err(wrong("is too long"));
    }
    if path.contains(&0) {
        return Err(wrong("holds a NUL byte"));
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names
                    .pop()
                    .ok_or_else(|| wrong("leads out of the root file system"))?;
            }
            name if name.len() > crate::erofs::format::NAME_MAX => {
                return Err(wrong("has a name of more than 255 bytes"));
            }
            name => names.push(name),
        }
    }
    Ok(names)
}

/// A path for an error message: printable, and not longer than anyone reads.
pub fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    if text.chars().count() <= 200 {
        text.into_owned()
    } else {
        text.chars().take(200).chain("…".chars()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &str) -> Option<Vec<String>> {
        let names = components(path.as_bytes()).ok()?;
        Some(
            names
                .iter()
                .map(|name| String::from_utf8_lossy(name).into_owned())
                .collect(),
        )
    }

    #[test]
    fn paths_are_taken_from_the_root() {
        assert_eq!(
            names("./a//b/./c/"),
            Some(vec!["a".into(), "b".into(), "c".into()])
        );
        assert_eq!(names("/etc/passwd"), Some(vec!["etc".into(), "passwd".into()]));
        assert_eq!(names("a/../b"), Some(vec!["b".into()]));
        assert_eq!(names("./"), Some(vec![]));
    }

    #[test]
    fn paths_out_of_the_root_are_refused() {
        for path in ["..", "../etc/passwd", "a/../../etc/passwd", "/../x", "./../x"] {
            assert_eq!(names(path), None, "{path}");
        }
    }

    #[test]
    fn names_linux_cannot_have_are_refused() {
        assert!(names(&"n".repeat(255)).is_some());
        assert_eq!(names(&"n".repeat(256)), None);
        assert_eq!(names("a\0b"), None);
        assert_eq!(names(&"a/".repeat(20_000)), None);
    }
}
