//! Who a process runs as: names looked up in the image's passwd and group files.
//!
//! The files belong to the image and are hostile: they are opened beneath the container's root
//! (`RESOLVE_IN_ROOT`, no magic links), only if regular, and only so much of them is read.

use std::{
    fs::File,
    io::Read as _,
    os::{fd::AsFd, unix::fs::FileTypeExt as _},
};

use agent_protocol::{Process, process};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::Mode,
};

use crate::error::AgentError;

/// As much of a passwd or group file as is looked at.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A process's identity, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The home directory, `/` where nothing names one.
    pub home: String,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Account {
            name,
            uid,
            gid,
            home: fields.nth(1).unwrap_or(""),
        })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or(""),
        })
    })
}

/// Resolves what an image or `--user` says: `name`, `uid`, `name:group`, `uid:gid` and the mixed forms.
fn resolve_name(spec: &str, passwd: &str, group: &str) -> Result<Identity, AgentError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let numeric = user.parse::<u32>().ok();
    // A name that is all digits is looked up as a name first, as docker does it.
    let account = accounts(passwd)
        .find(|account| account.name == user)
        .or_else(|| accounts(passwd).find(|account| Some(account.uid) == numeric));
    let uid = match (&account, numeric) {
        (Some(account), _) => account.uid,
        (None, Some(uid)) => uid,
        (None, None) => {
            return Err(AgentError::UnknownUser {
                what: "user",
                name: user.into(),
                file: "/etc/passwd",
            });
        }
    };
    let home = account.as_ref().map_or("", |account| account.home);
    let home = if home.is_empty() { "/" } else { home }.to_owned();
    if let Some(wanted) = wanted_group {
        let gid = group_number(wanted, group)?;
        return Ok(Identity {
            uid,
            gid,
            groups: Vec::new(),
            home,
        });
    }
    let gid = account.as_ref().map_or(0, |account| account.gid);
    let member_of = |group: &Group<'_>| {
        account
            .as_ref()
            .is_some_and(|account| group.members.split(',').any(|member| member == account.name))
    };
    let groups = groups(group).filter(member_of).map(|group| group.gid).collect();
    Ok(Identity {
        uid,
        gid,
        groups,
        home,
    })
}

/// A small text file beneath `root`; empty where there is none.
fn read_beneath(root: impl AsFd, path: &str) -> String {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let Ok(fd) = openat2(root, path, how) else {
        return String::new();
    };
    let file = File::from(fd);
    // A FIFO or device in place of the file would be read for ever.
    let Some(metadata) = file.metadata().ok().filter(|metadata| {
        let kind = metadata.file_type();
        kind.is_file() && !kind.is_fifo() && !kind.is_char_device()
    }) else {
        return String::new();
    };
    // With room for all of it, and a byte to see its end: each further read is an exit on a PVM host.
    let length = metadata.len().min(MAX_FILE_BYTES);
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1);
    if file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The numbers of the further groups that a process names.
fn additional_groups(root: impl AsFd, process: &Process) -> Result<Vec<u32>, AgentError> {
    if process.additional_groups.is_empty() {
        return Ok(Vec::new());
    }
    let file = read_beneath(root, "etc/group");
    let number = |wanted: &String| group_number(wanted, &file);
    process.additional_groups.iter().map(number).collect()
}

fn group_number(wanted: &str, file: &str) -> Result<u32, AgentError> {
    let found = groups(file).find(|group| group.name == wanted);
    found
        .map(|group| group.gid)
        .or_else(|| wanted.parse().ok())
        .ok_or_else(|| AgentError::UnknownUser {
            what: "group",
            name: wanted.into(),
            file: "/etc/group",
        })
}

/// Names of users by number.
#[derive(Debug)]
pub struct Names {
    passwd: String,
}

impl Names {
    /// As the image's passwd file has them.
    pub fn read(root: impl AsFd) -> Self {
        Self {
            passwd: read_beneath(root, "etc/passwd"),
        }
    }

    /// The name of a user, printable and of a sensible length.
    pub fn name_of(&self, uid: u32) -> Option<String> {
        let account = accounts(&self.passwd).find(|account| account.uid == uid)?;
        let sensible = |name: &&str| name.len() <= 64 && name.chars().all(|c| c.is_ascii_graphic());
        Some(account.name).filter(sensible).map(str::to_owned)
    }
}

/// The identity a process asks for, looked up beneath the container's root.
pub fn resolve(root: impl AsFd + Copy, process: &Process) -> Result<Identity, AgentError> {
    let mut identity = match &process.user {
        Some(process::User::UserIds(ids)) => {
            let passwd = read_beneath(root, "etc/passwd");
            let home = accounts(&passwd).find(|account| account.uid == ids.uid);
            let home = home
                .map(|account| account.home)
                .filter(|home| !home.is_empty())
                .unwrap_or("/");
            Identity {
                uid: ids.uid,
                gid: ids.gid,
                groups: Vec::new(),
                home: home.to_owned(),
            }
        }
        Some(process::User::UserName(name)) => {
            let passwd = read_beneath(root, "etc/passwd");
            resolve_name(name, &passwd, &read_beneath(root, "etc/group"))?
        }
        _ => resolve_name(
            "",
            &read_beneath(root, "etc/passwd"),
            &read_beneath(root, "etc/group"),
        )?,
    };
    let named = additional_groups(root, process)?;
    for gid in process.additional_gids.iter().copied().chain(named) {
        if !identity.groups.contains(&gid) {
            identity.groups.push(gid);
        }
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nredis:x:100:101::/var/lib/redis:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nredis:x:101:\nssl:x:102:www,redis\nadm:x:4:redis\n";

    #[test]
    fn name_gives_its_group_its_memberships_and_its_home() {
        let identity = resolve_name("redis", PASSWD, GROUP).unwrap();
        assert_eq!((identity.uid, identity.gid), (100, 101));
        assert_eq!(identity.groups, [102, 4]);
        assert_eq!(identity.home, "/var/lib/redis");
    }

    #[test]
    fn explicit_group_replaces_the_memberships() {
        let identity = resolve_name("redis:ssl", PASSWD, GROUP).unwrap();
        assert_eq!((identity.uid, identity.gid, identity.groups.len()), (100, 102, 0));
    }

    #[test]
    fn number_without_an_account_is_taken_as_it_is() {
        let identity = resolve_name("4711:4712", PASSWD, GROUP).unwrap();
        assert_eq!(
            (identity.uid, identity.gid, identity.home.as_str()),
            (4711, 4712, "/")
        );
    }

    #[test]
    fn unknown_name_is_an_error_that_says_the_name() {
        let error = resolve_name("nobody-here", PASSWD, GROUP).unwrap_err();
        assert!(error.to_string().contains("nobody-here"), "{error}");
    }

    #[test]
    fn empty_user_is_root() {
        let identity = resolve_name("", PASSWD, GROUP).unwrap();
        assert_eq!(
            (identity.uid, identity.gid, identity.home.as_str()),
            (0, 0, "/root")
        );
    }

    #[test]
    fn passwd_that_links_out_of_the_root_is_resolved_inside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("etc/passwd")).unwrap();
        let root = File::open(dir.path()).unwrap();
        assert_eq!(read_beneath(root, "etc/passwd"), "");
    }
}
