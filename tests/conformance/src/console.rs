//! The console socket: what an engine's monitor listens on to be sent the terminal of a container.

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::runtime::PATIENCE;

/// A socket a runtime can be pointed at by `--console-socket`.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// # Errors
    /// The path is too long for a socket, or can't be written to.
    pub fn new(dir: &Path) -> Result<Self> {
        let path = dir.join("console.sock");
        let listener = UnixListener::bind(&path).context("cannot make the console socket")?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal's controlling end, as the runtime sends it.
    ///
    /// # Errors
    /// It sends none.
    pub fn receive(&self) -> Result<File> {
        let begin = Instant::now();
        let stream = loop {
            if let Ok((stream, _)) = self.listener.accept() {
                break stream;
            }
            if begin.elapsed() > PATIENCE {
                bail!("nobody connected to the console socket");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut name = [0; 4096];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut name)];
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .context("nothing came over the console socket")?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control
                && let Some(descriptor) = descriptors.first()
            {
                return Ok(owned(*descriptor));
            }
        }
        bail!("the console socket brought no descriptor")
    }
}

#[expect(unsafe_code, reason = "descriptors come as numbers")]
fn owned(descriptor: RawFd) -> File {
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    unsafe { File::from_raw_fd(descriptor) }
}

/// Everything that comes out of a terminal until its other end is closed.
pub fn read_to_hangup(mut terminal: File) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count) = terminal.read(&mut buffer) {
        if count == 0 {
            break;
        }
        all.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&all).replace("\r\n", "\n")
}
