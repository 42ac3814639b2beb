//! VMM and guest kernel together on ordinary, hardware-style KVM: the same binaries as on a PVM host.

use std::time::Duration;

use hull_tests::outer_vm::{Configuration, boot};

#[test]
fn every_boot_protocol_reaches_init_on_stock_kvm_amd() {
    if let Err(error) =
        hull_tests::kernel_vm::vmm_program().and_then(|_| hull_tests::kernel_vm::kernel_image())
    {
        let required = std::env::var_os("HULL_REQUIRE_KVM").is_some_and(|value| value == "1");
        assert!(!required, "HULL_REQUIRE_KVM=1, but: {error:#}");
        eprintln!("skipped: {error:#}");
        return;
    }
    let configurations = [
        Configuration {
            name: "linux64",
            protocol: "linux64",
            vcpus: 1,
        },
        Configuration {
            name: "two-vcpus",
            protocol: "linux64",
            vcpus: 2,
        },
        Configuration {
            name: "pvh",
            protocol: "pvh",
            vcpus: 1,
        },
        Configuration {
            name: "firecracker",
            protocol: "firecracker",
            vcpus: 1,
        },
    ];
    let (guests, console) = boot(&configurations, Duration::from_secs(600)).unwrap();
    for guest in guests {
        assert_eq!(guest.exit, Some(0), "{}: {console}", guest.name);
        assert!(
            guest.console.contains(r#""init":true"#),
            "{}: {console}",
            guest.name
        );
        assert!(
            guest.console.contains(r#""done":"minimal""#),
            "{}: {console}",
            guest.name
        );
    }
}
