//! SCSI emulation of a block device: command descriptor blocks in, storage operations and answers out.
//!
//! Knows nothing of rings and nothing of Python. [`LogicalUnit::start`] looks at a CDB; what comes back is either an
//! answer ([`Next::Done`]) or an operation that somebody with storage must carry out ([`Next::Call`]), after which
//! [`LogicalUnit::resume`] is asked, until the answer is there. A command that needs several operations (FUA, WRITE
//! SAME, UNMAP with several ranges) keeps its place in its [`Task`].
//!
//! Commands are rows of one table, `opcodes`; a module beside it answers those that belong together. Standards are
//! cited by the name of the clause, which outlives the numbers of their drafts.

mod batch;
mod capacity;
mod cdb;
mod copy;
mod defects;
mod format;
mod geometry;
mod identity;
mod inquiry;
mod job;
mod lba_status;
mod log;
mod lun;
mod luns;
mod mode;
mod mode_select;
mod modify;
pub mod opcodes;
mod power;
mod ready;
mod sanitize;
pub mod sense;
mod supported;
mod task;
mod transfer;
mod unmap;
mod verify;
mod vpd;
mod write_same;

pub use copy::CopyDomain;
pub use geometry::{Capabilities, Geometry};
pub use identity::Identity;
pub use lun::{LogicalUnit, LunError};
pub use sense::Sense;
pub use task::Task;

/// A position in bytes from the start of the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteOffset(pub u64);

/// The SAM-5 status of a finished command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Status {
    Good = 0x00,
    CheckCondition = 0x02,
    ConditionMet = 0x04,
    Busy = 0x08,
    ReservationConflict = 0x18,
    TaskSetFull = 0x28,
    AcaActive = 0x30,
    TaskAborted = 0x40,
}

impl Status {
    /// The status with this code, if there is one.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x00 => Self::Good,
            0x02 => Self::CheckCondition,
            0x04 => Self::ConditionMet,
            0x08 => Self::Busy,
            0x18 => Self::ReservationConflict,
            0x28 => Self::TaskSetFull,
            0x30 => Self::AcaActive,
            0x40 => Self::TaskAborted,
            _ => return None,
        })
    }
}

/// The command's own data buffer: Data-In or Data-Out, as long as the fabric announced (which may differ from what
/// the CDB says).
pub trait DataBuffer {
    /// Bytes of the buffer.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies bytes from `offset` out of the buffer; the caller stays inside [`DataBuffer::len`].
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies bytes into the buffer at `offset`; the caller stays inside [`DataBuffer::len`].
    fn write(&self, offset: usize, from: &[u8]);
}

/// What a handler is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verb {
    /// Fill the buffer from the medium.
    Read,
    /// Store the buffer on the medium.
    Write,
    /// Make every write that returned before durable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range reads as zeroes from now on.
    WriteZeroes,
    /// Tell which parts of the range have storage: [`StepResult::Extents`].
    Extents,
}

/// Where the bytes of an operation are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepBuffer {
    /// The operation has no data.
    None,
    /// `length` bytes (the step's) of the command's own buffer, from this position.
    Command(usize),
    /// Bytes that the emulation made, to be written (exactly the step's length).
    Owned(Vec<u8>),
    /// The operation reads into memory of its own; [`LogicalUnit::resume`] gets the bytes.
    Scratch,
}

/// What the medium has for a block, with the codes of GET LBA STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BlockState {
    /// Storage with data.
    Mapped = 0,
    /// No storage.
    Deallocated = 1,
    /// Storage that is reserved, without data.
    Anchored = 2,
}

impl BlockState {
    /// The state of this code.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Mapped,
            1 => Self::Deallocated,
            2 => Self::Anchored,
            _ => return None,
        })
    }
}

/// Bytes in one state; the next ones follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediumExtent {
    /// How many.
    pub length: u64,
    /// Their state.
    pub state: BlockState,
}

/// What a step brought, beside success.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum StepResult {
    /// Nothing.
    #[default]
    None,
    /// The bytes that were read with [`StepBuffer::Scratch`], exactly the step's length.
    Bytes(Vec<u8>),
    /// The answer to [`Verb::Extents`], from the start of the step; it may end early.
    Extents(Vec<MediumExtent>),
}

/// One operation for the handler. In range, aligned to blocks and allowed: the emulation has checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What to do.
    pub verb: Verb,
    /// Where; 0 for [`Verb::Flush`].
    pub offset: ByteOffset,
    /// How many bytes; 0 for [`Verb::Flush`].
    pub length: u64,
    /// The data.
    pub buffer: StepBuffer,
    /// [`Verb::Write`]: return only when the data is durable. Set only if [`Capabilities::native_fua`].
    pub fua: bool,
    /// The NAA designator of the unit whose handler is meant, if this is a piece of a copy: that unit may be the command's
    /// own or another one. Nothing is held for a copy beforehand: the piece enters among the commands of its unit.
    pub unit: Option<[u8; 16]>,
}

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// The status.
    pub status: Status,
    /// Present exactly with [`Status::CheckCondition`].
    pub sense: Option<Sense>,
    /// How many bytes of the command's buffer are valid Data-In: the rest never reaches the initiator. 0 for
    /// commands without Data-In.
    pub data_in: usize,
}

impl Reply {
    /// GOOD with `data_in` bytes of Data-In.
    #[must_use]
    pub const fn good(data_in: usize) -> Self {
        Self { status: Status::Good, sense: None, data_in }
    }

    /// CHECK CONDITION with `sense`, no data.
    #[must_use]
    pub const fn check(sense: Sense) -> Self {
        Self { status: Status::CheckCondition, sense: Some(sense), data_in: 0 }
    }

    /// GOOD with as much of `data` as the allocation length and the buffer have room for.
    fn data(buffer: &dyn DataBuffer, allocation_length: u32, data: &[u8]) -> Next {
        let room = usize::try_from(allocation_length).unwrap_or(usize::MAX).min(buffer.len());
        let data = &data[..data.len().min(room)];
        buffer.write(0, data);
        Next::Done(Self::good(data.len()))
    }

    /// A status without sense or data.
    #[must_use]
    pub const fn status(status: Status) -> Self {
        Self { status, sense: None, data_in: 0 }
    }
}

/// What a command touches from its first step to its last, in bytes: all that it reads, writes or discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The first byte.
    pub first: u64,
    /// The byte behind the last one.
    pub end: u64,
    /// No other command may touch any of it meanwhile.
    pub exclusive: bool,
}

impl Reach {
    const NOTHING: Self = Self { first: 0, end: 0, exclusive: false };

    const fn shared(first: u64, end: u64) -> Self {
        Self { first, end, exclusive: false }
    }

    const fn exclusive(first: u64, end: u64) -> Self {
        Self { first, end, exclusive: true }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.first >= self.end
    }

    /// Whether the two must not run at the same time.
    #[must_use]
    pub const fn excludes(&self, other: &Self) -> bool {
        let first = if self.first > other.first { self.first } else { other.first };
        let end = if self.end < other.end { self.end } else { other.end };
        (self.exclusive || other.exclusive) && first < end
    }
}

/// What happens next to a command.
#[derive(Debug)]
pub enum Next {
    /// It is finished.
    Done(Reply),
    /// The handler is needed; keep the task for [`LogicalUnit::resume`].
    Call(Step, Task),
    /// The same, but the command is answered now, with GOOD: the task goes on without it (IMMED). None of its steps
    /// has to do with the command's buffer, and how it ends is known by the state of the unit.
    Early(Step, Task),
}
