//! UNMAP.

use super::batch::Batch;
use super::cdb::Cdb;
use super::opcodes::Outcome;
use super::transfer::Extent;
use super::{DataBuffer, LogicalUnit, Next, Reply, Sense};

const HEADER: usize = 8;
const DESCRIPTOR: usize = 16;
/// Where NUMBER OF LOGICAL BLOCKS is in a descriptor, after the LBA.
const NUMBER: usize = 8;

/// UNMAP. Every range is checked before the first one is touched. ANCHOR is a reserved bit here (ANC_SUP is 0).
pub(super) fn unmap(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let length = usize::from(cdb.u16(7));
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    if length < HEADER || length > buffer.len() {
        return Err(Sense::PARAMETER_LIST_LENGTH_ERROR.at_cdb(7, 7));
    }
    // A copy: what is checked is what is done, whatever becomes of the buffer meanwhile.
    let mut list = vec![0; length];
    buffer.read(0, &mut list);
    let extents = extents(lu, &list)?;
    let mut pieces = Vec::with_capacity(extents.len());
    for Extent { first, blocks } in extents {
        lu.plan_discard(&mut pieces, first, first + blocks);
    }
    Ok(if pieces.is_empty() { Next::Done(Reply::good(0)) } else { Batch::start(lu, pieces, Vec::new()) })
}

/// The ranges of an UNMAP parameter list (SBC-4, UNMAP parameter list), all of them valid.
fn extents(lu: &LogicalUnit, list: &[u8]) -> Result<Vec<Extent>, Sense> {
    let invalid = |at: usize| Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at as u16);
    let data_length = 2 + usize::from(u16::from_be_bytes([list[0], list[1]]));
    let descriptors_length = usize::from(u16::from_be_bytes([list[2], list[3]]));
    let body =
        list[HEADER..].get(..descriptors_length).ok_or(Sense::PARAMETER_LIST_LENGTH_ERROR.at_cdb(7, 7))?;
    if data_length < HEADER + descriptors_length {
        return Err(invalid(0));
    }
    // An incomplete descriptor at the end is ignored, as SBC-4 says.
    let (descriptors, _) = body.as_chunks::<DESCRIPTOR>();
    if descriptors.len() > lu.geometry().max_discard_descriptors as usize {
        return Err(invalid(2));
    }
    let capacity = lu.blocks();
    let mut allowance = u64::from(lu.geometry().max_discard_blocks);
    let mut extents = Vec::with_capacity(descriptors.len());
    for (index, descriptor) in descriptors.iter().enumerate() {
        let at = HEADER + index * DESCRIPTOR;
        let (lba, rest) = descriptor.split_at(NUMBER);
        let first = lba.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
        let blocks = rest[..4].iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
        if capacity.checked_sub(first).is_none_or(|room| blocks > room) {
            return Err(Sense::LBA_OUT_OF_RANGE.at_parameter(at as u16));
        }
        allowance = allowance.checked_sub(blocks).ok_or(invalid(at + NUMBER))?;
        extents.push(Extent { first, blocks });
    }
    Ok(extents)
}
