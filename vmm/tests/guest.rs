//! What tiny guests can do: ports, memory-mapped accesses, halts, resets, starting a second vCPU.

mod support;

use std::time::Duration;
use support::{Code, ENTRY, Guest, Vmm, kvm_is_usable};
use vmm_api::{RequestBody, StopReason};

#[test]
fn serial_output_arrives_and_a_triple_fault_is_an_orderly_end() {
    if !kvm_is_usable() {
        return;
    }
    let guest = Guest::new(&Code::new().print("hello\n").triple_fault());
    let finished = guest.run();
    assert!(finished.status.success(), "{finished:?}");
    assert_eq!(guest.console(), "hello\n");
}

#[test]
fn every_boot_protocol_reaches_its_entry_point() {
    if !kvm_is_usable() {
        return;
    }
    for protocol in ["linux64", "firecracker"] {
        let guest =
            Guest::new(&Code::new().print("in").triple_fault()).with("boot_protocol", protocol.into());
        assert!(guest.run().status.success());
        assert_eq!(guest.console(), "in", "{protocol}");
    }
}

#[test]
fn boot_data_is_where_the_protocol_says() {
    if !kvm_is_usable() {
        return;
    }
    // boot_flag and header of the zero page whose address is in RSI, the command line, the MP table.
    let code = Code::new()
        .raw(&[0x0f, 0xb7, 0x86, 0xfe, 0x01, 0x00, 0x00]) // movzx eax, word [rsi + 0x1fe]
        .print_if_eax_is(0xaa55, 'y', 'n')
        .raw(&[0x8b, 0x86, 0x02, 0x02, 0x00, 0x00]) // mov eax, [rsi + 0x202]
        .print_if_eax_is(0x5372_6448, 'y', 'n')
        .load32(0x2_0000)
        .print_if_eax_is(u32::from_le_bytes(*b"a=b "), 'y', 'n')
        .load32(0x9_fc00)
        .print_if_eax_is(u32::from_le_bytes(*b"_MP_"), 'y', 'n')
        .triple_fault();
    let guest = Guest::new(&code).with("cmdline", "a=b c".into());
    assert!(guest.run().status.success());
    assert_eq!(guest.console(), "yyyy");
}

#[test]
fn unclaimed_ports_and_addresses_read_all_ones_and_are_counted() {
    if !kvm_is_usable() {
        return;
    }
    let code = Code::new()
        .in32(0x700)
        .print_if_eax_is(u32::MAX, 'y', 'n')
        .out32(0x700, 7)
        .print("done")
        .idle();
    let guest = Guest::new(&code);
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("done");
    assert_eq!(guest.console(), "ydone");
    let metrics = vmm.metrics();
    assert_eq!(metrics.unclaimed_accesses, 2);
    assert!(
        metrics.vcpus[0].exits.pio_in >= 1 && metrics.vcpus[0].exits.pio_out >= 5,
        "{metrics:?}"
    );
}

#[test]
fn memory_without_a_device_reads_all_ones() {
    if !kvm_is_usable() {
        return;
    }
    // 512 MiB: inside the identity map, outside the guest's 64 MiB of RAM.
    let code = Code::new()
        .load32(0x2000_0000)
        .print_if_eax_is(u32::MAX, 'y', 'n')
        .store32(0x2000_0000, 1)
        .print("!")
        .idle();
    let guest = Guest::new(&code);
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("y!");
    let metrics = vmm.metrics();
    assert_eq!(metrics.unclaimed_accesses, 2);
    assert_eq!(
        (
            metrics.vcpus[0].exits.mmio_read,
            metrics.vcpus[0].exits.mmio_write
        ),
        (1, 1)
    );
}

