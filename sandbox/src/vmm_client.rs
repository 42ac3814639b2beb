//! One `hull-vmm`: started, configured, watched, ended.
//!
//! The VMM gets one end of a connected socket pair as its control socket; when its owner dies, that socket
//! ends and the VMM with it. Everything it needs comes as open descriptors with its configuration.

use std::{
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
};
use vmm_api::{
    BalloonConfig, BlkConfig, BootProtocol, Client, ClientError, Event, FsConfig, FsShareConfig,
    GuestPortConfig, HugePages, IoEngine, NetConfig, RequestBody, ResourceRef, ResponseBody, SerialConfig,
    VmConfig, VsockConfig,
};

use crate::{
    Result, SandboxError, SandboxId, network,
    process_handle::{ProcessHandle, ProcessIdentity},
    shares::OpenShare,
    wait,
};

/// How long the VMM may take to answer; assembling a large microVM is the longest of it.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to end when asked.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// How much of its standard error is kept: the newest.
const KEPT_STDERR_BYTES: usize = 16 * 1024;
/// Context id of every guest: each microVM has an address space of its own.
const GUEST_CID: u32 = 3;

/// A disk of the microVM.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Name in metrics, and the serial number the agent finds it by.
    pub(crate) serial: String,
    /// The image, open; read-only if `read_only`.
    pub(crate) image: File,
    /// Whether the guest may only read.
    pub(crate) read_only: bool,
}

/// What a microVM is made of.
#[derive(Debug)]
pub(crate) struct VmParts {
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: File,
    pub(crate) cmdline: String,
    /// The first one is the root of the microVM.
    pub(crate) disks: Vec<Disk>,
    pub(crate) shares: Vec<OpenShare>,
    /// Where further ones will come from.
    pub(crate) share_orders: Option<OwnedFd>,
    pub(crate) vsock: UnixListener,
    /// Port on the host and the stream that serves it.
    pub(crate) guest_port: (u32, UnixStream),
    pub(crate) console: Option<File>,
    /// How many network devices, each without a link until it is given a tap.
    pub(crate) net: usize,
}

/// A VMM process. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Vmm {
    child: Child,
    process: ProcessHandle,
    pub(crate) identity: ProcessIdentity,
    control: Client,
    stderr: ChildStderr,
    kept_stderr: Vec<u8>,
    ended: bool,
}

/// How a wait for the guest ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watched {
    /// The descriptor is readable.
    Readable,
    /// The time has passed.
    TimedOut,
}

fn keep_across_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = fcntl_getfd(fd)?;
    Ok(fcntl_setfd(fd, flags - FdFlags::CLOEXEC)?)
}

