//! VERIFY and WRITE AND VERIFY.

use tcmu::scsi::{Capabilities, Geometry, Sense, StepBuffer, Verb};

use crate::disk::{ALL, Disk, assert_check, assert_good, assert_invalid_field, fields};

/// A command on blocks in one of its forms: 10, 12, 16 or 32 bytes.
#[rustfmt::skip]
fn cdb(length: usize, opcode: u8, flags: u8, lba: u32, blocks: u16) -> Vec<u8> {
    let (short, long) = (lba.to_be_bytes(), u64::from(lba).to_be_bytes());
    let (few, many) = (blocks.to_be_bytes(), u32::from(blocks).to_be_bytes());
    match length {
        10 => fields(&[&[opcode, flags], &short, &[0], &few, &[0]]),
        12 => fields(&[&[opcode, flags], &short, &many, &[0, 0]]),
        16 => fields(&[&[opcode, flags], &long, &many, &[0, 0]]),
        _ => fields(&[
            &[0x7f, 0, 0, 0, 0, 0, 0],
            &[0x18], // ADDITIONAL CDB LENGTH
            &[0, opcode], // SERVICE ACTION
            &[flags, 0],
            &long,
            &[0xff; 8], // expected tags
            &many,
        ]),
    }
}

const VERIFY: [(usize, u8); 4] = [(10, 0x2f), (12, 0xaf), (16, 0x8f), (32, 0x0a)];
const WRITE_AND_VERIFY: [(usize, u8); 4] = [(10, 0x2e), (12, 0xae), (16, 0x8e), (32, 0x0c)];
const BYTCHK: u8 = 0x02;
const ONE_BLOCK: u8 = 0x06;

fn disk() -> Disk {
    let mut disk = Disk::new(64, ALL);
    disk.medium.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 5) as u8);
    disk
}

#[test]
fn data_is_compared() {
    for (length, opcode) in VERIFY {
        let mut disk = disk();
        let mut data = disk.medium[3 * 512..9 * 512].to_vec();
        assert_good(disk.write(&cdb(length, opcode, BYTCHK, 3, 6), &data));
        for at in [0, 1, 511, 512, 6 * 512 - 1] {
            data[at] ^= 1;
            let reply = disk.write(&cdb(length, opcode, BYTCHK, 3, 6), &data);
            assert_check(reply, Sense::MISCOMPARE);
            assert_eq!(reply.sense.unwrap().information, Some(at as u64));
            data[at] ^= 1;
        }
    }
}

#[test]
fn without_data_the_blocks_are_only_read() {
    for (length, opcode) in VERIFY {
        let mut disk = disk();
        assert_good(disk.command(&cdb(length, opcode, 0, 0, 64)));
        assert_eq!(disk.verbs(), [Verb::Flush, Verb::Read]);
        disk.lu.set_write_cache(false);
        assert_good(disk.command(&cdb(length, opcode, 0, 0, 64)));
        assert_eq!(disk.verbs(), [Verb::Read]);
        assert_good(disk.command(&cdb(length, opcode, 0, 5, 0)));
        assert_eq!(disk.verbs(), []);
    }
}

#[test]
fn one_block_is_compared_with_all() {
    for (length, opcode) in VERIFY {
        let mut disk = disk();
        disk.medium[512..8 * 512].fill(7);
        assert_good(disk.write(&cdb(length, opcode, ONE_BLOCK, 1, 7), &[7; 512]));
        disk.medium[4 * 512 + 9] = 8;
        let reply = disk.write(&cdb(length, opcode, ONE_BLOCK, 1, 7), &[7; 512]);
        assert_check(reply, Sense::MISCOMPARE);
        assert_eq!(reply.sense.unwrap().information, Some(9));
    }
}

