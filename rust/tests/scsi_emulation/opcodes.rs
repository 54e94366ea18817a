//! Dispatch, reserved bits, and REPORT SUPPORTED OPERATION CODES, each judged by the other.

use tcmu::scsi::opcodes::{self, Direction};
use tcmu::scsi::{Capabilities, Sense};

use crate::copy::{extended_copy, parameter_list};
use crate::disk::{ALL, Buffer, Disk, assert_check, assert_good, assert_invalid_field, fields};

const RCTD: u8 = 0x80;

#[rustfmt::skip]
fn report(options: u8, opcode: u8, service_action: u16, allocation: u32) -> Vec<u8> {
    fields(&[
        &[0xa3], // MAINTENANCE IN
        &[0x0c], // REPORT SUPPORTED OPERATION CODES
        &[options], // RCTD, REPORTING OPTIONS
        &[opcode], // REQUESTED OPERATION CODE
        &service_action.to_be_bytes(), // REQUESTED SERVICE ACTION
        &allocation.to_be_bytes(), // ALLOCATION LENGTH
        &[0],
        &[0], // CONTROL
    ])
}

/// Operation code, service action and CDB length of all commands that the unit says it has.
pub fn supported(disk: &mut Disk) -> Vec<(u8, Option<u16>, usize)> {
    let data = disk.read(&report(0, 0, 0, 4096), 4096);
    assert_eq!(u32::from_be_bytes(data[..4].try_into().unwrap()) as usize, data.len() - 4);
    let (descriptors, []) = data[4..].as_chunks::<8>() else { panic!("a descriptor is cut off") };
    let parse = |descriptor: &[u8; 8]| {
        let service_action = u16::from_be_bytes([descriptor[2], descriptor[3]]);
        let has_action = descriptor[5] & 0x01 != 0;
        assert!(has_action || service_action == 0);
        let length = u16::from_be_bytes([descriptor[6], descriptor[7]]);
        (descriptor[0], has_action.then_some(service_action), length.into())
    };
    descriptors.iter().map(parse).collect()
}

/// Those of them that get here: reservations are the kernel's, and only listed.
fn dispatched(disk: &mut Disk) -> Vec<(u8, Option<u16>, usize)> {
    let mut commands = supported(disk);
    commands.retain(|command| !matches!(command.0, 0x16 | 0x17 | 0x56 | 0x57 | 0x5e | 0x5f));
    commands
}

/// The usage data of a command.
pub fn usage(disk: &mut Disk, opcode: u8, service_action: Option<u16>) -> Vec<u8> {
    let data = disk.read(&report(3, opcode, service_action.unwrap_or(0), 4096), 4096);
    assert_eq!(data[1], 0x03, "supported as in the standard");
    assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])), data.len() - 4);
    data[4..].to_vec()
}

/// Puts the service action in its place, and with it the length of a long CDB.
pub fn set_action(cdb: &mut [u8], service_action: Option<u16>) {
    match service_action {
        Some(action) if cdb[0] == 0x7f => {
            cdb[7] = 0x18;
            cdb[8..10].copy_from_slice(&action.to_be_bytes());
        }
        Some(action) => cdb[1] |= action as u8,
        None => (),
    }
}

/// Data-Out with which the valid CDB of a command is GOOD.
fn data_out(opcode: u8) -> Vec<u8> {
    let mut data = vec![0; if opcode == 0x89 { 1024 } else { 512 }];
    if opcode == 0x48 {
        data[..4].copy_from_slice(&[1, 0, 0, 4]);
    }
    data
}

/// A CDB that is GOOD with a buffer of 512 bytes of zeroes.
fn valid(opcode: u8, service_action: Option<u16>, length: usize) -> Vec<u8> {
    let mut cdb = vec![0; length];
    cdb[0] = opcode;
    set_action(&mut cdb, service_action);
    match opcode {
        0x4c | 0x4d => cdb[2] = 0x40,
        0x48 if service_action == Some(1) => {
            cdb[8] = 8;
        }
        0x7f if service_action == Some(0x0d) => cdb[31] = 1,
        0x08 | 0x0a => cdb[4] = 1,
        0x1a | 0x5a => cdb[2] = 0x3f,
        0x41 => cdb[8] = 1,
        0x89 | 0x93 => cdb[13] = 1,
        _ => (),
    }
    cdb
}

