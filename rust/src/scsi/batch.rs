//! Commands that take several steps: WRITE SAME, UNMAP, FORMAT UNIT and SANITIZE.

use super::job::Running;
use super::task::{Stage, Task};
use super::{ByteOffset, LogicalUnit, Next, Reach, Reply, Sense, Step, StepBuffer, Verb};

/// How much data the emulation makes at once.
const CHUNK_BYTES: u64 = 1 << 20;
/// How much of the medium is discarded or zeroed at once while progress is to be seen.
const PROGRESS_BYTES: u64 = 1 << 30;

/// Blocks `first..end`, on which one thing is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) verb: Verb,
    pub(super) first: u64,
    pub(super) end: u64,
    /// Data is written with all its bits inverted.
    pub(super) inverted: bool,
}

impl Piece {
    pub(super) const fn new(verb: Verb, first: u64, end: u64) -> Self {
        Self { verb, first, end, inverted: false }
    }
}

/// An operation on the whole medium, for those who ask how far it is.
#[derive(Debug)]
struct Progress {
    running: Running,
    done: u64,
    total: u64,
    flushed: bool,
}

/// Pieces of work in the order in which they are done.
#[derive(Debug)]
pub(super) struct Batch {
    /// In reverse order, so that the next one is popped.
    pieces: Vec<Piece>,
    /// The block that [`Verb::Write`] repeats; empty stands for zeroes.
    pattern: Vec<u8>,
    block_size: u64,
    progress: Option<Progress>,
}

impl Batch {
    /// Begins the work; `pieces` are in order and not empty.
    pub(super) fn start(lu: &LogicalUnit, mut pieces: Vec<Piece>, pattern: Vec<u8>) -> Next {
        pieces.reverse();
        let block_size = lu.geometry().block_size.into();
        Box::new(Self { pieces, pattern, block_size, progress: None }).advance(lu)
    }

    /// Begins an operation on the whole medium; if `immediate`, the command is answered before it.
    pub(super) fn job(
        lu: &LogicalUnit,
        mut pieces: Vec<Piece>,
        pattern: Vec<u8>,
        running: Running,
        immediate: bool,
    ) -> Next {
        pieces.reverse();
        let total = pieces.iter().map(|piece| piece.end - piece.first).sum();
        let progress = Some(Progress { running, done: 0, total, flushed: false });
        let block_size = lu.geometry().block_size.into();
        match Box::new(Self { pieces, pattern, block_size, progress }).advance(lu) {
            Next::Call(step, task) if immediate => Next::Early(step, task),
            next => next,
        }
    }

    /// Whether this is a SANITIZE, which nothing but its end may end.
    pub(super) fn sanitizes(&self) -> bool {
        self.progress.as_ref().is_some_and(|progress| progress.running.sanitizes())
    }

    /// What is touched: by an operation on the whole medium also what the medium grows by; otherwise everything from the
    /// first to the last byte, of which `start..end` is the first step's.
    pub(super) fn reach(&self, start: u64, end: u64) -> Reach {
        if self.progress.is_some() {
            return Reach::exclusive(0, u64::MAX);
        }
        let hull = self.pieces.iter().fold((start, end), |(start, end), piece| {
            (start.min(piece.first * self.block_size), end.max(piece.end * self.block_size))
        });
        Reach::shared(hull.0, hull.1)
    }

    /// The next step.
    pub(super) fn advance(mut self: Box<Self>, lu: &LogicalUnit) -> Next {
        let Some(piece) = self.pieces.pop() else {
            return self.finish(lu);
        };
        // The medium may have shrunk since the command's own check.
        if piece.end > lu.blocks() {
            return Next::Done(Reply::check(Sense::LBA_OUT_OF_RANGE));
        }
        let block_size = u64::from(lu.geometry().block_size);
        let limit = match piece.verb {
            Verb::Write => CHUNK_BYTES / block_size,
            _ if self.progress.is_none() => u64::MAX,
            _ => whole_granules(lu, PROGRESS_BYTES / block_size),
        };
        let end = piece.end.min(piece.first.saturating_add(limit));
        if end < piece.end {
            self.pieces.push(Piece { first: end, ..piece });
        }
        if let Some(progress) = &mut self.progress {
            progress.running.progress(progress.done, progress.total);
            progress.done += end - piece.first;
        }
        let length = (end - piece.first) * block_size;
        let buffer = match piece.verb {
            Verb::Write => {
                StepBuffer::Owned(self.data(&piece, (end - piece.first) as usize, length as usize))
            }
            _ => StepBuffer::None,
        };
        let offset = ByteOffset(piece.first * block_size);
        Next::Call(
            Step { verb: piece.verb, offset, length, buffer, fua: false, unit: None },
            Task(Stage::Batch(self)),
        )
    }

    fn data(&self, piece: &Piece, blocks: usize, length: usize) -> Vec<u8> {
        let mut data = if self.pattern.is_empty() { vec![0; length] } else { self.pattern.repeat(blocks) };
        if piece.inverted {
            data.iter_mut().for_each(|byte| *byte = !*byte);
        }
        data
    }

    /// All pieces are done. An operation on the whole medium has reached the medium when it ends.
    fn finish(mut self: Box<Self>, lu: &LogicalUnit) -> Next {
        match self.progress.take() {
            None if lu.is_write_through() => Next::flush(),
            None => Next::Done(Reply::good(0)),
            Some(progress) if lu.capabilities().flush && !progress.flushed => {
                self.progress = Some(Progress { flushed: true, ..progress });
                Next::Call(Step::FLUSH, Task(Stage::Batch(self)))
            }
            Some(progress) => {
                progress.running.succeed();
                Next::Done(Reply::good(0))
            }
        }
    }
}

/// About so many blocks, but whole granules: the next discard begins where this one ends.
fn whole_granules(lu: &LogicalUnit, blocks: u64) -> u64 {
    let granularity = lu.geometry().discard_granularity_blocks();
    (blocks / granularity).max(1) * granularity
}

impl LogicalUnit {
    /// Adds what makes `first..end` read as zeroes without discarding it.
    pub(super) fn plan_zeroes(&self, pieces: &mut Vec<Piece>, first: u64, end: u64) {
        let verb = if self.capabilities().write_zeroes { Verb::WriteZeroes } else { Verb::Write };
        if first < end {
            pieces.push(Piece::new(verb, first, end));
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
            pieces.push(Piece::new(Verb::Discard, from, to));
        }
        if self.capabilities().discard_zeroes {
            self.plan_zeroes(pieces, to, end);
        }
    }
}
