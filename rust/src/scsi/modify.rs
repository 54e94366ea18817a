//! Commands that read before they write: COMPARE AND WRITE and ORWRITE.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::task::{Stage, Task};
use super::transfer::{Durability, Extent, Transfer, check_protection, force_unit_access};
use super::verify::{CHUNK_BYTES, difference};
use super::{
    ByteOffset, DataBuffer, LogicalUnit, Next, Reach, Reply, Sense, Step, StepBuffer, StepResult, Verb,
};

/// A COMPARE AND WRITE whose blocks are being read.
#[derive(Debug)]
pub(super) struct Compare {
    offset: u64,
    length: usize,
    durability: Durability,
}

/// COMPARE AND WRITE: the first half of the data is compared, the second one is written. The data has to be exactly
/// twice the blocks: what an initiator means by anything else is unknown.
pub(super) fn compare_and_write(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const NUMBER_OF_LOGICAL_BLOCKS: usize = 13;
    check_protection::<16>(cdb)?;
    let extent = Extent { first: cdb.u64(2), blocks: cdb.byte(NUMBER_OF_LOGICAL_BLOCKS).into() };
    extent.check::<16>(lu)?;
    if extent.blocks > lu.geometry().max_compare_blocks.into() {
        return Err(invalid_field(NUMBER_OF_LOGICAL_BLOCKS, 7));
    }
    if extent.blocks == 0 {
        // With data it was meant to be 256 blocks, which the field has no room for.
        return match buffer.len() {
            0 => Ok(Next::Done(Reply::good(0))),
            _ => Err(invalid_field(NUMBER_OF_LOGICAL_BLOCKS, 7)),
        };
    }
    let block_size = u64::from(lu.geometry().block_size);
    let length = (extent.blocks * block_size) as usize;
    if buffer.len() != 2 * length {
        return Err(Sense::INVALID_FIELD_IN_INFORMATION_UNIT);
    }
    let offset = extent.first * block_size;
    let durability = lu.durability(force_unit_access::<16>(cdb));
    let compare = Box::new(Compare { offset, length, durability });
    Ok(Next::Call(Step::scratch(offset, length as u64), Task(Stage::Compare(compare))))
}

impl Compare {
    pub(super) fn advance(&self, buffer: &dyn DataBuffer, result: StepResult) -> Next {
        let StepResult::Bytes(bytes) = result else {
            return Next::Done(Reply::check(Sense::INTERNAL_TARGET_FAILURE));
        };
        if let Some(offset) = difference(buffer, 0, &bytes) {
            return Next::Done(Reply::check(Sense::MISCOMPARE.with_information(offset as u64)));
        }
        let &Self { offset, length, durability } = self;
        durability.write(ByteOffset(offset), length as u64, StepBuffer::Command(length))
    }
}

/// An ORWRITE, done up to `at`.
#[derive(Debug)]
pub(super) struct OrWrite {
    start: u64,
    at: u64,
    end: u64,
    durability: Durability,
}

/// ORWRITE(16).
pub(super) fn orwrite(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let Transfer { offset, length, force_unit_access } = Transfer::decode::<16>(lu, cdb, buffer)?;
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    let durability = lu.durability(force_unit_access);
    let (start, end) = (offset.0, offset.0 + length as u64);
    Ok(Box::new(OrWrite { start, at: start, end, durability }).advance(lu, buffer, StepResult::None))
}

impl OrWrite {
    pub(super) const fn reach(&self) -> Reach {
        Reach::exclusive(self.start, self.end)
    }

    /// With bytes: they were read, and are written now. Without: they are written, and the next ones are read.
    pub(super) fn advance(
        mut self: Box<Self>,
        lu: &LogicalUnit,
        buffer: &dyn DataBuffer,
        result: StepResult,
    ) -> Next {
        let StepResult::Bytes(bytes) = result else {
            if self.end > lu.size() {
                return Next::Done(Reply::check(Sense::LBA_OUT_OF_RANGE));
            }
            let length = (self.end - self.at).min(CHUNK_BYTES);
            return Next::Call(Step::scratch(self.at, length), Task(Stage::OrWrite(self)));
        };
        let mut merged = vec![0; bytes.len()];
        buffer.read((self.at - self.start) as usize, &mut merged);
        merged.iter_mut().zip(&bytes).for_each(|(sent, read)| *sent |= read);
        let (offset, length) = (ByteOffset(self.at), bytes.len() as u64);
        self.at += length;
        let buffer = StepBuffer::Owned(merged);
        if self.at == self.end {
            return self.durability.write(offset, length, buffer);
        }
        let fua = self.durability == Durability::Native;
        Next::Call(
            Step { verb: Verb::Write, offset, length, buffer, fua, unit: None },
            Task(Stage::OrWrite(self)),
        )
    }
}
