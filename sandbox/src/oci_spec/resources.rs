//! `linux.resources`: limits inside of the microVM as files of control groups version 2, and the microVM's own size.
//!
//! What is said of the host's devices and CPUs (`cpu.cpus`, `cpu.mems`) concerns the host's control group, which is the
//! caller's; everything else that has no meaning in the guest is refused.

use ::oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};
use agent_protocol::{CgroupFile, Resources};

use super::{
    devices,
    error::{Result, invalid, unsupported},
    warnings::Warnings,
};

const FIELD: &str = "linux.resources";
/// What the kernel takes where no period is given.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// Most entries of each list.
const MAX_ENTRIES: usize = 64;

/// The limits as the agent sets them.
pub(super) fn translate(resources: &LinuxResources, warnings: &mut Warnings) -> Result<Resources> {
    let mut files = Files::default();
    if let Some(memory) = resources.memory() {
        memory_files(memory, &mut files, warnings)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_files(cpu, &mut files)?;
    }
    if let Some(pids) = resources.pids() {
        // None is what a container has anyway.
        if pids.limit() > 0 {
            files.set("pids.max", pids.limit());
        }
    }
    if let Some(block) = resources.block_io() {
        refuse_block_io(block)?;
    }
    for (index, huge) in resources.hugepage_limits().iter().flatten().enumerate() {
        let field = || format!("{FIELD}.hugepageLimits[{index}]");
        let size = huge.page_size();
        let known = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !known || huge.limit() < 0 {
            return invalid(
                field(),
                "is not a page size as in 2MB with a limit of zero or more bytes",
            );
        }
        // Pages of a size that the microVM's kernel doesn't have can't be had.
        files.set_optional(&format!("hugetlb.{size}.max"), huge.limit());
    }
    refuse_others(resources)?;
    unified(resources, &mut files)?;
    Ok(Resources {
        files: files.0,
        device_rules: devices::rules(resources.devices().as_deref())?,
        ..Resources::default()
    })
}

#[derive(Debug, Default)]
struct Files(Vec<CgroupFile>);

impl Files {
    fn set(&mut self, name: &str, value: impl ToString) {
        self.push(name, value.to_string(), false);
    }

    fn set_optional(&mut self, name: &str, value: impl ToString) {
        self.push(name, value.to_string(), true);
    }

    fn push(&mut self, name: &str, value: String, optional: bool) {
        self.0.push(CgroupFile {
            name: name.to_owned(),
            value,
            optional,
            ..CgroupFile::default()
        });
    }
}

/// A limit in bytes; none where it is zero, `max` where it is -1.
fn bytes(field: &str, value: Option<i64>) -> Result<Option<String>> {
    match value.unwrap_or(0) {
        0 => Ok(None),
        -1 => Ok(Some("max".into())),
        value if value < 0 => invalid(
            format!("{FIELD}.memory.{field}"),
            format!("{value} is neither a number of bytes nor -1"),
        ),
        value => Ok(Some(value.to_string())),
    }
}

