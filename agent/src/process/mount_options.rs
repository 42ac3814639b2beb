//! Options of a mount, as mount(8) and runc name them.

use nix::{errno::Errno, mount::MsFlags};

use crate::mount_api::{
    ATTRIBUTE_ATIME, ATTRIBUTE_NOATIME, ATTRIBUTE_NODEV, ATTRIBUTE_NODIRATIME, ATTRIBUTE_NOEXEC,
    ATTRIBUTE_NOSUID, ATTRIBUTE_NOSYMFOLLOW, ATTRIBUTE_RDONLY, ATTRIBUTE_STRICTATIME, Attributes,
};

/// `MS_NOSYMFOLLOW`, which libc lacks.
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

/// What an option does to `mount(2)`'s flags, and to the attributes of a mount: (name, set, cleared, attributes).
type Row = (&'static str, MsFlags, MsFlags, Attributes);

const NONE: MsFlags = MsFlags::empty();

const fn sets(name: &'static str, flag: MsFlags, attribute: u64) -> Row {
    (
        name,
        flag,
        NONE,
        Attributes {
            set: attribute,
            clear: 0,
        },
    )
}

const fn clears(name: &'static str, flag: MsFlags, attribute: u64) -> Row {
    (
        name,
        NONE,
        flag,
        Attributes {
            set: 0,
            clear: attribute,
        },
    )
}

/// How access times are kept is one of several.
const fn atime(name: &'static str, flag: MsFlags, cleared: MsFlags, attribute: u64) -> Row {
    let attributes = Attributes {
        set: attribute,
        clear: ATTRIBUTE_ATIME,
    };
    (name, flag, cleared, attributes)
}

/// Each with a form that begins with `r` and means everything below, too.
const PER_MOUNT: [Row; 20] = [
    sets("ro", MsFlags::MS_RDONLY, ATTRIBUTE_RDONLY),
    clears("rw", MsFlags::MS_RDONLY, ATTRIBUTE_RDONLY),
    sets("nosuid", MsFlags::MS_NOSUID, ATTRIBUTE_NOSUID),
    clears("suid", MsFlags::MS_NOSUID, ATTRIBUTE_NOSUID),
    sets("nodev", MsFlags::MS_NODEV, ATTRIBUTE_NODEV),
    clears("dev", MsFlags::MS_NODEV, ATTRIBUTE_NODEV),
    sets("noexec", MsFlags::MS_NOEXEC, ATTRIBUTE_NOEXEC),
    clears("exec", MsFlags::MS_NOEXEC, ATTRIBUTE_NOEXEC),
    sets("nodiratime", MsFlags::MS_NODIRATIME, ATTRIBUTE_NODIRATIME),
    clears("diratime", MsFlags::MS_NODIRATIME, ATTRIBUTE_NODIRATIME),
    sets("nosymfollow", NOSYMFOLLOW, ATTRIBUTE_NOSYMFOLLOW),
    clears("symfollow", NOSYMFOLLOW, ATTRIBUTE_NOSYMFOLLOW),
    atime("noatime", MsFlags::MS_NOATIME, NONE, ATTRIBUTE_NOATIME),
    atime("atime", NONE, MsFlags::MS_NOATIME, 0),
    atime("relatime", MsFlags::MS_RELATIME, NONE, 0),
    atime("norelatime", NONE, MsFlags::MS_RELATIME, 0),
    atime(
        "strictatime",
        MsFlags::MS_STRICTATIME,
        NONE,
        ATTRIBUTE_STRICTATIME,
    ),
    atime("nostrictatime", NONE, MsFlags::MS_STRICTATIME, 0),
    // Of the superblock, without an attribute of a mount; they have no recursive form, which is no harm.
    sets("lazytime", MsFlags::MS_LAZYTIME, 0),
    clears("nolazytime", MsFlags::MS_LAZYTIME, 0),
];

/// Of `mount(2)` alone.
const PLAIN: [(&str, MsFlags, MsFlags); 15] = [
    ("bind", MsFlags::MS_BIND, NONE),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), NONE),
    ("remount", MsFlags::MS_REMOUNT, NONE),
    ("sync", MsFlags::MS_SYNCHRONOUS, NONE),
    ("async", NONE, MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC, NONE),
    ("iversion", MsFlags::MS_I_VERSION, NONE),
    ("noiversion", NONE, MsFlags::MS_I_VERSION),
    // Mandatory locks have gone from the kernel; silence is about its log.
    ("mand", NONE, NONE),
    ("nomand", NONE, NONE),
    ("silent", NONE, NONE),
    ("loud", NONE, NONE),
    ("defaults", NONE, NONE),
    ("copy", NONE, NONE),
    ("nocopy", NONE, NONE),
];

/// Options, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MountOptions {
    /// For `mount(2)`.
    pub(super) flags: MsFlags,
    /// The same for a mount that is there already.
    pub(super) attributes: Attributes,
    /// For it and everything below.
    pub(super) recursive: Attributes,
    /// In their order.
    pub(super) propagation: Vec<MsFlags>,
    /// What is below a tmpfs is copied into it.
    pub(super) copy_up: bool,
    /// For the filesystem itself.
    pub(super) data: Vec<String>,
}