impl Vmm {
    /// Starts the process. It has no microVM yet, and can only have one with shares if `shares` says so.
    pub(crate) fn spawn(program: &Path, id: &SandboxId, jail_uid: u32, shares: bool) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().map_err(SandboxError::system("creating a socket pair"))?;
        keep_across_exec(theirs.as_fd()).map_err(SandboxError::system("passing the control socket on"))?;
        let mut command = Command::new(program);
        command
            .arg0("hull-vmm")
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .args(["--id", id.as_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for the container, which gets it from us.
            .process_group(0);
        if shares {
            command.arg("--shares");
        }
        if rustix::process::geteuid().is_root() {
            command.args(["--uid", &jail_uid.to_string(), "--gid", &jail_uid.to_string()]);
        }
        let mut child = command.spawn().map_err(SandboxError::io("starting", program))?;
        drop(theirs);
        let pid = i32::try_from(child.id()).unwrap_or(0);
        // It is our child and not waited for yet, so its number can't have been given to another.
        let identity = ProcessIdentity::of(pid);
        let opened = identity.and_then(ProcessIdentity::open);
        let (Some(identity), Some(process), Some(stderr)) = (identity, opened, child.stderr.take()) else {
            drop(child.kill());
            drop(child.wait());
            return Err(SandboxError::system("watching the VMM")(io::Error::from(
                io::ErrorKind::NotFound,
            )));
        };
        let nonblocking =
            fcntl_getfl(&stderr).and_then(|flags| fcntl_setfl(&stderr, flags | OFlags::NONBLOCK));
        nonblocking.map_err(SandboxError::system("preparing the VMM's standard error"))?;
        let mut control = Client::from_stream(ours);
        control.set_timeout(Some(CALL_TIMEOUT));
        Ok(Self {
            child,
            process,
            identity,
            control,
            stderr,
            kept_stderr: Vec::new(),
            ended: false,
        })
    }

    fn call(&mut self, body: RequestBody, fds: &[BorrowedFd<'_>]) -> Result<ResponseBody> {
        self.control.call(body, fds).map_err(|source| match source {
            ClientError::Refused(error) => SandboxError::VmRefused {
                message: error.message,
            },
            source => {
                self.process.wait_exited(Duration::from_millis(200));
                match self.diagnosis() {
                    silent if silent.is_empty() => SandboxError::Vmm { source },
                    diagnosis => SandboxError::VmmDied { diagnosis },
                }
            }
        })
    }

    /// Assembles the microVM and lets it run.
    pub(crate) fn start(&mut self, parts: &VmParts) -> Result<()> {
        let mut fds = Vec::new();
        let config = config(parts, &mut fds);
        self.call(RequestBody::Configure(Box::new(config)), &fds)?;
        self.call(RequestBody::Start, &[])?;
        Ok(())
    }

    /// Connects the network devices with their taps, which are the VMM's alone from here on and go with it.
    pub(crate) fn attach_taps(&mut self, wiring: &mut network::Wiring) -> Result<()> {
        for (index, tap) in std::mem::take(&mut wiring.taps).into_iter().enumerate() {
            let request = RequestBody::AttachNet {
                id: network::device_id(index),
                taps: vec![ResourceRef::Fd(0)],
            };
            self.call(request, &[tap.as_fd()])?;
        }
        Ok(())
    }

    /// Waits until `fd` is readable, as long as the microVM lives and nobody gives up.
    pub(crate) fn watch(
        &mut self,
        fd: BorrowedFd<'_>,
        cancel: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> Result<Watched> {
        loop {
            let never = fd;
            let [ready, stopped, exited, said, cancelled] = wait::any_readable(
                [
                    fd,
                    self.control.as_stream().as_fd(),
                    self.process.as_fd(),
                    self.stderr.as_fd(),
                    cancel.unwrap_or(never),
                ],
                Some(deadline),
            )
            .map_err(SandboxError::system("waiting for the microVM"))?;
            if cancel.is_some() && cancelled {
                return Err(SandboxError::Cancelled);
            }
            if ready {
                return Ok(Watched::Readable);
            }
            if said {
                self.drain_stderr();
            }
            if stopped || exited {
                return Err(self.stopped());
            }
            if Instant::now() >= deadline {
                return Ok(Watched::TimedOut);
            }
        }
    }

    /// Why the microVM stopped, once it has.
    pub(crate) fn stopped(&mut self) -> SandboxError {
        let reason = match self.control.next_event(Some(END_PATIENCE)) {
            Ok(Some(Event::Stopped { reason })) => Some(reason),
            _ => None,
        };
        self.process.wait_exited(END_PATIENCE);
        SandboxError::VmStopped {
            reason,
            diagnosis: self.diagnosis(),
        }
    }

    pub(crate) fn drain_stderr(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = self.stderr.read(&mut buffer) {
            self.kept_stderr.extend_from_slice(&buffer[..length]);
            let excess = self.kept_stderr.len().saturating_sub(KEPT_STDERR_BYTES);
            self.kept_stderr.drain(..excess);
        }
    }

    /// The last of what the VMM said, on one line, safe to print.
    pub(crate) fn diagnosis(&mut self) -> String {
        self.drain_stderr();
        last_lines(&self.kept_stderr)
    }

    /// Stops all vCPUs.
    pub(crate) fn pause(&mut self) -> Result<()> {
        self.call(RequestBody::Pause, &[]).map(drop)
    }

    /// Lets them run again.
    pub(crate) fn resume(&mut self) -> Result<()> {
        self.call(RequestBody::Resume, &[]).map(drop)
    }

    /// Ends the microVM and the process at once, without waiting for it.
    pub(crate) fn kill(&mut self) {
        if let Err(errno) = self.process.kill() {
            tracing::warn!(pid = self.identity.pid, %errno, "can't kill a VMM");
        }
    }

    /// Waits until the process has exited; false if it hasn't in time.
    pub(crate) fn wait_exited(&self, timeout: Duration) -> bool {
        self.process.wait_exited(timeout)
    }

    /// Ends the microVM and the process, by force if it must be.
    pub(crate) fn end(&mut self) {
        if self.ended {
            return;
        }
        self.ended = true;
        // It holds nothing that would have to be written first, and is gone soonest so.
        self.kill();
        drop(self.child.wait());
    }
}

impl AsFd for Vmm {
    /// Readable once the process has exited.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl Vmm {
    /// Readable when the VMM has said something on its standard error.
    pub(crate) fn stderr_fd(&self) -> BorrowedFd<'_> {
        self.stderr.as_fd()
    }

    /// Readable when the microVM has stopped.
    pub(crate) fn control_fd(&self) -> BorrowedFd<'_> {
        self.control.as_stream().as_fd()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.end();
    }
}

fn last_lines(bytes: &[u8]) -> String {
    const LINES: usize = 4;
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    last.join("; ")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The wire configuration, and the descriptors it refers to in order.
fn config<'a>(parts: &'a VmParts, fds: &mut Vec<BorrowedFd<'a>>) -> VmConfig {
    let mut attach = |fd: BorrowedFd<'a>| {
        fds.push(fd);
        ResourceRef::Fd(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX))
    };
    let blk = parts
        .disks
        .iter()
        .map(|disk| BlkConfig {
            id: disk.serial.clone(),
            source: attach(disk.image.as_fd()),
            read_only: disk.read_only,
            serial: Some(disk.serial.clone()),
            queues: 1,
            io_engine: IoEngine::Auto,
        })
        .collect();
    let shares: Vec<FsShareConfig> = parts
        .shares
        .iter()
        .map(|share| FsShareConfig {
            source: attach(share.root.as_fd()),
            read_only: share.read_only,
            exclusive: share.exclusive,
            overlay_marks: share.marks.as_ref().map(|marks| attach(marks.as_fd())),
        })
        .collect();
    let orders = parts.share_orders.as_ref().map(|orders| attach(orders.as_fd()));
    let (port, stream) = &parts.guest_port;
    VmConfig {
        vcpu_count: parts.vcpus,
        memory_mib: parts.memory_mib,
        huge_pages: HugePages::Transparent,
        kernel: attach(parts.kernel.as_fd()),
        initrd: None,
        cmdline: parts.cmdline.clone(),
        boot_protocol: BootProtocol::Linux64,
        blk,
        fs: (!shares.is_empty()).then(|| FsConfig {
            tag: agent_protocol::SHARES_TAG.to_owned(),
            shares,
            orders,
        }),
        net: (0..parts.net).map(net_device).collect(),
        vsock: Some(VsockConfig {
            cid: GUEST_CID,
            listener: attach(parts.vsock.as_fd()),
            guest_ports: vec![GuestPortConfig {
                port: *port,
                stream: attach(stream.as_fd()),
            }],
        }),
        rng: true,
        balloon: Some(BalloonConfig {
            free_page_reporting: true,
            deflate_on_oom: true,
            stats_interval_s: 0,
        }),
        serial: parts.console.as_ref().map(|file| SerialConfig {
            output: attach(file.as_fd()),
        }),
        boot_timer: false,
    }
}

