//! REPORT SUPPORTED OPERATION CODES and TASK MANAGEMENT FUNCTIONS.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::{self, Command, Outcome};
use super::{DataBuffer, LogicalUnit, Reply, Sense};

/// A command timeouts descriptor that indicates no times: they are the storage's, which is not known here.
const TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// REPORT SUPPORTED OPERATION CODES.
pub(super) fn operation_codes(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let timeouts: &[u8] = if cdb.bit(2, 7) { &TIMEOUTS } else { &[] };
    let options = cdb.byte(2) & 0x07;
    let data = match options {
        0 => list(lu, timeouts),
        1..=3 => one(lu, wanted(lu, cdb, options)?, timeouts),
        _ => return Err(invalid_field(2, 2)),
    };
    Ok(Reply::data(buffer, cdb.u32(6), &data))
}

/// All commands.
fn list(lu: &LogicalUnit, timeouts: &[u8]) -> Vec<u8> {
    const CTDP: u8 = 0x02;
    const SERVACTV: u8 = 0x01;
    let mut data = vec![0; 4];
    for command in opcodes::all(lu) {
        let [high, low] = command.service_action().unwrap_or(0).to_be_bytes();
        let mut flags = if command.service_action().is_some() { SERVACTV } else { 0 };
        if !timeouts.is_empty() {
            flags |= CTDP;
        }
        data.extend([command.opcode(), 0, high, low, 0, flags]);
        data.extend((command.cdb_length() as u16).to_be_bytes());
        data.extend(timeouts);
    }
    let length = data.len() as u32 - 4;
    data[..4].copy_from_slice(&length.to_be_bytes());
    data
}

/// The command that REQUESTED OPERATION CODE and SERVICE ACTION name, if the unit has it. Option 1 is for operation
/// codes without service actions, option 2 for those with, option 3 for both.
fn wanted(lu: &LogicalUnit, cdb: Cdb<'_>, options: u8) -> Result<Option<&'static Command>, Sense> {
    let service_action = cdb.u16(4);
    let mut rows = opcodes::with_opcode(cdb.byte(3), lu);
    let Some(has_actions) = rows.clone().next().map(|row| row.service_action().is_some()) else {
        return Ok(None);
    };
    match options {
        1 if has_actions => return Err(invalid_field(2, 2)),
        2 if !has_actions => return Err(invalid_field(2, 2)),
        1 => return Ok(rows.next()),
        _ => (),
    }
    Ok(rows.find(|row| row.service_action().unwrap_or(0) == service_action))
}

/// One command.
fn one(lu: &LogicalUnit, command: Option<&Command>, timeouts: &[u8]) -> Vec<u8> {
    const NOT_SUPPORTED: u8 = 0x01;
    const SUPPORTED: u8 = 0x03;
    const CTDP: u8 = 0x80;
    let Some(command) = command else {
        return vec![0, NOT_SUPPORTED, 0, 0];
    };
    let flags = if timeouts.is_empty() { SUPPORTED } else { SUPPORTED | CTDP };
    let mut data = vec![0, flags];
    data.extend((command.cdb_length() as u16).to_be_bytes());
    data.extend((0..command.cdb_length()).map(|byte| command.usage(byte, lu)));
    data.extend(timeouts);
    data
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS: ABORT TASK and LOGICAL UNIT RESET, which the target core carries out.
pub(super) fn task_management_functions(_lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const ATS: u8 = 0x80;
    const LURS: u8 = 0x08;
    // REPD asks for the extended data: timeouts, all of them unknown.
    let mut data = [ATS | LURS, 0, 0, 0x0c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let length = if cdb.bit(2, 7) {
        data.len()
    } else {
        data[3] = 0;
        4
    };
    Ok(Reply::data(buffer, cdb.u32(6), &data[..length]))
}
