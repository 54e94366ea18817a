//! COMPARE AND WRITE, ORWRITE, WRITE ATOMIC and PRE-FETCH.

use tcmu::scsi::{Geometry, Sense, Verb};

use crate::disk::{ALL, Disk, assert_check, assert_good, assert_invalid_field, fields};

const FUA: u8 = 0x08;

#[rustfmt::skip]
fn compare_and_write(flags: u8, lba: u64, blocks: u8) -> Vec<u8> {
    fields(&[
        &[0x89], // COMPARE AND WRITE
        &[flags], // WRPROTECT, DPO, FUA, FUA_NV
        &lba.to_be_bytes(),
        &[0, 0, 0],
        &[blocks], // NUMBER OF LOGICAL BLOCKS
        &[0], // GROUP NUMBER
        &[0], // CONTROL
    ])
}

fn sixteen(opcode: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    fields(&[&[opcode, flags], &lba.to_be_bytes(), &blocks.to_be_bytes(), &[0, 0]])
}

#[test]
fn blocks_that_are_as_expected_are_replaced() {
    let mut disk = Disk::new(300, ALL);
    for blocks in [1, 2, 255] {
        let length = usize::from(blocks) * 512;
        disk.medium.fill(1);
        let data = [vec![1; length], vec![2; length]].concat();
        assert_good(disk.write(&compare_and_write(0, 3, blocks), &data));
        assert_eq!(disk.medium[3 * 512..][..length], vec![2; length]);
        assert_eq!(disk.verbs(), [Verb::Read, Verb::Write]);
    }
    assert_good(disk.command(&compare_and_write(0, 3, 0)));
    // 256 blocks, as somebody may think.
    assert_invalid_field(disk.write(&compare_and_write(0, 3, 0), &[0; 2 * 256 * 512]), 13, 7);
    assert_good(disk.write(&compare_and_write(FUA, 299, 1), &[[1; 512], [2; 512]].concat()));
    assert_eq!(disk.verbs(), [Verb::Read, Verb::Write, Verb::Flush]);
}

#[test]
fn a_miscompare_changes_nothing_and_says_where() {
    let mut disk = Disk::new(16, ALL);
    for at in [0, 1, 511, 512, 1023] {
        let mut data = vec![0; 2048];
        data[at] = 1;
        data[1024..].fill(9);
        let reply = disk.write(&compare_and_write(0, 3, 2), &data);
        assert_check(reply, Sense::MISCOMPARE);
        assert_eq!(reply.sense.unwrap().information, Some(at as u64));
        assert_eq!(disk.verbs(), [Verb::Read]);
    }
}

#[test]
fn compare_and_write_that_is_refused() {
    let geometry = Geometry { max_compare_blocks: 4, ..Geometry::new(512, 16 * 512) };
    let mut disk = Disk::with(geometry, ALL);
    assert_invalid_field(disk.write(&compare_and_write(0, 0, 5), &[0; 5120]), 13, 7);
    assert_invalid_field(disk.write(&compare_and_write(0x20, 0, 1), &[0; 1024]), 1, 7);
    assert_check(disk.write(&compare_and_write(0, 15, 2), &[0; 2048]), Sense::LBA_OUT_OF_RANGE);
    for length in [0, 512, 1023, 1025, 2048] {
        let reply = disk.write(&compare_and_write(0, 0, 1), &vec![0; length]);
        assert_check(reply, Sense::INVALID_FIELD_IN_INFORMATION_UNIT);
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn orwrite_sets_bits() {
    let mut disk = Disk::new(5000, ALL);
    disk.medium.fill(0x0c);
    assert_good(disk.write(&sixteen(0x8b, 0, 1, 4998), &vec![0x0a; 4998 * 512]));
    assert!(disk.medium[512..4999 * 512].iter().all(|&byte| byte == 0x0e));
    assert_eq!((disk.medium[511], disk.medium[4999 * 512]), (0x0c, 0x0c));
    assert_eq!(disk.verbs(), [Verb::Read, Verb::Write].repeat(3));
    assert_good(disk.write(&sixteen(0x8b, FUA, 0, 1), &[0x0a; 512]));
    assert_eq!(disk.verbs(), [Verb::Read, Verb::Write, Verb::Flush]);
    assert_good(disk.command(&sixteen(0x8b, 0, 0, 0)));
    assert_eq!(disk.verbs(), []);
}

#[test]
fn write_atomic_takes_what_the_handler_promises() {
    let cdb = |lba: u64, boundary: u16, blocks: u16| {
        let (boundary, blocks) = (boundary.to_be_bytes(), blocks.to_be_bytes());
        fields(&[&[0x9c, 0], &lba.to_be_bytes(), &boundary, &blocks, &[0, 0]])
    };
    assert_check(Disk::new(16, ALL).write(&cdb(0, 0, 1), &[1; 512]), Sense::INVALID_OPCODE);
    let geometry = Geometry { max_atomic_write_blocks: 4, ..Geometry::new(512, 16 * 512) };
    let mut disk = Disk::with(geometry, ALL);
    assert_good(disk.write(&cdb(12, 0, 4), &[1; 2048]));
    assert_eq!(disk.medium[12 * 512..], [1; 2048]);
    assert_good(disk.command(&cdb(0, 0, 0)));
    assert_invalid_field(disk.write(&cdb(0, 0, 5), &[1; 2560]), 12, 7);
    assert_invalid_field(disk.write(&cdb(0, 1, 1), &[1; 512]), 11, 0);
    assert_check(disk.write(&cdb(13, 0, 4), &[1; 2048]), Sense::LBA_OUT_OF_RANGE);
    assert_check(disk.write(&cdb(16, 0, 0), &[]), Sense::LBA_OUT_OF_RANGE);
}

#[test]
fn prefetch() {
    let mut disk = Disk::new(16, ALL);
    for immediate in [0, 0x02] {
        assert_good(disk.command(&sixteen(0x90, immediate, 0, 16)));
        assert_good(disk.command(&[0x34, immediate, 0, 0, 0, 15, 0, 0, 1, 0]));
        assert_check(disk.command(&sixteen(0x90, immediate, 16, 0)), Sense::LBA_OUT_OF_RANGE);
        assert_check(disk.command(&[0x34, immediate, 0, 0, 0, 15, 0, 0, 2, 0]), Sense::LBA_OUT_OF_RANGE);
    }
}
