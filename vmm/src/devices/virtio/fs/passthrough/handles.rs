//! Files and directories the guest has open.
//!
//! Invariant: at most `limit` of them, each with one descriptor of the host; a handle serves only the inode it was made for.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use super::errno;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    pub inode: u64,
    pub is_directory: bool,
    pub file: Mutex<File>,
}

/// All of them.
#[derive(Debug)]
pub struct HandleTable {
    handles: HashMap<u64, Arc<Handle>>,
    next: u64,
    limit: usize,
}

impl HandleTable {
    pub fn new(limit: usize) -> Self {
        Self {
            handles: HashMap::new(),
            next: 1,
            limit,
        }
    }

    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Refuses what the limit doesn't allow, before anything is opened for it.
    pub fn check_room(&self) -> io::Result<()> {
        if self.handles.len() < self.limit {
            Ok(())
        } else {
            Err(errno(libc::ENFILE))
        }
    }

    pub fn insert(&mut self, handle: Handle) -> u64 {
        let number = self.next;
        self.next += 1;
        self.handles.insert(number, Arc::new(handle));
        number
    }

    pub fn get(&self, number: u64, inode: u64, is_directory: bool) -> io::Result<Arc<Handle>> {
        self.handles
            .get(&number)
            .filter(|handle| handle.inode == inode && handle.is_directory == is_directory)
            .cloned()
            .ok_or_else(|| errno(libc::EBADF))
    }

    /// Any handle on an inode. Looks at all of them.
    pub fn of_inode(&self, inode: u64) -> Option<Arc<Handle>> {
        self.handles
            .values()
            .find(|handle| handle.inode == inode)
            .cloned()
    }

    /// Closes all handles on some inodes.
    pub fn remove_those(&mut self, is_one: impl Fn(u64) -> bool) {
        self.handles.retain(|_, handle| !is_one(handle.inode));
    }

    /// Takes the handle out, to be closed.
    pub fn remove(&mut self, number: u64, inode: u64, is_directory: bool) -> io::Result<()> {
        self.get(number, inode, is_directory)?;
        self.handles.remove(&number);
        Ok(())
    }
}
