//! LOG SENSE and LOG SELECT.

use tcmu::scsi::{Capabilities, Sense};

use crate::disk::{ALL, Disk, assert_check, assert_good, assert_invalid_field};

const CUMULATIVE: u8 = 0x40;

fn log_sense(page: u8, subpage: u8, pointer: u16) -> Vec<u8> {
    let [high, low] = pointer.to_be_bytes();
    vec![0x4d, 0, page, subpage, 0, high, low, 1, 0, 0]
}

fn page(disk: &mut Disk, code: u8) -> Vec<u8> {
    let data = disk.read(&log_sense(CUMULATIVE | code, 0, 0), 256);
    assert_eq!((data[0], data[1]), (code, 0));
    assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])) + 4, data.len());
    data[4..].to_vec()
}

#[test]
fn every_page_that_is_listed_is_there_and_no_other() {
    let mut disk = Disk::new(16, ALL);
    let listed = page(&mut disk, 0);
    assert_eq!(listed, [0x00, 0x0c, 0x0d, 0x0e, 0x19]);
    for code in 0..0x40 {
        if listed.contains(&code) {
            page(&mut disk, code);
        } else {
            assert_invalid_field(disk.command(&log_sense(CUMULATIVE | code, 0, 0)), 2, 5);
        }
    }
    let with_subpages = disk.read(&log_sense(CUMULATIVE, 0xff, 0), 256);
    assert_eq!(with_subpages, [0x40, 0xff, 0, 12, 0, 0, 0, 0xff, 0x0c, 0, 0x0d, 0, 0x0e, 0, 0x19, 0]);
    let mut disk = Disk::new(16, Capabilities { discard: false, ..ALL });
    assert_eq!(page(&mut disk, 0), [0x00, 0x0d, 0x0e, 0x19]);
}

#[test]
fn temperature_and_cycles() {
    let mut disk = Disk::new(16, ALL);
    assert_eq!(page(&mut disk, 0x0d), [0, 0, 0x03, 2, 0, 0xff], "not available");
    assert_eq!(page(&mut disk, 0x0e), [0, 4, 0x03, 4, 0, 0, 0, 0]);
    assert_good(disk.command(&[0x1b, 0, 0, 0, 0, 0]));
    assert_good(disk.command(&[0x1b, 0, 0, 0, 1, 0]));
    assert_good(disk.command(&[0x1b, 0, 0, 0, 1, 0]));
    assert_eq!(page(&mut disk, 0x0e), [0, 4, 0x03, 4, 0, 0, 0, 1]);
}

#[test]
fn reads_and_writes_are_counted_until_they_are_reset() {
    let mut disk = Disk::new(16, ALL);
    disk.read(&[0x08, 0, 0, 0, 3, 0], 3 * 512);
    disk.read(&[0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0], 1024);
    assert_good(disk.write(&[0x0a, 0, 0, 0, 1, 0], &[0; 512]));
    let counters = |disk: &mut Disk| {
        let data = page(disk, 0x19);
        assert_eq!((data.len(), &data[..4]), (68, [0, 1, 0x03, 64].as_slice()));
        [4, 12, 20, 28].map(|at| u64::from_be_bytes(data[at..at + 8].try_into().unwrap()))
    };
    assert_eq!(counters(&mut disk), [2, 1, 1, 5]);
    assert_good(disk.command(&[0x4c, 0x02, 0, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(counters(&mut disk), [0; 4]);
}

#[test]
fn what_is_refused() {
    let mut disk = Disk::new(16, ALL);
    for control in [0x00, 0x80, 0xc0] {
        assert_invalid_field(disk.command(&log_sense(control | 0x0d, 0, 0)), 2, 7);
    }
    assert_invalid_field(disk.command(&log_sense(CUMULATIVE | 0x0d, 1, 0)), 3, 7);
    assert_invalid_field(disk.command(&log_sense(CUMULATIVE | 0x0e, 0, 5)), 5, 7);
    assert_invalid_field(disk.command(&[0x4d, 1, CUMULATIVE, 0, 0, 0, 0, 0, 4, 0]), 1, 0);
    assert_invalid_field(disk.command(&[0x4c, 1, 0, 0, 0, 0, 0, 0, 0, 0]), 1, 0);
    assert_invalid_field(disk.command(&[0x4c, 2, 0x3f, 0, 0, 0, 0, 0, 0, 0]), 2, 5);
    assert_invalid_field(disk.write(&[0x4c, 2, 0, 0, 0, 0, 0, 0, 4, 0], &[0; 4]), 7, 7);
    let parameters = disk.write(&[0x4c, 0, 0x4d, 0, 0, 0, 0, 0, 4, 0], &[0; 4]);
    assert_check(parameters, Sense::INVALID_FIELD_IN_PARAMETER_LIST);
}