fn memory_files(memory: &LinuxMemory, files: &mut Files, warnings: &mut Warnings) -> Result<()> {
    let limit = memory.limit().unwrap_or(0);
    if let Some(value) = bytes("limit", memory.limit())?.filter(|value| value != "max") {
        files.set("memory.max", value);
    }
    if let Some(value) = bytes("reservation", memory.reservation())?.filter(|value| value != "max") {
        if limit > 0 && memory.reservation().unwrap_or(0) > limit {
            return invalid(
                format!("{FIELD}.memory.reservation"),
                format!("{value} is above linux.resources.memory.limit, {limit}"),
            );
        }
        files.set("memory.low", value);
    }
    let swap = memory.swap().unwrap_or(0);
    if bytes("swap", memory.swap())?.is_some_and(|value| value != "max") {
        if limit <= 0 {
            return invalid(
                format!("{FIELD}.memory.swap"),
                "is memory and swap together, and needs a linux.resources.memory.limit",
            );
        }
        if swap < limit {
            return invalid(
                format!("{FIELD}.memory.swap"),
                format!(
                    "{swap} is memory and swap together, and is below linux.resources.memory.limit, {limit}"
                ),
            );
        }
        files.set("memory.swap.max", swap - limit);
    }
    if memory.swappiness().is_some_and(|swappiness| swappiness > 100) {
        return invalid(format!("{FIELD}.memory.swappiness"), "is above 100");
    }
    if memory.disable_oom_killer() == Some(true) {
        return unsupported(
            format!("{FIELD}.memory.disableOOMKiller"),
            "control groups version 2, as the microVM has them, always end a container that is out of memory",
        );
    }
    if memory.use_hierarchy() == Some(false) {
        return unsupported(
            format!("{FIELD}.memory.useHierarchy"),
            "control groups version 2, as the microVM has them, always count what is below a group",
        );
    }
    let kernel = memory.kernel();
    for (field, value) in [("kernel", kernel), ("kernelTCP", memory.kernel_tcp())] {
        if bytes(field, value)?.is_some_and(|value| value != "max") {
            warnings.add(format!(
                "{FIELD}.memory.{field}: no kernel bounds this apart any more; it counts towards memory.limit"
            ));
        }
    }
    Ok(())
}

/// Shares of version 1 (2 to 262144) on the scale of version 2 (1 to 10000), as runc converts them.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn cpu_files(cpu: &LinuxCpu, files: &mut Files) -> Result<()> {
    if cpu.realtime_runtime().unwrap_or(0) != 0 || cpu.realtime_period().unwrap_or(0) != 0 {
        return unsupported(
            format!("{FIELD}.cpu.realtimeRuntime, realtimePeriod"),
            "control groups version 2, as the microVM has them, don't share out real-time",
        );
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        files.set("cpu.weight", weight(shares));
    }
    if let Some(idle) = cpu.idle() {
        if !matches!(idle, 0 | 1) {
            return invalid(format!("{FIELD}.cpu.idle"), format!("{idle} is neither 0 nor 1"));
        }
        if idle == 1 {
            files.set("cpu.idle", 1);
        }
    }
    if let Some((quota, period)) = quota(cpu)? {
        files.set("cpu.max", format!("{quota} {period}"));
        if let Some(burst) = cpu.burst() {
            files.set("cpu.max.burst", burst);
        }
    } else if cpu.burst().unwrap_or(0) != 0 {
        return invalid(
            format!("{FIELD}.cpu.burst"),
            "needs a linux.resources.cpu.quota to go beyond",
        );
    }
    Ok(())
}

/// CPU time in each period, in microseconds; `None` where there is no limit.
fn quota(cpu: &LinuxCpu) -> Result<Option<(u64, u64)>> {
    let period = cpu
        .period()
        .filter(|period| *period != 0)
        .unwrap_or(DEFAULT_PERIOD_US);
    match cpu.quota().unwrap_or(0) {
        0 | -1 => Ok(None),
        quota => match u64::try_from(quota) {
            Ok(quota) => Ok(Some((quota, period))),
            Err(_) => invalid(
                format!("{FIELD}.cpu.quota"),
                format!("{quota} is neither a number of microseconds nor -1"),
            ),
        },
    }
}

/// How many CPUs the container can keep busy, rounded up; `None` where nothing says it.
pub(super) fn cpus(resources: &LinuxResources) -> Result<Option<u64>> {
    let Some(cpu) = resources.cpu() else {
        return Ok(None);
    };
    let by_quota = quota(cpu)?.map(|(quota, period)| quota.div_ceil(period).max(1));
    let by_set = match cpu.cpus().as_deref().filter(|list| !list.is_empty()) {
        None => None,
        Some(list) => {
            let cpus = super::process::cpu_list(&format!("{FIELD}.cpu.cpus"), list)?;
            Some(cpus.len() as u64)
        }
    };
    Ok(match (by_quota, by_set) {
        (Some(quota), Some(set)) => Some(quota.min(set)),
        (one, other) => one.or(other),
    })
}

