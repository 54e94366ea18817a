//! The place of a command that waits for the handler.

use super::batch::Batch;
use super::copy::ExtendedCopy;
use super::lba_status::LbaStatus;
use super::modify::{Compare, OrWrite};
use super::transfer::Durability;
use super::verify::Verify;
use super::{ByteOffset, DataBuffer, LogicalUnit, Next, Reach, Reply, Step, StepBuffer, StepResult, Verb};

/// Where a command is between two steps. Made by [`LogicalUnit::start`], given back to [`LogicalUnit::resume`] when
/// the step has succeeded, or to [`LogicalUnit::fail`]; dropped, the command has been aborted.
#[derive(Debug)]
#[must_use]
pub struct Task(pub(super) Stage);

/// What is left to do. Plain reads and writes need no allocation.
#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing: GOOD, with so many bytes of Data-In.
    Finish { data_in: usize },
    /// The data is written, and becomes durable as it was to when the write began.
    Written(Durability),
    /// The cache is flushed, now the medium is read.
    Read { offset: ByteOffset, length: usize },
    /// More of a WRITE SAME, UNMAP, FORMAT UNIT or SANITIZE.
    Batch(Box<Batch>),
    /// The cache is flushed, or some blocks were read: now the next ones are.
    Verify(Box<Verify>),
    /// The data is written and must get to the medium, where it is verified.
    FlushAndVerify(Box<Verify>),
    /// The same of a WRITE ATOMIC.
    WrittenAtomic(Durability),
    /// The blocks of a COMPARE AND WRITE were read.
    Compare(Box<Compare>),
    /// Some blocks of an ORWRITE were read, or written.
    OrWrite(Box<OrWrite>),
    /// The handler has told its extents.
    LbaStatus(Box<LbaStatus>),
    /// The cache is flushed, now the unit stops, and ejects its medium if so asked.
    Stop { eject: bool },
    /// A piece of an EXTENDED COPY is read or written.
    Copy(Box<ExtendedCopy>),
}

impl Task {
    /// Whether the command goes on when it is aborted.
    #[must_use]
    pub fn outlives_abort(&self) -> bool {
        matches!(&self.0, Stage::Batch(batch) if batch.sanitizes())
    }

    /// What the whole command touches, known with its first step.
    #[must_use]
    pub fn reach(&self, first: &Step) -> Reach {
        let (start, end) = (first.offset.0, first.offset.0 + first.length);
        match &self.0 {
            Stage::Finish { .. } | Stage::Written(_) => Reach::shared(start, end),
            Stage::Read { offset, length } => Reach::shared(offset.0, offset.0 + *length as u64),
            Stage::Batch(batch) => batch.reach(start, end),
            Stage::Verify(verify) | Stage::FlushAndVerify(verify) => verify.reach(),
            Stage::WrittenAtomic(_) | Stage::Compare(_) => Reach::exclusive(start, end),
            Stage::OrWrite(orwrite) => orwrite.reach(),
            Stage::LbaStatus(_) | Stage::Stop { .. } | Stage::Copy(_) => Reach::NOTHING,
        }
    }
}

impl Step {
    /// Makes everything durable.
    pub(super) const FLUSH: Self = Self {
        verb: Verb::Flush,
        offset: ByteOffset(0),
        length: 0,
        buffer: StepBuffer::None,
        fua: false,
        unit: None,
    };

    /// Reads bytes for the emulation itself.
    pub(super) fn scratch(offset: u64, length: u64) -> Self {
        let offset = ByteOffset(offset);
        Self { verb: Verb::Read, offset, length, buffer: StepBuffer::Scratch, fua: false, unit: None }
    }
}

impl Next {
    /// A flush, then GOOD.
    pub(super) const fn flush() -> Self {
        Self::Call(Step::FLUSH, Task(Stage::Finish { data_in: 0 }))
    }

    /// A read into the command's buffer, then GOOD.
    pub(super) fn read(offset: ByteOffset, length: usize) -> Self {
        let buffer = StepBuffer::Command(0);
        let step = Step { verb: Verb::Read, offset, length: length as u64, buffer, fua: false, unit: None };
        Self::Call(step, Task(Stage::Finish { data_in: length }))
    }
}

impl LogicalUnit {
    /// Goes on with a command whose step succeeded and brought `result`.
    pub fn resume(&self, task: Task, buffer: &dyn DataBuffer, result: StepResult) -> Next {
        match task.0 {
            Stage::Finish { data_in } => Next::Done(Reply::good(data_in)),
            Stage::Written(durability) | Stage::WrittenAtomic(durability) => self.finish_write(durability),
            Stage::Read { offset, length } => Next::read(offset, length),
            Stage::Batch(batch) => batch.advance(self),
            Stage::Verify(verify) => verify.advance(self, buffer, result),
            Stage::FlushAndVerify(verify) => Next::Call(Step::FLUSH, Task(Stage::Verify(verify))),
            Stage::Compare(compare) => compare.advance(buffer, result),
            Stage::OrWrite(orwrite) => orwrite.advance(self, buffer, result),
            Stage::LbaStatus(status) => status.advance(self, buffer, result),
            Stage::Stop { eject } => {
                self.start_or_stop(false, eject);
                Next::Done(Reply::good(0))
            }
            Stage::Copy(copy) => copy.advance(self, result),
        }
    }

    /// The answer to a command whose step has failed with `reply`.
    #[must_use]
    pub fn fail(&self, task: Task, reply: Reply) -> Reply {
        match task.0 {
            Stage::Copy(copy) => copy.failed(reply),
            _ => reply,
        }
    }
}
