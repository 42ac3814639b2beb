//! The KVM backend of this host: found for what it is, and its registers saved and restored.

use kvm_bindings::{Msrs, kvm_msr_entry};
use std::sync::Arc;
use vmm::{
    arch::x86_64::{
        backend::{self, PVM_MSR},
        cpuid::CpuidTable,
        msr,
    },
    vstate::{kvm::KvmHost, memory, vm::Vm},
};
use vmm_api::KvmBackend;

fn host() -> Option<KvmHost> {
    match KvmHost::open() {
        Ok(host) => Some(host),
        Err(error) => {
            assert!(std::env::var_os("HULL_REQUIRE_KVM").is_none(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

#[test]
fn detection_agrees_with_what_the_processor_says() {
    let Some(host) = host() else { return };
    let vm = Vm::new(&host, Arc::new(memory::create(16, true).unwrap())).unwrap();
    let found = backend::detect(Some(&vm.create_vcpu(0).unwrap())).kind();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let hardware = cpuinfo
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    assert_eq!(found == KvmBackend::Hardware, hardware, "{found:?}");
    assert_eq!(backend::guess(), found);
}

#[test]
fn registers_survive_saving_and_restoring_with_those_kvm_does_not_list() {
    let Some(host) = host() else { return };
    let vm = Vm::new(&host, Arc::new(memory::create(16, true).unwrap())).unwrap();
    let (first, second) = (vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap());
    let backend = backend::detect(Some(&first));
    let table = CpuidTable::new(host.kvm(), backend, 2, None).unwrap();
    table.apply(&first, 0).unwrap();
    table.apply(&second, 1).unwrap();
    msr::set_boot(&first).unwrap();
    const LSTAR: u32 = 0xc000_0082;
    let mut marks = vec![kvm_msr_entry {
        index: LSTAR,
        data: 0xffff_ffff_8123_4560,
        ..Default::default()
    }];
    if backend.kind() == KvmBackend::Pvm {
        // A registered page, in the form KVM reports it.
        marks.push(kvm_msr_entry {
            index: PVM_MSR,
            data: 0x543f,
            ..Default::default()
        });
    }
    assert_eq!(
        first.set_msrs(&Msrs::from_entries(&marks).unwrap()).unwrap(),
        marks.len()
    );
    let saved = msr::save(host.kvm(), &first, backend).unwrap();
    // The clock goes on.
    let settled: Vec<_> = saved
        .into_iter()
        .filter(|entry| !matches!(entry.index, 0x10 | 0x6e0))
        .collect();
    msr::restore(&second, &settled).unwrap();
    for mark in marks {
        assert_eq!(
            msr::read(&second, mark.index),
            msr::read(&first, mark.index),
            "{:#x}",
            mark.index
        );
    }
}
