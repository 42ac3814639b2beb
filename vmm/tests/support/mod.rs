//! Tiny guests and a `hull-vmm` process for them.
//!
//! A guest is a few hand-assembled instructions in an ELF file, entered in 64-bit mode at 1 MiB. A PVM backend interprets
//! them, hardware runs them; the result is the same.

#![allow(dead_code, reason = "every test program uses its own part of this")]
#![expect(clippy::unwrap_used, reason = "test code: a panic is a failed test")]

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use vmm_api::{Client, RequestBody, ResponseBody, VmConfig};

pub const VMM: &str = env!("CARGO_BIN_EXE_hull-vmm");
pub const ENTRY: u64 = 0x10_0000;
/// Nothing hangs longer than this; a loaded host needs much less.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Whether the tests can run; says why when not. Where the run declares KVM present, its absence is a failure.
pub fn kvm_is_usable() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            assert!(
                std::env::var_os("HULL_REQUIRE_KVM").is_none(),
                "/dev/kvm: {error}"
            );
            eprintln!("skipped: /dev/kvm: {error}");
            false
        }
    }
}

/// Machine code, built by appending.
#[derive(Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high])
    }

    /// `out port, value` (one byte)
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).raw(&[0xb0, value, 0xee])
    }

    /// `out port, value` (four bytes)
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.port(port)
            .raw(&[0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0xef])
    }

    /// `in eax, port`
    pub fn in32(self, port: u16) -> Self {
        self.port(port).raw(&[0xed])
    }

    /// Writes `text` to the UART.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out8(0x3f8, byte))
    }

    /// Prints `yes` if EAX is `value`, else `no`.
    pub fn print_if_eax_is(self, value: u32, yes: char, no: char) -> Self {
        // cmp eax, value; mov al, no; jne +2; mov al, yes; mov dx, 0x3f8; out dx, al
        let mut bytes = vec![0x3d];
        bytes.extend(value.to_le_bytes());
        bytes.extend([
            0xb0, no as u8, 0x75, 0x02, 0xb0, yes as u8, 0x66, 0xba, 0xf8, 0x03, 0xee,
        ]);
        self.raw(&bytes)
    }

    /// `mov qword [address], value`, by way of RAX
    pub fn store64(self, address: u32, value: u64) -> Self {
        self.raw(&[0x48, 0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0x48, 0x89, 0x04, 0x25])
            .raw(&address.to_le_bytes())
    }

    /// `mov dword [address], value`
    pub fn store32(self, address: u32, value: u32) -> Self {
        self.raw(&[0xc7, 0x04, 0x25])
            .raw(&address.to_le_bytes())
            .raw(&value.to_le_bytes())
    }

    /// `mov eax, [address]`
    pub fn load32(self, address: u32) -> Self {
        self.raw(&[0x8b, 0x04, 0x25]).raw(&address.to_le_bytes())
    }

    /// An exception without a handler: the orderly end (`reboot=t`).
    pub fn triple_fault(self) -> Self {
        self.raw(&[0x0f, 0x0b])
    }

    /// `cli; 1: hlt; jmp 1b`
    pub fn idle(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// `1: jmp 1b`
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Pads with `nop` to `offset`.
    pub fn at(mut self, offset: usize) -> Self {
        assert!(self.0.len() <= offset);
        self.0.resize(offset, 0x90);
        self
    }

    /// The ELF file, at 1 MiB.
    pub fn elf(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[24..32].copy_from_slice(&ENTRY.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes[72..80].copy_from_slice(&120u64.to_le_bytes());
        bytes[88..96].copy_from_slice(&ENTRY.to_le_bytes());
        let size = (self.0.len() as u64).to_le_bytes();
        bytes[96..104].copy_from_slice(&size);
        bytes[104..112].copy_from_slice(&size);
        bytes.extend_from_slice(&self.0);
        bytes
    }
}

/// A directory with a kernel, a configuration and a place for the console.
pub struct Guest {
    pub directory: TempDir,
    pub config: serde_json::Value,
}

impl Guest {
    pub fn new(code: &Code) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        std::fs::write(&kernel, code.elf()).unwrap();
        let config = serde_json::json!({
            "vcpu_count": 1,
            "memory_mib": 64,
            "kernel": { "path": kernel },
            "serial": { "output": { "path": directory.path().join("console") } },
        });
        Self { directory, config }
    }

    pub fn with(mut self, field: &str, value: serde_json::Value) -> Self {
        self.config[field] = value;
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn console(&self) -> String {
        std::fs::read_to_string(self.path("console")).unwrap_or_default()
    }

    /// Runs it with `--config` to its end.
    pub fn run(&self) -> Finished {
        let config = self.path("config.json");
        std::fs::write(&config, self.config.to_string()).unwrap();
        run(Command::new(VMM).arg("--config").arg(config))
    }

    /// The wire configuration with descriptors, and the descriptors.
    pub fn wire(&self) -> (VmConfig, Vec<OwnedFd>) {
        let kernel = File::open(self.path("kernel")).unwrap();
        let console = File::options()
            .append(true)
            .create(true)
            .open(self.path("console"))
            .unwrap();
        let mut config = self.config.clone();
        config["kernel"] = serde_json::json!({ "fd": 0 });
        config["serial"]["output"] = serde_json::json!({ "fd": 1 });
        let mut fds = vec![kernel.into(), console.into()];
        let disks = config.get_mut("blk").and_then(serde_json::Value::as_array_mut);
        for disk in disks.into_iter().flatten() {
            // Those that name a descriptor bring it themselves.
            if let Some(path) = disk["source"]["path"].as_str() {
                let writable = disk["read_only"] == false;
                let image = File::options().read(true).write(writable).open(path).unwrap();
                disk["source"] = serde_json::json!({ "fd": fds.len() });
                fds.push(image.into());
            }
        }
        (serde_json::from_value(config).unwrap(), fds)
    }

    /// Waits until the console shows `text`.
    pub fn wait_for_console(&self, text: &str) {
        wait_until(
            || self.console().contains(text),
            || format!("{text:?} on the console: {:?}", self.console()),
        );
    }
}

pub fn wait_until(mut done: impl FnMut() -> bool, what: impl Fn() -> String) {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "timed out waiting for {}", what());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How a process ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stderr: String,
}

