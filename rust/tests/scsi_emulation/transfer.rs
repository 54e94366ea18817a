//! READ, WRITE and SYNCHRONIZE CACHE.

use tcmu::scsi::{ByteOffset, Capabilities, Geometry, LogicalUnit, Next, Sense, StepBuffer, Verb};

use crate::disk::{ALL, Buffer, Disk, assert_check, assert_good, assert_invalid_field, fields, identity};

const DPO: u8 = 0x10;
const FUA: u8 = 0x08;
const FUA_NV: u8 = 0x02;

fn six(opcode: u8, lba: u32, blocks: u8) -> Vec<u8> {
    let [_, high, middle, low] = lba.to_be_bytes();
    vec![opcode, high, middle, low, blocks, 0]
}

#[rustfmt::skip]
fn ten(opcode: u8, flags: u8, lba: u32, blocks: u16) -> Vec<u8> {
    fields(&[
        &[opcode],
        &[flags], // RDPROTECT or WRPROTECT, DPO, FUA, FUA_NV
        &lba.to_be_bytes(),
        &[0], // GROUP NUMBER
        &blocks.to_be_bytes(),
        &[0], // CONTROL
    ])
}

#[rustfmt::skip]
fn twelve(opcode: u8, flags: u8, lba: u32, blocks: u32) -> Vec<u8> {
    fields(&[
        &[opcode],
        &[flags],
        &lba.to_be_bytes(),
        &blocks.to_be_bytes(),
        &[0], // GROUP NUMBER
        &[0], // CONTROL
    ])
}

#[rustfmt::skip]
fn sixteen(opcode: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    fields(&[
        &[opcode],
        &[flags],
        &lba.to_be_bytes(),
        &blocks.to_be_bytes(),
        &[0], // GROUP NUMBER
        &[0], // CONTROL
    ])
}

/// The same READ or WRITE in all its forms.
fn forms(write: bool, lba: u32, blocks: u8) -> [Vec<u8>; 4] {
    let direction = if write { 2 } else { 0 };
    [
        six(0x08 + direction, lba, blocks),
        ten(0x28 + direction, 0, lba, blocks.into()),
        twelve(0xa8 + direction, 0, lba, blocks.into()),
        sixteen(0x88 + direction, 0, lba.into(), blocks.into()),
    ]
}

/// A CDB and where its LBA and transfer length fields start.
fn pointers(form: usize) -> ((u16, u8), u16) {
    [((1, 4), 4), ((2, 7), 7), ((2, 7), 6), ((2, 7), 10)][form]
}

#[test]
fn all_forms_reach_the_same_bytes() {
    for (form, (write, read)) in forms(true, 5, 3).into_iter().zip(forms(false, 5, 3)).enumerate() {
        let mut disk = Disk::new(16, ALL);
        let data: Vec<u8> = (0..3 * 512).map(|at| (at / 7 + form) as u8).collect();
        assert_good(disk.write(&write, &data));
        assert_eq!(disk.medium[5 * 512..8 * 512], data);
        assert_eq!(disk.read(&read, 3 * 512), data);
        let [write, read] = disk.steps.try_into().unwrap();
        assert_eq!((write.verb, write.offset, write.length), (Verb::Write, ByteOffset(5 * 512), 3 * 512));
        assert_eq!(read.buffer, StepBuffer::Command(0));
    }
}

#[test]
fn the_largest_addresses() {
    let blocks = (1 << 40) + 10;
    let lu = LogicalUnit::new(identity(), Geometry::new(4096, blocks * 4096), ALL).unwrap();
    let buffer = Buffer::stale(8192);
    let offset = |cdb: &[u8]| match lu.start(cdb, &buffer) {
        Next::Call(step, _) => step.offset.0 / 4096,
        other => panic!("{other:?}"),
    };
    assert_eq!(offset(&six(0x08, 0x1f_ffff, 1)), 0x1f_ffff);
    assert_eq!(offset(&ten(0x28, 0, u32::MAX, 2)), u64::from(u32::MAX));
    assert_eq!(offset(&twelve(0xa8, 0, u32::MAX, 2)), u64::from(u32::MAX));
    assert_eq!(offset(&sixteen(0x88, 0, blocks - 2, 2)), blocks - 2);
}

#[test]
fn zero_blocks_are_256_in_six_bytes() {
    let mut disk = Disk::new(300, ALL);
    assert_eq!(disk.read(&six(0x08, 0, 0), 256 * 512).len(), 256 * 512);
    assert_good(disk.write(&six(0x0a, 44, 0), &[1; 256 * 512]));
    assert_check(disk.write(&six(0x0a, 45, 0), &[1; 256 * 512]), Sense::LBA_OUT_OF_RANGE);
}