/// So that there is a copy for RECEIVE COPY STATUS to tell of.
fn copy_nothing(disk: &mut Disk) {
    let list = parameter_list(0, 0, &[], &[]);
    assert_good(disk.write(&extended_copy(&list), &list));
}

#[test]
fn every_listed_command_is_answered() {
    let mut disk = Disk::new(16, ALL);
    copy_nothing(&mut disk);
    for (opcode, action, length) in dispatched(&mut disk) {
        let reply = disk.write(&valid(opcode, action, length), &data_out(opcode));
        assert_good(reply);
        disk.command(&[0x1b, 0, 0, 0, 1, 0]);
    }
}

#[test]
fn every_other_operation_code_is_invalid() {
    let mut disk = Disk::new(16, ALL);
    let listed: Vec<u8> = supported(&mut disk).iter().map(|command| command.0).collect();
    for opcode in (0..=u8::MAX).filter(|opcode| !listed.contains(opcode)) {
        for length in [1, 6, 10, 16, 32, 260] {
            let mut cdb = vec![0; length];
            cdb[0] = opcode;
            assert_check(disk.command(&cdb), Sense::INVALID_OPCODE);
        }
        let data = disk.read(&report(1, opcode, 0, 255), 255);
        assert_eq!(data, [0, 0x01, 0, 0], "not supported");
    }
    assert_check(disk.command(&[]), Sense::INVALID_OPCODE);
}

#[test]
fn an_unknown_service_action_is_an_invalid_field() {
    let mut disk = Disk::new(16, ALL);
    // READ CAPACITY(16), GET LBA STATUS and the REPORT SUPPORTED commands are there; REPORT TARGET PORT GROUPS is not.
    for (opcode, known) in [(0x9e, [0x10, 0x12]), (0xa3, [0x0c, 0x0d])] {
        for action in (0..0x20).filter(|action| !known.contains(action)) {
            let mut cdb = vec![0; 16];
            cdb[..2].copy_from_slice(&[opcode, action]);
            assert_invalid_field(disk.command(&cdb), 1, 4);
        }
        assert_invalid_field(disk.command(&[opcode]), 1, 4);
    }
}

#[test]
fn reservations_are_listed_but_not_ours() {
    let mut disk = Disk::new(16, ALL);
    let (ours, all) = (dispatched(&mut disk), supported(&mut disk));
    assert_eq!(all.len() - ours.len(), 4 + 4 + 8);
    for (opcode, action, length) in all.into_iter().filter(|command| !ours.contains(command)) {
        assert_eq!(usage(&mut disk, opcode, action)[0], opcode);
        assert_check(disk.command(&valid(opcode, action, length)), Sense::INVALID_OPCODE);
    }
}

#[test]
fn every_reserved_bit_is_refused() {
    // In SCSI-2 the LUN was here; see `Command::validate`.
    let is_obsolete_lun = |length, byte, bit| length == 6 && byte == 1 && bit >= 5;
    let few = Capabilities { discard: false, ..ALL };
    for capabilities in [ALL, few] {
        let mut disk = Disk::new(16, capabilities);
        for (opcode, action, length) in dispatched(&mut disk) {
            let usage = usage(&mut disk, opcode, action);
            assert_eq!((usage[0], usage.len()), (opcode, length));
            for (byte, bit) in (1..length).flat_map(|byte| (0..8).map(move |bit| (byte, bit))) {
                let is_action = action.is_some()
                    && if opcode == 0x7f { (7..10).contains(&byte) } else { byte == 1 && bit < 5 };
                if usage[byte] >> bit & 1 != 0 || is_action {
                    continue;
                }
                let mut cdb = valid(opcode, action, length);
                cdb[byte] |= 1 << bit;
                let reply = disk.write(&cdb, &data_out(opcode));
                if is_obsolete_lun(length, byte, bit) {
                    assert_good(reply);
                    disk.command(&[0x1b, 0, 0, 0, 1, 0]);
                } else {
                    assert_invalid_field(reply, byte as u16, bit);
                }
            }
        }
    }
}

