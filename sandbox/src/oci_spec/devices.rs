//! `linux.devices` and `linux.resources.devices`: which nodes a container has, and which devices it may open.
//!
//! A device of the host isn't in the microVM. What can be given is what the microVM's kernel has under the same number,
//! and only for numbers that mean the same everywhere: character devices with a number the kernel's list assigns. The
//! agent looks whether it is there. A block device's number means a disk of the microVM, never the host's.

use ::oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use agent_protocol::{Device, DeviceRule};

use super::{
    error::{Result, invalid, unsupported},
    warnings::Warnings,
};

/// Most nodes and rules, as the protocol bounds them.
const MAX_DEVICES: usize = 1024;
const MAX_RULES: usize = 512;
/// As the kernel numbers devices.
const MAX_MAJOR: i64 = 0xfff;
const MAX_MINOR: i64 = 0xf_ffff;
/// Character devices whose number means the same on every kernel: memory, terminals, and those with a fixed minor of the
/// miscellaneous ones.
const FIXED_MAJORS: [i64; 3] = [1, 4, 5];
const MISC_MAJOR: i64 = 10;
const FIRST_DYNAMIC_MISC: i64 = 255;

/// What every container may do with devices, as runc adds it: (type, major, minor, access).
const ALWAYS: [(char, Option<u32>, Option<u32>, &str); 9] = [
    ('c', None, None, "m"),
    ('b', None, None, "m"),
    ('c', Some(1), Some(3), "rwm"),
    ('c', Some(1), Some(5), "rwm"),
    ('c', Some(1), Some(7), "rwm"),
    ('c', Some(1), Some(8), "rwm"),
    ('c', Some(1), Some(9), "rwm"),
    ('c', Some(5), None, "rwm"),
    ('c', Some(136), None, "rwm"),
];

/// The nodes, and whether the container is given whatever its microVM has.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Devices {
    pub(super) nodes: Vec<Device>,
    pub(super) all: bool,
}

pub(super) fn translate(spec: &Spec, warnings: &mut Warnings) -> Result<Devices> {
    let Some(linux) = spec.linux() else {
        return Ok(Devices::default());
    };
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|resources| resources.devices().as_deref());
    let all = allows_everything(rules.unwrap_or_default());
    let mut nodes: Vec<Device> = Vec::new();
    for (index, device) in linux.devices().iter().flatten().enumerate() {
        let field = format!("linux.devices[{index}]");
        let Some(node) = node(&field, device, all, warnings)? else {
            continue;
        };
        if nodes.len() >= MAX_DEVICES {
            return invalid("linux.devices", format!("has more than {MAX_DEVICES} entries"));
        }
        // The same one twice is what engines write for a default device; the later one counts.
        nodes.retain(|other| other.path != node.path);
        nodes.push(node);
    }
    Ok(Devices { nodes, all })
}

/// A node for a device; `None` if it is of the host alone and the container is given all there is.
fn node(field: &str, device: &LinuxDevice, all: bool, warnings: &mut Warnings) -> Result<Option<Device>> {
    let path = device.path().to_string_lossy().into_owned();
    if !path.starts_with('/') {
        return invalid(
            format!("{field}.path"),
            format!("{path:?} is not an absolute path"),
        );
    }
    if let Some(mode) = device.file_mode()
        && mode & !0o107_777 & !0o060_000 != 0
    {
        return invalid(
            format!("{field}.fileMode"),
            format!("{mode:#o} is not a file's mode"),
        );
    }
    let mut node = Device {
        path: path.clone(),
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        ..Device::default()
    };
    match device.typ() {
        LinuxDeviceType::P => {
            node.fifo = true;
            return Ok(Some(node));
        }
        LinuxDeviceType::C | LinuxDeviceType::U => {}
        LinuxDeviceType::B if all => return Ok(left_out(field, &path, warnings)),
        LinuxDeviceType::B => {
            return unsupported(
                field,
                format!(
                    "{path} is a disk of the host, which a microVM doesn't have; share a directory instead"
                ),
            );
        }
        LinuxDeviceType::A => return invalid(format!("{field}.type"), "is none of c, b, u and p"),
    }
    let (major, minor) = (device.major(), device.minor());
    if !(0..=MAX_MAJOR).contains(&major) || !(0..=MAX_MINOR).contains(&minor) {
        return invalid(field, format!("{major}:{minor} is not the number of a device"));
    }
    let fixed = FIXED_MAJORS.contains(&major) || major == MISC_MAJOR && minor < FIRST_DYNAMIC_MISC;
    if !fixed {
        if all {
            return Ok(left_out(field, &path, warnings));
        }
        return unsupported(
            field,
            format!("{path} ({major}:{minor}) is a device of the host, which a microVM doesn't have"),
        );
    }
    node.major = u32::try_from(major).unwrap_or(0);
    node.minor = u32::try_from(minor).unwrap_or(0);
    node.optional = all;
    Ok(Some(node))
}

