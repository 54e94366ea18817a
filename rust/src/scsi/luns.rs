//! REPORT LUNS.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Reply};

/// REPORT LUNS of a target that has this unit alone, as LUN 0. A fabric with several units answers for itself before
/// it asks any of them, as the kernel's target core does.
pub(super) fn report_luns(_lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const LUN_BYTES: u8 = 8;
    let luns = match cdb.byte(2) {
        0x00 | 0x02 => 1,
        // Well known logical units only: there are none.
        0x01 => 0,
        _ => return Err(invalid_field(2, 7)),
    };
    let mut list = [0; 16];
    list[3] = luns * LUN_BYTES;
    let length = 8 + usize::from(luns * LUN_BYTES);
    Ok(Reply::data(buffer, cdb.u32(6), &list[..length]))
}
