//! A logging program (`binary://`), which takes a container's output as containerd's documentation says.
//!
//! It finds stdout at descriptor 3, stderr at 4, and says that it is ready by closing descriptor 5; the container's id and its
//! containerd namespace are in its environment, the address's query is its arguments. It ends when both outputs have ended.

use std::{
    fs::File,
    io::Read as _,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    process::{Child, Command},
    thread,
};

use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{Result, ShimError};

/// Moves the three descriptors from where they can be given to a child to where the program expects them.
const PLACER: &str = "exec 3<&0 4<&1 5>&2 0</dev/null 1>/dev/null 2>/dev/null; exec \"$@\"";

/// A program that runs until the container's output has ended.
#[derive(Debug)]
pub struct LogProgram {
    child: Option<Child>,
}

impl LogProgram {
    /// Starts the program of an address without its scheme, and waits until it is ready. The outputs' ends to write to.
    pub fn start(address: &str, (id, namespace): (&str, &str)) -> Result<(Self, OwnedFd, OwnedFd)> {
        let (program, query) = address.split_once('?').unwrap_or((address, ""));
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(ShimError::system("making a pipe"));
        let ((stdout_read, stdout), (stderr_read, stderr), (ready, ready_write)) =
            (pipe()?, pipe()?, pipe()?);
        let child = Command::new("/bin/sh")
            .args(["-c", PLACER, "sh", program])
            .args(arguments(query))
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(stdout_read)
            .stdout(stderr_read)
            .stderr(ready_write)
            .process_group(0)
            .spawn()
            .map_err(ShimError::io("starting the logging program", program))?;
        // Its end is as good as a byte: the program closed it, or has gone.
        drop(File::from(ready).read(&mut [0]));
        Ok((Self { child: Some(child) }, stdout, stderr))
    }
}

/// `a=b&c` becomes `a`, `b`, `c`.
fn arguments(query: &str) -> Vec<String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .flat_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            [key, value].map(str::to_owned)
        })
        .filter(|word| !word.is_empty())
        .collect()
}

impl Drop for LogProgram {
    fn drop(&mut self) {
        // It reads what is left and ends; nobody waits for that but a thread.
        if let Some(mut child) = self.child.take() {
            let waiter = thread::Builder::new().name("logger".into());
            drop(waiter.spawn(move || child.wait()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn program_gets_both_outputs_and_its_arguments() {
        let folder = tempfile::tempdir().unwrap();
        let (script, log) = (folder.path().join("log.sh"), folder.path().join("log"));
        let text = format!(
            "#!/bin/sh\nexec 5>&-\n{{ echo \"$1 $2 $CONTAINER_ID $CONTAINER_NAMESPACE\"; cat <&3; cat <&4; echo end; }} > {}\n",
            log.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let address = format!("{}?key=value", script.display());
        let (logger, stdout, stderr) = LogProgram::start(&address, ("c1", "ns")).unwrap();
        fs::File::from(stdout).write_all(b"out\n").unwrap();
        fs::File::from(stderr).write_all(b"err\n").unwrap();
        let mut logger = logger;
        logger.child.take().unwrap().wait().unwrap();
        assert_eq!(
            fs::read_to_string(log).unwrap(),
            "key value c1 ns\nout\nerr\nend\n"
        );
    }

    #[test]
    fn query_becomes_words() {
        assert_eq!(arguments("a=b&c&d=e"), ["a", "b", "c", "d", "e"]);
        assert!(arguments("").is_empty());
    }
}
