//! A profile as `config.json` has it: the architectures are those it names, and nothing depends on capabilities.

use ::oci_spec::runtime::{Arch, LinuxSeccomp};

use super::{AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, action, bpf, profile::Profile, syscalls};

/// The programs for a profile; none where everything is allowed.
///
/// # Errors
///
/// Says what is wrong with the profile.
pub(crate) fn oci_programs(seccomp: &LinuxSeccomp) -> Result<Vec<Vec<u8>>, String> {
    let text = serde_json::to_string(seccomp).map_err(|error| format!("can't be read: {error}"))?;
    let profile = Profile::parse(&text, 0)?;
    if profile.allows_everything() {
        return Ok(Vec::new());
    }
    let named = |architecture| {
        seccomp
            .architectures()
            .iter()
            .flatten()
            .any(|one| *one == architecture)
    };
    // The native one always belongs to it, as runc has it. The guest's kernel knows no other than these two.
    let mut tables = vec![profile.table(AUDIT_ARCH_X86_64, &syscalls::X86_64)];
    if named(Arch::ScmpArchX86) {
        tables.push(profile.table(AUDIT_ARCH_I386, &syscalls::I386));
    }
    let program = bpf::compile(&tables, action::KILL_THREAD);
    if program.len() > bpf::MAX_INSTRUCTIONS {
        return Err(format!(
            "makes a filter of {} instructions; the kernel takes {}",
            program.len(),
            bpf::MAX_INSTRUCTIONS
        ));
    }
    Ok(vec![bpf::bytes(&program)])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::bpf::machine, *};

    fn verdict(profile: &serde_json::Value, architecture: u32, number: u32) -> Option<u32> {
        let seccomp: LinuxSeccomp = serde_json::from_value(profile.clone()).unwrap();
        let bytes = oci_programs(&seccomp).unwrap().pop()?;
        let program: Vec<bpf::Instruction> = bytes
            .chunks_exact(8)
            .map(|b| bpf::Instruction {
                code: u16::from_ne_bytes([b[0], b[1]]),
                jump_true: b[2],
                jump_false: b[3],
                value: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            })
            .collect();
        Some(machine::run(&program, architecture, number, [0; 6]))
    }

    #[test]
    fn architectures_are_those_the_profile_names() {
        let mut profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
        });
        // read is 0, and 3 for 32 bits; write is 1.
        assert_eq!(verdict(&profile, AUDIT_ARCH_X86_64, 0), Some(action::ALLOW));
        assert_eq!(
            verdict(&profile, AUDIT_ARCH_X86_64, 1),
            Some(action::ERRNO | action::ENOSYS)
        );
        assert_eq!(verdict(&profile, AUDIT_ARCH_I386, 3), Some(action::KILL_THREAD));
        profile["architectures"] = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
        assert_eq!(verdict(&profile, AUDIT_ARCH_I386, 3), Some(action::ALLOW));
        assert_eq!(verdict(&profile, AUDIT_ARCH_I386, 2), Some(action::ERRNO | 13));
    }

    #[test]
    fn no_program_where_nothing_is_refused() {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []});
        assert_eq!(verdict(&profile, AUDIT_ARCH_X86_64, 0), None);
    }
}