#[test]
fn keyboard_controller_reset_is_an_orderly_end() {
    if !kvm_is_usable() {
        return;
    }
    let guest = Guest::new(&Code::new().out8(0x64, 0xfe).print("never").spin());
    let mut vmm = Vmm::start(&guest);
    assert_eq!(
        vmm.client.wait_stopped().unwrap(),
        Some(StopReason::GuestShutdown)
    );
    assert!(support::wait(&mut vmm.child).success());
    assert_eq!(guest.console(), "");
}

#[test]
fn boot_phases_are_timed() {
    if !kvm_is_usable() {
        return;
    }
    let guest = Guest::new(&Code::new().out8(0x5b8, 1).out8(0x5b8, 7).print("ok").idle())
        .with("boot_timer", true.into());
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("ok");
    let metrics = vmm.metrics();
    let phases: Vec<_> = metrics.boot_phases.iter().map(|mark| mark.phase).collect();
    assert_eq!(phases, [1, 7]);
    assert!(metrics.boot_phases[0].since_first_run_ns > 0);
    assert!(metrics.boot_phases[0].since_first_run_ns <= metrics.boot_phases[1].since_first_run_ns);
    assert!(metrics.start.main_to_first_run_us.unwrap() > 0 && metrics.start.load_kernel_us > 0);
}

#[test]
fn standalone_run_prints_its_timing_as_one_line_of_json() {
    if !kvm_is_usable() {
        return;
    }
    let guest = Guest::new(&Code::new().out8(0x5b8, 7).triple_fault()).with("boot_timer", true.into());
    let finished = guest.run();
    let line: serde_json::Value = serde_json::from_str(finished.stderr.trim()).unwrap();
    assert_eq!(line["boot_timer"]["marks"][0]["phase"], 7);
    assert!(line["boot_timer"]["main_to_first_run_us"].as_u64().unwrap() > 0);
    assert_eq!(line["exits"]["shutdown"], 1);
}

/// What a vCPU start block looks like, at 2 MiB.
const BLOCK: u32 = 0x20_0000;
const STATUS: u32 = BLOCK + 48;

/// Fills the block: magic, APIC id, reserved, rip, cr3, rsp, rdi, status 0; and rings.
fn ring(code: Code, magic: u64, apic_id: u32, rip: u64, cr3: u64) -> Code {
    code.store64(BLOCK, magic)
        .store32(BLOCK + 8, apic_id)
        .store32(BLOCK + 12, 0)
        .store64(BLOCK + 16, rip)
        .store64(BLOCK + 24, cr3)
        .store64(BLOCK + 32, 0x1f_0000)
        .store64(BLOCK + 40, u64::from(b'*'))
        .store64(BLOCK + 48, 0)
        .out32(0x5b0, BLOCK >> 12)
        .load32(STATUS)
}

const MAGIC: u64 = 0x0054_5241_5453_5041;
const ROOT: u64 = 0xa000;

#[test]
fn doorbell_starts_a_second_vcpu_in_the_named_state() {
    if !kvm_is_usable() {
        return;
    }
    let target = ENTRY + 0x800;
    // The second vCPU prints RDI, which the block set to '*', and halts.
    let code = ring(Code::new(), MAGIC, 1, target, ROOT)
        .print_if_eax_is(1, 'y', 'n')
        .idle()
        .at(0x800)
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0x89, 0xf8, 0xee]) // mov dx, 0x3f8; mov eax, edi; out dx, al
        .idle();
    let guest = Guest::new(&code).with("vcpu_count", 2.into());
    let _vmm = Vmm::start(&guest);
    guest.wait_for_console("*");
    guest.wait_for_console("y");
}

