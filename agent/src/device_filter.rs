//! The kernel's own check of each opening of a device by a container, for containers that can mount.
//!
//! Others need none: nothing they can make a node on opens one (`process::mounts`). A container with CAP_SYS_ADMIN
//! could mount a filesystem on which nodes can be opened, so its control group gets a BPF program. Attaching the
//! first one rewrites code of the kernel, which takes milliseconds on a PVM host; so nobody else pays for it.

#![expect(unsafe_code, reason = "the bpf system call has no wrapper")]

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;

/// Character devices that may be opened: (major, minor), any minor where there is none. As docker's.
const ALLOWED: [(i32, Option<i32>); 12] = [
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

/// Allows to make nodes, and to open the devices in the list.
fn program() -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61;
    const JUMP_NOT_EQUAL: u8 = 0x55;
    // r1 points to `struct bpf_cgroup_dev_ctx`: access and type, major, minor.
    let mut program = vec![
        instruction(LOAD_WORD, 0x12, 0, 0),
        instruction(LOAD_WORD, 0x13, 4, 0),
        instruction(LOAD_WORD, 0x14, 8, 0),
        // r5 = access
        instruction(0xbf, 0x25, 0, 0),
        instruction(0x77, 0x05, 0, 16),
        // r2 = type
        instruction(0x57, 0x02, 0, 0xffff),
        // BPF_DEVCG_ACC_MKNOD alone
        instruction(JUMP_NOT_EQUAL, 0x05, 2, 1),
    ];
    program.extend(answer(true));
    // BPF_DEVCG_DEV_CHAR
    program.push(instruction(0x15, 0x02, 2, 2));
    program.extend(answer(false));
    for (major, minor) in ALLOWED {
        let rest: i16 = if minor.is_some() { 3 } else { 2 };
        program.push(instruction(JUMP_NOT_EQUAL, 0x03, rest, major));
        if let Some(minor) = minor {
            program.push(instruction(JUMP_NOT_EQUAL, 0x04, 2, minor));
        }
        program.extend(answer(true));
    }
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

/// Has the kernel check every opening of a device by the processes of a control group.
pub fn attach(cgroup: &OwnedFd) -> Result<(), Errno> {
    const PROG_LOAD: u32 = 5;
    const PROG_ATTACH: u32 = 8;
    const CGROUP_DEVICE: u64 = 15;
    const ATTACH_CGROUP_DEVICE: u64 = 6;
    let instructions = program();
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

    /// What the program answers; a small part of the machine.
    fn run(kind: u32, access: u32, major: i32, minor: i32) -> bool {
        let program = program();
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
                0x61 => {
                    registers[to] = match offset {
                        0 => i64::from(access << 16 | kind),
                        4 => i64::from(major),
                        8 => i64::from(minor),
                        _ => panic!("outside of the context"),
                    }
                }
                0xbf => registers[to] = registers[from],
                0x77 => registers[to] >>= value,
                0x57 => registers[to] &= i64::from(value),
                0x55 => at += jump(registers[to] != i64::from(value)),
                0x15 => at += jump(registers[to] == i64::from(value)),
                0xb7 => registers[to] = i64::from(value),
                0x95 => return registers[0] != 0,
                other => panic!("no such instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn listed_devices_open_disks_do_not_and_nodes_can_be_made() {
        let (block, character) = (1, 2);
        let (make, read, both) = (1, 2, 6);
        assert!(run(character, both, 1, 3));
        assert!(run(character, read, 136, 7));
        assert!(!run(character, read, 1, 1));
        assert!(!run(block, read, 254, 0));
        assert!(!run(block, both, 1, 3));
        assert!(run(block, make, 254, 0));
        assert!(!run(block, make | read, 254, 0));
        assert!(!run(character, read, 10, 1));
    }
}
