//! START STOP UNIT.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::task::{Stage, Task};
use super::{DataBuffer, LogicalUnit, Next, Reply, Step};

/// START STOP UNIT: started and stopped are all the states there are. Other power conditions are refused, as no Power
/// Condition page announces them, and so is LOEJ (a reserved bit here), as the medium cannot be removed. IMMED allows
/// an early answer but does not ask for one.
pub(super) fn start_stop_unit(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    if cdb.byte(4) & 0xf0 != 0 {
        return Err(invalid_field(4, 7));
    }
    let start = cdb.bit(4, 0);
    let no_flush = cdb.bit(4, 2);
    if !start && lu.capabilities().flush && !no_flush {
        return Ok(Next::Call(Step::FLUSH, Task(Stage::Stop)));
    }
    lu.set_stopped(!start);
    Ok(Next::Done(Reply::good(0)))
}
