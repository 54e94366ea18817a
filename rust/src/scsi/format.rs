//! FORMAT UNIT: every block becomes zeroes, or the pattern that was sent.

use super::batch::Batch;
use super::cdb::{Cdb, invalid_field};
use super::job::Kind;
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Sense, Verb, batch};

const SHORT_HEADER: usize = 4;
const LONG_HEADER: usize = 8;

/// What a parameter list asks for.
#[derive(Debug, Default)]
struct Request {
    immediate: bool,
    pattern: Vec<u8>,
}

/// FORMAT UNIT. There are no defects and no protection information to be had; a defect list is refused, what says how
/// defects are to be treated changes nothing.
pub(super) fn format_unit(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const FMTDATA: u8 = 4;
    const LONGLIST: u8 = 5;
    if cdb.byte(1) & 0xc0 != 0 {
        return Err(invalid_field(1, 7));
    }
    let request = if cdb.bit(1, FMTDATA) {
        parameter_list(lu, buffer, if cdb.bit(1, LONGLIST) { LONG_HEADER } else { SHORT_HEADER })?
    } else {
        Request::default()
    };
    let running = lu.job().begin(Kind::Format)?;
    let mut pieces = Vec::new();
    if !request.pattern.is_empty() {
        pieces.push(batch::Piece::new(Verb::Write, 0, lu.blocks()));
    } else if lu.capabilities().discard_zeroes {
        lu.plan_discard(&mut pieces, 0, lu.blocks());
    } else {
        lu.plan_zeroes(&mut pieces, 0, lu.blocks());
    }
    Ok(Batch::job(lu, pieces, request.pattern, running, request.immediate))
}

fn parameter_list(lu: &LogicalUnit, buffer: &dyn DataBuffer, header: usize) -> Result<Request, Sense> {
    const FOV: u8 = 0x80;
    const DPRY_DCRT_STPF: u8 = 0x70;
    const IP: u8 = 0x08;
    const DSP: u8 = 0x04;
    const IMMED: u8 = 0x02;
    let invalid = |at: usize| Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at as u16));
    let mut list = vec![0; buffer.len().min(header + 4 + lu.geometry().block_size as usize)];
    buffer.read(0, &mut list);
    let Some((header, rest)) = list.split_at_checked(header) else {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
    };
    // PROTECTION FIELD USAGE; in the long header P_I_INFORMATION and PROTECTION INTERVAL EXPONENT.
    if header[0] != 0 {
        return invalid(0);
    }
    if header.len() == LONG_HEADER && header[2..4] != [0, 0] {
        return invalid(if header[2] != 0 { 2 } else { 3 });
    }
    let flags = header[1];
    if flags & FOV == 0 && flags & (DPRY_DCRT_STPF | IP) != 0 || flags & DSP != 0 {
        return invalid(1);
    }
    let defects = if header.len() == LONG_HEADER { 4..8 } else { 2..4 };
    if header[defects.clone()].iter().any(|&byte| byte != 0) {
        return invalid(defects.start);
    }
    let pattern = if flags & IP != 0 { initialization_pattern(lu, rest, header.len())? } else { Vec::new() };
    Ok(Request { immediate: flags & IMMED != 0, pattern })
}

/// The block that an initialization pattern descriptor describes; empty for zeroes.
fn initialization_pattern(lu: &LogicalUnit, descriptor: &[u8], at: usize) -> Result<Vec<u8>, Sense> {
    const SI: u8 = 0x20;
    const DEFAULT: u8 = 0;
    const REPEAT: u8 = 1;
    let invalid = |byte: usize| Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter((at + byte) as u16);
    let Some((&[modifier, kind, high, low], pattern)) = descriptor.split_first_chunk() else {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR);
    };
    // SI asks for blocks to be overwritten that were reassigned: there are none.
    if modifier & !SI != 0 {
        return Err(invalid(0));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    match kind {
        DEFAULT if length == 0 => Ok(Vec::new()),
        REPEAT if (1..=lu.geometry().block_size as usize).contains(&length) => {
            let pattern = pattern.get(..length).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR)?;
            Ok(lu.block_of(pattern))
        }
        DEFAULT | REPEAT => Err(invalid(2)),
        _ => Err(invalid(1)),
    }
}

impl LogicalUnit {
    /// A block filled with `pattern`, again and again; empty if that is all zeroes.
    pub(super) fn block_of(&self, pattern: &[u8]) -> Vec<u8> {
        if pattern.iter().all(|&byte| byte == 0) {
            return Vec::new();
        }
        pattern.iter().copied().cycle().take(self.geometry().block_size as usize).collect()
    }
}
