//! LOG SENSE and LOG SELECT.

use std::sync::atomic::{AtomicU64, Ordering};

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Next, Reply, Sense};

/// What a unit counts. Commands count when they begin.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    reads: AtomicU64,
    writes: AtomicU64,
    blocks_read: AtomicU64,
    blocks_written: AtomicU64,
    starts: AtomicU64,
}

impl Statistics {
    pub(super) fn read(&self, blocks: u64) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.blocks_read.fetch_add(blocks, Ordering::Relaxed);
    }

    pub(super) fn write(&self, blocks: u64) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.blocks_written.fetch_add(blocks, Ordering::Relaxed);
    }

    pub(super) fn start(&self) {
        self.starts.fetch_add(1, Ordering::Relaxed);
    }

    fn reset(&self) {
        for counter in [&self.reads, &self.writes, &self.blocks_read, &self.blocks_written] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

impl LogicalUnit {
    pub(super) fn count_read(&self, bytes: usize) {
        self.statistics().read((bytes / self.geometry().block_size as usize) as u64);
    }

    pub(super) fn count_write(&self, bytes: usize) {
        self.statistics().write((bytes / self.geometry().block_size as usize) as u64);
    }
}

type Parameters = fn(&LogicalUnit) -> Vec<(u16, Vec<u8>)>;

struct Page {
    code: u8,
    exists: fn(&LogicalUnit) -> bool,
    /// Parameter codes in ascending order, and what follows the header of each.
    parameters: Parameters,
}

/// In ascending order. Page 00h is made from this list.
const PAGES: [Page; 4] = [
    Page { code: 0x0c, exists: |lu| lu.capabilities().discard, parameters: logical_block_provisioning },
    Page { code: 0x0d, exists: |_| true, parameters: temperature },
    Page { code: 0x0e, exists: |_| true, parameters: start_stop_cycles },
    Page { code: 0x19, exists: |_| true, parameters: general_statistics },
];
const SUPPORTED_PAGES: u8 = 0x00;
const ALL_SUBPAGES: u8 = 0xff;

/// What the storage has left is not known: no parameter is better than a number that somebody relies on.
fn logical_block_provisioning(_lu: &LogicalUnit) -> Vec<(u16, Vec<u8>)> {
    Vec::new()
}

/// There is no sensor.
fn temperature(_lu: &LogicalUnit) -> Vec<(u16, Vec<u8>)> {
    const NOT_AVAILABLE: u8 = 0xff;
    vec![(0x0000, vec![0, NOT_AVAILABLE])]
}

/// Accumulated start-stop cycles.
fn start_stop_cycles(lu: &LogicalUnit) -> Vec<(u16, Vec<u8>)> {
    let starts = u32::try_from(lu.statistics().starts.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
    vec![(0x0004, starts.to_be_bytes().into())]
}

/// Commands and blocks, without the times that they took.
fn general_statistics(lu: &LogicalUnit) -> Vec<(u16, Vec<u8>)> {
    const LENGTH: usize = 0x40;
    let counters = lu.statistics();
    let mut data = Vec::with_capacity(LENGTH);
    for counter in [&counters.reads, &counters.writes, &counters.blocks_written, &counters.blocks_read] {
        data.extend(counter.load(Ordering::Relaxed).to_be_bytes());
    }
    data.resize(LENGTH, 0);
    vec![(0x0001, data)]
}

fn find(lu: &LogicalUnit, code: u8) -> Option<&'static Page> {
    PAGES.iter().find(|page| page.code == code && (page.exists)(lu))
}

/// LOG SENSE of cumulative values: there are no thresholds, and nothing is saved.
pub(super) fn log_sense(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const SPF: u8 = 0x40;
    const CUMULATIVE: u8 = 1;
    const BINARY_LIST: u8 = 0x03;
    if cdb.bit(1, 0) {
        return Err(invalid_field(1, 0));
    }
    if cdb.byte(2) >> 6 != CUMULATIVE {
        return Err(invalid_field(2, 7));
    }
    let (code, subpage, pointer) = (cdb.byte(2) & 0x3f, cdb.byte(3), cdb.u16(5));
    let with_subpages = subpage == ALL_SUBPAGES;
    if subpage != 0 && !(with_subpages && code == SUPPORTED_PAGES) {
        return Err(invalid_field(3, 7));
    }
    let mut data = if subpage == 0 { vec![code, 0, 0, 0] } else { vec![code | SPF, subpage, 0, 0] };
    if code == SUPPORTED_PAGES {
        let pages = PAGES.iter().filter(|page| (page.exists)(lu)).map(|page| (page.code, 0));
        let own = [(SUPPORTED_PAGES, 0), (SUPPORTED_PAGES, ALL_SUBPAGES)];
        for (code, subpage) in own.into_iter().take(1 + usize::from(with_subpages)).chain(pages) {
            data.push(code);
            if with_subpages {
                data.push(subpage);
            }
        }
    } else {
        let parameters = (find(lu, code).ok_or(invalid_field(2, 5))?.parameters)(lu);
        if pointer > parameters.last().map_or(0, |last| last.0) {
            return Err(invalid_field(5, 7));
        }
        for (code, value) in parameters.into_iter().filter(|parameter| parameter.0 >= pointer) {
            data.extend(code.to_be_bytes());
            data.extend([BINARY_LIST, value.len() as u8]);
            data.extend(value);
        }
    }
    let length = (data.len() - 4) as u16;
    data[2..4].copy_from_slice(&length.to_be_bytes());
    Ok(Reply::data(buffer, cdb.u16(7).into(), &data))
}

/// LOG SELECT: counters are reset (PCR), and nothing else is changed.
pub(super) fn log_select(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    if cdb.bit(1, 0) {
        return Err(invalid_field(1, 0));
    }
    let code = cdb.byte(2) & 0x3f;
    if code != 0 && find(lu, code).is_none() {
        return Err(invalid_field(2, 5));
    }
    if cdb.byte(3) != 0 {
        return Err(invalid_field(3, 7));
    }
    let reset = cdb.bit(1, 1);
    if cdb.u16(7) != 0 {
        let refused = Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(0);
        return Err(if reset { invalid_field(7, 7) } else { refused });
    }
    if reset {
        lu.statistics().reset();
    }
    Ok(Next::Done(Reply::good(0)))
}
