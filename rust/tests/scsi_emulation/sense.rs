//! Sense data on the wire.

use tcmu::scsi::sense::{SenseFormat, SenseKey};
use tcmu::scsi::{Sense, Status};

use crate::disk::{ALL, Disk};

#[test]
fn fixed_format() {
    let sense = Sense::INVALID_FIELD_IN_CDB.at_cdb(1, 5).with_information(0x0102_0304);
    let (bytes, length) = sense.encode(SenseFormat::Fixed);
    #[rustfmt::skip]
    assert_eq!(bytes[..length], [
        0xf0, // VALID, current, fixed format
        0,
        0x05, // ILLEGAL REQUEST
        1, 2, 3, 4, // INFORMATION
        0x0a, // ADDITIONAL SENSE LENGTH
        0, 0, 0, 0, // COMMAND-SPECIFIC INFORMATION
        0x24, 0x00, // INVALID FIELD IN CDB
        0, // FIELD REPLACEABLE UNIT CODE
        0xcd, // SKSV, C/D, BPV, bit 5
        0, 1, // FIELD POINTER
    ]);
    assert!(bytes[length..].iter().all(|&byte| byte == 0));
}

#[test]
fn information_above_32_bits_is_not_valid_in_the_fixed_format() {
    let (bytes, _) = Sense::MISCOMPARE.with_information(1 << 32).encode(SenseFormat::Fixed);
    assert_eq!(bytes[0], 0x70);
    assert_eq!(bytes[3..7], [0; 4]);
}

#[test]
fn descriptor_format() {
    let sense = Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(0x1234).with_information(1 << 32);
    let (bytes, length) = sense.encode(SenseFormat::Descriptor);
    #[rustfmt::skip]
    assert_eq!(bytes[..length], [
        0x72, // current, descriptor format
        0x05, 0x26, 0x00, // ILLEGAL REQUEST, INVALID FIELD IN PARAMETER LIST
        0, 0, 0,
        0x14, // ADDITIONAL SENSE LENGTH
        0x00, 0x0a, 0x80, 0, // information descriptor, VALID
        0, 0, 0, 1, 0, 0, 0, 0, // INFORMATION
        0x02, 0x06, 0, 0, // sense key specific descriptor
        0x80, 0x12, 0x34, // SKSV, in the data, FIELD POINTER
        0,
    ]);
}

#[test]
fn progress() {
    let sense = Sense::LOGICAL_UNIT_NOT_READY_FORMAT_IN_PROGRESS.with_progress(0x8000);
    assert_eq!(sense.encode(SenseFormat::Fixed).0[15..18], [0x80, 0x80, 0x00]);
}

#[test]
fn keys_have_their_codes() {
    for code in 0..=u8::MAX {
        match SenseKey::from_code(code) {
            Some(key) => assert_eq!(key as u8, code),
            None => assert!(code == 0x0c || code > 0x0f),
        }
    }
}

#[test]
fn the_unit_chooses_the_format() {
    let disk = Disk::new(8, ALL);
    assert_eq!(disk.lu.encode_sense(&Sense::WRITE_ERROR).0[0], 0x70);
    disk.lu.set_descriptor_sense(true);
    assert_eq!(disk.lu.encode_sense(&Sense::WRITE_ERROR).0[0], 0x72);
}

#[test]
fn request_sense_of_a_ready_unit_is_no_sense() {
    let mut disk = Disk::new(8, ALL);
    #[rustfmt::skip]
    let mut cdb = [
        0x03, // REQUEST SENSE
        0x00, // DESC
        0, 0,
        252, // ALLOCATION LENGTH
        0, // CONTROL
    ];
    let data = disk.read(&cdb, 252);
    assert_eq!((data.len(), data[0], data[2], data[12]), (18, 0x70, 0, 0));
    cdb[1] = 0x01;
    assert_eq!(disk.read(&cdb, 252), [0x72, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn request_sense_of_a_stopped_unit_says_so_with_good() {
    let mut disk = Disk::new(8, ALL);
    disk.command(&[0x1b, 0, 0, 0, 0, 0]);
    let reply = disk.command(&[0x03, 0, 0, 0, 18, 0]);
    assert_eq!((reply.status, reply.data_in), (Status::Good, 0));
    let data = disk.read(&[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((data[2], data[12], data[13]), (0x02, 0x04, 0x02));
}
