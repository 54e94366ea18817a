//! TEST UNIT READY and REQUEST SENSE.

use super::cdb::Cdb;
use super::opcodes::Outcome;
use super::sense::SenseFormat;
use super::{DataBuffer, LogicalUnit, Next, Reply, Sense};

/// TEST UNIT READY: the table has done all the tests.
pub(super) fn test_unit_ready(_lu: &LogicalUnit, _cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    Ok(Next::Done(Reply::good(0)))
}

/// REQUEST SENSE: GOOD with the unit's condition as data. Sense of earlier commands was sent with their status.
pub(super) fn request_sense(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let sense = if let Some(sense) = lu.take_attention() {
        sense
    } else if let Some(sense) = lu.job().condition().or_else(|| lu.absence()) {
        sense
    } else if lu.is_stopped() {
        Sense::LOGICAL_UNIT_NOT_READY_INITIALIZING_COMMAND_REQUIRED
    } else {
        Sense::NO_SENSE
    };
    let format = if cdb.bit(1, 0) { SenseFormat::Descriptor } else { SenseFormat::Fixed };
    let (bytes, length) = sense.encode(format);
    Ok(Reply::data(buffer, cdb.byte(4).into(), &bytes[..length]))
}
