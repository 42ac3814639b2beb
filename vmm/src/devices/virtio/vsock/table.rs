//! The bounded table of connections, by handle and by ports.
//!
//! Invariant: a handle names one entry for ever; an event that comes for an entry that is gone finds nothing, even if
//! its slot has been taken again.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::connection::Connection;

/// The most sockets a device has open, greetings and draining ones included: a process in a container takes up to four, and
/// hundreds may run at once.
pub const MAX_ENTRIES: usize = 1024;

/// Names an entry of the table, also as epoll data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    index: u32,
    generation: u32,
}

impl Handle {
    /// The handle as epoll data.
    pub fn to_token(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The handle from epoll data.
    pub fn from_token(token: u64) -> Self {
        let bytes = token.to_le_bytes();
        Self {
            index: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            generation: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }
}

/// What a socket is used for.
#[derive(Debug)]
pub enum Entry {
    /// Accepted; its first line hasn't come yet.
    Greeting {
        /// The socket.
        stream: UnixStream,
        /// When we lose patience.
        deadline: Instant,
    },
    /// A connection.
    Connection(Connection),
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    entry: Option<Entry>,
}

/// The table.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// (host port, guest port) of every connection the guest knows of.
    by_ports: HashMap<(u32, u32), Handle>,
}

impl Table {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is no room.
    pub fn is_full(&self) -> bool {
        self.len() >= MAX_ENTRIES
    }

    /// Adds an entry; gives it back if there is no room.
    pub fn insert(&mut self, entry: Entry) -> Result<Handle, Entry> {
        if self.is_full() {
            return Err(entry);
        }
        let index = match self.free.pop() {
            Some(index) => index,
            // Below MAX_ENTRIES.
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    entry: None,
                });
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        let slot = &mut self.slots[index as usize];
        slot.entry = Some(entry);
        Ok(Handle {
            index,
            generation: slot.generation,
        })
    }

    /// Lets a connection be found by its ports.
    pub fn bind(&mut self, handle: Handle) {
        if let Some(connection) = self.connection(handle) {
            let ports = (connection.host_port, connection.guest_port);
            self.by_ports.insert(ports, handle);
        }
    }

    /// Lets a connection's ports be used again.
    pub fn unbind(&mut self, handle: Handle) {
        if let Some(connection) = self.connection(handle) {
            let ports = (connection.host_port, connection.guest_port);
            if self.by_ports.get(&ports) == Some(&handle) {
                self.by_ports.remove(&ports);
            }
        }
    }

    /// The connection between two ports.
    pub fn find(&self, host_port: u32, guest_port: u32) -> Option<Handle> {
        self.by_ports.get(&(host_port, guest_port)).copied()
    }

    /// The entry of a handle.
    pub fn entry(&mut self, handle: Handle) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(handle.index as usize)?;
        slot.entry
            .as_mut()
            .filter(|_| slot.generation == handle.generation)
    }

    /// The connection of a handle, if that is what it is.
    pub fn connection(&mut self, handle: Handle) -> Option<&mut Connection> {
        match self.entry(handle)? {
            Entry::Connection(connection) => Some(connection),
            Entry::Greeting { .. } => None,
        }
    }

    /// All connections.
    pub fn connections(&mut self) -> impl Iterator<Item = (Handle, &mut Connection)> {
        (0..).zip(&mut self.slots).filter_map(|(index, slot)| {
            let generation = slot.generation;
            match slot.entry.as_mut()? {
                Entry::Connection(connection) => Some((Handle { index, generation }, connection)),
                Entry::Greeting { .. } => None,
            }
        })
    }

    /// Turns a greeting into the connection that `make` makes of its socket.
    pub fn promote(&mut self, handle: Handle, make: impl FnOnce(UnixStream) -> Connection) {
        if self.entry(handle).is_none() {
            return;
        }
        let entry = &mut self.slots[handle.index as usize].entry;
        *entry = entry.take().map(|entry| match entry {
            Entry::Greeting { stream, .. } => Entry::Connection(make(stream)),
            connection @ Entry::Connection(_) => connection,
        });
    }

    /// Takes an entry out.
    pub fn remove(&mut self, handle: Handle) -> Option<Entry> {
        self.unbind(handle);
        self.entry(handle)?;
        let slot = &mut self.slots[handle.index as usize];
        // The highest bit stays clear: such tokens are the backend's own.
        slot.generation = slot.generation.wrapping_add(1) & i32::MAX.cast_unsigned();
        self.free.push(handle.index);
        slot.entry.take()
    }

    /// Handles of all entries with their deadlines.
    pub fn deadlines(&self) -> impl Iterator<Item = (Handle, Instant)> {
        (0..).zip(&self.slots).filter_map(|(index, slot)| {
            let deadline = match slot.entry.as_ref()? {
                Entry::Greeting { deadline, .. } => *deadline,
                Entry::Connection(connection) => connection.deadline?,
            };
            let handle = Handle {
                index,
                generation: slot.generation,
            };
            Some((handle, deadline))
        })
    }

    /// Handles of all entries.
    pub fn handles(&self) -> Vec<Handle> {
        (0..)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.entry.is_some())
            .map(|(index, slot)| Handle {
                index,
                generation: slot.generation,
            })
            .collect()
    }
}
