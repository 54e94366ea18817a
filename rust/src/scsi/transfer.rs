//! READ, WRITE, WRITE ATOMIC, PRE-FETCH and SYNCHRONIZE CACHE.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::task::{Stage, Task};
use super::{ByteOffset, DataBuffer, LogicalUnit, Next, Reply, Sense, Step, StepBuffer, Verb};

/// Logical blocks from `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) first: u64,
    pub(super) blocks: u64,
}

impl Extent {
    /// Byte and bit where the LBA starts in a CDB of `N` bytes: the same for all commands on blocks (SBC-4).
    const fn lba_field<const N: usize>() -> (usize, u8) {
        match N {
            6 => (1, 4),
            32 => (12, 7),
            _ => (2, 7),
        }
    }

    /// Byte where the number of blocks starts.
    pub(super) const fn length_field<const N: usize>() -> usize {
        match N {
            6 => 4,
            10 => 7,
            12 => 6,
            32 => 28,
            _ => 10,
        }
    }

    /// The LBA and number of blocks of a CDB of `N` bytes: 6, 10, 12, 16 or 32.
    pub(super) fn decode<const N: usize>(cdb: Cdb<'_>) -> Self {
        let length = Self::length_field::<N>();
        match N {
            6 => Self {
                first: (cdb.u32(0) & 0x001f_ffff).into(),
                // The only commands in which 0 blocks stand for 256.
                blocks: match cdb.byte(length) {
                    0 => 256,
                    blocks => blocks.into(),
                },
            },
            10 => Self { first: cdb.u32(2).into(), blocks: cdb.u16(length).into() },
            12 => Self { first: cdb.u32(2).into(), blocks: cdb.u32(length).into() },
            32 => Self { first: cdb.u64(12), blocks: cdb.u32(length).into() },
            _ => Self { first: cdb.u64(2), blocks: cdb.u32(length).into() },
        }
    }

    /// Checks that the blocks are on the medium. The first one must be, even if there are none.
    pub(super) fn check<const N: usize>(self, lu: &LogicalUnit) -> Result<(), Sense> {
        let room = lu.blocks().saturating_sub(self.first);
        if room == 0 || self.blocks > room {
            let (byte, bit) = Self::lba_field::<N>();
            return Err(Sense::LBA_OUT_OF_RANGE.at_cdb(byte as u16, bit));
        }
        Ok(())
    }
}

/// Byte of RDPROTECT, DPO, FUA and the like, for all commands on blocks that have them.
pub(super) const fn flags_byte<const N: usize>() -> usize {
    if N == 32 { 10 } else { 1 }
}

/// Refuses RDPROTECT, WRPROTECT and VRPROTECT: the unit has no protection information. The tags that commands of 32
/// bytes expect are not looked at for the same reason.
pub(super) fn check_protection<const N: usize>(cdb: Cdb<'_>) -> Result<(), Sense> {
    let byte = flags_byte::<N>();
    if cdb.byte(byte) & 0xe0 != 0 { Err(invalid_field(byte, 7)) } else { Ok(()) }
}

/// FUA. FUA_NV is obsolete, but initiators of SBC-2 and SBC-3 set it; FUA is more than it asks for.
pub(super) fn force_unit_access<const N: usize>(cdb: Cdb<'_>) -> bool {
    N != 6 && (cdb.bit(flags_byte::<N>(), 3) || cdb.bit(flags_byte::<N>(), 1))
}

/// How a write becomes durable before its GOOD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// It need not, or is as soon as it returns.
    Later,
    /// The handler does it.
    Native,
    /// By a flush.
    Flush,
}

impl LogicalUnit {
    pub(super) fn durability(&self, force_unit_access: bool) -> Durability {
        let capabilities = self.capabilities();
        if !capabilities.flush || !(force_unit_access || self.is_write_through()) {
            Durability::Later
        } else if capabilities.native_fua {
            Durability::Native
        } else {
            Durability::Flush
        }
    }

    /// What follows the write itself. The cache may have been turned off since it began, and the flush of that was too
    /// early for its data; but whoever gets its GOOD now will not ask for another one.
    pub(super) fn finish_write(&self, durability: Durability) -> Next {
        match durability {
            Durability::Later if !self.is_write_through() => Next::Done(Reply::good(0)),
            Durability::Native => Next::Done(Reply::good(0)),
            Durability::Later | Durability::Flush => Next::flush(),
        }
    }
}

