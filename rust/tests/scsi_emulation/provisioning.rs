//! UNMAP and WRITE SAME.

use tcmu::scsi::sense::KeySpecific;
use tcmu::scsi::{Capabilities, Geometry, Next, Sense, StepResult, Verb};

use crate::disk::{ALL, Buffer, DISCARDED, Disk, assert_check, assert_good, assert_invalid_field, fields};

const NDOB: u8 = 0x01;
const UNMAP: u8 = 0x08;
const ANCHOR: u8 = 0x10;

#[rustfmt::skip]
fn unmap_cdb(length: u16) -> Vec<u8> {
    fields(&[
        &[0x42], // UNMAP
        &[0], // ANCHOR
        &[0; 4],
        &[0], // GROUP NUMBER
        &length.to_be_bytes(), // PARAMETER LIST LENGTH
        &[0], // CONTROL
    ])
}

fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let descriptors = ranges.len() as u16 * 16;
    #[rustfmt::skip]
    let mut list = [
        (descriptors + 6).to_be_bytes().as_slice(), // UNMAP DATA LENGTH
        &descriptors.to_be_bytes(), // UNMAP BLOCK DESCRIPTOR DATA LENGTH
        &[0; 4],
    ].concat();
    for (lba, blocks) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

fn unmap(disk: &mut Disk, ranges: &[(u64, u32)]) -> tcmu::scsi::Reply {
    let list = unmap_list(ranges);
    disk.write(&unmap_cdb(list.len() as u16), &list)
}

#[rustfmt::skip]
fn write_same_10(flags: u8, lba: u32, blocks: u16) -> Vec<u8> {
    fields(&[
        &[0x41], // WRITE SAME(10)
        &[flags], // WRPROTECT, ANCHOR, UNMAP
        &lba.to_be_bytes(),
        &[0], // GROUP NUMBER
        &blocks.to_be_bytes(), // NUMBER OF LOGICAL BLOCKS
        &[0], // CONTROL
    ])
}

#[rustfmt::skip]
fn write_same_16(flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    fields(&[
        &[0x93], // WRITE SAME(16)
        &[flags], // WRPROTECT, ANCHOR, UNMAP, NDOB
        &lba.to_be_bytes(),
        &blocks.to_be_bytes(), // NUMBER OF LOGICAL BLOCKS
        &[0], // GROUP NUMBER
        &[0], // CONTROL
    ])
}

fn full_disk(blocks: u64, capabilities: Capabilities) -> Disk {
    let mut disk = Disk::new(blocks, capabilities);
    disk.medium.fill(1);
    disk
}

/// Granules of 8 blocks that start at block 4.
fn granular_disk(capabilities: Capabilities) -> Disk {
    let geometry =
        Geometry { discard_granularity: 8 * 512, discard_alignment: 4 * 512, ..Geometry::new(512, 50 * 512) };
    let mut disk = Disk::with(geometry, capabilities);
    disk.medium.fill(1);
    disk
}

fn blocks_that_are(disk: &Disk, value: u8) -> Vec<usize> {
    let blocks = disk.medium.chunks(512).enumerate();
    blocks.filter(|(_, block)| block.iter().all(|&byte| byte == value)).map(|(at, _)| at).collect()
}

#[test]
fn unmap_discards_its_ranges() {
    let mut disk = full_disk(16, ALL);
    // Adjacent, overlapping, empty, and up to the end.
    assert_good(unmap(&mut disk, &[(1, 2), (3, 1), (2, 2), (9, 0), (16, 0), (15, 1)]));
    assert_eq!(blocks_that_are(&disk, 0), [1, 2, 3, 15]);
    assert_eq!(disk.verbs(), [Verb::Discard; 4]);
}

#[test]
fn unmap_of_nothing() {
    let mut disk = full_disk(16, ALL);
    assert_good(disk.command(&unmap_cdb(0)));
    assert_good(unmap(&mut disk, &[]));
    assert_good(unmap(&mut disk, &[(16, 0)]));
    assert_eq!(disk.verbs(), []);
}

