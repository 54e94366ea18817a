//! INQUIRY, standard data. The VPD pages are in `vpd`.

use super::cdb::{Cdb, invalid_field};
use super::opcodes::Outcome;
use super::{DataBuffer, LogicalUnit, Reply, vpd};

/// SPC-4, and the descriptors that go with it: initiators (and libiscsi's suite) know these best, and nothing here
/// needs a later one.
const VERSION: u8 = 0x06;
const VERSION_DESCRIPTORS: [u16; 3] = [
    0x00a0, // SAM-5
    0x0460, // SPC-4
    0x04c0, // SBC-3
];

/// INQUIRY.
pub(super) fn inquiry(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    let page = cdb.byte(2);
    let allocation = cdb.u16(3).into();
    if cdb.bit(1, 0) {
        return Ok(Reply::data(buffer, allocation, &vpd::page(lu, page).ok_or(invalid_field(2, 7))?));
    }
    if page != 0 {
        return Err(invalid_field(2, 7));
    }
    Ok(Reply::data(buffer, allocation, &standard(lu)))
}

/// Standard INQUIRY data: a disk that is there, without target port groups (the fabric has them) or protection, with
/// third-party copy and command queuing.
fn standard(lu: &LogicalUnit) -> [u8; 96] {
    const RMB: u8 = 0x80;
    const HISUP_AND_FORMAT: u8 = 0x12;
    const THIRD_PARTY_COPY: u8 = 0x08;
    const CMDQUE: u8 = 0x02;
    let identity = lu.identity();
    let mut data = [0; 96];
    if lu.geometry().removable {
        data[1] = RMB;
    }
    data[2] = VERSION;
    data[3] = HISUP_AND_FORMAT;
    data[4] = data.len() as u8 - 5;
    data[5] = THIRD_PARTY_COPY;
    data[7] = CMDQUE;
    data[8..16].copy_from_slice(identity.vendor());
    data[16..32].copy_from_slice(identity.product());
    data[32..36].copy_from_slice(identity.revision());
    for (at, descriptor) in (58..).step_by(2).zip(VERSION_DESCRIPTORS) {
        data[at..at + 2].copy_from_slice(&descriptor.to_be_bytes());
    }
    data
}
