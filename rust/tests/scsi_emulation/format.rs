//! FORMAT UNIT.

use tcmu::scsi::sense::KeySpecific;
use tcmu::scsi::{Capabilities, Sense, Verb};

use crate::disk::{ALL, Buffer, Disk, assert_check, assert_good, assert_invalid_field};

const FMTDATA: u8 = 0x10;
const LONGLIST: u8 = 0x20;
const FOV: u8 = 0x80;
const IP: u8 = 0x08;
const IMMED: u8 = 0x02;

fn format(flags: u8) -> [u8; 6] {
    [0x04, flags, 0, 0, 0, 0]
}

fn full(capabilities: Capabilities) -> Disk {
    let mut disk = Disk::new(3000, capabilities);
    disk.medium.fill(1);
    disk
}

#[test]
fn every_block_is_zero_afterwards() {
    for [discard, discard_zeroes, write_zeroes, flush] in
        [[true; 4], [true, false, true, true], [false, false, false, true], [false; 4]]
    {
        let mut disk = full(Capabilities { discard, discard_zeroes, write_zeroes, flush, ..ALL });
        assert_good(disk.command(&format(0)));
        assert!(disk.medium.iter().all(|&byte| byte == 0));
        assert!(!flush || !disk.volatile.contains(&true));
    }
}

#[test]
fn a_pattern_is_repeated() {
    let mut disk = full(ALL);
    let list = [0, FOV | IP, 0, 0, 0, 0x01, 0, 3, 7, 8, 9];
    assert_good(disk.write(&format(FMTDATA), &list));
    for block in disk.medium.chunks(512) {
        assert!(block.iter().zip([7, 8, 9].iter().cycle()).all(|(byte, wanted)| byte == wanted));
    }
    assert_good(disk.write(&format(FMTDATA | LONGLIST), &[0, FOV | IP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    assert!(disk.medium.iter().all(|&byte| byte == 0));
}

#[test]
fn lists_that_are_refused() {
    let mut disk = full(ALL);
    #[rustfmt::skip]
    let cases: [(u8, &[u8], u16); 11] = [
        (0, &[1, 0, 0, 0], 0), // PROTECTION FIELD USAGE
        (0, &[0, IP, 0, 0, 0, 1, 0, 1, 7], 1), // IP without FOV
        (0, &[0, FOV | 0x04, 0, 0], 1), // DSP
        (0, &[0, 0, 0, 4, 0, 0, 0, 0], 2), // a defect list
        (LONGLIST, &[0, 0, 0, 0, 0, 0, 0, 4], 4),
        (LONGLIST, &[0, 0, 0, 0x10, 0, 0, 0, 0], 3), // P_I_INFORMATION
        (0, &[0, FOV | IP, 0, 0, 0x40, 1, 0, 1, 7], 4), // IP MODIFIER
        (0, &[0, FOV | IP, 0, 0, 0, 2, 0, 1, 7], 5), // INITIALIZATION PATTERN TYPE
        (0, &[0, FOV | IP, 0, 0, 0, 1, 0, 0], 6), // no pattern
        (0, &[0, FOV | IP, 0, 0, 0, 1, 2, 1], 6), // longer than a block
        (0, &[0, FOV | IP, 0, 0, 0, 0, 0, 1, 7], 6), // a pattern of the default type
    ];
    for (flags, list, byte) in cases {
        let reply = disk.write(&format(FMTDATA | flags), list);
        assert_check(reply, Sense::INVALID_FIELD_IN_PARAMETER_LIST);
        let Some(KeySpecific::Parameter(pointer)) = reply.sense.unwrap().specific else { panic!() };
        assert_eq!(pointer.byte, byte, "{list:?}");
    }
    for list in [&[0; 3][..], &[0, FOV | IP, 0, 0, 0, 1, 0], &[0, FOV | IP, 0, 0, 0, 1, 0, 2, 7]] {
        assert_check(disk.write(&format(FMTDATA), list), Sense::PARAMETER_LIST_LENGTH_ERROR);
    }
    assert_invalid_field(disk.command(&format(0x40)), 1, 7);
    assert_eq!(disk.verbs(), []);
    assert_good(disk.command(&[0; 6]));
}

fn progress(disk: &mut Disk) -> Option<u16> {
    let data = disk.read(&[0x03, 0, 0, 0, 18, 0], 18);
    match (data[2], data[12], data[13]) {
        (0, 0, 0) => None,
        (2, 4, 4) => Some(u16::from_be_bytes([data[16], data[17]])),
        other => panic!("{other:?}"),
    }
}

#[test]
fn progress_is_seen_while_it_runs() {
    let mut disk = Disk::new(8000, Capabilities { discard: false, write_zeroes: false, ..ALL });
    disk.early = Some(None);
    assert_good(disk.write(&format(FMTDATA), &[0, IMMED, 0, 0]));
    let in_progress = Sense::LOGICAL_UNIT_NOT_READY_FORMAT_IN_PROGRESS;
    let mut last = 0;
    loop {
        for cdb in [&[0x00, 0, 0, 0, 0, 0], &[0x08, 0, 0, 0, 1, 0], &format(0), &[0x1b, 0, 0, 0, 0, 0]] {
            let reply = disk.write(cdb, &[0; 512]);
            assert_check(reply, in_progress);
            assert!(matches!(reply.sense.unwrap().specific, Some(KeySpecific::Progress(_))));
        }
        assert_eq!(disk.read(&[0x12, 0, 0, 0, 36, 0], 36).len(), 36);
        let now = progress(&mut disk).unwrap();
        assert!(now >= last);
        last = now;
        if !disk.go_on() {
            break;
        }
    }
    assert!(last > 0xc000);
    assert_eq!(progress(&mut disk), None);
    assert_good(disk.command(&[0; 6]));
}

#[test]
fn a_failure_leaves_the_medium_unusable_until_the_next_format() {
    let mut disk = full(ALL);
    let buffer = Buffer::stale(0);
    drop(disk.lu.start(&format(0), &buffer));
    assert_check(disk.command(&[0; 6]), Sense::FORMAT_COMMAND_FAILED);
    assert_check(disk.write(&[0x0a, 0, 0, 0, 1, 0], &[0; 512]), Sense::FORMAT_COMMAND_FAILED);
    assert_good(disk.command(&[0x1b, 0, 0, 0, 1, 0]));
    assert_good(disk.command(&format(0)));
    assert_good(disk.command(&[0; 6]));
}

#[test]
fn long_discards_are_done_in_pieces() {
    let mut disk = Disk::new(8, ALL);
    let geometry =
        tcmu::scsi::Geometry { discard_granularity: 3 << 20, ..tcmu::scsi::Geometry::new(512, 5 << 30) };
    disk.lu = tcmu::scsi::LogicalUnit::new(crate::disk::identity(), geometry, ALL).unwrap().into();
    let buffer = Buffer::stale(0);
    let mut next = disk.lu.start(&format(0), &buffer);
    let mut steps = Vec::new();
    while let tcmu::scsi::Next::Call(step, task) = next {
        steps.push((step.verb, step.offset.0 % (3 << 20)));
        next = disk.lu.resume(task, &buffer, tcmu::scsi::StepResult::None);
    }
    assert_eq!(steps, [vec![(Verb::Discard, 0); 6], vec![(Verb::Flush, 0)]].concat());
}
