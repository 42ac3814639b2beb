//! The handle on `/dev/kvm`, opened before the jail closes the file system.

use kvm_ioctls::{Cap, Kvm};
use std::{io, os::fd::AsRawFd};

/// The one API version KVM has ever had since 2.6.22.
const KVM_API_VERSION: i32 = 12;
const DEVICE: &str = "/dev/kvm";

/// Why KVM can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device node isn't there.
    #[error(
        "{DEVICE} does not exist: this host offers no KVM; load kvm_intel, kvm_amd or kvm_pvm, or turn on (nested) virtualisation"
    )]
    Missing,
    /// The device node can't be opened.
    #[error("no permission to use {DEVICE}: run as root or as a member of the group that owns it")]
    NoAccess,
    /// Something else is wrong with the device node.
    #[error("can't open {DEVICE}")]
    Open(#[source] io::Error),
    /// Not the KVM this program was written for.
    #[error("KVM speaks API version {version}, {KVM_API_VERSION} is needed")]
    ApiVersion {
        /// As reported.
        version: i32,
    },
    /// A capability is missing.
    #[error("KVM on this host lacks {capability}")]
    Capability {
        /// Its name.
        capability: &'static str,
    },
}

/// An open `/dev/kvm` with everything the VMM relies on.
#[derive(Debug)]
pub struct KvmHost {
    kvm: Kvm,
}

impl KvmHost {
    /// Opens `/dev/kvm` and checks what the VMM can't do without.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|errno| match errno.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::NoAccess,
            errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION {
            return Err(KvmError::ApiVersion { version });
        }
        let needed = [
            (Cap::UserMemory, "user memory"),
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::MpState, "MP state"),
            (Cap::ExtCpuid, "CPUID setting"),
        ];
        for (cap, capability) in needed {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Capability { capability });
            }
        }
        Ok(Self { kvm })
    }

    /// The handle itself.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Descriptor number, for the jail's list of those to keep.
    #[must_use]
    pub fn raw_fd(&self) -> i32 {
        self.kvm.as_raw_fd()
    }
}