#[test]
fn doorbell_refuses_bad_blocks_with_a_status_and_goes_on() {
    if !kvm_is_usable() {
        return;
    }
    let target = ENTRY + 0x800;
    let mut code = Code::new();
    for (magic, apic_id, rip, cr3, status) in [
        (MAGIC ^ 1, 1, target, ROOT, 2),
        (MAGIC, 0, target, ROOT, 3),
        (MAGIC, 77, target, ROOT, 3),
        (MAGIC, 1, 1 << 62, ROOT, 4),
        (MAGIC, 1, target, 0x1_0000_0000, 4),
        (MAGIC, 1, target, ROOT, 1),
        (MAGIC, 1, target, ROOT, 5),
    ] {
        code = ring(code, magic, apic_id, rip, cr3).print_if_eax_is(status, 'y', 'n');
    }
    // Frames without memory, an odd width, and the end.
    let code = code
        .out32(0x5b0, u32::MAX)
        .out8(0x5b0, 1)
        .print("end")
        .idle()
        .at(0x800)
        .idle();
    let guest = Guest::new(&code).with("vcpu_count", 2.into());
    let _vmm = Vmm::start(&guest);
    guest.wait_for_console("end");
    assert_eq!(guest.console(), "yyyyyyyend");
}

#[test]
fn paused_guest_stands_still_and_goes_on_where_it_was() {
    if !kvm_is_usable() {
        return;
    }
    // Counts in memory and prints a dot every 65536 rounds: 1: inc dword [0x300000]; cmp word [0x300000], 0; jne 1b; '.'; jmp 1b
    let code = Code::new()
        .raw(&[
            0xff, 0x04, 0x25, 0, 0, 0x30, 0, 0x66, 0x83, 0x3c, 0x25, 0, 0, 0x30, 0, 0, 0x75, 0xee,
        ])
        .print(".")
        .raw(&[0xeb, 0xe5]);
    let guest = Guest::new(&code);
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console(".");
    vmm.call(RequestBody::Pause).unwrap();
    let before = guest.console().len();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.console().len(), before);
    vmm.call(RequestBody::Resume).unwrap();
    support::wait_until(|| guest.console().len() > before, || "more dots".to_owned());
    assert!(vmm.metrics().vcpus[0].exits.interrupted >= 1);
}

