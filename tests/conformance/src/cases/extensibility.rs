//! config.md: "Annotations", "Extensibility", "Valid values".

use anyhow::Result;
use serde_json::{Value, json};

use super::equal;
use crate::case::{Case, must};
use crate::world::World;

const EXTENSIBILITY: &str = "config.md#extensibility";
const VALID: &str = "config.md#valid-values";
const ANNOTATIONS: &str = "config.md#annotations";

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        must(
            "annotations.unknown_keys_are_ignored",
            ANNOTATIONS,
            "Runtimes MUST handle unknown annotation keys like any other unknown property",
            |world| {
                accepted(
                    world,
                    "/annotations",
                    json!({"com.example.unknown": "x", "org.opencontainers.image.os": "linux"}),
                )
            },
        ),
        must(
            "annotations.may_be_empty",
            ANNOTATIONS,
            "Values MAY be an empty string; if there are no annotations then this property MAY either be absent or an empty map",
            |world| accepted(world, "/annotations", json!({})),
        ),
        must(
            "annotations.may_hold_empty_values",
            ANNOTATIONS,
            "Values MAY be an empty string",
            |world| accepted(world, "/annotations", json!({"com.example.empty": ""})),
        ),
        must(
            "annotations.values_must_be_strings",
            ANNOTATIONS,
            "Values MUST be strings",
            |world| rejected(world, "/annotations", json!({"com.example.number": 7})),
        ),
        must(
            "annotations.keys_must_not_be_empty",
            ANNOTATIONS,
            "Keys MUST NOT be an empty string",
            |world| rejected(world, "/annotations", json!({"": "x"})),
        ),
    ];
    for (name, pointer) in [
        ("top", "/unknownProperty"),
        ("process", "/process/unknownProperty"),
        ("root", "/root/unknownProperty"),
        ("linux", "/linux/unknownProperty"),
        ("resources", "/linux/resources/unknownProperty"),
        ("user", "/process/user/unknownProperty"),
        ("mount", "/mounts/0/unknownProperty"),
        ("namespace", "/linux/namespaces/0/unknownProperty"),
    ] {
        cases.push(must(
            format!("extensibility.unknown_property_of_{name}_is_ignored"),
            EXTENSIBILITY,
            "Runtimes MAY log unknown properties but MUST otherwise ignore them. That includes not generating errors if they encounter an unknown property",
            move |world| accepted(world, pointer, json!({"some": ["thing", 1]})),
        ));
    }
    cases.push(must(
        "extensibility.of_other_platforms_is_ignored",
        "config.md#platform-specific-configuration",
        "windows, solaris, zos: platform-specific configuration",
        |world| {
            accepted(
                world,
                "/solaris",
                json!({"milestone": "svc:/milestone/container:default"}),
            )
        },
    ));
    for (name, pointer, value) in [
        ("args", "/process/args", json!("/bin/probe")),
        ("cwd", "/process/cwd", json!(7)),
        ("terminal", "/process/terminal", json!("yes")),
        ("env", "/process/env", json!({"PATH": "/bin"})),
        ("readonly", "/root/readonly", json!("yes")),
        ("mounts", "/mounts", json!({"destination": "/data"})),
        ("uid", "/process/user/uid", json!("root")),
        ("uid_that_is_negative", "/process/user/uid", json!(-5)),
        ("uid_that_is_too_large", "/process/user/uid", json!(1_i64 << 40)),
        (
            "rlimit",
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": "many", "hard": 5}]),
        ),
        ("memory_limit", "/linux/resources/memory", json!({"limit": "1g"})),
        ("hostname", "/hostname", json!(["a"])),
    ] {
        cases.push(must(
            format!("valid_values.type_of_{name}"),
            VALID,
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            move |world| rejected(world, pointer, value.clone()),
        ));
    }
    cases.push(must(
        "valid_values.hostname_too_long",
        VALID,
        "Runtimes MUST generate an error when invalid or unsupported values are encountered",
        |world| rejected(world, "/hostname", json!("x".repeat(65))),
    ));
    cases
}

fn accepted(world: &World<'_>, pointer: &str, value: Value) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set(pointer, value);
    equal("pid", world.report(&mut bundle)?["pid"].clone(), 1)
}

fn rejected(world: &World<'_>, pointer: &str, value: Value) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.set(pointer, value);
    world.refused(&bundle).map(drop)
}
