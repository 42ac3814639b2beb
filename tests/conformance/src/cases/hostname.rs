//! config.md, "Hostname" and "Domainname".

use anyhow::Result;
use serde_json::json;

use super::{equal, worked};
use crate::case::{Case, must};
use crate::world::World;

pub fn cases() -> Vec<Case> {
    vec![
        must("hostname.is_seen_inside", "config.md#hostname",
            "hostname specifies the container's hostname as seen by processes running inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/hostname", json!("mrsdalloway"));
                equal("hostname", world.report(&mut bundle)?["hostname"].clone(), "mrsdalloway")
            }),
        must("hostname.is_not_the_hosts", "config-linux.md#namespaces",
            "uts: the container will be able to have its own hostname and domain name",
            not_the_hosts),
        must("hostname.inside_can_be_changed_without_effect_outside", "config-linux.md#namespaces",
            "Changes to the global resource are visible to other processes that are members of the namespace, but are invisible to other processes",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.capabilities(&["CAP_SYS_ADMIN"]);
                let before = nix::unistd::gethostname()?;
                let lines = world.probe(&mut bundle, &["sethostname", "changed", "report"])?;
                worked(&lines[0])?;
                equal("inside", lines[1]["hostname"].clone(), "changed")?;
                equal("outside", nix::unistd::gethostname()?, before)
            }),
        must("hostname.without_a_uts_namespace_is_an_error", "config.md#hostname",
            "Depending on your namespace configuration, the container UTS namespace may be the runtime UTS namespace: as runc, refuse to change it",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.without_namespace("uts");
                world.refused(&bundle).map(drop)
            }).practice(),
        must("domainname.is_seen_inside", "config.md#domainname",
            "domainname specifies the container's domainname as seen by processes running inside the container",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.set("/domainname", json!("foobarbaz.test"));
                equal("domainname", world.report(&mut bundle)?["domainname"].clone(), "foobarbaz.test")
            }),
    ]
}

fn not_the_hosts(world: &World<'_>) -> Result<()> {
    let before = nix::unistd::gethostname()?;
    let mut bundle = world.bundle()?;
    bundle.set("/hostname", json!("another-name"));
    let container = world.create(bundle.probe(&["pause"]))?;
    container.start()?;
    equal("the host's name meanwhile", nix::unistd::gethostname()?, before)
}
