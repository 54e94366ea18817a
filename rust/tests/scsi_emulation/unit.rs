//! What a logical unit may be made of.

use tcmu::scsi::{Capabilities, Geometry, Identity, LogicalUnit, LunError, Sense};

use crate::disk::{ALL, Disk, NAA, assert_check, assert_good, identity};

fn refused(change: impl FnOnce(&mut Geometry)) -> LunError {
    let mut geometry = Geometry::new(512, 1 << 20);
    change(&mut geometry);
    LogicalUnit::new(identity(), geometry, ALL).unwrap_err()
}

#[test]
fn every_block_size_that_initiators_take() {
    for block_size in [512, 1024, 2048, 4096] {
        LogicalUnit::new(identity(), Geometry::new(block_size, 1 << 20), Capabilities::default()).unwrap();
    }
}

#[test]
fn geometries_that_do_not_fit_together() {
    for block_size in [0, 1, 256, 520, 3000, 8192, u32::MAX] {
        let error = LogicalUnit::new(identity(), Geometry::new(block_size, 1 << 20), ALL).unwrap_err();
        assert_eq!(error, LunError::BlockSize(block_size));
    }
    for size in [0, 511, 513, u64::MAX - 511, 1 << 63] {
        assert_eq!(refused(|geometry| geometry.size = size), LunError::Size { size, block_size: 512 });
    }
    for physical in [0, 256, 1000, 512 << 16] {
        let error = refused(|geometry| geometry.physical_block_size = physical);
        assert_eq!(error, LunError::PhysicalBlockSize { physical, block_size: 512 });
    }
    assert_eq!(refused(|geometry| geometry.max_transfer_blocks = 0), LunError::ZeroLimit);
    assert_eq!(refused(|geometry| geometry.max_write_same_blocks = 0), LunError::ZeroLimit);
    for (granularity, alignment) in [(0, 0), (100, 0), (4096, 4096), (4096, 100), (1 << 40, 0)] {
        let error = refused(|geometry| {
            geometry.discard_granularity = granularity;
            geometry.discard_alignment = alignment;
        });
        assert_eq!(error, LunError::Discard { granularity, alignment });
    }
    for blocks in [7, 12, 24] {
        let error = refused(|geometry| {
            geometry.physical_block_size = 4096;
            geometry.max_transfer_blocks = 16;
            geometry.optimal_transfer_blocks = blocks;
        });
        assert_eq!(error, LunError::OptimalTransfer { blocks, max: 16 });
    }
}

#[test]
fn identities_are_printable_and_fit() {
    let long = "x".repeat(129);
    let cases = [
        (Identity::new("NINECHARS", "p", "r", "s", NAA), "the vendor has 9 characters; 8 fit"),
        (Identity::new("v", "p\0", "r", "s", NAA), "the product must be printable ASCII"),
        (Identity::new("v", "p", "ä", "s", NAA), "the revision must be printable ASCII"),
        (Identity::new("v", "p", "r", &long, NAA), "the serial number has 129 characters; 128 fit"),
        (Identity::new("v", "p", "r", "", NAA), "the serial number is empty"),
        (
            Identity::new("v", "p", "r", "s", [0x50; 16]),
            "the designator must be of NAA type 6, but starts with 0x50",
        ),
    ];
    for (identity, message) in cases {
        assert_eq!(identity.unwrap_err().to_string(), message);
    }
}

#[test]
fn resizing_moves_the_end() {
    let mut disk = Disk::new(16, ALL);
    disk.medium.resize(32 * 512, 0);
    disk.lu.set_size(32 * 512).unwrap();
    assert_eq!(disk.lu.size(), 32 * 512);
    assert_check(disk.command(&[0; 6]), Sense::CAPACITY_DATA_HAS_CHANGED);
    assert_eq!(disk.read(&[0x08, 0, 0, 31, 1, 0], 512).len(), 512);
    assert_eq!(disk.lu.set_size(100), Err(LunError::Size { size: 100, block_size: 512 }));
    assert_eq!(disk.lu.size(), 32 * 512);
}

#[test]
fn a_new_capacity_is_told_once() {
    let mut disk = Disk::new(16, ALL);
    disk.lu.set_size(16 * 512).unwrap();
    assert_good(disk.command(&[0; 6]));
    disk.lu.set_size(8 * 512).unwrap();
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 36, 0], 36).len(), 36);
    assert_eq!(disk.read(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], 16).len(), 16);
    assert_check(disk.command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Sense::CAPACITY_DATA_HAS_CHANGED);
    assert_good(disk.command(&[0; 6]));
    disk.lu.set_size(16 * 512).unwrap();
    let sense = disk.read(&[0x03, 0, 0, 0, 18, 0], 18);
    assert_eq!((sense[2], sense[12], sense[13]), (0x06, 0x2a, 0x09));
    assert_good(disk.command(&[0; 6]));
}

#[test]
fn a_unit_whose_process_has_died_tells_that_it_was_reset() {
    let mut disk = Disk::new(16, ALL);
    disk.lu.announce_capacity();
    disk.lu.announce_reset();
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 36, 0], 36).len(), 36);
    // The reset goes first, and the other is not lost behind it.
    assert_check(disk.command(&[0; 6]), Sense::DEVICE_INTERNAL_RESET);
    assert_check(disk.command(&[0; 6]), Sense::CAPACITY_DATA_HAS_CHANGED);
    assert_good(disk.command(&[0; 6]));
    // One that was not told yet goes on in another process.
    disk.lu.announce_reset();
    let state: Vec<_> = disk.lu.state().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let mut heir = Disk::new(16, ALL);
    assert!(heir.lu.restore(&state));
    assert_check(heir.command(&[0; 6]), Sense::DEVICE_INTERNAL_RESET);
}

#[test]
fn there_is_no_write_cache_without_flush() {
    let disk = Disk::new(8, Capabilities { flush: false, ..ALL });
    disk.lu.set_write_cache(true);
    assert!(!disk.lu.has_write_cache());
}

#[test]
fn a_unit_is_shared_by_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<LogicalUnit>();
}
