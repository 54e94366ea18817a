//! SANITIZE.

use tcmu::scsi::{Capabilities, Sense, Verb};

use crate::disk::{ALL, Buffer, Disk, assert_check, assert_good, assert_invalid_field};

const OVERWRITE: u8 = 0x01;
const BLOCK_ERASE: u8 = 0x02;
const EXIT_FAILURE_MODE: u8 = 0x1f;
const AUSE: u8 = 0x20;
const IMMED: u8 = 0x80;
const INVERT: u8 = 0x80;

fn sanitize(action: u8, length: u16) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    vec![0x48, action, 0, 0, 0, 0, 0, high, low, 0]
}

fn overwrite(disk: &mut Disk, flags: u8, list: &[u8]) -> tcmu::scsi::Reply {
    disk.write(&sanitize(OVERWRITE | flags, list.len() as u16), list)
}

fn full(capabilities: Capabilities) -> Disk {
    let mut disk = Disk::new(3000, capabilities);
    disk.medium.fill(1);
    disk
}

#[test]
fn overwriting() {
    let mut disk = full(ALL);
    assert_good(overwrite(&mut disk, 0, &[1, 0, 0, 2, 0xaa, 0x55]));
    assert!(disk.medium.chunks(2).all(|pair| pair == [0xaa, 0x55]));
    assert!(!disk.volatile.contains(&true));
    assert_eq!(disk.verbs(), [Verb::Write, Verb::Write, Verb::Flush]);
    assert_good(overwrite(&mut disk, 0, &[[1, 0, 2, 0].as_slice(), &[0; 512]].concat()));
    assert!(disk.medium.iter().all(|&byte| byte == 0));
    assert_good(overwrite(&mut disk, 0, &[INVERT | 2, 0, 0, 1, 0x0f]));
    assert!(disk.medium.iter().all(|&byte| byte == 0xf0));
    assert_good(overwrite(&mut disk, 0, &[INVERT | 3, 0, 0, 1, 0x0f]));
    assert!(disk.medium.iter().all(|&byte| byte == 0x0f));
}

#[test]
fn overwriting_that_is_refused() {
    let mut disk = full(ALL);
    for length in [0, 1, 4, 517, 600] {
        assert_invalid_field(disk.write(&sanitize(OVERWRITE, length), &[1; 600]), 7, 7);
    }
    for list in [[0, 0, 0, 1, 9], [1, 1, 0, 1, 9], [0x21, 0, 0, 1, 9], [1, 0, 0, 0, 9], [1, 0, 0, 2, 9]] {
        assert_check(overwrite(&mut disk, 0, &list), Sense::INVALID_FIELD_IN_PARAMETER_LIST);
    }
    assert_check(disk.write(&sanitize(OVERWRITE, 8), &[1; 7]), Sense::PARAMETER_LIST_LENGTH_ERROR);
    assert_invalid_field(overwrite(&mut disk, 0x40, &[1, 0, 0, 1, 9]), 1, 6);
    assert_eq!(disk.verbs(), []);
}

#[test]
fn erasing() {
    for (discard_zeroes, verbs) in [
        (true, vec![Verb::Discard, Verb::Flush]),
        (false, vec![Verb::WriteZeroes, Verb::Discard, Verb::Flush]),
    ] {
        let mut disk = full(Capabilities { discard_zeroes, ..ALL });
        assert_good(disk.command(&sanitize(BLOCK_ERASE, 0)));
        assert_eq!(disk.verbs(), verbs);
        assert!(!disk.medium.contains(&1));
        assert_invalid_field(disk.write(&sanitize(BLOCK_ERASE, 8), &[0; 8]), 7, 7);
    }
    let mut disk = full(Capabilities { discard: false, ..ALL });
    assert_invalid_field(disk.command(&sanitize(BLOCK_ERASE, 0)), 1, 4);
}

#[test]
fn nothing_else_is_done_meanwhile() {
    let mut disk = full(ALL);
    disk.early = Some(None);
    assert_good(overwrite(&mut disk, IMMED, &[2, 0, 0, 1, 9]));
    let in_progress = Sense::LOGICAL_UNIT_NOT_READY_SANITIZE_IN_PROGRESS;
    assert_check(disk.command(&[0; 6]), in_progress);
    assert_check(disk.command(&sanitize(BLOCK_ERASE, 0)), in_progress);
    assert_check(disk.command(&sanitize(EXIT_FAILURE_MODE, 0)), in_progress);
    assert_check(disk.command(&[0x04, 0, 0, 0, 0, 0]), in_progress);
    while disk.go_on() {}
    assert_good(disk.command(&[0; 6]));
    assert!(disk.medium.iter().all(|&byte| byte == 9));
}

#[test]
fn after_a_failure() {
    let fail = |disk: &Disk, flags| {
        let buffer = Buffer::stale(0);
        drop(disk.lu.start(&sanitize(BLOCK_ERASE | flags, 0), &buffer));
    };
    let mut disk = full(ALL);
    fail(&disk, 0);
    assert_check(disk.command(&[0; 6]), Sense::SANITIZE_COMMAND_FAILED);
    assert_check(disk.command(&[0x04, 0, 0, 0, 0, 0]), Sense::SANITIZE_COMMAND_FAILED);
    assert_invalid_field(disk.command(&sanitize(EXIT_FAILURE_MODE, 0)), 1, 4);
    assert_good(disk.command(&sanitize(BLOCK_ERASE, 0)));
    assert_good(disk.command(&[0; 6]));
    fail(&disk, AUSE);
    assert_check(disk.command(&[0; 6]), Sense::SANITIZE_COMMAND_FAILED);
    assert_good(disk.command(&sanitize(EXIT_FAILURE_MODE, 0)));
    assert_good(disk.command(&[0; 6]));
    assert_invalid_field(disk.write(&sanitize(EXIT_FAILURE_MODE, 8), &[0; 8]), 7, 7);
}
