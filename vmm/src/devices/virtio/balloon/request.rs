//! What the guest says on the balloon's queues.

use vm_memory::{Bytes, GuestAddress};

use super::backend::PAGE_BYTES;
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::queue::{Chain, read_segments, slice_segments};

/// Most page numbers taken from one request, 64 MiB of pages. Linux sends 256.
pub const MAX_PAGES: usize = 16 * 1024;
/// Most bytes of statistics taken from one request: 64 of ten bytes.
const MAX_STATISTICS_LEN: u32 = 640;
const STATISTIC_LEN: usize = 10;

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// Address of the first byte.
    pub fn start(self) -> GuestAddress {
        // Page numbers have 32 bits, so this fits.
        GuestAddress(self.first * PAGE_BYTES)
    }

    /// Length in bytes.
    pub fn len_bytes(self) -> u64 {
        self.count * PAGE_BYTES
    }
}

/// The page numbers in a request, neighbours joined, and whether some of the request was unusable.
pub fn read_pages(mem: &GuestRam, chain: &Chain) -> (Vec<PageRun>, bool) {
    let mut runs: Vec<PageRun> = Vec::new();
    let mut left = MAX_PAGES;
    let mut bad = chain.writable_len() > 0 || chain.readable_len() == 0;
    for segment in chain.readable() {
        let count = (segment.len / 4) as usize;
        bad |= segment.len % 4 != 0 || count > left;
        for index in 0..count.min(left) {
            let at = segment.addr.0.checked_add(4 * index as u64).map(GuestAddress);
            let Some(page) = at.and_then(|at| mem.read_obj::<u32>(at).ok()) else {
                bad = true;
                break;
            };
            join(&mut runs, u64::from(u32::from_le(page)));
        }
        left -= count.min(left);
    }
    (runs, bad)
}

fn join(runs: &mut Vec<PageRun>, page: u64) {
    match runs.last_mut() {
        Some(run) if run.first + run.count == page => run.count += 1,
        Some(run) if page + 1 == run.first => {
            run.first = page;
            run.count += 1;
        }
        _ => runs.push(PageRun {
            first: page,
            count: 1,
        }),
    }
}

/// What the guest last said about its memory; what it doesn't know is missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatistics {
    /// Memory swapped in.
    pub swap_in_bytes: Option<u64>,
    /// Memory swapped out.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed the disk.
    pub major_faults: Option<u64>,
    /// Page faults that didn't.
    pub minor_faults: Option<u64>,
    /// Memory not used for anything.
    pub free_bytes: Option<u64>,
    /// Memory the guest manages.
    pub total_bytes: Option<u64>,
    /// Memory that could be had without swapping.
    pub available_bytes: Option<u64>,
    /// Memory of caches that could be had quickly.
    pub disk_caches_bytes: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
}

/// Reads the statistics in a request. Unknown ones are skipped.
pub fn read_statistics(mem: &GuestRam, chain: &Chain) -> Option<BalloonStatistics> {
    let len = chain.readable_len().min(MAX_STATISTICS_LEN);
    let mut bytes = vec![0; len as usize];
    let parts: Vec<_> = slice_segments(chain.readable(), 0..len).collect();
    if !read_segments(mem, &parts, &mut bytes) {
        return None;
    }
    let mut statistics = BalloonStatistics::default();
    for entry in bytes.chunks_exact(STATISTIC_LEN) {
        let &[t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] = entry else {
            continue;
        };
        let field = match u16::from_le_bytes([t0, t1]) {
            0 => &mut statistics.swap_in_bytes,
            1 => &mut statistics.swap_out_bytes,
            2 => &mut statistics.major_faults,
            3 => &mut statistics.minor_faults,
            4 => &mut statistics.free_bytes,
            5 => &mut statistics.total_bytes,
            6 => &mut statistics.available_bytes,
            7 => &mut statistics.disk_caches_bytes,
            10 => &mut statistics.oom_kills,
            _ => continue,
        };
        *field = Some(u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]));
    }
    Some(statistics)
}