#[test]
fn a_cdb_that_is_too_short_is_refused() {
    let mut disk = Disk::new(16, ALL);
    for (opcode, action, length) in dispatched(&mut disk) {
        for short in 2..length {
            let reply = disk.write(&valid(opcode, action, length)[..short], &data_out(opcode));
            // Without its service action no command of variable length is known.
            let at = if opcode == 0x7f && short < 10 { 8 } else { short };
            assert_invalid_field(reply, at as u16, 7);
        }
    }
}

#[test]
fn what_follows_the_cdb_is_ignored() {
    let mut disk = Disk::new(16, ALL);
    copy_nothing(&mut disk);
    for (opcode, action, length) in dispatched(&mut disk) {
        let mut cdb = valid(opcode, action, length);
        cdb.extend([0xff; 20]);
        assert_good(disk.write(&cdb, &data_out(opcode)));
        disk.command(&[0x1b, 0, 0, 0, 1, 0]);
    }
}

#[test]
fn the_list() {
    let names = |capabilities| {
        let mut disk = Disk::new(16, capabilities);
        let list = dispatched(&mut disk);
        assert!(list.is_sorted());
        list.into_iter()
            .map(|(opcode, action, length)| {
                opcodes::find(&valid(opcode, action, length), &disk.lu).unwrap().name()
            })
            .collect::<Vec<_>>()
    };
    let all = [
        "TEST UNIT READY",
        "REQUEST SENSE",
        "FORMAT UNIT",
        "READ(6)",
        "WRITE(6)",
        "INQUIRY",
        "MODE SELECT(6)",
        "MODE SENSE(6)",
        "START STOP UNIT",
        "READ CAPACITY(10)",
        "READ(10)",
        "WRITE(10)",
        "WRITE AND VERIFY(10)",
        "VERIFY(10)",
        "PRE-FETCH(10)",
        "SYNCHRONIZE CACHE(10)",
        "READ DEFECT DATA(10)",
        "WRITE SAME(10)",
        "UNMAP",
        "SANITIZE, OVERWRITE",
        "SANITIZE, BLOCK ERASE",
        "SANITIZE, EXIT FAILURE MODE",
        "LOG SELECT",
        "LOG SENSE",
        "MODE SELECT(10)",
        "MODE SENSE(10)",
        "READ(32)",
        "VERIFY(32)",
        "WRITE(32)",
        "WRITE AND VERIFY(32)",
        "WRITE SAME(32)",
        "EXTENDED COPY(LID1)",
        "RECEIVE COPY STATUS(LID1)",
        "RECEIVE COPY OPERATING PARAMETERS",
        "RECEIVE COPY FAILURE DETAILS(LID1)",
        "READ(16)",
        "COMPARE AND WRITE",
        "WRITE(16)",
        "ORWRITE(16)",
        "WRITE AND VERIFY(16)",
        "VERIFY(16)",
        "PRE-FETCH(16)",
        "SYNCHRONIZE CACHE(16)",
        "WRITE SAME(16)",
        "READ CAPACITY(16)",
        "GET LBA STATUS",
        "REPORT LUNS",
        "REPORT SUPPORTED OPERATION CODES",
        "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        "READ(12)",
        "WRITE(12)",
        "WRITE AND VERIFY(12)",
        "VERIFY(12)",
        "READ DEFECT DATA(12)",
    ];
    assert_eq!(names(ALL), all);
    let full = names(Capabilities { discard: false, ..ALL });
    assert_eq!(
        full,
        all.into_iter().filter(|name| !["UNMAP", "SANITIZE, BLOCK ERASE"].contains(name)).collect::<Vec<_>>()
    );
}

