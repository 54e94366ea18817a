//! READ, WRITE and SYNCHRONIZE CACHE.

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
            _ => (2, 7),
        }
    }

    /// Byte where the number of blocks starts.
    pub(super) const fn length_field<const N: usize>() -> usize {
        match N {
            6 => 4,
            10 => 7,
            12 => 6,
            _ => 10,
        }
    }

    /// The LBA and number of blocks of a CDB of `N` bytes: 6, 10, 12 or 16.
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

/// Refuses RDPROTECT and WRPROTECT: the unit has no protection information.
pub(super) fn check_protection(cdb: Cdb<'_>) -> Result<(), Sense> {
    if cdb.byte(1) & 0xe0 != 0 { Err(invalid_field(1, 7)) } else { Ok(()) }
}

struct Transfer {
    offset: ByteOffset,
    length: usize,
    force_unit_access: bool,
}

impl Transfer {
    fn decode<const N: usize>(
        lu: &LogicalUnit,
        cdb: Cdb<'_>,
        buffer: &dyn DataBuffer,
    ) -> Result<Self, Sense> {
        // FUA_NV is obsolete, but initiators of SBC-2 and SBC-3 set it; FUA is more than it asks for. DPO is a hint.
        let force_unit_access = N != 6 && (cdb.bit(1, 3) || cdb.bit(1, 1));
        if N != 6 {
            check_protection(cdb)?;
        }
        let extent = Extent::decode::<N>(cdb);
        extent.check::<N>(lu)?;
        let too_long = || invalid_field(Extent::length_field::<N>(), 7);
        if extent.blocks > lu.geometry().max_transfer_blocks.into() {
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
    let durable = lu.capabilities().flush && (force_unit_access || lu.is_write_through());
    let fua = durable && lu.capabilities().native_fua;
    let stage = if durable && !fua { Stage::Flush } else { Stage::Finish { data_in: 0 } };
    let buffer = StepBuffer::Command(0);
    let step = Step { verb: Verb::Write, offset, length: length as u64, buffer, fua };
    Ok(Next::Call(step, Task(stage)))
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
