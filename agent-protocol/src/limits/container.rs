//! The bounds of a container.

use super::{
    Bounded, InvalidMessage, MAX_FILE_BYTES, MAX_LIST_ENTRIES, MAX_PATH_BYTES, check_id, check_list,
    check_optional_id, check_path, check_strings, check_text, require,
};
use crate::{CreateContainerRequest, IdMapping, Resources, UpdateContainerRequest};

/// Most rules of which devices may be opened.
pub const MAX_DEVICE_RULES: usize = 1024;
/// Most files of a control group.
pub const MAX_CGROUP_FILES: usize = 128;
/// Most ranges of ids of a user namespace, as the kernel has it.
pub const MAX_ID_MAPPINGS: usize = 340;
/// Largest state that a hook reads.
pub const MAX_HOOK_STATE_BYTES: usize = 256 * 1024;

impl Bounded for CreateContainerRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        self.rootfs
            .as_ref()
            .ok_or(InvalidMessage::new("rootfs", "is missing"))?
            .check()?;
        self.process
            .as_ref()
            .ok_or(InvalidMessage::new("process", "is missing"))?
            .check()?;
        check_text("hostname", &self.hostname, 64)?;
        check_list("mounts", &self.mounts, MAX_LIST_ENTRIES)?;
        for mount in &self.mounts {
            check_path("mounts.destination", &mount.destination)?;
            check_text("mounts.type", &mount.type_, 32)?;
            check_text("mounts.source", &mount.source, MAX_PATH_BYTES - 1)?;
            check_list("mounts.options", &mount.options, 64)?;
            mount
                .options
                .iter()
                .try_for_each(|option| check_text("mounts.options", option, 1024))?;
            check_optional_id("mounts.common_tmpfs", &mount.common_tmpfs)?;
            require(
                mount.share.is_none() || mount.common_tmpfs.is_empty(),
                "mounts.common_tmpfs",
                "is named for a share",
            )?;
        }
        for (field, paths) in [
            ("masked_paths", &self.masked_paths),
            ("readonly_paths", &self.readonly_paths),
        ] {
            check_list(field, paths, MAX_LIST_ENTRIES)?;
            paths.iter().try_for_each(|path| check_path(field, path))?;
        }
        check_list("devices", &self.devices, MAX_LIST_ENTRIES)?;
        for device in &self.devices {
            check_path("devices.path", &device.path)?;
            if !device.source.is_empty() {
                check_path("devices.source", &device.source)?;
                require(
                    device.source.starts_with("/dev/") && !device.source.contains(".."),
                    "devices.source",
                    "is not below /dev",
                )?;
            }
        }
        check_list("sysctls", &self.sysctls, 256)?;
        for sysctl in &self.sysctls {
            check_text("sysctls.name", &sysctl.name, 256)?;
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
            require(
                !sysctl.name.is_empty()
                    && sysctl.name.bytes().all(allowed)
                    && !["..", "//"].iter().any(|odd| sysctl.name.contains(odd)),
                "sysctls.name",
                "is not the name of a sysctl",
            )?;
            check_text("sysctls.value", &sysctl.value, 4096)?;
        }
        check_list("files", &self.files, 64)?;
        for file in &self.files {
            check_path("files.path", &file.path)?;
            require(
                file.content.len() <= MAX_FILE_BYTES,
                "files.content",
                "is more than 256 KiB",
            )?;
            require(file.mode <= 0o7777, "files.mode", "has bits above 07777")?;
        }
        check_text("domainname", &self.domainname, 64)?;
        check_text("rootfs_propagation", &self.rootfs_propagation, 32)?;
        if let Some(resources) = self.resources.as_ref() {
            resources.check()?;
        }
        check_namespaces(self)?;
        check_hooks(self)
    }
}

impl Bounded for UpdateContainerRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        self.resources.get_or_default().check()
    }
}

impl Bounded for Resources {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_list("resources.files", &self.files, MAX_CGROUP_FILES)?;
        for file in &self.files {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            let (name, field) = (&file.name, "resources.files.name");
            check_text(field, name, 64)?;
            require(
                name.contains('.') && !name.starts_with('.') && name.bytes().all(allowed),
                field,
                "is not the name of a control group's file",
            )?;
            require(!name.starts_with("cgroup."), field, "is not one of a controller")?;
            check_text("resources.files.value", &file.value, 4096)?;
        }
        check_list("resources.device_rules", &self.device_rules, MAX_DEVICE_RULES)?;
        for rule in &self.device_rules {
            let (major, minor) = (rule.major.unwrap_or(0), rule.minor.unwrap_or(0));
            require(
                major <= 0xfff && minor <= 0xf_ffff,
                "resources.device_rules",
                "has a number that no device has",
            )?;
        }
        Ok(())
    }
}

fn check_mappings(field: &'static str, mappings: &[IdMapping]) -> Result<(), InvalidMessage> {
    check_list(field, mappings, MAX_ID_MAPPINGS)?;
    require(!mappings.is_empty(), field, "is empty")?;
    mappings.iter().try_for_each(|mapping| {
        let fits = |first: u32| first.checked_add(mapping.size).is_some();
        require(
            mapping.size > 0 && fits(mapping.container_id) && fits(mapping.host_id),
            field,
            "has a range that is empty or beyond the last id",
        )
    })
}

fn check_namespaces(request: &CreateContainerRequest) -> Result<(), InvalidMessage> {
    if let Some(joined) = request.joined.as_ref() {
        for id in [&joined.ipc, &joined.uts, &joined.pid] {
            check_optional_id("joined", id)?;
        }
    }
    if let Some(user) = request.user_namespace.as_ref() {
        check_mappings("user_namespace.uid_mappings", &user.uid_mappings)?;
        check_mappings("user_namespace.gid_mappings", &user.gid_mappings)?;
    }
    if let Some(time) = request.time_namespace.as_ref() {
        for offset in [&time.monotonic, &time.boottime] {
            require(
                offset.nanoseconds < 1_000_000_000,
                "time_namespace",
                "has an offset with a second or more of nanoseconds",
            )?;
        }
    }
    Ok(())
}

fn check_hooks(request: &CreateContainerRequest) -> Result<(), InvalidMessage> {
    check_list("start_hooks", &request.start_hooks, 64)?;
    for hook in &request.start_hooks {
        check_path("start_hooks.path", &hook.path)?;
        check_strings("start_hooks.args", &hook.args)?;
        check_strings("start_hooks.env", &hook.env)?;
    }
    require(
        request.hook_state.len() <= MAX_HOOK_STATE_BYTES,
        "hook_state",
        "is more than 256 KiB",
    )
}
