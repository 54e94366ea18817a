//! GET LBA STATUS.

use tcmu::scsi::BlockState::{Anchored, Deallocated, Mapped};
use tcmu::scsi::{BlockState, Capabilities, Geometry, MediumExtent, Sense};

use crate::disk::{ALL, Disk, assert_check, fields};

fn get_lba_status(lba: u64, allocation: u32) -> Vec<u8> {
    fields(&[&[0x9e, 0x12], &lba.to_be_bytes(), &allocation.to_be_bytes(), &[0, 0]])
}

/// First block, number of blocks, provisioning status.
fn status(disk: &mut Disk, lba: u64, allocation: u32) -> Vec<(u64, u32, u8)> {
    let data = disk.read(&get_lba_status(lba, allocation), 4096);
    assert_eq!(u32::from_be_bytes(data[..4].try_into().unwrap()) as usize, data.len() - 4);
    let (descriptors, []) = data[8..].as_chunks::<16>() else { panic!("a descriptor is cut off") };
    let parse = |descriptor: &[u8; 16]| {
        let lba = u64::from_be_bytes(descriptor[..8].try_into().unwrap());
        (lba, u32::from_be_bytes(descriptor[8..12].try_into().unwrap()), descriptor[12])
    };
    descriptors.iter().map(parse).collect()
}

fn extents(disk: &mut Disk, extents: &[(u64, BlockState)]) {
    disk.extents = extents.iter().map(|&(length, state)| MediumExtent { length, state }).collect();
}

#[test]
fn without_extents_everything_is_mapped() {
    let mut disk = Disk::new(16, Capabilities { extents: false, ..ALL });
    assert_eq!(status(&mut disk, 3, 255), [(3, 13, 0)]);
    assert_check(disk.command(&get_lba_status(16, 255)), Sense::LBA_OUT_OF_RANGE);
    let geometry = Geometry { size: 512 << 33, ..Geometry::new(512, 512) };
    let lu =
        tcmu::scsi::LogicalUnit::new(crate::disk::identity(), geometry, *disk.lu.capabilities()).unwrap();
    disk.lu = lu.into();
    assert_eq!(status(&mut disk, 0, 255), [(0, u32::MAX, 0)]);
}

#[test]
fn extents_become_descriptors() {
    let mut disk = Disk::new(16, ALL);
    extents(&mut disk, &[(1024, Mapped), (512, Deallocated), (512, Deallocated), (512, Anchored)]);
    assert_eq!(status(&mut disk, 0, 255), [(0, 2, 0), (2, 2, 1), (4, 1, 2)]);
    assert_eq!(status(&mut disk, 8, 255), [(8, 2, 0), (10, 2, 1), (12, 1, 2)]);
    assert_eq!(status(&mut disk, 14, 255), [(14, 2, 0)], "no further than the medium");
    assert_eq!(status(&mut disk, 0, 24), [(0, 2, 0)]);
    assert_eq!(status(&mut disk, 0, 55), [(0, 2, 0), (2, 2, 1)]);
    assert_eq!(disk.read(&get_lba_status(0, 6), 255), [0, 0, 0, 20, 0, 0]);
}

#[test]
fn a_block_that_is_partly_free_is_mapped() {
    let mut disk = Disk::new(16, ALL);
    extents(&mut disk, &[(700, Mapped), (2000, Deallocated), (100, Mapped), (5000, Deallocated)]);
    assert_eq!(status(&mut disk, 0, 255), [(0, 2, 0), (2, 3, 1), (5, 1, 0), (6, 9, 1), (15, 1, 0)]);
    extents(&mut disk, &[(100, Deallocated), (100, Anchored), (u64::MAX, Deallocated)]);
    assert_eq!(status(&mut disk, 0, 255), [(0, 1, 0), (1, 15, 1)]);
}