/// A device that is connected later.
fn net_device(index: usize) -> NetConfig {
    NetConfig {
        id: network::device_id(index),
        mac: network::format_mac(&network::device_mac(index)),
        mtu: None,
        queue_pairs: 1,
        taps: Vec::new(),
        rx_limit: None,
        tx_limit: None,
    }
}

/// Checks that this process may use KVM, and says what to do if not.
pub(crate) fn check_kvm() -> Result<()> {
    let path = Path::new("/dev/kvm");
    let opened: io::Result<OwnedFd> = File::options().read(true).write(true).open(path).map(Into::into);
    let Err(error) = opened else { return Ok(()) };
    let (reason, remedy) = match error.kind() {
        io::ErrorKind::NotFound => (
            "it does not exist".to_owned(),
            "load the kvm module (kvm-intel, kvm-amd or kvm-pvm), or enable virtualisation in the firmware",
        ),
        io::ErrorKind::PermissionDenied => (
            "permission denied".to_owned(),
            "join the group that owns it (`usermod -aG kvm $USER`, then log in again); where it belongs to root alone, \
             the udev rule KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\" gives it to that group",
        ),
        _ => (error.to_string(), "run `hull doctor`"),
    };
    Err(SandboxError::Kvm { reason, remedy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_shown_and_made_safe() {
        let text = b"one\ntwo\nthree\n\nfour\x1b[31m\nfive\n";
        assert_eq!(last_lines(text), "two; three; four [31m; five");
        assert_eq!(last_lines(b""), "");
    }

    #[test]
    fn vmm_that_cannot_be_started_is_named() {
        let id = SandboxId::random().unwrap();
        let error = Vmm::spawn(Path::new("/nonexistent/hull-vmm"), &id, 1, false).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/hull-vmm"), "{error}");
    }

    #[test]
    fn vmm_that_dies_at_once_is_reported_with_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        std::fs::write(&program, "#!/bin/sh\necho 'no such thing' >&2\nexit 1\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut vmm = Vmm::spawn(&program, &SandboxId::random().unwrap(), 1, false).unwrap();
        let (_keep, waited) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let error = vmm.watch(waited.as_fd(), None, deadline).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
    }
}