/// The memory limit in bytes, wherever it is said.
pub(super) fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    let plain = resources.memory().as_ref().and_then(LinuxMemory::limit);
    let unified = || {
        resources
            .unified()
            .as_ref()?
            .get("memory.max")?
            .trim()
            .parse()
            .ok()
    };
    plain
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|limit| *limit != 0)
        .or_else(unified)
}

fn refuse_block_io(block: &LinuxBlockIo) -> Result<()> {
    let weight = |weight: Option<u16>| weight.unwrap_or(0) != 0;
    let lists = [
        ("throttleReadBpsDevice", block.throttle_read_bps_device()),
        ("throttleWriteBpsDevice", block.throttle_write_bps_device()),
        ("throttleReadIOPSDevice", block.throttle_read_iops_device()),
        ("throttleWriteIOPSDevice", block.throttle_write_iops_device()),
    ]
    .map(|(name, list)| (name, list.as_ref().is_some_and(|list| !list.is_empty())));
    let plain = [
        ("weight", weight(block.weight())),
        ("leafWeight", weight(block.leaf_weight())),
        (
            "weightDevice",
            block
                .weight_device()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
        ),
    ];
    match plain.into_iter().chain(lists).find(|(_, given)| *given) {
        Some((name, _)) => unsupported(
            format!("{FIELD}.blockIO.{name}"),
            "names disks of the host, which a microVM doesn't have; leave it out",
        ),
        None => Ok(()),
    }
}

fn refuse_others(resources: &LinuxResources) -> Result<()> {
    if let Some(network) = resources.network() {
        if network.class_id().unwrap_or(0) != 0 {
            return unsupported(
                format!("{FIELD}.network.classID"),
                "control groups version 2, as the microVM has them, don't tag packets",
            );
        }
        if network.priorities().as_ref().is_some_and(|list| !list.is_empty()) {
            return unsupported(
                format!("{FIELD}.network.priorities"),
                "control groups version 2, as the microVM has them, don't give packets priorities",
            );
        }
    }
    if resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty()) {
        return unsupported(format!("{FIELD}.rdma"), "a microVM has no RDMA device to limit");
    }
    Ok(())
}

