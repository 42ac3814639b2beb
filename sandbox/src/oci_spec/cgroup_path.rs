//! `linux.cgroupsPath`: the host's control group, in which the whole microVM is accounted.

use std::path::{Component, Path, PathBuf};

use super::error::{Result, invalid};

const FIELD: &str = "linux.cgroupsPath";

/// Where on the host a container's microVM is accounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostCgroup {
    /// Below the mount point of each hierarchy, without a slash before it.
    Path(PathBuf),
    /// A scope of systemd.
    Systemd {
        /// The slice it is in, `system.slice` where the configuration leaves it out.
        slice: String,
        /// Whose it is.
        prefix: String,
        /// Its name.
        name: String,
    },
}

/// `None`: the caller chooses.
pub(super) fn translate(path: Option<&Path>, systemd: bool) -> Result<Option<HostCgroup>> {
    let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(None);
    };
    let text = path.to_string_lossy();
    if !systemd {
        if text.split(':').count() == 3
            && text
                .split(':')
                .next()
                .is_none_or(|slice| slice.is_empty() || slice.ends_with(".slice"))
        {
            return invalid(
                FIELD,
                format!("{text:?} is a name of systemd's; give --systemd-cgroup, or a path"),
            );
        }
        let mut relative = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => relative.push(name),
                Component::ParentDir => drop(relative.pop()),
                Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            }
        }
        if relative.as_os_str().is_empty() {
            return invalid(FIELD, format!("{text:?} is the root of all groups"));
        }
        return Ok(Some(HostCgroup::Path(relative)));
    }
    let parts: Vec<&str> = text.split(':').collect();
    let [slice, prefix, name] = parts[..] else {
        return invalid(
            FIELD,
            format!("{text:?} is not slice:prefix:name, as --systemd-cgroup has it"),
        );
    };
    if name.is_empty() || text.contains('/') {
        return invalid(FIELD, format!("{text:?} names no scope of systemd"));
    }
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    if !slice.ends_with(".slice") || slice.contains("--") || slice.starts_with('-') && slice != "-.slice" {
        return invalid(FIELD, format!("{slice:?} is not the name of a slice of systemd"));
    }
    Ok(Some(HostCgroup::Systemd {
        slice: slice.to_owned(),
        prefix: prefix.to_owned(),
        name: name.to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str, systemd: bool) -> Result<Option<HostCgroup>> {
        translate(Some(Path::new(text)), systemd)
    }

    #[test]
    fn paths_are_taken_beneath_the_hierarchies() {
        let group = |text: &str| Some(HostCgroup::Path(text.into()));
        assert_eq!(path("/default/box", false).unwrap(), group("default/box"));
        assert_eq!(path("box", false).unwrap(), group("box"));
        assert_eq!(path("/a/../../b", false).unwrap(), group("b"));
        assert_eq!(path("/a/b:c", false).unwrap(), group("a/b:c"));
        assert!(path("/", false).is_err() && path("/..", false).is_err());
        assert!(path("system.slice:hull:x", false).is_err());
        assert_eq!(path("", false).unwrap(), None);
        assert_eq!(translate(None, true).unwrap(), None);
    }

    #[test]
    fn scopes_of_systemd_have_three_parts() {
        let scope = |slice: &str| {
            Some(HostCgroup::Systemd {
                slice: slice.into(),
                prefix: "hull".into(),
                name: "box".into(),
            })
        };
        assert_eq!(path("a-b.slice:hull:box", true).unwrap(), scope("a-b.slice"));
        assert_eq!(path(":hull:box", true).unwrap(), scope("system.slice"));
        for wrong in [
            "/a/b",
            "a:b",
            "a.slice:hull:",
            "a:hull:box",
            "a--b.slice:hull:box",
            "a.slice:h:x/y",
        ] {
            assert!(path(wrong, true).is_err(), "{wrong}");
        }
    }
}
