//! MODE SENSE.

use tcmu::scsi::{Capabilities, Geometry, LogicalUnit, Sense};

use crate::disk::{ALL, Buffer, Disk, assert_check, assert_invalid_field, identity};

const DBD: u8 = 0x08;
const LLBAA: u8 = 0x10;
const CHANGEABLE: u8 = 0x40;
const DEFAULT: u8 = 0x80;
const SAVED: u8 = 0xc0;

#[rustfmt::skip]
fn mode_sense_6(dbd: u8, page: u8, subpage: u8) -> [u8; 6] {
    [
        0x1a, // MODE SENSE(6)
        dbd, // DBD
        page, // PC, PAGE CODE
        subpage, // SUBPAGE CODE
        255, // ALLOCATION LENGTH
        0, // CONTROL
    ]
}

#[rustfmt::skip]
fn mode_sense_10(flags: u8, page: u8, subpage: u8) -> [u8; 10] {
    [
        0x5a, // MODE SENSE(10)
        flags, // LLBAA, DBD
        page, // PC, PAGE CODE
        subpage, // SUBPAGE CODE
        0, 0, 0,
        1, 0, // ALLOCATION LENGTH
        0, // CONTROL
    ]
}

const RECOVERY: [u8; 12] = [0x01, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const EXTENSION: [u8; 4] = [0x4a, 0x01, 0, 0x1c];
const EXCEPTIONS: [u8; 12] = [0x1c, 0x0a, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn caching(wce: u8) -> Vec<u8> {
    let mut page = vec![0; 20];
    page[..3].copy_from_slice(&[0x08, 0x12, wce]);
    page
}

#[rustfmt::skip]
fn control(d_sense: u8) -> [u8; 12] {
    [
        0x0a, 0x0a,
        0x02 | d_sense, // D_SENSE, GLTSD
        0x10, // unrestricted reordering
        0,
        0x40, // TAS
        0, 0,
        0xff, 0xff, // BUSY TIMEOUT PERIOD
        0, 0,
    ]
}

#[test]
fn six_has_a_short_block_descriptor() {
    let data = Disk::new(16, ALL).read(&mode_sense_6(0, 0x08, 0), 255);
    #[rustfmt::skip]
    assert_eq!(data, [
        [
            31, // MODE DATA LENGTH
            0, // MEDIUM TYPE
            0x10, // DPOFUA
            8, // BLOCK DESCRIPTOR LENGTH
            0, 0, 0, 16, // NUMBER OF LOGICAL BLOCKS
            0, 0, 2, 0, // LOGICAL BLOCK LENGTH
        ].as_slice(),
        &caching(0x04),
    ].concat());
}

#[test]
fn ten_has_either_block_descriptor() {
    let mut disk = Disk::new(16, ALL);
    let short = disk.read(&mode_sense_10(0, 0x01, 0), 256);
    #[rustfmt::skip]
    assert_eq!(short, [
        [
            0, 26, // MODE DATA LENGTH
            0, // MEDIUM TYPE
            0x10, // DPOFUA
            0, 0, // LONGLBA
            0, 8, // BLOCK DESCRIPTOR LENGTH
            0, 0, 0, 16, // NUMBER OF LOGICAL BLOCKS
            0, 0, 2, 0, // LOGICAL BLOCK LENGTH
        ].as_slice(),
        &RECOVERY,
    ].concat());
    let long = disk.read(&mode_sense_10(LLBAA, 0x01, 0), 256);
    #[rustfmt::skip]
    assert_eq!(long, [
        [
            0, 34, // MODE DATA LENGTH
            0, // MEDIUM TYPE
            0x10, // DPOFUA
            1, 0, // LONGLBA
            0, 16, // BLOCK DESCRIPTOR LENGTH
            0, 0, 0, 0, 0, 0, 0, 16, // NUMBER OF LOGICAL BLOCKS
            0, 0, 0, 0,
            0, 0, 2, 0, // LOGICAL BLOCK LENGTH
        ].as_slice(),
        &RECOVERY,
    ].concat());
    let none = disk.read(&mode_sense_10(LLBAA | DBD, 0x01, 0), 256);
    assert_eq!(none, [[0, 18, 0, 0x10, 0, 0, 0, 0].as_slice(), &RECOVERY].concat());
}

#[test]
fn the_short_block_descriptor_of_a_large_disk() {
    let lu = LogicalUnit::new(identity(), Geometry::new(512, 512 << 33), ALL).unwrap();
    let buffer = Buffer::stale(255);
    lu.start(&mode_sense_6(0, 0x08, 0), &buffer);
    let mut descriptor = [0; 4];
    tcmu::scsi::DataBuffer::read(&buffer, 4, &mut descriptor);
    assert_eq!(descriptor, [0xff; 4]);
}

#[test]
fn all_pages() {
    let mut disk = Disk::new(16, ALL);
    let before = [RECOVERY.as_slice(), &caching(0x04), &control(0)].concat();
    let extension = [EXTENSION.as_slice(), &[0; 28]].concat();
    for (subpage, between) in [(0x00, [].as_slice()), (0xff, &extension)] {
        let expected = [before.as_slice(), between, &EXCEPTIONS].concat();
        let data = disk.read(&mode_sense_6(DBD, 0x3f, subpage), 255);
        assert_eq!(data[..4], [expected.len() as u8 + 3, 0, 0x10, 0]);
        assert_eq!(data[4..], expected);
    }
    let both = [control(0).as_slice(), &extension].concat();
    assert_eq!(disk.read(&mode_sense_6(DBD, 0x0a, 0xff), 255)[4..], both);
    assert_eq!(disk.read(&mode_sense_6(DBD, 0x0a, 0x01), 255)[4..], extension);
}

#[test]
fn pages_that_are_not_there() {
    let mut disk = Disk::new(16, ALL);
    assert_invalid_field(disk.command(&mode_sense_6(0, 0x02, 0)), 2, 5);
    assert_invalid_field(disk.command(&mode_sense_6(0, 0x0a, 0x02)), 3, 7);
    assert_invalid_field(disk.command(&mode_sense_10(0, 0x3f, 0x02)), 3, 7);
}

#[test]
fn current_values_follow_the_state() {
    let mut disk = Disk::new(16, ALL);
    disk.lu.set_write_cache(false);
    disk.lu.set_descriptor_sense(true);
    assert_eq!(disk.read(&mode_sense_6(DBD, 0x08, 0), 255)[4..], caching(0));
    assert_eq!(disk.read(&mode_sense_6(DBD, 0x0a, 0), 255)[4..], control(0x04));
    assert_eq!(disk.read(&mode_sense_6(DBD, DEFAULT | 0x08, 0), 255)[4..], caching(0x04));
    assert_eq!(disk.read(&mode_sense_6(DBD, DEFAULT | 0x0a, 0), 255)[4..], control(0));
}

#[test]
fn what_is_changeable() {
    let mut disk = Disk::new(16, ALL);
    let mut changeable = |page| disk.read(&mode_sense_6(DBD, CHANGEABLE | page, 0), 255)[4..].to_vec();
    assert_eq!(changeable(0x01), RECOVERY);
    assert_eq!(changeable(0x08), caching(0x04));
    assert_eq!(changeable(0x0a), [0x0a, 0x0a, 0x04, 0, 0x08, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(changeable(0x1c), [[0x1c, 0x0a].as_slice(), &[0; 10]].concat());
    let mut disk = Disk::new(16, Capabilities { flush: false, ..ALL });
    assert_eq!(disk.read(&mode_sense_6(DBD, CHANGEABLE | 0x08, 0), 255)[4..], caching(0));
}

#[test]
fn nothing_is_saved() {
    let reply = Disk::new(16, ALL).command(&mode_sense_6(0, SAVED | 0x08, 0));
    assert_check(reply, Sense::SAVING_PARAMETERS_NOT_SUPPORTED);
}

#[test]
fn write_protection_and_a_missing_cache_are_told() {
    let mut disk = Disk::new(16, Capabilities { write: false, flush: false, ..ALL });
    let data = disk.read(&mode_sense_6(DBD, 0x08, 0), 255);
    assert_eq!(data[2], 0x90);
    assert_eq!(data[4..], caching(0));
}

#[test]
fn any_allocation_length_truncates() {
    let mut disk = Disk::new(16, ALL);
    let mut cdb = mode_sense_6(0, 0x3f, 0);
    let whole = disk.read(&cdb, 255);
    for allocation in 0..=255 {
        cdb[4] = allocation;
        assert_eq!(disk.read(&cdb, 255), whole[..whole.len().min(allocation.into())]);
    }
}
