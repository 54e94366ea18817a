//! START STOP UNIT and the stopped unit.

use tcmu::scsi::{Capabilities, Geometry, Sense, Verb};

use crate::disk::{ALL, Disk, assert_check, assert_good, assert_invalid_field};

#[rustfmt::skip]
fn start_stop(flags: u8) -> [u8; 6] {
    [
        0x1b, // START STOP UNIT
        0, // IMMED
        0,
        0, // POWER CONDITION MODIFIER
        flags, // POWER CONDITION, NO_FLUSH, LOEJ, START
        0, // CONTROL
    ]
}

const STOP: u8 = 0;
const START: u8 = 0x01;
const LOEJ: u8 = 0x02;
const NO_FLUSH: u8 = 0x04;

#[test]
fn a_stopped_unit_is_not_ready_until_it_is_started() {
    let mut disk = Disk::new(16, ALL);
    assert_good(disk.command(&start_stop(STOP)));
    let not_ready = Sense::LOGICAL_UNIT_NOT_READY_INITIALIZING_COMMAND_REQUIRED;
    assert_check(disk.command(&[0x00, 0, 0, 0, 0, 0]), not_ready);
    assert_check(disk.command(&[0x08, 0, 0, 0, 1, 0]), not_ready);
    assert_check(disk.write(&[0x0a, 0, 0, 0, 1, 0], &[0; 512]), not_ready);
    assert_check(disk.command(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0]), not_ready);
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 96, 0], 96).len(), 96, "INQUIRY is always answered");
    assert_good(disk.command(&start_stop(START)));
    assert_good(disk.command(&[0x00, 0, 0, 0, 0, 0]));
}

#[test]
fn stopping_flushes_unless_told_not_to() {
    let mut disk = Disk::new(16, ALL);
    disk.command(&start_stop(STOP));
    assert_eq!(disk.verbs(), [Verb::Flush]);
    disk.command(&start_stop(NO_FLUSH));
    assert_eq!(disk.verbs(), []);
    disk.command(&start_stop(START));
    assert_eq!(disk.verbs(), []);
    let mut disk = Disk::new(16, Capabilities { flush: false, ..ALL });
    disk.command(&start_stop(STOP));
    assert!(disk.lu.is_stopped());
}

#[test]
fn a_failed_flush_leaves_the_unit_started() {
    let disk = Disk::new(16, ALL);
    let buffer = crate::disk::Buffer::stale(0);
    let next = disk.lu.start(&start_stop(STOP), &buffer);
    assert!(matches!(next, tcmu::scsi::Next::Call(..)));
    assert!(!disk.lu.is_stopped());
}

#[test]
fn power_conditions_and_ejecting_are_refused() {
    let mut disk = Disk::new(16, ALL);
    for condition in 1..=15 {
        assert_invalid_field(disk.command(&start_stop(condition << 4)), 4, 7);
    }
    assert_invalid_field(disk.command(&start_stop(LOEJ)), 4, 1);
    assert!(!disk.lu.is_stopped());
}

#[test]
fn a_removable_medium() {
    let geometry = Geometry { removable: true, ..Geometry::new(512, 16 * 512) };
    let mut disk = Disk::with(geometry, ALL);
    let prevent = |value| [0x1e, 0, 0, 0, value, 0];
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 36, 0], 36)[1], 0x80);
    assert_good(disk.command(&prevent(1)));
    assert_check(disk.command(&start_stop(LOEJ)), Sense::MEDIUM_REMOVAL_PREVENTED);
    assert_good(disk.command(&[0; 6]));
    assert_good(disk.command(&prevent(0)));
    assert_good(disk.command(&start_stop(LOEJ)));
    assert_eq!(disk.verbs(), [Verb::Flush]);
    for cdb in [&[0x00, 0, 0, 0, 0, 0][..], &[0x08, 0, 0, 0, 1, 0], &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        assert_check(disk.command(cdb), Sense::MEDIUM_NOT_PRESENT);
    }
    assert_good(disk.command(&prevent(1)));
    assert_check(disk.command(&start_stop(LOEJ | START)), Sense::MEDIUM_REMOVAL_PREVENTED);
    assert_good(disk.command(&prevent(0)));
    assert_good(disk.command(&start_stop(LOEJ | START)));
    assert_good(disk.command(&[0; 6]));
    assert_good(disk.command(&prevent(1)));
    disk.lu.reset();
    assert_good(disk.command(&start_stop(LOEJ)));
    assert_good(disk.command(&start_stop(LOEJ | START)));
    assert_invalid_field(disk.command(&prevent(2)), 4, 1);
    assert_check(Disk::new(16, ALL).command(&prevent(1)), Sense::INVALID_OPCODE);
}