#[test]
fn directions() {
    let direction = |opcode| opcodes::find(&[opcode; 16], &Disk::new(8, ALL).lu).unwrap().direction();
    assert_eq!(direction(0x00), Direction::None);
    assert_eq!(direction(0x88), Direction::In);
    assert_eq!(direction(0x93), Direction::Out);
}

#[test]
fn one_command() {
    let mut disk = Disk::new(16, ALL);
    #[rustfmt::skip]
    assert_eq!(disk.read(&report(1, 0x28, 0, 255), 255), [
        0,
        0x03, // supported as in the standard
        0, 10, // CDB SIZE
        0x28,
        0xfa, // RDPROTECT, DPO, FUA, FUA_NV
        0xff, 0xff, 0xff, 0xff, // LOGICAL BLOCK ADDRESS
        0,
        0xff, 0xff, // TRANSFER LENGTH
        0,
    ]);
    let capacity = disk.read(&report(2, 0x9e, 0x10, 255), 255);
    assert_eq!(capacity[..6], [0, 0x03, 0, 16, 0x9e, 0x10]);
    // UNMAP is a bit of WRITE SAME only where it can be.
    assert_eq!(usage(&mut disk, 0x93, None)[1], 0xe9);
    let mut disk = Disk::new(16, Capabilities { discard_zeroes: false, ..ALL });
    assert_eq!(usage(&mut disk, 0x93, None)[1], 0xe1);
}

#[test]
fn reporting_options_go_with_service_actions() {
    let mut disk = Disk::new(16, ALL);
    let not_supported = [0, 0x01, 0, 0];
    assert_invalid_field(disk.command(&report(1, 0x9e, 0, 255)), 2, 2);
    assert_invalid_field(disk.command(&report(2, 0x28, 0, 255)), 2, 2);
    assert_eq!(disk.read(&report(2, 0x9e, 0x11, 255), 255), not_supported);
    assert_eq!(disk.read(&report(3, 0x9e, 0x11, 255), 255), not_supported);
    assert_eq!(disk.read(&report(3, 0x28, 0x01, 255), 255), not_supported);
    assert_eq!(disk.read(&report(3, 0x28, 0x00, 255), 255)[1], 0x03);
    for options in 4..8 {
        assert_invalid_field(disk.command(&report(options, 0x28, 0, 255)), 2, 2);
    }
}

#[test]
fn timeouts_descriptors() {
    let mut disk = Disk::new(16, ALL);
    let commands = supported(&mut disk).len();
    let data = disk.read(&report(RCTD, 0, 0, 4096), 4096);
    assert_eq!(data.len(), 4 + commands * 20);
    for descriptor in data[4..].as_chunks::<20>().0 {
        assert_eq!(descriptor[5] & 0x02, 0x02, "CTDP");
        assert_eq!(descriptor[8..10], [0, 0x0a]);
    }
    let data = disk.read(&report(RCTD | 1, 0x00, 0, 255), 255);
    assert_eq!((data.len(), data[1]), (4 + 6 + 12, 0x83));
}

#[test]
fn task_management_functions() {
    let mut disk = Disk::new(16, ALL);
    let mut cdb = [0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0];
    assert_eq!(disk.read(&cdb, 255), [0x88, 0, 0, 0]);
    cdb[2] = 0x80;
    let data = disk.read(&cdb, 255);
    assert_eq!((data.len(), &data[..4]), (16, [0x88, 0, 0, 0x0c].as_slice()));
}

#[test]
fn the_list_is_truncated_like_all_data() {
    let mut disk = Disk::new(16, ALL);
    let whole = disk.read(&report(0, 0, 0, u32::MAX), 4096);
    for length in [0, 1, 4, 11] {
        assert_eq!(disk.read(&report(0, 0, 0, length), 4096), whole[..length as usize]);
        let buffer = Buffer::stale(length as usize);
        assert_eq!(disk.run(&report(0, 0, 0, u32::MAX), &buffer).data_in, length as usize);
    }
}