impl MountOptions {
    /// Takes options apart, later ones winning.
    pub(super) fn parse(options: &[String]) -> Self {
        let mut parsed = Self {
            flags: NONE,
            attributes: Attributes::default(),
            recursive: Attributes::default(),
            propagation: Vec::new(),
            copy_up: false,
            data: Vec::new(),
        };
        for option in options {
            parsed.take(option);
        }
        parsed
    }

    fn take(&mut self, option: &str) {
        if let Some(flag) = propagation_of(option) {
            self.propagation.push(flag);
        } else if let Some((_, set, clear, attributes)) = PER_MOUNT.iter().find(|(name, ..)| *name == option)
        {
            self.flags = (self.flags - *clear) | *set;
            self.attributes.merge(*attributes);
        } else if let Some((_, set, clear)) = PLAIN.iter().find(|(name, ..)| *name == option) {
            self.flags = (self.flags - *clear) | *set;
        } else if let Some((.., attributes)) = option
            .strip_prefix('r')
            .and_then(|rest| PER_MOUNT.iter().find(|(name, ..)| *name == rest))
        {
            self.recursive.merge(*attributes);
        } else if option == "tmpcopyup" {
            self.copy_up = true;
        } else {
            self.data.push(option.to_owned());
        }
    }

    /// No node on it opens a device, whatever the options say.
    pub(super) fn forbid_devices(&mut self) {
        self.flags |= MsFlags::MS_NODEV;
        self.attributes.merge(Attributes {
            set: ATTRIBUTE_NODEV,
            clear: 0,
        });
        self.recursive.clear &= !ATTRIBUTE_NODEV;
    }

    /// Makes it writable for now; whether it was not to be.
    pub(super) fn take_read_only(&mut self) -> bool {
        let read_only = self.flags.contains(MsFlags::MS_RDONLY);
        self.flags -= MsFlags::MS_RDONLY;
        read_only
    }

    /// As `mount(2)` takes it.
    pub(super) fn data(&self) -> String {
        self.data.join(",")
    }
}

/// How mounts and unmounts below a mount spread, if the option says that.
pub(super) fn propagation_of(option: &str) -> Option<MsFlags> {
    let (kind, recursive) = match option.strip_prefix('r') {
        Some(kind) => (kind, MsFlags::MS_REC),
        None => (option, NONE),
    };
    let flag = match kind {
        "private" => MsFlags::MS_PRIVATE,
        "slave" => MsFlags::MS_SLAVE,
        "shared" => MsFlags::MS_SHARED,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

/// The propagation of a whole tree by its name; none where there is no name.
pub(super) fn root_propagation(name: &str) -> Result<Option<MsFlags>, Errno> {
    if name.is_empty() {
        return Ok(None);
    }
    propagation_of(name).map(Some).ok_or(Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        MountOptions::parse(&options)
    }

    #[test]
    fn options_are_split_into_flags_and_data() {
        let parsed = parse(&["nosuid", "noexec", "ro", "mode=1777", "size=65536k"]);
        assert_eq!(
            parsed.flags,
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY
        );
        assert!(parsed.propagation.is_empty());
        assert_eq!(parsed.data(), "mode=1777,size=65536k");
    }

    #[test]
    fn propagation_is_set_apart_and_recursive_where_asked() {
        let parsed = parse(&["rshared", "ro", "rw", "slave"]);
        assert_eq!(
            parsed.propagation,
            [MsFlags::MS_SHARED | MsFlags::MS_REC, MsFlags::MS_SLAVE]
        );
        assert!(parsed.flags.is_empty() && parsed.data.is_empty());
        assert_eq!(propagation_of("ro"), None);
    }

    #[test]
    fn later_option_wins() {
        let parsed = parse(&["ro", "noexec", "rw"]);
        assert_eq!(parsed.flags, MsFlags::MS_NOEXEC);
        let expected = Attributes {
            set: ATTRIBUTE_NOEXEC,
            clear: ATTRIBUTE_RDONLY,
        };
        assert_eq!(parsed.attributes, expected);
        // `exec` after `noexec` takes it back from both.
        assert_eq!(parse(&["noexec", "exec"]).attributes.set, 0);
        assert_eq!(
            parse(&["noatime", "strictatime"]).attributes.set,
            ATTRIBUTE_STRICTATIME
        );
    }

    #[test]
    fn recursive_forms_are_kept_apart_and_devices_stay_forbidden() {
        let mut parsed = parse(&["rro", "rdev", "rbind", "relatime", "rnoexec"]);
        assert_eq!(parsed.recursive.set, ATTRIBUTE_RDONLY | ATTRIBUTE_NOEXEC);
        assert_eq!(parsed.recursive.clear, ATTRIBUTE_NODEV);
        assert_eq!(
            parsed.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RELATIME
        );
        parsed.forbid_devices();
        assert_eq!(parsed.recursive.clear, 0);
        assert_eq!(parsed.attributes.set & ATTRIBUTE_NODEV, ATTRIBUTE_NODEV);
        assert!(parse(&["tmpcopyup"]).copy_up);
    }
}
