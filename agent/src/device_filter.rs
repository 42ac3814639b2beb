//! The kernel's own check of each opening of a device by a container, for containers that can mount.
//!
//! Others need none: nothing they can make a node on opens one (`process::mounts`). A container with CAP_SYS_ADMIN
//! could mount a filesystem on which nodes can be opened, so its control group gets a BPF program. Attaching the
//! first one rewrites code of the kernel, which takes milliseconds on a PVM host; so nobody else pays for it.

#![expect(unsafe_code, reason = "the bpf system call has no wrapper")]

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use agent_protocol::DeviceRule;
use nix::errno::Errno;

/// Character devices that may be opened: (major, minor), any minor where there is none. As docker's.
const ALLOWED: [(u32, Option<u32>); 12] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(0)),
    (5, Some(1)),
    (5, Some(2)),
    // Terminals of a devpts.
    (136, None),
    // /dev/fuse, /dev/net/tun: what they do needs capabilities of their own.
    (10, Some(229)),
    (10, Some(200)),
    // /dev/loop-control gives no device.
    (10, Some(237)),
];

/// An instruction of eBPF.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    value: i32,
}

const fn instruction(code: u8, registers: u8, offset: i16, value: i32) -> Instruction {
    Instruction {
        code,
        registers,
        offset,
        value,
    }
}

/// `r0 = value; exit`
fn answer(allowed: bool) -> [Instruction; 2] {
    [
        instruction(0xb7, 0, 0, i32::from(allowed)),
        instruction(0x95, 0, 0, 0),
    ]
}

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const SHIFT_RIGHT: u8 = 0x77;
const AND: u8 = 0x57;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
/// `BPF_DEVCG_DEV_BLOCK`, `BPF_DEVCG_DEV_CHAR`
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
/// `BPF_DEVCG_ACC_*`
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// `r2` = type, `r3` = major, `r4` = minor, `r5` = what of the access isn't decided yet.
fn prologue() -> [Instruction; 6] {
    // r1 points to `struct bpf_cgroup_dev_ctx`: access and type, major, minor.
    [
        instruction(LOAD_WORD, 0x12, 0, 0),
        instruction(LOAD_WORD, 0x13, 4, 0),
        instruction(LOAD_WORD, 0x14, 8, 0),
        instruction(MOVE, 0x25, 0, 0),
        instruction(SHIFT_RIGHT, 0x05, 0, 16),
        instruction(AND, 0x02, 0, 0xffff),
    ]
}

/// Decides what one rule decides, if it is about this device.
fn rule(rule: &DeviceRule) -> Vec<Instruction> {
    let mut access = 0;
    for (given, bit) in [(rule.mknod, MKNOD), (rule.read, READ), (rule.write, WRITE)] {
        access |= if given { bit } else { 0 };
    }
    let mut body = if rule.allow {
        // What it allows needs no other rule; when nothing is left, all is allowed.
        let mut body = vec![
            instruction(AND, 0x05, 0, ALL & !access),
            instruction(JUMP_NOT_EQUAL, 0x05, 2, 0),
        ];
        body.extend(answer(true));
        body
    } else {
        let mut body = vec![
            instruction(MOVE, 0x56, 0, 0),
            instruction(AND, 0x06, 0, access),
            instruction(JUMP_EQUAL, 0x06, 2, 0),
        ];
        body.extend(answer(false));
        body
    };
    let number = |number: Option<u32>| number.and_then(|number| i32::try_from(number).ok());
    let mut conditions = Vec::new();
    conditions.extend(number(rule.minor).map(|minor| (4, minor)));
    conditions.extend(number(rule.major).map(|major| (3, major)));
    if rule.character != rule.block {
        conditions.push((2, if rule.block { BLOCK } else { CHARACTER }));
    }
    for (register, value) in conditions {
        let beyond = i16::try_from(body.len()).unwrap_or(i16::MAX);
        body.insert(0, instruction(JUMP_NOT_EQUAL, register, beyond, value));
    }
    body
}

/// The agent's own rules: nodes can be made, and the devices in the list opened.
fn own_rules() -> Vec<DeviceRule> {
    let make = DeviceRule {
        allow: true,
        character: true,
        block: true,
        mknod: true,
        ..DeviceRule::default()
    };
    let open = |(major, minor): (u32, Option<u32>)| DeviceRule {
        allow: true,
        character: true,
        major: Some(major),
        minor,
        read: true,
        write: true,
        mknod: true,
        ..DeviceRule::default()
    };
    std::iter::once(make).chain(ALLOWED.map(open)).collect()
}

/// Of the rules that are about a device and a kind of access, the last one decides; without one it is denied.
fn program(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = prologue().to_vec();
    program.extend(rules.iter().rev().flat_map(rule));
    program.extend(answer(false));
    program
}