impl Durability {
    /// A write, a flush if it takes one, then GOOD.
    pub(super) fn write(self, offset: ByteOffset, length: u64, buffer: StepBuffer) -> Next {
        let fua = self == Self::Native;
        Next::Call(
            Step { verb: Verb::Write, offset, length, buffer, fua, unit: None },
            Task(Stage::Written(self)),
        )
    }
}

pub(super) struct Transfer {
    pub(super) offset: ByteOffset,
    pub(super) length: usize,
    pub(super) force_unit_access: bool,
}

impl Transfer {
    pub(super) fn decode<const N: usize>(
        lu: &LogicalUnit,
        cdb: Cdb<'_>,
        buffer: &dyn DataBuffer,
    ) -> Result<Self, Sense> {
        if N != 6 {
            check_protection::<N>(cdb)?;
        }
        let extent = Extent::decode::<N>(cdb);
        extent.check::<N>(lu)?;
        let limit = lu.geometry().max_transfer_blocks;
        Self::new(lu, buffer, extent, limit, Extent::length_field::<N>(), force_unit_access::<N>(cdb))
    }

    /// The transfer of blocks that are on the medium, `limit` at most; their number is at `length_field`.
    fn new(
        lu: &LogicalUnit,
        buffer: &dyn DataBuffer,
        extent: Extent,
        limit: u32,
        length_field: usize,
        force_unit_access: bool,
    ) -> Result<Self, Sense> {
        let too_long = || invalid_field(length_field, 7);
        if extent.blocks > limit.into() {
            return Err(too_long());
        }
        let block_size = u64::from(lu.geometry().block_size);
        let length = usize::try_from(extent.blocks * block_size).map_err(|_| too_long())?;
        if length > buffer.len() {
            return Err(Sense::INVALID_FIELD_IN_INFORMATION_UNIT);
        }
        Ok(Self { offset: ByteOffset(extent.first * block_size), length, force_unit_access })
    }
}

/// READ(6), (10), (12), (16).
pub(super) fn read<const N: usize>(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let Transfer { offset, length, force_unit_access } = Transfer::decode::<N>(lu, cdb, buffer)?;
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    lu.count_read(length);
    // SBC-4: a READ with FUA returns what is on the medium, so what the cache holds has to get there first.
    if force_unit_access && lu.has_write_cache() {
        return Ok(Next::Call(Step::FLUSH, Task(Stage::Read { offset, length })));
    }
    Ok(Next::read(offset, length))
}

/// WRITE(6), (10), (12), (16).
pub(super) fn write<const N: usize>(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let Transfer { offset, length, force_unit_access } = Transfer::decode::<N>(lu, cdb, buffer)?;
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    lu.count_write(length);
    Ok(lu.durability(force_unit_access).write(offset, length as u64, StepBuffer::Command(0)))
}

/// WRITE ATOMIC(16), without boundaries inside. The handler promises it for as many blocks as Block Limits reports.
pub(super) fn write_atomic(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const TRANSFER_LENGTH: usize = 12;
    check_protection::<16>(cdb)?;
    let extent = Extent { first: cdb.u64(2), blocks: cdb.u16(TRANSFER_LENGTH).into() };
    extent.check::<16>(lu)?;
    let limit = lu.geometry().max_atomic_write_blocks;
    let Transfer { offset, length, force_unit_access } =
        Transfer::new(lu, buffer, extent, limit, TRANSFER_LENGTH, cdb.bit(1, 3))?;
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    lu.count_write(length);
    let durability = lu.durability(force_unit_access);
    let (length, fua) = (length as u64, durability == Durability::Native);
    let stage = Stage::WrittenAtomic(durability);
    let buffer = StepBuffer::Command(0);
    Ok(Next::Call(Step { verb: Verb::Write, offset, length, buffer, fua, unit: None }, Task(stage)))
}

/// PRE-FETCH(10), (16). GOOD, and not CONDITION MET, which would say that the blocks are in the cache now: what is
/// cached is the handler's business.
pub(super) fn prefetch<const N: usize>(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    Extent::decode::<N>(cdb).check::<N>(lu)?;
    Ok(Next::Done(Reply::good(0)))
}

/// SYNCHRONIZE CACHE(10), (16). Always the whole cache: handlers flush no ranges. IMMED allows an early answer but does
/// not ask for one (SBC-4), and a late one can report failure.
pub(super) fn synchronize_cache<const N: usize>(
    lu: &LogicalUnit,
    cdb: Cdb<'_>,
    _buffer: &dyn DataBuffer,
) -> Outcome {
    Extent::decode::<N>(cdb).check::<N>(lu)?;
    Ok(if lu.capabilities().flush { Next::flush() } else { Next::Done(Reply::good(0)) })
}
