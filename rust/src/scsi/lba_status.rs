//! GET LBA STATUS: which blocks have storage.

use super::cdb::Cdb;
use super::opcodes::Outcome;
use super::task::{Stage, Task};
use super::transfer::Extent;
use super::{
    BlockState, ByteOffset, DataBuffer, LogicalUnit, MediumExtent, Next, Reply, Step, StepBuffer, StepResult,
    Verb,
};

const HEADER: usize = 8;
const DESCRIPTOR: usize = 16;

/// A GET LBA STATUS that waits for the handler's extents.
#[derive(Debug)]
pub(super) struct LbaStatus {
    first: u64,
    end: u64,
    allocation: u32,
}

/// GET LBA STATUS. A handler that does not tell extents has storage for every block, as far as anybody knows.
pub(super) fn get_lba_status(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let first = cdb.u64(2);
    Extent { first, blocks: 0 }.check::<16>(lu)?;
    // The number of blocks of a descriptor has 32 bits.
    let end = lu.blocks().min(first.saturating_add(u32::MAX.into()));
    let status = Box::new(LbaStatus { first, end, allocation: cdb.u32(10) });
    if !lu.capabilities().extents {
        return Ok(status.answer(buffer, &[(end - first, BlockState::Mapped)]));
    }
    let block_size = u64::from(lu.geometry().block_size);
    let step = Step {
        verb: Verb::Extents,
        offset: ByteOffset(first * block_size),
        length: (end - first) * block_size,
        buffer: StepBuffer::None,
        fua: false,
        unit: None,
    };
    Ok(Next::Call(step, Task(Stage::LbaStatus(status))))
}

impl LbaStatus {
    pub(super) fn advance(&self, lu: &LogicalUnit, buffer: &dyn DataBuffer, result: StepResult) -> Next {
        let extents = match result {
            StepResult::Extents(extents) => extents,
            _ => Vec::new(),
        };
        let block_size = u64::from(lu.geometry().block_size);
        let runs = runs(&extents, block_size, self.end - self.first);
        self.answer(buffer, &runs)
    }

    fn answer(&self, buffer: &dyn DataBuffer, runs: &[(u64, BlockState)]) -> Next {
        let room = usize::try_from(self.allocation).unwrap_or(usize::MAX).min(buffer.len());
        // One descriptor at least, whatever the room: the length tells that there is more.
        let fitting = (room.saturating_sub(HEADER) / DESCRIPTOR).max(1);
        let mut data = vec![0; HEADER];
        let mut lba = self.first;
        for (blocks, state) in runs.iter().take(fitting) {
            data.extend(lba.to_be_bytes());
            data.extend((*blocks as u32).to_be_bytes());
            data.extend([*state as u8, 0, 0, 0]);
            lba += blocks;
        }
        let length = data.len() as u32 - 4;
        data[..4].copy_from_slice(&length.to_be_bytes());
        Reply::data(buffer, self.allocation, &data)
    }
}

/// The handler's extents as runs of whole blocks, `limit` blocks at most and one run at least. A block of which any
/// byte has storage is mapped; so is what the handler does not speak of.
fn runs(extents: &[MediumExtent], block_size: u64, limit: u64) -> Vec<(u64, BlockState)> {
    let mut runs: Vec<(u64, BlockState)> = Vec::new();
    let mut push = |blocks: u64, state: BlockState| match runs.last_mut() {
        _ if blocks == 0 => (),
        Some((last, same)) if *same == state => *last += blocks,
        _ => runs.push((blocks, state)),
    };
    let (mut byte, mut block) = (0u64, 0u64);
    for extent in extents {
        byte = byte.saturating_add(extent.length);
        let mapped = extent.state == BlockState::Mapped;
        let end = if mapped { byte.div_ceil(block_size) } else { byte / block_size };
        if end > block {
            push(end - block, extent.state);
            block = end;
        }
        // A block that two extents share is mapped if it is not known to be free in both.
        if !mapped && block * block_size < byte {
            push(1, BlockState::Mapped);
            block += 1;
        }
        if block >= limit {
            break;
        }
    }
    if runs.is_empty() {
        runs.push((limit, BlockState::Mapped));
    }
    let mut left = limit;
    runs.retain_mut(|(blocks, _)| {
        *blocks = (*blocks).min(left);
        left -= *blocks;
        *blocks > 0
    });
    runs
}
