//! Mode pages, and MODE SENSE. Changing them is in `mode_select`.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Reply, Sense};

/// Which values of a page (the PC field).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Values {
    Current,
    /// A one for each bit that MODE SELECT may change.
    Changeable,
    Default,
}

pub(super) struct Page {
    pub(super) code: u8,
    pub(super) subpage: u8,
    /// Bytes after the page's header.
    pub(super) length: usize,
    /// Writes what is not zero into those bytes.
    fill: fn(&LogicalUnit, Values, &mut [u8]),
    /// Takes over what of those bytes is changeable.
    pub(super) change: fn(&LogicalUnit, &[u8]),
}

/// In ascending order, which is the order of the answer when all are asked for.
pub(super) const PAGES: [Page; 5] = [
    Page { code: 0x01, subpage: 0, length: 0x0a, fill: nothing, change: fixed },
    Page { code: 0x08, subpage: 0, length: 0x12, fill: caching, change: change_caching },
    Page { code: 0x0a, subpage: 0, length: 0x0a, fill: control, change: change_control },
    Page { code: 0x0a, subpage: 0x01, length: 0x1c, fill: nothing, change: fixed },
    Page { code: 0x1c, subpage: 0, length: 0x0a, fill: informational_exceptions, change: fixed },
];

const WCE: u8 = 0x04;
const D_SENSE: u8 = 0x04;
const SWP: u8 = 0x08;

const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// Read-Write Error Recovery: errors come from the handler, nothing is recovered or reported here. Control Extension:
/// no timestamp, no implicit ALUA, no limit to sense data.
fn nothing(_lu: &LogicalUnit, _values: Values, _body: &mut [u8]) {}

fn fixed(_lu: &LogicalUnit, _body: &[u8]) {}

/// There are no exceptions to be told.
fn informational_exceptions(_lu: &LogicalUnit, values: Values, body: &mut [u8]) {
    const DEXCPT: u8 = 0x08;
    if values != Values::Changeable {
        body[0] = DEXCPT;
    }
}

fn caching(lu: &LogicalUnit, values: Values, body: &mut [u8]) {
    let enabled = match values {
        Values::Current => lu.has_write_cache(),
        Values::Changeable | Values::Default => lu.capabilities().flush,
    };
    if enabled {
        body[0] |= WCE;
    }
}

fn change_caching(lu: &LogicalUnit, body: &[u8]) {
    lu.set_write_cache(body[0] & WCE != 0);
}

fn change_control(lu: &LogicalUnit, body: &[u8]) {
    lu.set_descriptor_sense(body[0] & D_SENSE != 0);
    lu.set_software_write_protect(body[2] & SWP != 0);
}

fn control(lu: &LogicalUnit, values: Values, body: &mut [u8]) {
    const GLTSD: u8 = 0x02;
    const UNRESTRICTED_REORDERING: u8 = 0x10;
    const TAS: u8 = 0x40;
    if values == Values::Changeable {
        body[0] = D_SENSE;
        body[2] = SWP;
        return;
    }
    body[0] = GLTSD;
    if values == Values::Current && lu.has_descriptor_sense() {
        body[0] |= D_SENSE;
    }
    if values == Values::Current && lu.has_software_write_protect() {
        body[2] |= SWP;
    }
    body[1] = UNRESTRICTED_REORDERING;
    body[3] = TAS;
    // BUSY TIMEOUT PERIOD: unlimited.
    body[6..8].copy_from_slice(&[0xff, 0xff]);
}

impl Page {
    /// What follows the page's header.
    pub(super) fn body(&self, lu: &LogicalUnit, values: Values) -> Vec<u8> {
        let mut body = vec![0; self.length];
        (self.fill)(lu, values, &mut body);
        body
    }

    fn append(&self, lu: &LogicalUnit, values: Values, data: &mut Vec<u8>) {
        const SPF: u8 = 0x40;
        if self.subpage == 0 {
            data.extend([self.code, self.length as u8]);
        } else {
            data.extend([self.code | SPF, self.subpage]);
            data.extend((self.length as u16).to_be_bytes());
        }
        data.extend(self.body(lu, values));
    }
}

/// The pages that a CDB asks for.
fn pages(lu: &LogicalUnit, cdb: Cdb<'_>) -> Result<Vec<u8>, Sense> {
    let code = cdb.byte(2) & 0x3f;
    let subpage = cdb.byte(3);
    let values = match cdb.byte(2) >> 6 {
        0 => Values::Current,
        1 => Values::Changeable,
        2 => Values::Default,
        _ => return Err(Sense::SAVING_PARAMETERS_NOT_SUPPORTED.at_cdb(2, 7)),
    };
    let mut of_code = PAGES.iter().filter(|page| code == ALL_PAGES || page.code == code).peekable();
    if of_code.peek().is_none() {
        return Err(invalid_field(2, 5));
    }
    let mut wanted = of_code.filter(|page| subpage == ALL_SUBPAGES || page.subpage == subpage).peekable();
    if wanted.peek().is_none() {
        return Err(invalid_field(3, 7));
    }
    let mut data = Vec::new();
    wanted.for_each(|page| page.append(lu, values, &mut data));
    Ok(data)
}

/// The short block descriptor has 32 bits for the number of blocks: FFFFFFFFh stands for more.
pub(super) fn short_block_descriptor(lu: &LogicalUnit) -> Vec<u8> {
    let blocks = u32::try_from(lu.blocks()).unwrap_or(u32::MAX);
    [blocks.to_be_bytes(), lu.geometry().block_size.to_be_bytes()].concat()
}

pub(super) fn long_block_descriptor(lu: &LogicalUnit) -> Vec<u8> {
    let mut descriptor = vec![0; 16];
    descriptor[..8].copy_from_slice(&lu.blocks().to_be_bytes());
    descriptor[12..].copy_from_slice(&lu.geometry().block_size.to_be_bytes());
    descriptor
}

/// WP, and DPOFUA: FUA always works, by a flush if not otherwise, and DPO costs nothing.
fn device_specific_parameter(lu: &LogicalUnit) -> u8 {
    const WP: u8 = 0x80;
    const DPOFUA: u8 = 0x10;
    if lu.is_write_protected().is_some() { DPOFUA | WP } else { DPOFUA }
}

/// MODE SENSE(6).
pub(super) fn mode_sense_6(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let pages = pages(lu, cdb)?;
    let descriptor = if cdb.bit(1, 3) { Vec::new() } else { short_block_descriptor(lu) };
    let length = (3 + descriptor.len() + pages.len()) as u8;
    let header = [length, 0, device_specific_parameter(lu), descriptor.len() as u8];
    Ok(Reply::data(buffer, cdb.byte(4).into(), &[&header, descriptor.as_slice(), &pages].concat()))
}

/// MODE SENSE(10).
pub(super) fn mode_sense_10(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const LONGLBA: u8 = 0x01;
    let pages = pages(lu, cdb)?;
    let (descriptor, flags) = match (cdb.bit(1, 3), cdb.bit(1, 4)) {
        (true, _) => (Vec::new(), 0),
        (false, true) => (long_block_descriptor(lu), LONGLBA),
        (false, false) => (short_block_descriptor(lu), 0),
    };
    let [high, low] = ((6 + descriptor.len() + pages.len()) as u16).to_be_bytes();
    let header = [high, low, 0, device_specific_parameter(lu), flags, 0, 0, descriptor.len() as u8];
    Ok(Reply::data(buffer, cdb.u16(7).into(), &[&header, descriptor.as_slice(), &pages].concat()))
}
