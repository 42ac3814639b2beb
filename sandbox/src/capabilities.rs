//! Capabilities by name, and which of them a container has, as docker decides it.

use caps::Capability;

use crate::{Result, SandboxError, confinement::Confinement};

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW, SYS_CHROOT,
/// MKNOD, AUDIT_WRITE, SETFCAP.
const DEFAULT: u64 = 0xa804_25fb;

/// The number of a capability, with or without `CAP_`, in either case.
pub(crate) fn number(name: &str) -> Option<u8> {
    let name = name.to_ascii_uppercase();
    let full = if name.starts_with("CAP_") {
        name
    } else {
        format!("CAP_{name}")
    };
    full.parse::<Capability>()
        .ok()
        .map(|capability| capability.index())
}

fn all() -> u64 {
    caps::all()
        .into_iter()
        .fold(0, |mask, capability| mask | 1 << capability.index())
}

/// The names of one option as a mask, and whether `ALL` is among them.
fn mask(option: &'static str, names: &[String]) -> Result<(u64, bool)> {
    let mut mask = 0;
    let mut every = false;
    for name in names {
        if name.eq_ignore_ascii_case("all") {
            every = true;
            continue;
        }
        let number = number(name).ok_or_else(|| SandboxError::InvalidOption {
            option,
            problem: format!(
                "{name:?} is not a capability; capabilities(7) lists them, and ALL is all of them"
            ),
        })?;
        mask |= 1 << number;
    }
    Ok((mask, every))
}

/// The bounding set of a container.
///
/// # Errors
///
/// A name is not a capability's.
pub(crate) fn bounding(confinement: &Confinement) -> Result<u64> {
    let (added, add_all) = mask("--cap-add", &confinement.cap_add)?;
    let (dropped, drop_all) = mask("--cap-drop", &confinement.cap_drop)?;
    Ok(match () {
        () if confinement.privileged => all(),
        () if add_all => all() & !dropped,
        () if drop_all => added,
        () => (DEFAULT & !dropped) | added,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(add: &[&str], drop: &[&str]) -> u64 {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        let confinement = Confinement {
            cap_add: names(add),
            cap_drop: names(drop),
            ..Confinement::default()
        };
        bounding(&confinement).unwrap()
    }

    #[test]
    fn names_are_taken_as_docker_takes_them() {
        assert_eq!(number("NET_ADMIN"), Some(12));
        assert_eq!(number("cap_sys_admin"), Some(21));
        assert_eq!(number("CAP_FLY"), None);
    }

    #[test]
    fn sets_are_dockers() {
        assert_eq!(set(&[], &[]), DEFAULT);
        assert_eq!(set(&["NET_ADMIN"], &["CHOWN"]), (DEFAULT | 1 << 12) & !1);
        assert_eq!(set(&["CHOWN"], &["ALL"]), 1);
        assert_eq!(set(&[], &["all"]), 0);
        assert_eq!(set(&["ALL"], &["SYS_ADMIN"]), ((1 << 41) - 1) & !(1 << 21));
    }

    #[test]
    fn unknown_name_is_refused_by_name() {
        let confinement = Confinement {
            cap_drop: vec!["FLY".into()],
            ..Confinement::default()
        };
        let error = bounding(&confinement).unwrap_err();
        assert!(error.to_string().contains("FLY"), "{error}");
    }
}