#[test]
fn long_ranges_are_read_in_pieces() {
    let mut disk = Disk::new(5000, ALL);
    assert_good(disk.command(&cdb(10, 0x2f, 0, 0, 5000)));
    assert_eq!(disk.verbs(), [Verb::Flush, Verb::Read, Verb::Read, Verb::Read]);
    let data = vec![0; 5000 * 512];
    assert_good(disk.write(&cdb(16, 0x8f, BYTCHK, 0, 5000), &data));
    disk.medium[4999 * 512] = 1;
    let reply = disk.write(&cdb(16, 0x8f, BYTCHK, 0, 5000), &data);
    assert_eq!(reply.sense.unwrap().information, Some(4999 * 512));
}

#[test]
fn what_is_refused() {
    let geometry = Geometry { max_transfer_blocks: 8, ..Geometry::new(512, 64 * 512) };
    let mut disk = Disk::with(geometry, ALL);
    for (length, opcode) in VERIFY {
        let (flags, number) = [(1, 7), (1, 6), (1, 10), (10, 28)]
            [[10, 12, 16, 32].iter().position(|&known| known == length).unwrap()];
        assert_invalid_field(disk.write(&cdb(length, opcode, 0x04, 0, 1), &[0; 512]), flags, 2);
        assert_invalid_field(disk.write(&cdb(length, opcode, 0x20, 0, 1), &[0; 512]), flags, 7);
        assert_invalid_field(disk.write(&cdb(length, opcode, BYTCHK, 0, 9), &[0; 9 * 512]), number, 7);
        assert_check(disk.write(&cdb(length, opcode, 0, 60, 5), &[]), Sense::LBA_OUT_OF_RANGE);
        let short = disk.write(&cdb(length, opcode, BYTCHK, 0, 2), &[0; 1023]);
        assert_check(short, Sense::INVALID_FIELD_IN_INFORMATION_UNIT);
        assert_good(disk.command(&cdb(length, opcode, 0, 0, 64)));
    }
    let mut wrong = cdb(32, 0x0a, 0, 0, 1);
    wrong[7] = 0x10;
    assert_invalid_field(disk.command(&wrong), 7, 7);
}

#[test]
fn what_is_written_is_read_back_from_the_medium() {
    for (length, opcode) in WRITE_AND_VERIFY {
        for flags in [0, BYTCHK] {
            let mut disk = disk();
            assert_good(disk.write(&cdb(length, opcode, flags, 3, 2), &[9; 1024]));
            assert_eq!(disk.medium[3 * 512..5 * 512], [9; 1024]);
            assert_eq!(disk.verbs(), [Verb::Write, Verb::Flush, Verb::Read]);
            assert!(!disk.volatile.contains(&true));
        }
        let mut disk = disk();
        assert_invalid_field(
            disk.write(&cdb(length, opcode, ONE_BLOCK, 0, 1), &[0; 512]),
            if length == 32 { 10 } else { 1 },
            2,
        );
        let mut disk = Disk::new(8, Capabilities { native_fua: true, ..ALL });
        assert_good(disk.write(&cdb(length, opcode, BYTCHK, 0, 1), &[9; 512]));
        assert!(disk.steps[0].fua);
        assert_eq!(disk.steps[1].buffer, StepBuffer::Scratch);
        assert_eq!(disk.verbs(), [Verb::Write, Verb::Read]);
    }
}

#[test]
fn the_long_reads_and_writes() {
    let mut disk = disk();
    assert_good(disk.write(&cdb(32, 0x0b, 0x08, 5, 2), &[3; 1024]));
    assert_eq!(disk.verbs(), [Verb::Write, Verb::Flush]);
    assert_eq!(disk.read(&cdb(32, 0x09, 0, 5, 2), 1024), [3; 1024]);
    assert_good(disk.write(&cdb(32, 0x0d, 0, 6, 3), &[4; 512]));
    assert_eq!(disk.medium[6 * 512..9 * 512], [4; 3 * 512]);
    assert_good(disk.command(&cdb(32, 0x0d, 0x01, 6, 3)));
    assert_eq!(disk.medium[6 * 512..9 * 512], [0; 3 * 512]);
    assert_invalid_field(disk.command(&cdb(32, 0x0d, 0, 6, 0)), 28, 7);
}