#[test]
fn unmap_checks_all_ranges_before_the_first_is_touched() {
    let mut disk = full_disk(16, ALL);
    for bad in [(16, 1), (15, 2), (17, 0), (u64::MAX, 1), (u64::MAX, u32::MAX)] {
        let reply = unmap(&mut disk, &[(0, 1), bad]);
        assert_eq!(reply.sense, Some(Sense::LBA_OUT_OF_RANGE.at_parameter(24)));
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn unmap_limits() {
    let geometry =
        Geometry { max_discard_blocks: 10, max_discard_descriptors: 3, ..Geometry::new(512, 512 * 64) };
    let mut disk = Disk::with(geometry, ALL);
    assert_good(unmap(&mut disk, &[(0, 4), (10, 4), (20, 2)]));
    disk.steps.clear();
    let reply = unmap(&mut disk, &[(0, 4), (10, 4), (20, 3)]);
    assert_eq!(reply.sense, Some(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(8 + 2 * 16 + 8)));
    let reply = unmap(&mut disk, &[(0, 1); 4]);
    assert_eq!(reply.sense, Some(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(2)));
    assert_eq!(disk.verbs(), []);
}

#[test]
fn unmap_lengths() {
    let mut disk = full_disk(16, ALL);
    let list = unmap_list(&[(0, 1), (4, 1)]);
    // Shorter than the header.
    for length in 1..8 {
        assert_check(disk.write(&unmap_cdb(length), &list), Sense::PARAMETER_LIST_LENGTH_ERROR);
    }
    // More than was sent; descriptors past the end of the list.
    assert_check(disk.write(&unmap_cdb(41), &list), Sense::PARAMETER_LIST_LENGTH_ERROR);
    assert_check(disk.write(&unmap_cdb(39), &list), Sense::PARAMETER_LIST_LENGTH_ERROR);
    // UNMAP DATA LENGTH contradicts the descriptors.
    let mut short = list.clone();
    short[1] = 37;
    let reply = disk.write(&unmap_cdb(40), &short);
    assert_check(reply, Sense::INVALID_FIELD_IN_PARAMETER_LIST);
    assert!(matches!(reply.sense.unwrap().specific, Some(KeySpecific::Parameter(field)) if field.byte == 0));
    assert_eq!(disk.verbs(), []);
    // An incomplete descriptor is ignored; so is what follows the descriptors.
    let mut incomplete = list.clone();
    incomplete[3] = 31;
    assert_good(disk.write(&unmap_cdb(40), &incomplete));
    assert_eq!(blocks_that_are(&disk, 0), [0]);
}

#[test]
fn unmap_discards_whole_granules_and_zeroes_the_rest() {
    let mut disk = granular_disk(ALL);
    assert_good(unmap(&mut disk, &[(2, 20)]));
    assert_eq!(disk.verbs(), [Verb::WriteZeroes, Verb::Discard, Verb::WriteZeroes]);
    assert_eq!(blocks_that_are(&disk, 0), (2..22).collect::<Vec<_>>());
    assert_good(unmap(&mut disk, &[(5, 6)]));
    assert_eq!(disk.verbs(), [Verb::WriteZeroes]);
}

#[test]
fn unmap_without_the_promise_of_zeroes_leaves_partial_granules() {
    let mut disk = granular_disk(Capabilities { discard_zeroes: false, ..ALL });
    assert_good(unmap(&mut disk, &[(2, 20), (24, 5)]));
    assert_eq!(disk.verbs(), [Verb::Discard]);
    assert_eq!(blocks_that_are(&disk, DISCARDED), (4..20).collect::<Vec<_>>());
}

#[test]
fn the_last_granule_may_be_short() {
    let mut disk = granular_disk(ALL);
    assert_good(unmap(&mut disk, &[(44, 6)]));
    assert_eq!(disk.verbs(), [Verb::Discard]);
}

#[test]
fn without_discard_there_is_no_unmap() {
    let mut disk = full_disk(16, Capabilities { discard: false, ..ALL });
    assert_check(unmap(&mut disk, &[(0, 1)]), Sense::INVALID_OPCODE);
    assert_invalid_field(disk.write(&write_same_16(UNMAP, 0, 1), &[0; 512]), 1, 3);
    let mut disk = full_disk(16, Capabilities { discard_zeroes: false, ..ALL });
    assert_good(unmap(&mut disk, &[(0, 1)]));
    assert_invalid_field(disk.write(&write_same_10(UNMAP, 0, 1), &[0; 512]), 1, 3);
}

#[test]
fn anchoring_is_refused() {
    let mut disk = full_disk(16, ALL);
    let mut cdb = unmap_cdb(24);
    cdb[1] = 0x01;
    assert_invalid_field(disk.write(&cdb, &unmap_list(&[(0, 1)])), 1, 0);
    for flags in [ANCHOR, ANCHOR | UNMAP] {
        assert_invalid_field(disk.write(&write_same_16(flags, 0, 1), &[0; 512]), 1, 4);
        assert_invalid_field(disk.write(&write_same_10(flags, 0, 1), &[0; 512]), 1, 4);
    }
}

#[test]
fn write_same_writes_the_block() {
    let block: Vec<u8> = (0..512).map(|at| at as u8).collect();
    for cdb in [write_same_10(0, 3, 5), write_same_16(0, 3, 5), write_same_16(UNMAP, 3, 5)] {
        let mut disk = Disk::new(16, ALL);
        assert_good(disk.write(&cdb, &block));
        assert_eq!(disk.verbs(), [Verb::Write]);
        assert_eq!(disk.medium[3 * 512..8 * 512], block.repeat(5));
        assert_eq!(disk.medium[8 * 512..], [0; 8 * 512]);
    }
}

#[test]
fn write_same_goes_in_chunks() {
    let blocks = 5000;
    let mut disk = Disk::new(blocks, ALL);
    assert_good(disk.write(&write_same_16(0, 0, blocks as u32), &[3; 512]));
    assert!(disk.medium.iter().all(|&byte| byte == 3));
    assert!(disk.steps.iter().all(|step| step.length <= 1 << 20));
    assert_eq!(disk.verbs(), [Verb::Write; 3]);
}

#[test]
fn write_same_of_zeroes() {
    let cases = [
        (ALL, 0, Verb::WriteZeroes),
        (ALL, UNMAP, Verb::Discard),
        (Capabilities { write_zeroes: false, ..ALL }, 0, Verb::Write),
        (Capabilities { write_zeroes: false, ..ALL }, UNMAP, Verb::Discard),
    ];
    for (capabilities, flags, verb) in cases {
        for (cdb, data) in [
            (write_same_16(flags, 2, 3), [0; 512].as_slice()),
            (write_same_10(flags, 2, 3), &[0; 512]),
            (write_same_16(flags | NDOB, 2, 3), &[]),
        ] {
            let mut disk = full_disk(16, capabilities);
            assert_good(disk.write(&cdb, data));
            assert_eq!(disk.verbs(), [verb]);
            assert_eq!(blocks_that_are(&disk, 0), [2, 3, 4]);
        }
    }
}

#[test]
fn write_same_with_unmap_zeroes_partial_granules() {
    let mut disk = granular_disk(Capabilities { write_zeroes: false, ..ALL });
    assert_good(disk.write(&write_same_16(UNMAP | NDOB, 1, 30), &[]));
    assert_eq!(disk.verbs(), [Verb::Write, Verb::Discard, Verb::Write]);
    assert_eq!(blocks_that_are(&disk, 0), (1..31).collect::<Vec<_>>());
}

#[test]
fn write_same_lengths() {
    let geometry = Geometry { max_write_same_blocks: 4, ..Geometry::new(512, 16 * 512) };
    let mut disk = Disk::with(geometry, ALL);
    for blocks in [0, 5] {
        assert_invalid_field(disk.write(&write_same_10(0, 0, blocks), &[0; 512]), 7, 7);
        assert_invalid_field(disk.write(&write_same_16(0, 0, blocks.into()), &[0; 512]), 10, 7);
    }
    assert_check(disk.write(&write_same_10(0, 14, 3), &[0; 512]), Sense::LBA_OUT_OF_RANGE);
    assert_check(disk.write(&write_same_16(0, u64::MAX, u32::MAX), &[0; 512]), Sense::LBA_OUT_OF_RANGE);
    // Exactly one block is sent.
    for length in [0, 256, 511, 513, 1024] {
        let reply = disk.write(&write_same_16(0, 0, 1), &vec![0; length]);
        assert_check(reply, Sense::INVALID_FIELD_IN_CDB);
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn write_same_ten_has_no_ndob() {
    assert_invalid_field(Disk::new(16, ALL).command(&write_same_10(NDOB, 0, 1)), 1, 0);
}

#[test]
fn write_same_refuses_protection_and_write_protection() {
    let mut disk = full_disk(16, ALL);
    for protect in 1..8 {
        assert_invalid_field(disk.write(&write_same_10(protect << 5, 0, 1), &[0; 512]), 1, 7);
        assert_invalid_field(disk.write(&write_same_16(protect << 5, 0, 1), &[0; 512]), 1, 7);
    }
    let mut disk = full_disk(16, Capabilities { write: false, ..ALL });
    assert_check(disk.command(&write_same_10(0xff, 0, 0)), Sense::WRITE_PROTECTED);
    assert_check(disk.command(&write_same_16(0, 0, 1)), Sense::WRITE_PROTECTED);
    assert_check(disk.command(&unmap_cdb(3)), Sense::WRITE_PROTECTED);
}

#[test]
fn without_a_write_cache_everything_is_flushed_once() {
    let mut disk = granular_disk(ALL);
    disk.lu.set_write_cache(false);
    assert_good(unmap(&mut disk, &[(2, 20), (30, 1)]));
    let (last, rest) = disk.steps.split_last().unwrap();
    assert_eq!(last.verb, Verb::Flush);
    assert!(rest.iter().all(|step| step.verb != Verb::Flush));
    assert!(!disk.volatile.contains(&true));
}

/// The handler is asked for nothing beyond the end of a disk that shrinks while a long command runs.
#[test]
fn a_shrinking_disk_ends_a_batch() {
    let disk = Disk::new(8192, ALL);
    let buffer = Buffer::from(vec![1; 512]);
    let Next::Call(_, task) = disk.lu.start(&write_same_16(0, 0, 8192), &buffer) else { panic!() };
    disk.lu.set_size(4096 * 512).unwrap();
    let Next::Done(reply) = disk.lu.resume(task, &buffer, StepResult::None) else { panic!() };
    assert_check(reply, Sense::LBA_OUT_OF_RANGE);
}
