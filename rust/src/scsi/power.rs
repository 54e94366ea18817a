//! START STOP UNIT and PREVENT ALLOW MEDIUM REMOVAL.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::task::{Stage, Task};
use super::{DataBuffer, LogicalUnit, Next, Reply, Sense, Step};

/// START STOP UNIT: started and stopped are all the states there are. Other power conditions are refused, as no Power
/// Condition page announces them, and so is LOEJ (a reserved bit then) where the medium cannot be removed. What is loaded
/// again is the medium that was ejected: nobody has to be told that it has changed. IMMED allows an early answer but
/// does not ask for one.
pub(super) fn start_stop_unit(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    if cdb.byte(4) & 0xf0 != 0 {
        return Err(invalid_field(4, 7));
    }
    let start = cdb.bit(4, 0);
    let eject = cdb.bit(4, 1);
    let no_flush = cdb.bit(4, 2);
    if eject && lu.is_removal_prevented() {
        return Err(Sense::MEDIUM_REMOVAL_PREVENTED.at_cdb(4, 1));
    }
    if !start && lu.capabilities().flush && !no_flush {
        return Ok(Next::Call(Step::FLUSH, Task(Stage::Stop { eject })));
    }
    lu.start_or_stop(start, eject);
    Ok(Next::Done(Reply::good(0)))
}

/// PREVENT ALLOW MEDIUM REMOVAL, of removable media. One initiator's word counts for all: which one it is the kernel
/// does not say.
pub(super) fn prevent_allow(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    match cdb.byte(4) {
        prevent @ (0 | 1) => lu.set_removal_prevented(prevent == 1),
        _ => return Err(invalid_field(4, 1)),
    }
    Ok(Next::Done(Reply::good(0)))
}

impl LogicalUnit {
    /// Starts or stops; with `eject` the medium is loaded or ejected, too.
    pub(super) fn start_or_stop(&self, start: bool, eject: bool) {
        if eject {
            self.set_ejected(!start);
        }
        // A unit without a medium is as good as stopped, but is not asked to be started.
        self.set_stopped(!start && !eject);
    }
}