/// Runs a command to its end, bounded in time.
pub fn run(command: &mut Command) -> Finished {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    let status = wait(&mut child);
    Finished {
        status,
        stderr: reader.join().unwrap().unwrap(),
    }
}

pub fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("hull-vmm did not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A `hull-vmm` under a connected control socket.
pub struct Vmm {
    pub child: Child,
    pub client: Client,
}

impl Vmm {
    pub fn spawn() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(VMM);
        command
            .args(["--control-fd", "3"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        inherit_as(&mut command, theirs.into(), 3);
        let child = command.spawn().unwrap();
        drop(command);
        let mut client = Client::from_stream(ours);
        client.set_timeout(Some(TIMEOUT));
        Self { child, client }
    }

    /// With `guest` running in it.
    pub fn start(guest: &Guest) -> Self {
        let mut vmm = Self::spawn();
        vmm.configure(guest).unwrap();
        vmm.call(RequestBody::Start).unwrap();
        vmm
    }

    pub fn configure(&mut self, guest: &Guest) -> Result<ResponseBody, vmm_api::ClientError> {
        let (config, fds) = guest.wire();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.client.call(RequestBody::Configure(Box::new(config)), &fds)
    }

    pub fn call(&mut self, body: RequestBody) -> Result<ResponseBody, vmm_api::ClientError> {
        self.client.call(body, &[])
    }

    pub fn metrics(&mut self) -> vmm_api::MetricsReport {
        match self.call(RequestBody::Metrics).unwrap() {
            ResponseBody::Metrics(metrics) => *metrics,
            other => panic!("{other:?}"),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has the command's process find `fd` under `number`.
#[expect(unsafe_code, reason = "dup2 between fork and exec")]
pub fn inherit_as(command: &mut Command, fd: OwnedFd, number: i32) {
    use std::os::fd::AsRawFd;
    // SAFETY: dup2 and fcntl are async-signal-safe; the descriptor lives in the closure.
    unsafe {
        command.pre_exec(move || {
            let raw = fd.as_raw_fd();
            let result = if raw == number {
                libc::fcntl(raw, libc::F_SETFD, 0)
            } else {
                libc::dup2(raw, number)
            };
            if result < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
}

pub fn write_file(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}