#[test]
fn every_pause_of_a_busy_guest_holds_until_it_is_resumed() {
    if !kvm_is_usable() {
        return;
    }
    // Both vCPUs write to a port nobody has, as fast as they can.
    let target = ENTRY + 0x800;
    let busy = |code: Code| code.out8(0x1234, 0).raw(&[0xeb, 0xf7]);
    let code = busy(ring(Code::new(), MAGIC, 1, target, ROOT).print_if_eax_is(1, 'y', 'n')).at(0x800);
    let guest = Guest::new(&busy(code)).with("vcpu_count", 2.into());
    let mut vmm = Vmm::start(&guest);
    guest.wait_for_console("y");
    let exits = |vmm: &mut Vmm| -> Vec<u64> {
        let vcpus = vmm.metrics().vcpus;
        vcpus.iter().map(|vcpu| vcpu.exits.pio_out).collect()
    };
    for _ in 0..50 {
        vmm.call(RequestBody::Pause).unwrap();
        let paused = exits(&mut vmm);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(exits(&mut vmm), paused, "ran while it was paused");
        vmm.call(RequestBody::Resume).unwrap();
        support::wait_until(
            || exits(&mut vmm).iter().zip(&paused).all(|(now, then)| now > then),
            || "both vCPUs to go on".to_owned(),
        );
    }
    // A paused microVM can be told to stop.
    vmm.call(RequestBody::Pause).unwrap();
    vmm.call(RequestBody::Shutdown).unwrap();
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn guest_with_a_silent_console_reader_does_not_hang() {
    if !kvm_is_usable() {
        return;
    }
    let code = Code::new().print("x").raw(&[0xeb, 0xf7]); // for ever
    let guest = Guest::new(&code);
    let (_reader, writer) = std::io::pipe().unwrap();
    let mut vmm = Vmm::spawn();
    let (config, mut fds) = guest.wire();
    fds[1] = writer.into();
    let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
    vmm.client
        .call(RequestBody::Configure(Box::new(config)), &fds)
        .unwrap();
    vmm.call(RequestBody::Start).unwrap();
    support::wait_until(
        || vmm.metrics().vcpus[0].exits.pio_out > 60_000,
        || "a full pipe".to_owned(),
    );
    std::thread::sleep(Duration::from_millis(100));
    vmm.call(RequestBody::Pause).unwrap();
    vmm.call(RequestBody::Shutdown).unwrap();
    assert!(support::wait(&mut vmm.child).success());
}

/// `mov ecx, register; mov edx, high; mov eax, low; wrmsr`
fn wrmsr(code: Code, register: u32, high: u32, low: u32) -> Code {
    code.raw(&[0xb9])
        .raw(&register.to_le_bytes())
        .raw(&[0xba])
        .raw(&high.to_le_bytes())
        .raw(&[0xb8])
        .raw(&low.to_le_bytes())
        .raw(&[0x0f, 0x30])
}

#[test]
fn init_and_startup_interrupts_start_a_second_vcpu_in_real_mode() {
    if !kvm_is_usable() {
        return;
    }
    // Real-mode code at 0x8000: mov dx, 0x3f8; mov al, '*'; out dx, al; cli; hlt
    let trampoline = u64::from_le_bytes([0xba, 0xf8, 0x03, 0xb0, b'*', 0xee, 0xfa, 0xf4]);
    const APIC_BASE: u32 = 0x1b;
    const ICR: u32 = 0x830;
    let code = Code::new()
        .store64(0x8000, trampoline)
        .store32(0x8008, 0xfdeb_f4f4);
    let code = wrmsr(code, APIC_BASE, 0, 0xfee0_0d00); // x2APIC mode, still the boot processor
    let code = wrmsr(code, ICR, 1, 0x4500); // INIT
    let code = wrmsr(code, ICR, 1, 0x4608); // startup at 0x8000
    let guest = Guest::new(&code.print("sent").idle()).with("vcpu_count", 2.into());
    let _vmm = Vmm::start(&guest);
    guest.wait_for_console("*");
    guest.wait_for_console("sent");
}

#[test]
fn all_vcpus_a_guest_may_have_are_started_by_doorbell() {
    if !kvm_is_usable() {
        return;
    }
    let target = ENTRY + 0x1800;
    let mut code = Code::new();
    for apic_id in 1..16 {
        code = ring(code, MAGIC, apic_id, target, ROOT).print_if_eax_is(1, 'y', 'n');
    }
    // Each counts itself: lock inc dword [0x300000].
    let count = Code::new().raw(&[0xf0, 0xff, 0x04, 0x25, 0, 0, 0x30, 0]).idle();
    let code = code
        .load32(0x30_0000)
        .raw(&[0x3d, 15, 0, 0, 0, 0x75, 0xf2]) // until it is 15
        .print("all")
        .idle()
        .at(0x1800)
        .raw(&count.0);
    let guest = Guest::new(&code).with("vcpu_count", 16.into());
    let vmm = Vmm::start(&guest);
    guest.wait_for_console("all");
    assert_eq!(guest.console(), format!("{}all", "y".repeat(15)));
    drop(vmm);
}

#[test]
fn guest_the_backend_cannot_run_is_reported_with_its_registers() {
    if !kvm_is_usable() {
        return;
    }
    // A software interrupt from interpreted kernel code: PVM's emulator has none. Hardware takes the missing handler for a
    // triple fault.
    let guest = Guest::new(&Code::new().raw(&[0xcd, 0x80]).spin());
    let mut vmm = Vmm::start(&guest);
    match vmm.client.wait_stopped().unwrap() {
        Some(StopReason::GuestShutdown) => assert!(support::wait(&mut vmm.child).success()),
        Some(StopReason::VcpuFailed { message }) => {
            assert!(
                message.contains("vCPU 0") && message.contains("rip 0000000000100000"),
                "{message}"
            );
            assert_eq!(support::wait(&mut vmm.child).code(), Some(1));
        }
        other => panic!("{other:?}"),
    }
}
