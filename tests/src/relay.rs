//! A way to a server that can be held up at any byte, as a network does it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Passes on everything, or stops after so many bytes of answers. Its threads end with the connections.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Bytes of answers that may still pass; `None` is all.
    allowance: Mutex<Option<usize>>,
    changed: Condvar,
    held_up: AtomicUsize,
}

impl Relay {
    /// In front of a server on a port of this machine.
    ///
    /// # Panics
    /// There is no free port.
    pub fn start(server: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared {
            allowance: Mutex::new(None),
            changed: Condvar::new(),
            held_up: AtomicUsize::new(0),
        });
        let relay = Self {
            port,
            shared: Arc::clone(&shared),
        };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, server)) else {
                    continue;
                };
                let (Ok(requests), Ok(to_server)) = (client.try_clone(), server.try_clone()) else {
                    continue;
                };
                thread::spawn(move || pass(&requests, &to_server, |_| ()));
                let shared = Arc::clone(&shared);
                thread::spawn(move || pass(&server, &client, |bytes| shared.wait_for_leave(bytes)));
            }
        });
        relay
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Lets no more than so many bytes of answers pass from now on.
    pub fn hold_after(&self, bytes: usize) {
        self.set(Some(bytes));
    }

    /// Lets everything pass, what was held up too.
    pub fn open(&self) {
        self.set(None);
    }

    /// How many answers have been held up since the beginning.
    pub fn held_up(&self) -> usize {
        self.shared.held_up.load(Ordering::SeqCst)
    }

    fn set(&self, allowance: Option<usize>) {
        *self
            .shared
            .allowance
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = allowance;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn wait_for_leave(&self, bytes: usize) {
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        let mut counted = false;
        while let Some(left) = *allowance {
            if let Some(rest) = left.checked_sub(bytes) {
                *allowance = Some(rest);
                return;
            }
            if !std::mem::replace(&mut counted, true) {
                self.held_up.fetch_add(1, Ordering::SeqCst);
            }
            allowance = self
                .changed
                .wait(allowance)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn pass(mut from: &TcpStream, mut to: &TcpStream, ask: impl Fn(usize)) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        ask(length);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Write).ok();
}
