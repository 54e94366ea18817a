//! READ CAPACITY.

use super::cdb::Cdb;
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Reply};

/// READ CAPACITY(10): a last LBA above 32 bits is FFFFFFFFh, which sends the initiator to READ CAPACITY(16).
pub(super) fn read_capacity_10(lu: &LogicalUnit, _cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let last = u32::try_from(lu.blocks() - 1).unwrap_or(u32::MAX);
    let mut data = [0; 8];
    data[..4].copy_from_slice(&last.to_be_bytes());
    data[4..].copy_from_slice(&lu.geometry().block_size.to_be_bytes());
    Ok(Reply::data(buffer, u32::MAX, &data))
}

/// READ CAPACITY(16).
pub(super) fn read_capacity_16(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const LBPME: u8 = 0x80;
    const LBPRZ: u8 = 0x40;
    let mut data = [0; 32];
    data[..8].copy_from_slice(&(lu.blocks() - 1).to_be_bytes());
    data[8..12].copy_from_slice(&lu.geometry().block_size.to_be_bytes());
    data[13] = lu.geometry().physical_exponent();
    if lu.capabilities().discard {
        data[14] |= LBPME;
    }
    if lu.capabilities().discard_zeroes {
        data[14] |= LBPRZ;
    }
    Ok(Reply::data(buffer, cdb.u32(10), &data))
}
