//! config.md, "Linux Process": `capabilities`.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{equal, status_line};
use crate::case::{Case, must};
use crate::world::World;

const LINUX: &str = "config.md#linux-process";
/// Their bits.
const CHOWN: u64 = 1 << 0;
const KILL: u64 = 1 << 5;
const NET_BIND_SERVICE: u64 = 1 << 10;
const AUDIT_WRITE: u64 = 1 << 29;

const SOME: [&str; 4] = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_AUDIT_WRITE"];
const SOME_BITS: u64 = CHOWN | KILL | NET_BIND_SERVICE | AUDIT_WRITE;

pub fn cases() -> Vec<Case> {
    vec![
        must("capabilities.bounding", LINUX, "the bounding field is an array of bounding capabilities that are kept for the process",
            |world| sets(world, &json!({"bounding": SOME}), "CapBnd", SOME_BITS)),
        must("capabilities.effective", LINUX, "the effective field is an array of effective capabilities that are kept for the process",
            |world| sets(world, &json!({"bounding": SOME, "permitted": SOME, "effective": SOME}), "CapEff", SOME_BITS)),
        must("capabilities.permitted", LINUX, "the permitted field is an array of permitted capabilities that are kept for the process",
            |world| sets(world, &json!({"bounding": SOME, "permitted": SOME, "effective": SOME}), "CapPrm", SOME_BITS)),
        must("capabilities.inheritable", LINUX, "the inheritable field is an array of inheritable capabilities that are kept for the process",
            |world| sets(world, &json!({"bounding": SOME, "permitted": SOME, "inheritable": ["CAP_CHOWN", "CAP_KILL"]}), "CapInh", CHOWN | KILL)),
        must("capabilities.ambient", LINUX, "the ambient field is an array of ambient capabilities that are kept for the process",
            |world| sets(world, &json!({"bounding": SOME, "permitted": SOME, "inheritable": SOME, "ambient": ["CAP_KILL"]}), "CapAmb", KILL)),
        must("capabilities.ambient_ones_of_another_user_are_effective", LINUX,
            "the ambient field is an array of ambient capabilities that are kept for the process",
            ambient_of_a_user),
        must("capabilities.none_of_another_user", LINUX,
            "the effective field is an array of effective capabilities that are kept for the process",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/user", json!({"uid": 1000, "gid": 1000}));
                let report = world.report(&mut bundle)?;
                equal("CapEff", set(&report, "CapEff")?, 0)?;
                equal("CapPrm", set(&report, "CapPrm")?, 0)
            }),
        must("capabilities.empty_sets_are_empty", LINUX, "capabilities is an object containing arrays that specifies the sets of capabilities",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/process/capabilities", json!({"bounding": [], "effective": [], "permitted": [], "inheritable": [], "ambient": []}));
                let report = world.report(&mut bundle)?;
                ["CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"].iter().try_for_each(|name| equal(name, set(&report, name)?, 0))
            }),
        must("capabilities.take_effect", LINUX, "capabilities … are kept for the process", take_effect),
        must("capabilities.unknown_ones_are_no_failure", LINUX,
            "Any value which cannot be mapped to a relevant kernel interface MUST be logged as a warning; runtimes SHOULD NOT fail",
            unknown).should(),
        must("capabilities.unknown_ones_do_not_hide_known_ones", LINUX,
            "Any value which cannot be mapped to a relevant kernel interface MUST be logged as a warning",
            |world| {
                let names = ["CAP_CHOWN", "CAP_NO_SUCH"];
                sets(world, &json!({"bounding": names, "permitted": names, "effective": names}), "CapEff", CHOWN)
            }).should(),
    ]
}

fn set(report: &Value, name: &str) -> Result<u64> {
    let digits = status_line(report, name)?;
    u64::from_str_radix(digits, 16).with_context(|| format!("{name} is {digits:?}"))
}

fn sets(world: &World<'_>, sets: &Value, name: &str, wanted: u64) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set("/process/capabilities", sets.clone());
    let report = world.report(&mut bundle)?;
    let found = set(&report, name)?;
    ensure!(found == wanted, "{name}: found {found:#x}, wanted {wanted:#x}");
    Ok(())
}

fn ambient_of_a_user(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set("/process/user", json!({"uid": 1000, "gid": 1000}));
    let names = json!(["CAP_KILL"]);
    bundle.set(
        "/process/capabilities",
        json!({"bounding": names, "permitted": names, "inheritable": names, "effective": names, "ambient": names}),
    );
    let report = world.report(&mut bundle)?;
    equal("CapAmb", set(&report, "CapAmb")?, KILL)?;
    equal("CapEff", set(&report, "CapEff")?, KILL)
}

fn take_effect(world: &World<'_>) -> Result<()> {
    let operations = ["sethostname", "other", "mknod", "/tmp/null", "c", "1", "3"];
    let mut without = world.bundle()?;
    without.capabilities(&["CAP_CHOWN"]);
    let lines = world.probe(&mut without, &operations)?;
    super::failed_with(&lines[0], &[nix::errno::Errno::EPERM])?;
    super::failed_with(&lines[1], &[nix::errno::Errno::EPERM])?;
    let mut with = world.bundle()?;
    with.capabilities(&["CAP_SYS_ADMIN"]);
    let lines = world.probe(&mut with, &operations)?;
    super::worked(&lines[0])?;
    super::failed_with(&lines[1], &[nix::errno::Errno::EPERM])
}

fn unknown(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.capabilities(&["CAP_CHOWN", "CAP_NO_SUCH"]);
    let container = world.create(bundle.probe(&["report"]))?;
    container.start()?;
    container.wait_stopped()?;
    ensure!(
        container.stderr().contains("CAP_NO_SUCH"),
        "no warning names it; standard error: {:?}",
        container.stderr()
    );
    Ok(())
}