/// Files given by name, which go over what was converted.
fn unified(resources: &LinuxResources, files: &mut Files) -> Result<()> {
    let Some(unified) = resources.unified() else {
        return Ok(());
    };
    if unified.len() > MAX_ENTRIES {
        return invalid(
            format!("{FIELD}.unified"),
            format!("has more than {MAX_ENTRIES} entries"),
        );
    }
    let mut entries: Vec<(&String, &String)> = unified.iter().collect();
    entries.sort_unstable();
    for (name, value) in entries {
        let field = || format!("{FIELD}.unified.{name}");
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !name.contains('.') || name.starts_with('.') || !name.bytes().all(known) {
            return invalid(
                field(),
                "is not the name of a control group's file, as memory.high is",
            );
        }
        if name.starts_with("cgroup.") {
            return unsupported(field(), "is for moving and stopping processes, and not a limit");
        }
        // Limits of CPUs and memory nodes are the host's numbers, but this one was said for a group inside.
        files.0.retain(|file| file.name != *name);
        files.set(name, value.trim_end_matches('\n'));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn resources(value: &Value) -> LinuxResources {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn files(value: &Value) -> Result<Vec<(String, String)>> {
        let translated = translate(&resources(value), &mut Warnings::default())?;
        Ok(translated
            .files
            .into_iter()
            .map(|file| (file.name, file.value))
            .collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn limits_of_version_1_become_files_of_version_2() {
        let value = json!({
            "memory": {"limit": 67_108_864, "reservation": 1000, "swap": 67_108_964, "swappiness": 60, "disableOOMKiller": false},
            "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 7, "idle": 0, "cpus": "0-1", "mems": "0"},
            "pids": {"limit": 12},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
            "blockIO": {"weight": 0}
        });
        let expected = [
            ("memory.max", "67108864"),
            ("memory.low", "1000"),
            ("memory.swap.max", "100"),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpu.max.burst", "7"),
            ("pids.max", "12"),
            ("hugetlb.2MB.max", "0"),
        ];
        assert_eq!(files(&value).unwrap(), pairs(&expected));
    }

    #[test]
    fn what_is_unlimited_needs_no_controller() {
        let value = json!({
            "memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1, "period": 100_000, "shares": 0}, "pids": {"limit": -1}
        });
        assert_eq!(files(&value).unwrap(), []);
        assert_eq!(cpus(&resources(&value)).unwrap(), None);
        assert_eq!(memory_limit(&resources(&value)), None);
    }

    #[test]
    fn named_files_go_over_converted_ones() {
        let value = json!({"pids": {"limit": 12}, "unified": {"pids.max": "13\n", "memory.high": "1000"}});
        assert_eq!(
            files(&value).unwrap(),
            pairs(&[("memory.high", "1000"), ("pids.max", "13")])
        );
    }

    #[test]
    fn size_of_the_microvm_follows_quota_set_and_limit() {
        let size = |value: Value| {
            (
                cpus(&resources(&value)).unwrap(),
                memory_limit(&resources(&value)),
            )
        };
        assert_eq!(size(json!({"cpu": {"quota": 150_000}})), (Some(2), None));
        assert_eq!(
            size(json!({"cpu": {"quota": 10, "period": 1000}})),
            (Some(1), None)
        );
        assert_eq!(size(json!({"cpu": {"cpus": "0-3,7"}})), (Some(5), None));
        assert_eq!(
            size(json!({"cpu": {"cpus": "1", "quota": 900_000}})),
            (Some(1), None)
        );
        assert_eq!(
            size(json!({"unified": {"memory.max": "1048576"}})),
            (None, Some(1 << 20))
        );
        assert_eq!(
            size(json!({"memory": {"limit": 5}, "unified": {"memory.max": "7"}})),
            (None, Some(5))
        );
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_name() {
        for (value, field) in [
            (json!({"memory": {"limit": -2}}), "memory.limit"),
            (json!({"memory": {"swap": 5}}), "memory.swap"),
            (json!({"memory": {"swap": 5, "limit": 6}}), "memory.swap"),
            (
                json!({"memory": {"reservation": 7, "limit": 6}}),
                "memory.reservation",
            ),
            (
                json!({"memory": {"disableOOMKiller": true}}),
                "memory.disableOOMKiller",
            ),
            (json!({"memory": {"useHierarchy": false}}), "memory.useHierarchy"),
            (json!({"memory": {"swappiness": 101}}), "memory.swappiness"),
            (json!({"cpu": {"realtimeRuntime": 5}}), "cpu.realtimeRuntime"),
            (json!({"cpu": {"quota": -5}}), "cpu.quota"),
            (json!({"cpu": {"idle": 2}}), "cpu.idle"),
            (json!({"cpu": {"burst": 2}}), "cpu.burst"),
            (json!({"blockIO": {"weight": 10}}), "blockIO.weight"),
            (
                json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}),
                "blockIO.throttleReadBpsDevice",
            ),
            (json!({"network": {"classID": 1}}), "network.classID"),
            (
                json!({"network": {"priorities": [{"name": "eth0", "priority": 1}]}}),
                "network.priorities",
            ),
            (json!({"rdma": {"mlx": {"hcaHandles": 1}}}), "rdma"),
            (
                json!({"hugepageLimits": [{"pageSize": "../x", "limit": 1}]}),
                "hugepageLimits[0]",
            ),
            (json!({"unified": {"a/b.c": "1"}}), "unified.a/b.c"),
            (json!({"unified": {"cgroup.kill": "1"}}), "unified.cgroup.kill"),
        ] {
            let error = files(&value).unwrap_err().to_string();
            assert!(error.starts_with(&format!("linux.resources.{field}")), "{error}");
        }
    }

    #[test]
    fn shares_keep_their_ends_and_order() {
        assert_eq!((weight(2), weight(262_144), weight(1)), (1, 10_000, 1));
        assert!(weight(1024) < weight(2048));
    }
}
