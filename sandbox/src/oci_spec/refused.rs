//! Fields that no container in a microVM can have, told one by one.

use ::oci_spec::runtime::{Linux, MemoryPolicyModeType, Spec};

use super::{
    error::{Result, unsupported},
    warnings::Warnings,
};

pub(super) fn check(spec: &Spec, warnings: &mut Warnings) -> Result<()> {
    for (field, given, system) in [
        ("solaris", spec.solaris().is_some(), "Solaris"),
        ("windows", spec.windows().is_some(), "Windows"),
        ("zos", spec.zos().is_some(), "z/OS"),
    ] {
        // For another platform, which the specification tells runtimes to leave alone.
        if given {
            warnings.add(format!("{field}: is for {system} and has no effect on Linux"));
        }
    }
    if spec.vm().is_some() {
        return unsupported(
            "vm",
            "hypervisor, kernel and image of a microVM are this runtime's own; the annotations io.hull.memory_mib, \
             io.hull.vcpus and io.hull.kernel_params say what can be said about it",
        );
    }
    match spec.linux() {
        Some(linux) => check_linux(linux, warnings),
        None => Ok(()),
    }
}

fn check_linux(linux: &Linux, warnings: &mut Warnings) -> Result<()> {
    if let Some(rdt) = linux.intel_rdt() {
        let text = |text: &Option<String>| text.as_deref().is_some_and(|text| !text.is_empty());
        let monitored = [rdt.enable_cmt(), rdt.enable_mbm(), rdt.enable_monitoring()].contains(&&Some(true));
        let schemata = rdt.schemata().as_ref().is_some_and(|list| !list.is_empty());
        if text(rdt.clos_id())
            || text(rdt.l3_cache_schema())
            || text(rdt.mem_bw_schema())
            || schemata
            || monitored
        {
            return unsupported(
                "linux.intelRdt",
                "shares out the caches of the host's processors, which a microVM's processes are not known to; leave it out",
            );
        }
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return unsupported(
            "linux.netDevices",
            "a network device of the host can't be moved into a microVM; give the network namespace it is in \
             (linux.namespaces, network)",
        );
    }
    if linux
        .memory_policy()
        .as_ref()
        .is_some_and(|policy| policy.mode() != MemoryPolicyModeType::MpolDefault)
    {
        return unsupported(
            "linux.memoryPolicy",
            "a microVM has one memory node; linux.resources.cpu.mems says from which of the host's it is taken",
        );
    }
    if let Some(label) = linux.mount_label().as_deref().filter(|label| !label.is_empty()) {
        warnings.add(format!(
            "linux.mountLabel: {label:?} has no effect: the microVM's kernel has no SELinux"
        ));
    }
    Ok(())
}
