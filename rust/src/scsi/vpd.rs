//! The vital product data pages of INQUIRY.

use super::sense::SENSE_BYTES;
use super::{LogicalUnit, copy};

type Body = fn(&LogicalUnit) -> Vec<u8>;

/// Page codes in ascending order, and what follows the header of four bytes. Page 00h is made from this list.
const PAGES: [(u8, Body); 9] = [
    (0x00, supported_pages),
    (0x80, unit_serial_number),
    (0x83, device_identification),
    (0x86, extended_inquiry_data),
    (0x8f, copy::third_party_copy_page),
    (0xb0, block_limits),
    (0xb1, block_device_characteristics),
    (0xb2, logical_block_provisioning),
    (0xb7, block_limits_extension),
];

/// The whole page, header included; `None` if there is no such page.
pub(super) fn page(lu: &LogicalUnit, code: u8) -> Option<Vec<u8>> {
    let (_, body) = PAGES.iter().find(|(page, _)| *page == code)?;
    let body = body(lu);
    let mut page = vec![0, code];
    page.extend((body.len() as u16).to_be_bytes());
    page.extend(body);
    Some(page)
}

fn supported_pages(_lu: &LogicalUnit) -> Vec<u8> {
    PAGES.map(|(code, _)| code).to_vec()
}

fn unit_serial_number(lu: &LogicalUnit) -> Vec<u8> {
    lu.identity().serial().into()
}

/// Two names of the logical unit: NAA, and vendor, product and serial number for those who look at text.
fn device_identification(lu: &LogicalUnit) -> Vec<u8> {
    const BINARY_NAA: [u8; 2] = [0x01, 0x03];
    const ASCII_T10_VENDOR: [u8; 2] = [0x02, 0x01];
    let identity = lu.identity();
    let text = [identity.vendor().as_slice(), identity.product(), identity.serial().as_bytes()].concat();
    let mut descriptors = Vec::new();
    for (kind, designator) in [(BINARY_NAA, identity.naa().as_slice()), (ASCII_T10_VENDOR, &text)] {
        descriptors.extend(kind);
        descriptors.extend([0, designator.len() as u8]);
        descriptors.extend(designator);
    }
    descriptors
}

/// No protection, simple task attributes only (the kernel does not pass others on), a volatile cache if there is one.
fn extended_inquiry_data(lu: &LogicalUnit) -> Vec<u8> {
    const SIMPSUP: u8 = 0x01;
    const V_SUP: u8 = 0x01;
    const MAXIMUM_SENSE_DATA_LENGTH: usize = 13 - 4;
    let mut body = vec![0; 0x3c];
    body[1] = SIMPSUP;
    body[2] = if lu.capabilities().flush { V_SUP } else { 0 };
    body[MAXIMUM_SENSE_DATA_LENGTH] = SENSE_BYTES as u8;
    body
}

/// No streams, no scattered writes.
fn block_limits_extension(_lu: &LogicalUnit) -> Vec<u8> {
    vec![0; 0x3c]
}

/// Offsets in this page, as in SBC-4, count from the start of the page; `body` starts at its byte 4.
fn block_limits(lu: &LogicalUnit) -> Vec<u8> {
    const WSNZ: u8 = 0x01;
    const UGAVALID: u32 = 1 << 31;
    let geometry = lu.geometry();
    let mut body = vec![0; 0x3c];
    let mut put = |at: usize, bytes: &[u8]| body[at - 4..at - 4 + bytes.len()].copy_from_slice(bytes);
    put(4, &[WSNZ, geometry.max_compare_blocks]);
    put(6, &geometry.optimal_transfer_granularity_blocks.to_be_bytes());
    put(8, &geometry.max_transfer_blocks.to_be_bytes());
    put(12, &geometry.optimal_transfer_blocks.to_be_bytes());
    if lu.capabilities().discard {
        // `Geometry::check` keeps both below 2^32, and the alignment below the granularity.
        let granularity = geometry.discard_granularity_blocks() as u32;
        let alignment = geometry.discard_alignment_blocks() as u32;
        put(20, &geometry.max_discard_blocks.to_be_bytes());
        put(24, &geometry.max_discard_descriptors.to_be_bytes());
        put(28, &granularity.to_be_bytes());
        put(32, &(UGAVALID | alignment).to_be_bytes());
    }
    put(36, &geometry.max_write_same_blocks.to_be_bytes());
    // Alignment and granularity: any; no boundaries inside.
    put(44, &geometry.max_atomic_write_blocks.to_be_bytes());
    body
}

fn block_device_characteristics(lu: &LogicalUnit) -> Vec<u8> {
    const NOT_REPORTED: u8 = 0;
    const NON_ROTATING: u8 = 1;
    // Blocks that SANITIZE has erased can be read without writing them first.
    const WABEREQ_READS: u8 = 0x40;
    let mut body = vec![0; 0x3c];
    if lu.capabilities().discard {
        body[3] = WABEREQ_READS;
    }
    body[1] = if lu.geometry().rotational { NOT_REPORTED } else { NON_ROTATING };
    body
}

fn logical_block_provisioning(lu: &LogicalUnit) -> Vec<u8> {
    const LBPU: u8 = 0x80;
    const LBPWS_AND_LBPWS10: u8 = 0x60;
    const LBPRZ_ZEROES: u8 = 0x04;
    const THIN: u8 = 0x02;
    let capabilities = lu.capabilities();
    let mut body = vec![0; 4];
    if capabilities.discard {
        body[1] |= LBPU;
        body[2] |= THIN;
    }
    if capabilities.discard_zeroes {
        body[1] |= LBPWS_AND_LBPWS10 | LBPRZ_ZEROES;
    }
    body
}
