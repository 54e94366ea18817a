//! A command that takes several steps: WRITE SAME and UNMAP.

use super::task::{Stage, Task};
use super::{ByteOffset, LogicalUnit, Next, Reply, Sense, Step, StepBuffer, Verb};

/// How much data the emulation makes at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// Blocks `first..end`, on which one thing is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) verb: Verb,
    pub(super) first: u64,
    pub(super) end: u64,
}

/// Pieces of work in the order in which they are done.
#[derive(Debug)]
pub(super) struct Batch {
    /// In reverse order, so that the next one is popped.
    pieces: Vec<Piece>,
    /// The block that [`Verb::Write`] repeats; empty stands for zeroes.
    pattern: Vec<u8>,
}

impl Batch {
    /// Begins the work; `pieces` are in order and not empty.
    pub(super) fn start(lu: &LogicalUnit, mut pieces: Vec<Piece>, pattern: Vec<u8>) -> Next {
        pieces.reverse();
        Box::new(Self { pieces, pattern }).advance(lu)
    }

    /// The next step.
    pub(super) fn advance(mut self: Box<Self>, lu: &LogicalUnit) -> Next {
        let Some(piece) = self.pieces.pop() else {
            return if lu.is_write_through() { Next::flush() } else { Next::Done(Reply::good(0)) };
        };
        // The medium may have shrunk since the command's own check.
        if piece.end > lu.blocks() {
            return Next::Done(Reply::check(Sense::LBA_OUT_OF_RANGE));
        }
        let block_size = u64::from(lu.geometry().block_size);
        let mut end = piece.end;
        if piece.verb == Verb::Write {
            end = end.min(piece.first + CHUNK_BYTES / block_size);
            if end < piece.end {
                self.pieces.push(Piece { first: end, ..piece });
            }
        }
        let length = (end - piece.first) * block_size;
        let buffer = match piece.verb {
            Verb::Write => StepBuffer::Owned(self.data((end - piece.first) as usize, length as usize)),
            _ => StepBuffer::None,
        };
        let offset = ByteOffset(piece.first * block_size);
        Next::Call(Step { verb: piece.verb, offset, length, buffer, fua: false }, Task(Stage::Batch(self)))
    }

    fn data(&self, blocks: usize, length: usize) -> Vec<u8> {
        if self.pattern.is_empty() { vec![0; length] } else { self.pattern.repeat(blocks) }
    }
}

impl LogicalUnit {
    /// Adds what makes `first..end` read as zeroes without discarding it.
    pub(super) fn plan_zeroes(&self, pieces: &mut Vec<Piece>, first: u64, end: u64) {
        let verb = if self.capabilities().write_zeroes { Verb::WriteZeroes } else { Verb::Write };
        if first < end {
            pieces.push(Piece { verb, first, end });
        }
    }

    /// Adds what discards `first..end`: whole granules only. If discarded blocks are to read as zeroes, the parts of
    /// granules at both ends are zeroed, so that the whole range does; else they keep their data.
    pub(super) fn plan_discard(&self, pieces: &mut Vec<Piece>, first: u64, end: u64) {
        let granularity = self.geometry().discard_granularity_blocks();
        let alignment = self.geometry().discard_alignment_blocks();
        let offset = |lba: u64| (lba + granularity - alignment) % granularity;
        let from = match offset(first) {
            0 => first,
            over => first + (granularity - over),
        };
        // The last granule of the medium may be a short one.
        let to = if end == self.blocks() { end } else { end.saturating_sub(offset(end)) };
        let (from, to) = if from < to { (from, to) } else { (end, end) };
        if self.capabilities().discard_zeroes {
            self.plan_zeroes(pieces, first, from);
        }
        if from < to {
            pieces.push(Piece { verb: Verb::Discard, first: from, end: to });
        }
        if self.capabilities().discard_zeroes {
            self.plan_zeroes(pieces, to, end);
        }
    }
}
