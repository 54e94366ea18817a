//! WRITE SAME: one block, many times.

use super::batch::Batch;
use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::transfer::{Extent, check_protection, flags_byte};
use super::{DataBuffer, LogicalUnit, Sense, Verb, batch};

/// WRITE SAME(10), (16), (32). Blocks of zeroes become [`Verb::WriteZeroes`], or [`Verb::Discard`] if UNMAP is set (which is
/// only there if discarded blocks read as zeroes); other blocks are written with UNMAP set, too, as SBC-4 asks:
/// whatever is done, reading gives the block that was sent.
pub(super) fn write_same<const N: usize>(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let flags = flags_byte::<N>();
    let unmap = cdb.bit(flags, 3);
    let no_data_out = N != 10 && cdb.bit(flags, 0);
    check_protection::<N>(cdb)?;
    let extent = Extent::decode::<N>(cdb);
    extent.check::<N>(lu)?;
    // 0 blocks mean "up to the end", which Block Limits declines with WSNZ.
    if extent.blocks == 0 || extent.blocks > lu.geometry().max_write_same_blocks {
        return Err(invalid_field(Extent::length_field::<N>(), 7));
    }
    let pattern = if no_data_out { Vec::new() } else { pattern(lu, buffer)? };
    let Extent { first, blocks } = extent;
    let end = first + blocks;
    let mut pieces = Vec::new();
    if !pattern.is_empty() {
        pieces.push(batch::Piece::new(Verb::Write, first, end));
    } else if unmap {
        lu.plan_discard(&mut pieces, first, end);
    } else {
        lu.plan_zeroes(&mut pieces, first, end);
    }
    Ok(Batch::start(lu, pieces, pattern))
}

/// The block that was sent; empty if it is all zeroes. Exactly one block: what else an initiator could mean by more or
/// less data is unknown.
fn pattern(lu: &LogicalUnit, buffer: &dyn DataBuffer) -> Result<Vec<u8>, Sense> {
    let mut block = vec![0; lu.geometry().block_size as usize];
    if buffer.len() != block.len() {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    buffer.read(0, &mut block);
    if block.iter().all(|&byte| byte == 0) {
        block.clear();
    }
    Ok(block)
}
