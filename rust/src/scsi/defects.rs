//! READ DEFECT DATA: there are no defects, and the lists of them can be had.

use super::cdb::Cdb;
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Reply};

/// REQ_PLIST, REQ_GLIST and DEFECT LIST FORMAT, which are answered as they are asked for.
const LISTS_AND_FORMAT: u8 = 0x1f;

/// READ DEFECT DATA(10).
pub(super) fn read_defect_data_10(_lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let data = [0, cdb.byte(2) & LISTS_AND_FORMAT, 0, 0];
    Ok(Reply::data(buffer, cdb.u16(7).into(), &data))
}

/// READ DEFECT DATA(12).
pub(super) fn read_defect_data_12(_lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let data = [0, cdb.byte(1) & LISTS_AND_FORMAT, 0, 0, 0, 0, 0, 0];
    Ok(Reply::data(buffer, cdb.u32(6), &data))
}
