//! Threads that are kept for the next piece of work.
//!
//! To make a thread and end it is some 30 system calls and page faults, each of which is an exit or more on a PVM host; to
//! wake one up is two. So a few that have nothing to do wait, and an exec makes none.
//!
//! Invariant: a piece of work never waits for another: if no thread is free, one is made.

use std::{
    collections::VecDeque,
    io,
    sync::{Condvar, Mutex, PoisonError},
    thread,
};

type Job = Box<dyn FnOnce() + Send>;

/// Threads that may wait for work at once: what one exec needs.
const KEPT: usize = 4;
/// Enough for the deepest of what they do.
const STACK_BYTES: usize = 256 * 1024;

#[derive(Default)]
struct State {
    /// Given to threads that wait, and not yet taken.
    jobs: VecDeque<Job>,
    /// Threads that wait, those that were just given a job among them.
    waiting: usize,
}

struct Workers {
    state: Mutex<State>,
    given: Condvar,
}

static WORKERS: Workers = Workers {
    state: Mutex::new(State {
        jobs: VecDeque::new(),
        waiting: 0,
    }),
    given: Condvar::new(),
};

/// Does something on a thread of its own.
///
/// # Errors
///
/// A thread is needed, and the system refuses to make one.
pub fn spawn(job: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut state = WORKERS.state.lock().unwrap_or_else(PoisonError::into_inner);
    if state.waiting > state.jobs.len() {
        state.jobs.push_back(Box::new(job));
        drop(state);
        WORKERS.given.notify_one();
        return Ok(());
    }
    drop(state);
    thread::Builder::new()
        .name("worker".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            job();
            while let Some(job) = WORKERS.next() {
                job();
            }
        })
        .map(drop)
}

impl Workers {
    /// Waits for work; `None` if enough do that already.
    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.waiting - state.jobs.len() >= KEPT {
            return None;
        }
        state.waiting += 1;
        loop {
            if let Some(job) = state.jobs.pop_front() {
                state.waiting -= 1;
                return Some(job);
            }
            state = self.given.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, sync::mpsc, thread::ThreadId};

    use super::*;

    /// Runs as many at once as `count`; on which threads they were.
    fn at_once(count: usize) -> HashSet<ThreadId> {
        let (here, started) = mpsc::channel();
        let mut held = Vec::new();
        for _ in 0..count {
            let here = here.clone();
            let (release, released) = mpsc::channel::<()>();
            spawn(move || {
                here.send(thread::current().id()).unwrap();
                // Until the sender is dropped.
                let _ = released.recv();
            })
            .unwrap();
            held.push(release);
        }
        // Each must have begun although none has ended.
        started.iter().take(count).collect()
    }

    #[test]
    fn each_has_a_thread_and_ended_ones_are_used_again() {
        let first = at_once(20);
        assert_eq!(first.len(), 20);
        let known = (0..1000).any(|_| at_once(1).iter().all(|id| first.contains(id)));
        assert!(known, "no thread was used again");
        assert_eq!(at_once(20).len(), 20);
    }
}