fn left_out(field: &str, path: &str, warnings: &mut Warnings) -> Option<Device> {
    warnings.add(format!("{field}: {path} is the host's and is left out"));
    None
}

/// A device that the specification mounts from the host's /dev, as engines without privileges do.
pub(super) fn bound(field: &str, path: String, major: u64, minor: u64) -> Result<Device> {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let mut device = LinuxDevice::default();
    device
        .set_path(path.into())
        .set_typ(LinuxDeviceType::C)
        .set_major(number(major))
        .set_minor(number(minor));
    match node(field, &device, false, &mut Warnings::default())? {
        Some(node) => Ok(node),
        None => unsupported(field, "is a device of the host"),
    }
}

fn is_everything(rule: &LinuxDeviceCgroup) -> bool {
    rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
        && rule.major().is_none_or(|number| number < 0)
        && rule.minor().is_none_or(|number| number < 0)
}

/// Whether the rules allow whatever there is, as a privileged container's do.
fn allows_everything(rules: &[LinuxDeviceCgroup]) -> bool {
    let full = |rule: &LinuxDeviceCgroup| {
        let access = rule.access().as_deref().unwrap_or("");
        access.is_empty() || "rwm".chars().all(|one| access.contains(one))
    };
    let last_general = rules.iter().rposition(|rule| is_everything(rule) && full(rule));
    last_general.is_some_and(|position| {
        rules[position].allow() && rules[position..].iter().all(LinuxDeviceCgroup::allow)
    })
}

/// The rules for the agent, which checks each opening by them; none where everything is allowed.
pub(super) fn rules(given: Option<&[LinuxDeviceCgroup]>) -> Result<Vec<DeviceRule>> {
    let given = given.unwrap_or_default();
    if allows_everything(given) {
        return Ok(Vec::new());
    }
    if given.len() > MAX_RULES {
        return invalid(
            "linux.resources.devices",
            format!("has more than {MAX_RULES} entries"),
        );
    }
    let mut rules = Vec::new();
    for (index, rule) in given.iter().enumerate() {
        rules.push(one(&format!("linux.resources.devices[{index}]"), rule)?);
    }
    rules.extend(ALWAYS.map(|(kind, major, minor, access)| DeviceRule {
        allow: true,
        character: kind == 'c',
        block: kind == 'b',
        major,
        minor,
        read: access.contains('r'),
        write: access.contains('w'),
        mknod: access.contains('m'),
        ..DeviceRule::default()
    }));
    Ok(rules)
}

fn one(field: &str, rule: &LinuxDeviceCgroup) -> Result<DeviceRule> {
    let number = |name: &str, number: Option<i64>, limit: i64| match number {
        None => Ok(None),
        Some(number) if number < 0 => Ok(None),
        Some(number) if number <= limit => Ok(u32::try_from(number).ok()),
        Some(number) => invalid(
            format!("{field}.{name}"),
            format!("{number} is not the number of a device"),
        ),
    };
    let access = rule.access().as_deref().unwrap_or("");
    if let Some(other) = access.chars().find(|one| !"rwm".contains(*one)) {
        return invalid(
            format!("{field}.access"),
            format!("{other:?} is none of r, w and m"),
        );
    }
    let access = if access.is_empty() { "rwm" } else { access };
    let (character, block) = match rule.typ() {
        None | Some(LinuxDeviceType::A) => (true, true),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => (true, false),
        Some(LinuxDeviceType::B) => (false, true),
        Some(LinuxDeviceType::P) => return invalid(format!("{field}.type"), "is none of a, b and c"),
    };
    Ok(DeviceRule {
        allow: rule.allow(),
        character,
        block,
        major: number("major", rule.major(), MAX_MAJOR)?,
        minor: number("minor", rule.minor(), MAX_MINOR)?,
        read: access.contains('r'),
        write: access.contains('w'),
        mknod: access.contains('m'),
        ..DeviceRule::default()
    })
}

