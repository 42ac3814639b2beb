//! The process that stands for a Kubernetes pod: it holds the pod's network namespace and does nothing else.
//!
//! The pod's sandbox container runs no program of the user's, so it gets no microVM. Other containers and CNI find the pod's
//! namespaces by this process, as with other runtimes.
//!
//! It is a process of its own, `… pause NETNS HOSTNAME ID`, that ends with its shim: by its standard input, whose other end
//! nobody else has. The bundle remembers which it is, for whoever cleans up after a shim.

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
};

use rustix::{
    fs::Mode,
    process::{setsid, umask},
    system::sethostname,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_no_new_privs, unshare_unsafe},
};
use sandbox::ProcessIdentity;

use crate::error::{Result, ShimError};

/// The hidden verb.
pub const VERB: &str = "pause";
/// The namespace it stays in.
const OWN: &str = "-";
/// In the pod's bundle: which process it is.
const RECORD: &str = "pause.json";

/// What it stands for.
#[derive(Debug)]
pub struct Pod<'a> {
    pub id: &'a str,
    /// The host's, without.
    pub hostname: Option<&'a str>,
    /// The network namespace; the host's, without.
    pub network: Option<PathBuf>,
}

/// Starts one, and remembers it in the bundle.
pub fn start(bundle: &Path, pod: &Pod<'_>) -> Result<Child> {
    let child = Command::new("/proc/self/exe")
        .arg(VERB)
        .arg(pod.network.as_deref().unwrap_or(Path::new(OWN)))
        .arg(pod.hostname.unwrap_or(OWN))
        .arg(pod.id)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .current_dir("/")
        .process_group(0)
        .spawn()
        .map_err(ShimError::system("starting the pod's process"))?;
    let mut child = Unfinished(Some(child));
    child.await_ready()?;
    let process = child.0.take().ok_or(ShimError::Finished)?;
    let pid = i32::try_from(process.id()).unwrap_or(0);
    let path = bundle.join(RECORD);
    let record = serde_json::to_vec(&ProcessIdentity::of(pid)).map_err(|source| ShimError::Config {
        path: path.clone(),
        source,
    })?;
    std::fs::write(&path, record).map_err(ShimError::io("writing", &path))?;
    Ok(process)
}

/// A child that is ended if it doesn't become what it is to be.
struct Unfinished(Option<Child>);

impl Unfinished {
    /// Its standard error ends when it is ready; a word on it says why it won't be.
    fn await_ready(&mut self) -> Result<()> {
        use std::io::Read as _;
        let Some(stderr) = self.0.as_mut().and_then(|child| child.stderr.take()) else {
            return Ok(());
        };
        let mut complaint = String::new();
        stderr
            .take(4096)
            .read_to_string(&mut complaint)
            .map_err(ShimError::system("waiting for the pod's process"))?;
        if complaint.is_empty() {
            return Ok(());
        }
        Err(ShimError::Refused {
            field: "linux.namespaces".into(),
            problem: complaint.trim_end().to_owned(),
        })
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Ends the process that a bundle remembers, if it is there; its process id.
pub fn end_remembered(bundle: &Path) -> Option<i32> {
    let text = std::fs::read(bundle.join(RECORD)).ok()?;
    let identity: ProcessIdentity = serde_json::from_slice::<Option<_>>(&text).ok()??;
    if let Some(process) = identity.open() {
        let _ = process.kill();
    }
    Some(identity.pid)
}

/// Is it: the whole process is its own.
pub fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().skip(2).collect();
    let word = |index: usize| words.get(index).filter(|word| *word != OWN);
    if let Err(error) = settle(word(0).map(Path::new), word(1).and_then(|name| name.to_str())) {
        eprintln!("{}", error.chain());
        return ExitCode::FAILURE;
    }
    // Nothing ever comes.
    match std::io::copy(&mut std::io::stdin(), &mut std::io::sink()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Moves into the pod's namespaces and closes standard error.
fn settle(netns: Option<&Path>, hostname: Option<&str>) -> Result<()> {
    // It leads its group already, or this makes it lead its session.
    let _ = setsid();
    umask(Mode::RWXG | Mode::RWXO);
    if let Some(path) = netns {
        let namespace = File::open(path).map_err(ShimError::io("opening the network namespace", path))?;
        let kind = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
            .map_err(|errno| ShimError::io("joining the network namespace", path)(errno.into()))?;
    }
    if let Some(hostname) = hostname {
        own_names()?;
        sethostname(hostname.as_bytes()).map_err(ShimError::system("setting the pod's host name"))?;
    }
    set_no_new_privs(true).map_err(ShimError::system("giving up privileges"))?;
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .map_err(ShimError::io("opening", "/dev/null"))?;
    rustix::stdio::dup2_stderr(&null).map_err(ShimError::system("closing standard error"))
}

/// Gives this process names of its own, and System V objects.
#[expect(unsafe_code, reason = "unshare is one name for harmless and harmful things")]
fn own_names() -> Result<()> {
    // SAFETY: these namespaces concern neither memory nor descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWUTS | UnshareFlags::NEWIPC) }
        .map_err(ShimError::system("making the pod's namespaces"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_that_is_not_remembered_or_gone_is_no_error() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(end_remembered(bundle.path()), None);
        let gone = r#"{"pid":2147483646,"start_ticks":1}"#;
        std::fs::write(bundle.path().join(RECORD), gone).unwrap();
        assert_eq!(end_remembered(bundle.path()), Some(2_147_483_646));
        std::fs::write(bundle.path().join(RECORD), "null").unwrap();
        assert_eq!(end_remembered(bundle.path()), None);
    }
}