#[test]
fn zero_blocks_are_none_elsewhere() {
    let mut disk = Disk::new(16, ALL);
    for write in [false, true] {
        for cdb in &forms(write, 15, 0)[1..] {
            assert!(disk.read(cdb, 512).is_empty());
        }
        for cdb in &forms(write, 16, 0)[1..] {
            assert_check(disk.command(cdb), Sense::LBA_OUT_OF_RANGE);
        }
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn ranges_end_with_the_medium() {
    let mut disk = Disk::new(16, ALL);
    for write in [false, true] {
        for (lba, blocks) in [(16, 1), (15, 2), (14, 255), (0x1f_ffff, 1)] {
            for (form, cdb) in forms(write, lba, blocks).iter().enumerate() {
                let reply = disk.write(cdb, &[0; 255 * 512]);
                assert_check(reply, Sense::LBA_OUT_OF_RANGE);
                let ((byte, bit), _) = pointers(form);
                assert_eq!(reply.sense, Some(Sense::LBA_OUT_OF_RANGE.at_cdb(byte, bit)));
            }
        }
        let direction = if write { 2 } else { 0 };
        for (lba, blocks) in [(u64::MAX, u32::MAX), (u64::MAX, 1), (1 << 63, 1), (1 << 55, 0)] {
            let cdb = sixteen(0x88 + direction, 0, lba, blocks);
            assert_check(disk.write(&cdb, &[0; 512]), Sense::LBA_OUT_OF_RANGE);
        }
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn a_transfer_above_the_limit_is_refused() {
    let mut disk = Disk::with(Geometry { max_transfer_blocks: 4, ..Geometry::new(512, 8192) }, ALL);
    for write in [false, true] {
        for (form, cdb) in forms(write, 0, 5).iter().enumerate() {
            assert_invalid_field(disk.write(cdb, &[0; 5 * 512]), pointers(form).1, 7);
        }
        for cdb in &forms(write, 0, 4) {
            assert_good(disk.write(cdb, &[0; 4 * 512]));
        }
    }
}

/// A READ(10) of 8 blocks can arrive with a buffer of 512 bytes: the fabric believes the initiator's transport, which
/// has its own idea of the length.
#[test]
fn a_buffer_shorter_than_the_transfer_is_refused_before_anything_is_done() {
    let mut disk = Disk::new(16, ALL);
    for write in [false, true] {
        for cdb in &forms(write, 0, 2) {
            for length in [0, 1, 512, 1023] {
                let reply = disk.write(cdb, &vec![1; length]);
                assert_check(reply, Sense::INVALID_FIELD_IN_INFORMATION_UNIT);
            }
        }
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn a_buffer_longer_than_the_transfer_is_used_as_far_as_the_cdb_says() {
    let mut disk = Disk::new(16, ALL);
    for cdb in &forms(true, 2, 1) {
        assert_good(disk.write(cdb, &[7; 1000]));
    }
    assert_eq!(disk.medium[1024..1536], [7; 512]);
    assert_eq!(disk.medium[1536..], [0; 13 * 512]);
    for cdb in &forms(false, 2, 1) {
        assert_eq!(disk.read(cdb, 4096), [7; 512]);
    }
}

#[test]
fn protection_information_is_refused() {
    let mut disk = Disk::new(16, ALL);
    for protect in 1..8 {
        for write in [false, true] {
            for mut cdb in forms(write, 0, 1).into_iter().skip(1) {
                cdb[1] |= protect << 5;
                assert_invalid_field(disk.write(&cdb, &[0; 512]), 1, 7);
            }
        }
    }
}

#[test]
fn flags_that_are_reserved_are_refused() {
    let mut disk = Disk::new(16, ALL);
    for write in [false, true] {
        for form in 1..4 {
            let good = forms(write, 0, 1)[form].clone();
            // RARC, RELADR or DLD2; GROUP NUMBER; NACA
            let group = [6, 6, 10, 14][form];
            for (byte, bit) in [(1, 2), (1, 0), (group, 0), (group, 5), (good.len() - 1, 2)] {
                let mut cdb = good.clone();
                cdb[byte] |= 1 << bit;
                assert_invalid_field(disk.write(&cdb, &[0; 512]), byte as u16, bit);
            }
        }
    }
}

#[test]
fn a_write_with_fua_is_flushed() {
    for flags in [FUA, FUA_NV, DPO | FUA | FUA_NV] {
        let mut disk = Disk::new(16, ALL);
        assert_good(disk.write(&ten(0x2a, flags, 0, 1), &[1; 512]));
        assert_eq!(disk.verbs(), [Verb::Write, Verb::Flush]);
        assert!(!disk.volatile.contains(&true));
    }
    let mut disk = Disk::new(16, ALL);
    assert_good(disk.write(&ten(0x2a, DPO, 0, 1), &[1; 512]));
    assert_eq!(disk.verbs(), [Verb::Write]);
}

#[test]
fn a_write_without_a_write_cache_is_flushed() {
    let mut disk = Disk::new(16, ALL);
    disk.lu.set_write_cache(false);
    for cdb in &forms(true, 0, 1) {
        assert_good(disk.write(cdb, &[1; 512]));
        assert_eq!(disk.verbs(), [Verb::Write, Verb::Flush]);
    }
}

/// The flush that came with it was too early for their data, and the initiator will ask for no other one.
#[test]
fn writes_that_end_after_the_cache_was_turned_off_are_durable() {
    let twice = |block: &[u8]| block.repeat(2);
    let sixteen = |opcode: u8, blocks_at: usize| {
        let mut cdb = vec![0; 16];
        (cdb[0], cdb[blocks_at]) = (opcode, 1);
        cdb
    };
    for native_fua in [false, true] {
        for (cdb, data) in [
            (sixteen(0x8a, 13), vec![1; 512]),
            (sixteen(0x89, 13), twice(&[0; 512])),
            (sixteen(0x8b, 13), vec![1; 512]),
            (sixteen(0x93, 13), vec![1; 512]),
            (sixteen(0x9c, 13), vec![1; 512]),
        ] {
            let geometry = Geometry { max_atomic_write_blocks: 1, ..Geometry::new(512, 16 * 512) };
            let mut disk = Disk::with(geometry, Capabilities { native_fua, ..ALL });
            disk.loses_cache = true;
            assert_good(disk.write(&cdb, &data));
            assert_eq!(disk.verbs().last(), Some(&Verb::Flush), "{cdb:02x?}");
            assert!(!disk.volatile.contains(&true));
        }
    }
}

#[test]
fn a_handler_with_fua_of_its_own_needs_no_flush() {
    let mut disk = Disk::new(16, Capabilities { native_fua: true, ..ALL });
    assert_good(disk.write(&ten(0x2a, FUA, 0, 1), &[1; 512]));
    assert_good(disk.write(&ten(0x2a, 0, 0, 1), &[1; 512]));
    disk.lu.set_write_cache(false);
    assert_good(disk.write(&ten(0x2a, 0, 0, 1), &[1; 512]));
    assert_eq!(disk.steps.iter().map(|step| step.fua).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(disk.verbs(), [Verb::Write; 3]);
}

#[test]
fn without_flush_every_write_is_durable() {
    let mut disk = Disk::new(16, Capabilities { flush: false, native_fua: true, ..ALL });
    assert_good(disk.write(&ten(0x2a, FUA, 0, 1), &[1; 512]));
    assert_good(disk.command(&ten(0x35, 0, 0, 0)));
    assert_eq!(disk.verbs(), [Verb::Write]);
}

#[test]
fn a_read_with_fua_flushes_first() {
    let mut disk = Disk::new(16, ALL);
    assert_eq!(disk.read(&ten(0x28, FUA, 0, 2), 1024).len(), 1024);
    assert_eq!(disk.verbs(), [Verb::Flush, Verb::Read]);
    disk.lu.set_write_cache(false);
    disk.read(&ten(0x28, FUA, 0, 2), 1024);
    assert_eq!(disk.verbs(), [Verb::Read]);
}

#[test]
fn write_protection_comes_before_everything() {
    let mut disk = Disk::new(16, Capabilities { write: false, ..ALL });
    for cdb in &forms(true, 0xffff, 200) {
        assert_check(disk.command(cdb), Sense::WRITE_PROTECTED);
    }
    for cdb in &forms(false, 0, 1) {
        assert_eq!(disk.read(cdb, 512).len(), 512);
    }
}

#[test]
fn synchronize_cache() {
    const IMMED: u8 = 0x02;
    const SYNC_NV: u8 = 0x04;
    let mut disk = Disk::new(16, ALL);
    for flags in [0, IMMED, SYNC_NV] {
        for (lba, blocks) in [(0, 0), (0, 16), (15, 1)] {
            assert_good(disk.command(&ten(0x35, flags, lba, blocks)));
            assert_good(disk.command(&sixteen(0x91, flags, lba.into(), blocks.into())));
            assert_eq!(disk.verbs(), [Verb::Flush; 2]);
        }
    }
    for (lba, blocks) in [(16, 0), (0, 17), (15, 2)] {
        assert_check(disk.command(&ten(0x35, 0, lba, blocks)), Sense::LBA_OUT_OF_RANGE);
        assert_check(disk.command(&sixteen(0x91, 0, lba.into(), blocks.into())), Sense::LBA_OUT_OF_RANGE);
    }
    assert_check(disk.command(&sixteen(0x91, 0, u64::MAX, u32::MAX)), Sense::LBA_OUT_OF_RANGE);
}
