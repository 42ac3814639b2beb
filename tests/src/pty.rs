//! A program on a terminal, typed at and read as a person does.
//!
//! The program gets a pseudoterminal as its controlling terminal, in a session of its own; a thread keeps what it prints, so
//! that it never waits for the test. Every wait is bounded, and a failure shows what was on the screen.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};

use nix::pty::openpty;
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::hull::{PATIENCE, eventually, wait_for};

/// A program and its terminal.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    /// Kept open, so that the settings can be looked at when the program is gone.
    device: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
    /// How much of the screen was expected already.
    seen: usize,
}

const fn window(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Starts a program on a terminal of 24 rows and 80 columns.
    ///
    /// # Panics
    /// It can't be started.
    pub fn spawn(program: &Command) -> Self {
        let pair = openpty(None, None).expect("a pseudoterminal");
        tcsetwinsize(&pair.master, window(24, 80)).expect("a terminal has a size");
        let device = || {
            pair.slave
                .as_fd()
                .try_clone_to_owned()
                .expect("a copy of the terminal's descriptor")
        };
        let arguments: Vec<OsString> = program.get_args().map(Into::into).collect();
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", "--wait"])
            .arg(program.get_program())
            .args(arguments)
            .env("TERM", "xterm-256color")
            .stdin(device())
            .stdout(device())
            .stderr(device());
        for (name, value) in program.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        let child = command.spawn().expect("the program starts");
        let mut output = File::from(
            pair.master
                .as_fd()
                .try_clone_to_owned()
                .expect("a copy of the terminal's descriptor"),
        );
        let screen = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // It ends when the terminal is gone on both sides.
            while let Ok(count) = output.read(&mut buffer) {
                let mut screen = kept.lock().unwrap_or_else(PoisonError::into_inner);
                screen.extend_from_slice(&buffer[..count]);
            }
        });
        Self {
            child,
            keyboard: File::from(pair.master),
            device: pair.slave,
            screen,
            seen: 0,
        }
    }

    /// Types.
    ///
    /// # Panics
    /// The terminal is gone.
    pub fn send(&mut self, keys: impl AsRef<[u8]>) {
        self.keyboard
            .write_all(keys.as_ref())
            .expect("the terminal is there");
    }

    /// Everything printed so far.
    pub fn screen(&self) -> String {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&screen).into_owned()
    }

    fn find(&self, text: &str) -> Option<usize> {
        let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        let new = &screen[self.seen..];
        new.windows(text.len())
            .position(|window| window == text.as_bytes())
            .map(|at| self.seen + at + text.len())
    }

    /// Waits until a text is printed after what was expected before.
    ///
    /// # Panics
    /// It isn't.
    pub fn expect(&mut self, text: &str) {
        let mut found = None;
        eventually(PATIENCE, || {
            found = self.find(text);
            found.is_some()
        });
        match found {
            Some(end) => self.seen = end,
            None => panic!("{text:?} was not printed; the screen: {:?}", self.screen()),
        }
    }

    /// Makes the terminal another size; whoever runs in it is told.
    ///
    /// # Panics
    /// The terminal is gone.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        tcsetwinsize(&self.keyboard, window(rows, columns)).expect("the terminal is there");
    }

    /// The terminal's settings.
    ///
    /// # Panics
    /// The terminal is gone.
    pub fn settings(&self) -> Termios {
        tcgetattr(&self.device).expect("the terminal is there")
    }

    /// Whether lines are edited and echoed by the terminal itself: not so in raw mode.
    pub fn is_cooked(&self) -> bool {
        let modes = self.settings().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits until the program has ended.
    ///
    /// # Panics
    /// It hasn't in time.
    pub fn wait(&mut self) -> ExitStatus {
        match wait_for(&mut self.child, PATIENCE) {
            Some(status) => status,
            None => panic!("it still runs; the screen: {:?}", self.screen()),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // After a failure: hanging up ends what runs on the terminal.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
