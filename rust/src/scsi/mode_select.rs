//! MODE SELECT.

use super::cdb::{Cdb, invalid_field};
use super::mode::{PAGES, Page, Values, long_block_descriptor, short_block_descriptor};
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Next, Reply, Sense};

/// Where things are in the two headers.
struct Header {
    length: usize,
    medium_type: usize,
    /// LONGLBA, where there is one.
    flags: Option<usize>,
    descriptor_length: usize,
}

const SIX: Header = Header { length: 4, medium_type: 1, flags: None, descriptor_length: 3 };
const TEN: Header = Header { length: 8, medium_type: 2, flags: Some(4), descriptor_length: 7 };

/// MODE SELECT(6).
pub(super) fn mode_select_6(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    mode_select(lu, cdb, buffer, &SIX, cdb.byte(4).into(), 4)
}

/// MODE SELECT(10).
pub(super) fn mode_select_10(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    mode_select(lu, cdb, buffer, &TEN, cdb.u16(7).into(), 7)
}

fn mode_select(
    lu: &LogicalUnit,
    cdb: Cdb<'_>,
    buffer: &dyn DataBuffer,
    header: &Header,
    length: usize,
    length_field: u16,
) -> Outcome {
    const PF: u8 = 4;
    const SP: u8 = 0;
    if cdb.bit(1, SP) {
        return Err(invalid_field(1, SP));
    }
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    if !cdb.bit(1, PF) {
        return Err(invalid_field(1, PF));
    }
    let too_short = Sense::PARAMETER_LIST_LENGTH_ERROR.at_cdb(length_field, 7);
    if length < header.length || length > buffer.len() {
        return Err(too_short);
    }
    let mut list = vec![0; length];
    buffer.read(0, &mut list);
    let pages = block_descriptor(lu, header, &list)?.ok_or(too_short)?;
    let changes = changes(lu, &list, pages)?.ok_or(too_short)?;
    let was_cached = lu.has_write_cache();
    for (page, body) in changes {
        (page.change)(lu, body);
    }
    // What the cache holds when it is turned off has to get to the medium.
    Ok(if was_cached && !lu.has_write_cache() { Next::flush() } else { Next::Done(Reply::good(0)) })
}

fn invalid(at: usize) -> Sense {
    Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at as u16)
}

/// Checks the header and the block descriptor, by which nothing is changed, and returns where the pages start; `None`
/// if that is behind the end.
fn block_descriptor(lu: &LogicalUnit, header: &Header, list: &[u8]) -> Result<Option<usize>, Sense> {
    const LONGLBA: u8 = 0x01;
    if list[header.medium_type] != 0 {
        return Err(invalid(header.medium_type));
    }
    let long = header.flags.is_some_and(|at| list[at] & LONGLBA != 0);
    let mut own = if long { long_block_descriptor(lu) } else { short_block_descriptor(lu) };
    let length = usize::from(list[header.descriptor_length]);
    if length != 0 && length != own.len() {
        return Err(invalid(header.descriptor_length));
    }
    let Some(descriptor) = list.get(header.length..header.length + length) else { return Ok(None) };
    // No number of blocks means those that there are.
    let number = if long { 8 } else { 4 };
    if length != 0 && descriptor[..number].iter().all(|&byte| byte == 0) {
        own[..number].fill(0);
    }
    match descriptor.iter().zip(&own).position(|(sent, own)| sent != own) {
        Some(at) => Err(invalid(header.length + at)),
        None => Ok(Some(header.length + length)),
    }
}

/// A page, and what it is to become.
type Change<'a> = (&'static Page, &'a [u8]);

/// The pages from `at` on, all of them valid: what cannot be changed is as it is. `None` if one is cut off.
fn changes<'a>(lu: &LogicalUnit, list: &'a [u8], mut at: usize) -> Result<Option<Vec<Change<'a>>>, Sense> {
    const SPF: u8 = 0x40;
    let mut changes = Vec::new();
    while at < list.len() {
        let sub = list[at] & SPF != 0;
        let header = if sub { 4 } else { 2 };
        let Some(fields) = list.get(at..at + header) else { return Ok(None) };
        // The upper bit is PS, which is reserved here.
        let (code, subpage) = (fields[0] & !SPF, if sub { fields[1] } else { 0 });
        let page = PAGES
            .iter()
            .find(|page| page.code == code && page.subpage == subpage && sub == (page.subpage != 0))
            .ok_or(invalid(at))?;
        let length =
            if sub { usize::from(u16::from_be_bytes([fields[2], fields[3]])) } else { fields[1].into() };
        if length != page.length {
            return Err(invalid(at + header / 2));
        }
        let start = at + header;
        let Some(body) = list.get(start..start + length) else { return Ok(None) };
        let current = page.body(lu, Values::Current);
        let changeable = page.body(lu, Values::Changeable);
        let fixed = |index: usize| (body[index] ^ current[index]) & !changeable[index] != 0;
        if let Some(index) = (0..length).find(|&index| fixed(index)) {
            return Err(invalid(start + index));
        }
        changes.push((page, body));
        at = start + length;
    }
    Ok(Some(changes))
}