fn bpf(command: u32, attributes: &[u64]) -> Result<libc::c_long, Errno> {
    // SAFETY: the attributes live across the call and are as long as said; what they point to is the callers'.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of_val(attributes),
        )
    })
}

/// Has the kernel check every opening of a device by the processes of a control group, by these rules or our own.
pub fn attach(cgroup: &OwnedFd, rules: &[DeviceRule]) -> Result<(), Errno> {
    const PROG_LOAD: u32 = 5;
    const PROG_ATTACH: u32 = 8;
    const CGROUP_DEVICE: u64 = 15;
    const ATTACH_CGROUP_DEVICE: u64 = 6;
    let instructions = if rules.is_empty() {
        program(&own_rules())
    } else {
        program(rules)
    };
    let license = c"GPL";
    let number = |fd: RawFd| u64::from(fd.unsigned_abs());
    // (prog_type, insn_cnt), insns, license, (log_level, log_size), log_buf, (kern_version, prog_flags)
    let load = [
        CGROUP_DEVICE | (instructions.len() as u64) << 32,
        instructions.as_ptr().expose_provenance() as u64,
        license.as_ptr().expose_provenance() as u64,
        0,
        0,
        0,
    ];
    let loaded = bpf(PROG_LOAD, &load)?;
    let loaded = RawFd::try_from(loaded).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    // (target_fd, attach_bpf_fd), (attach_type, attach_flags)
    let attach = [
        number(cgroup.as_raw_fd()) | number(loaded.as_raw_fd()) << 32,
        ATTACH_CGROUP_DEVICE,
    ];
    bpf(PROG_ATTACH, &attach).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program answers; a small part of the machine.
    fn answers(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let mut registers = [0_i64; 10];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: r,
                offset,
                value,
            } = program[at];
            let (to, from) = (usize::from(r & 15), usize::from(r >> 4));
            at += 1;
            let jump = |holds: bool| {
                if holds {
                    usize::try_from(offset).unwrap()
                } else {
                    0
                }
            };
            match code {
                LOAD_WORD => {
                    // In the kernel's notation the destination is the low half.
                    registers[to] = match offset {
                        0 => i64::from(access << 16 | kind),
                        4 => i64::from(major),
                        8 => i64::from(minor),
                        _ => panic!("outside of the context"),
                    }
                }
                MOVE => registers[to] = registers[from],
                SHIFT_RIGHT => registers[to] >>= value,
                AND => registers[to] &= i64::from(value),
                JUMP_NOT_EQUAL => at += jump(registers[to] != i64::from(value)),
                JUMP_EQUAL => at += jump(registers[to] == i64::from(value)),
                0xb7 => registers[to] = i64::from(value),
                0x95 => return registers[0] != 0,
                other => panic!("no such instruction {other:#x}"),
            }
        }
    }

    fn run(kind: i32, access: i32, major: i32, minor: i32) -> bool {
        answers(&program(&own_rules()), kind, access, major, minor)
    }

    #[test]
    fn listed_devices_open_disks_do_not_and_nodes_can_be_made() {
        let both = READ | WRITE;
        assert!(run(CHARACTER, both, 1, 3));
        assert!(run(CHARACTER, READ, 136, 7));
        assert!(!run(CHARACTER, READ, 1, 1));
        assert!(!run(BLOCK, READ, 254, 0));
        assert!(!run(BLOCK, both, 1, 3));
        assert!(run(BLOCK, MKNOD, 254, 0));
        assert!(!run(BLOCK, MKNOD | READ, 254, 0));
        assert!(!run(CHARACTER, READ, 10, 1));
    }

    fn any_rule(allow: bool, major: Option<u32>, access: i32) -> DeviceRule {
        DeviceRule {
            allow,
            character: true,
            block: major.is_none(),
            major,
            read: access & READ != 0,
            write: access & WRITE != 0,
            mknod: access & MKNOD != 0,
            ..DeviceRule::default()
        }
    }

    #[test]
    fn last_rule_about_an_access_decides() {
        let rules = [
            any_rule(true, Some(7), ALL),
            any_rule(false, None, ALL),
            any_rule(true, Some(10), ALL),
            any_rule(false, Some(10), WRITE),
            any_rule(true, Some(11), READ),
            any_rule(true, Some(11), WRITE),
        ];
        let program = program(&rules);
        let open = |access, major| answers(&program, CHARACTER, access, major, 1);
        assert!(!open(READ, 7), "taken back by a later rule");
        assert!(open(READ, 10) && open(MKNOD | READ, 10));
        assert!(!open(WRITE, 10) && !open(READ | WRITE, 10));
        assert!(open(READ | WRITE, 11), "allowed by two rules together");
        assert!(!open(READ | MKNOD, 11));
        assert!(!answers(&program, BLOCK, READ, 10, 1));
    }
}
