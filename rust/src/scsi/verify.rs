//! VERIFY, and WRITE AND VERIFY: reading back, and comparing.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::task::{Stage, Task};
use super::transfer::{Extent, Transfer, check_protection, flags_byte};
use super::{DataBuffer, LogicalUnit, Next, Reach, Reply, Sense, Step, StepBuffer, StepResult, Verb};

/// How much is read at once.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

/// What the medium is compared with.
#[derive(Debug)]
enum Against {
    /// With nothing: it can be read, that is all.
    Nothing,
    /// With the command's data, byte for byte.
    Data,
    /// Each block with this one.
    Block(Vec<u8>),
}

/// The bytes `at..end`, which are still to be read.
#[derive(Debug)]
pub(super) struct Verify {
    start: u64,
    at: u64,
    end: u64,
    against: Against,
}

/// BYTCHK.
fn byte_check<const N: usize>(cdb: Cdb<'_>) -> u8 {
    cdb.byte(flags_byte::<N>()) >> 1 & 3
}

/// VERIFY(10), (12), (16), (32). What the cache holds goes to the medium first: that is what is to be verified.
pub(super) fn verify<const N: usize>(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    check_protection::<N>(cdb)?;
    let extent = Extent::decode::<N>(cdb);
    extent.check::<N>(lu)?;
    let block_size = u64::from(lu.geometry().block_size);
    let length = extent.blocks * block_size;
    let (against, needed) = match byte_check::<N>(cdb) {
        0 => (Against::Nothing, 0),
        1 if extent.blocks > lu.geometry().max_transfer_blocks.into() => {
            return Err(invalid_field(Extent::length_field::<N>(), 7));
        }
        1 => (Against::Data, length),
        3 => (Against::Block(vec![0; block_size as usize]), block_size),
        _ => return Err(invalid_field(flags_byte::<N>(), 2)),
    };
    if extent.blocks == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    if needed > buffer.len() as u64 {
        return Err(Sense::INVALID_FIELD_IN_INFORMATION_UNIT);
    }
    let start = extent.first * block_size;
    let mut verify = Box::new(Verify { start, at: start, end: start + length, against });
    if let Against::Block(block) = &mut verify.against {
        buffer.read(0, block);
    }
    if lu.has_write_cache() {
        return Ok(Next::Call(Step::FLUSH, Task(Stage::Verify(verify))));
    }
    Ok(verify.read(lu))
}

/// WRITE AND VERIFY(10), (12), (16), (32). The data is made durable before it is read back, or the cache would be
/// verified.
pub(super) fn write_and_verify<const N: usize>(
    lu: &LogicalUnit,
    cdb: Cdb<'_>,
    buffer: &dyn DataBuffer,
) -> Outcome {
    let against = match byte_check::<N>(cdb) {
        0 => Against::Nothing,
        1 => Against::Data,
        _ => return Err(invalid_field(flags_byte::<N>(), 2)),
    };
    let Transfer { offset, length, .. } = Transfer::decode::<N>(lu, cdb, buffer)?;
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    let verify = Box::new(Verify { start: offset.0, at: offset.0, end: offset.0 + length as u64, against });
    let fua = lu.capabilities().native_fua;
    let stage =
        if lu.capabilities().flush && !fua { Stage::FlushAndVerify(verify) } else { Stage::Verify(verify) };
    let buffer = StepBuffer::Command(0);
    Ok(Next::Call(
        Step { verb: Verb::Write, offset, length: length as u64, buffer, fua, unit: None },
        Task(stage),
    ))
}

impl Verify {
    pub(super) const fn reach(&self) -> Reach {
        Reach::shared(self.start, self.end)
    }

    /// Compares what was read, if something was, and reads on.
    pub(super) fn advance(
        mut self: Box<Self>,
        lu: &LogicalUnit,
        buffer: &dyn DataBuffer,
        result: StepResult,
    ) -> Next {
        if let StepResult::Bytes(bytes) = result {
            if let Some(offset) = self.difference(buffer, &bytes) {
                return Next::Done(Reply::check(Sense::MISCOMPARE.with_information(offset)));
            }
            self.at += bytes.len() as u64;
        }
        if self.at == self.end { Next::Done(Reply::good(0)) } else { self.read(lu) }
    }

    fn read(self: Box<Self>, lu: &LogicalUnit) -> Next {
        // The medium may have shrunk since the command's own check.
        if self.end > lu.size() {
            return Next::Done(Reply::check(Sense::LBA_OUT_OF_RANGE));
        }
        let length = (self.end - self.at).min(CHUNK_BYTES);
        Next::Call(Step::scratch(self.at, length), Task(Stage::Verify(self)))
    }

    /// Where in the command's data the first byte is that differs from the medium.
    fn difference(&self, buffer: &dyn DataBuffer, medium: &[u8]) -> Option<u64> {
        match &self.against {
            Against::Nothing => None,
            Against::Data => {
                let at = (self.at - self.start) as usize;
                difference(buffer, at, medium).map(|offset| (at + offset) as u64)
            }
            Against::Block(block) => medium
                .chunks(block.len())
                .find_map(|read| read.iter().zip(block).position(|(read, sent)| read != sent))
                .map(|offset| offset as u64),
        }
    }
}

/// Where `bytes` differ from the buffer at `at`.
pub(super) fn difference(buffer: &dyn DataBuffer, at: usize, bytes: &[u8]) -> Option<usize> {
    let mut sent = vec![0; bytes.len()];
    buffer.read(at, &mut sent);
    if sent == bytes { None } else { sent.iter().zip(bytes).position(|(sent, read)| sent != read) }
}
