//! SANITIZE: nothing that was on the medium can be read any more.

use super::batch::{Batch, Piece};
use super::cdb::{Cdb, invalid_field};
use super::job::{Kind, Running};
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Next, Reply, Sense, Verb};

const IMMED: u8 = 7;
const AUSE: u8 = 5;
const HEADER: usize = 4;

fn begin(lu: &LogicalUnit, cdb: Cdb<'_>) -> Result<Running, Sense> {
    lu.job().begin(Kind::Sanitize { may_exit: cdb.bit(1, AUSE) })
}

/// Where the length of a parameter list is that must not be there.
fn check_no_list(cdb: Cdb<'_>) -> Result<(), Sense> {
    if cdb.u16(7) != 0 { Err(invalid_field(7, 7)) } else { Ok(()) }
}

/// SANITIZE, OVERWRITE: the pattern, as often as asked for, inverted every other time if asked for.
pub(super) fn overwrite(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const INVERT: u8 = 0x80;
    const TEST: u8 = 0x60;
    const COUNT: u8 = 0x1f;
    let block_size = lu.geometry().block_size as usize;
    let length = usize::from(cdb.u16(7));
    if length <= HEADER || length > block_size + HEADER {
        return Err(invalid_field(7, 7));
    }
    if buffer.len() < length {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.at_cdb(7, 7));
    }
    let mut list = vec![0; length];
    buffer.read(0, &mut list);
    let invalid = |at: u16| Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at));
    if list[0] & TEST != 0 || list[0] & COUNT == 0 {
        return invalid(0);
    }
    if list[1] != 0 {
        return invalid(1);
    }
    let pattern_length = usize::from(u16::from_be_bytes([list[2], list[3]]));
    if pattern_length == 0 || pattern_length != length - HEADER {
        return invalid(2);
    }
    // Zeroes, too, are written as data: what a handler does for write_zeroes may leave the old bytes where they are.
    let pattern = list[HEADER..].iter().copied().cycle().take(block_size).collect();
    let running = begin(lu, cdb)?;
    let passes = list[0] & COUNT;
    let pass = |number: u8| Piece {
        inverted: list[0] & INVERT != 0 && number % 2 == 1,
        ..Piece::new(Verb::Write, 0, lu.blocks())
    };
    Ok(Batch::job(lu, (0..passes).map(pass).collect(), pattern, running, cdb.bit(1, IMMED)))
}

/// SANITIZE, BLOCK ERASE: everything is discarded; where that does not promise zeroes, after having been zeroed.
pub(super) fn block_erase(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    check_no_list(cdb)?;
    let running = begin(lu, cdb)?;
    let mut pieces = Vec::new();
    if !lu.capabilities().discard_zeroes {
        lu.plan_zeroes(&mut pieces, 0, lu.blocks());
    }
    lu.plan_discard(&mut pieces, 0, lu.blocks());
    Ok(Batch::job(lu, pieces, Vec::new(), running, cdb.bit(1, IMMED)))
}

/// SANITIZE, EXIT FAILURE MODE.
pub(super) fn exit_failure_mode(lu: &LogicalUnit, cdb: Cdb<'_>, _buffer: &dyn DataBuffer) -> Outcome {
    check_no_list(cdb)?;
    if let Some(sense) = lu.job().running() {
        return Err(sense);
    }
    if lu.job().exit_failure_mode() { Ok(Next::Done(Reply::good(0))) } else { Err(invalid_field(1, 4)) }
}