/// Whether the rules can be told from what the container's nodes are anyway: only then does the kernel have to ask at
/// each opening.
pub(super) fn rules_matter(rules: &[DeviceRule], nodes: &[Device]) -> bool {
    let allowed = |node: &Device, wanted: fn(&DeviceRule) -> bool| {
        let number = |of: Option<u32>, is: u32| of.is_none_or(|number| number == is);
        rules
            .iter()
            .rev()
            .find(|rule| {
                rule.character
                    && number(rule.major, node.major)
                    && number(rule.minor, node.minor)
                    && wanted(rule)
            })
            .is_some_and(|rule| rule.allow)
    };
    !rules.is_empty()
        && nodes
            .iter()
            .filter(|node| !node.fifo)
            .any(|node| !allowed(node, |rule| rule.read) || !allowed(node, |rule| rule.write))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn devices(devices: Value, rules: Value) -> Result<Devices> {
        let spec =
            json!({"ociVersion": "1.2.0", "linux": {"devices": devices, "resources": {"devices": rules}}});
        translate(&serde_json::from_value(spec).unwrap(), &mut Warnings::default())
    }

    fn rules_of(value: Value) -> Result<Vec<DeviceRule>> {
        let given: Vec<LinuxDeviceCgroup> = serde_json::from_value(value).unwrap();
        rules(Some(&given))
    }

    #[test]
    fn devices_the_microvm_can_have_are_taken_over() {
        let given = json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 3, "gid": 4},
            {"path": "/dev/pipe", "type": "p", "fileMode": 384}
        ]);
        let devices = devices(given, json!([{"allow": false, "access": "rwm"}])).unwrap();
        assert!(!devices.all);
        let fuse = &devices.nodes[0];
        assert_eq!(
            (fuse.major, fuse.minor, fuse.mode, fuse.uid, fuse.gid),
            (10, 229, 0o666, 3, 4)
        );
        assert!(!fuse.optional && devices.nodes[1].fifo);
    }

    #[test]
    fn devices_of_the_host_are_refused_unless_everything_is_allowed() {
        let given = json!([
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/dri/card0", "type": "c", "major": 226, "minor": 0},
            {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}
        ]);
        for one in given.as_array().unwrap().iter().take(2) {
            let error = devices(json!([one]), json!([{"allow": false}]))
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("linux.devices[0]"), "{error}");
        }
        let devices = devices(given, json!([{"allow": true, "access": "rwm"}])).unwrap();
        assert!(devices.all && devices.nodes.len() == 1 && devices.nodes[0].optional);
    }

    #[test]
    fn everything_is_allowed_when_no_later_rule_takes_it_back() {
        let allowed = |rules: Value| devices(json!([]), rules).unwrap().all;
        assert!(allowed(
            json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "a", "major": -1, "minor": -1, "access": "rwm"}])
        ));
        assert!(!allowed(
            json!([{"allow": true, "access": "rwm"}, {"allow": false, "type": "c", "major": 1}])
        ));
        assert!(!allowed(json!([{"allow": true, "access": "r"}])));
        assert!(!allowed(json!([])));
    }

    #[test]
    fn rules_end_with_what_every_container_may_do() {
        let rules = rules_of(json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}])).unwrap();
        assert_eq!(rules.len(), 2 + ALWAYS.len());
        assert!(rules[0].character && rules[0].block && !rules[0].allow);
        assert_eq!((rules[1].major, rules[1].mknod), (Some(10), false));
        let node = |major, minor| Device {
            major,
            minor,
            ..Device::default()
        };
        assert!(!rules_matter(&rules, &[node(10, 229), node(1, 3)]));
        assert!(rules_matter(&rules, &[node(10, 200)]));
    }

    #[test]
    fn rule_that_makes_no_sense_is_refused_by_name() {
        for (rule, field) in [
            (json!({"allow": true, "access": "x"}), "access"),
            (json!({"allow": true, "type": "c", "major": 5000}), "major"),
            (json!({"allow": true, "type": "p"}), "type"),
        ] {
            let error = rules_of(json!([rule])).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("linux.resources.devices[0].{field}")),
                "{error}"
            );
        }
    }
}
