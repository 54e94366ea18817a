//! READ CAPACITY and REPORT LUNS.

use tcmu::scsi::{Capabilities, Geometry, LogicalUnit, Next, Reply};

use crate::disk::{ALL, Buffer, Disk, assert_invalid_field, identity};

const READ_CAPACITY_10: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[rustfmt::skip]
fn read_capacity_16(allocation: u8) -> [u8; 16] {
    [
        0x9e, // SERVICE ACTION IN(16)
        0x10, // READ CAPACITY(16)
        0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, allocation, // ALLOCATION LENGTH
        0,
        0, // CONTROL
    ]
}

#[test]
fn ten() {
    let mut disk = Disk::with(Geometry::new(4096, 8 * 4096), ALL);
    assert_eq!(disk.read(&READ_CAPACITY_10, 8), [0, 0, 0, 7, 0, 0, 0x10, 0]);
}

#[test]
fn sixteen() {
    let geometry = Geometry { physical_block_size: 4096, ..Geometry::new(512, 8 * 512) };
    let data = Disk::with(geometry, ALL).read(&read_capacity_16(32), 32);
    #[rustfmt::skip]
    assert_eq!(data, [
        0, 0, 0, 0, 0, 0, 0, 7, // RETURNED LOGICAL BLOCK ADDRESS
        0, 0, 2, 0, // LOGICAL BLOCK LENGTH
        0, // no protection
        0x03, // LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT
        0xc0, 0, // LBPME, LBPRZ, LOWEST ALIGNED LOGICAL BLOCK ADDRESS
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let full = Capabilities { discard: false, ..ALL };
    assert_eq!(
        Disk::new(8, full).read(&read_capacity_16(32), 32)[14],
        0,
        "LBPRZ means nothing without LBPME"
    );
}

#[test]
fn sixteen_with_any_allocation_length() {
    let mut disk = Disk::new(8, ALL);
    for allocation in 0..=255 {
        assert_eq!(disk.read(&read_capacity_16(allocation), 255).len(), usize::from(allocation).min(32));
    }
}

#[test]
fn large_disks_send_initiators_to_sixteen() {
    let blocks = 1u64 << 33;
    let lu = LogicalUnit::new(identity(), Geometry::new(512, blocks * 512), ALL).unwrap();
    let mut data = [0; 8];
    let buffer = Buffer::stale(8);
    assert!(matches!(lu.start(&READ_CAPACITY_10, &buffer), Next::Done(reply) if reply == Reply::good(8)));
    tcmu::scsi::DataBuffer::read(&buffer, 0, &mut data);
    assert_eq!(data[..4], [0xff; 4]);
    lu.start(&read_capacity_16(8), &buffer);
    tcmu::scsi::DataBuffer::read(&buffer, 0, &mut data);
    assert_eq!(u64::from_be_bytes(data), blocks - 1);
}

#[test]
fn report_luns() {
    let mut disk = Disk::new(8, ALL);
    #[rustfmt::skip]
    let mut cdb = [
        0xa0, // REPORT LUNS
        0,
        0x00, // SELECT REPORT
        0, 0, 0,
        0, 0, 1, 0, // ALLOCATION LENGTH
        0,
        0, // CONTROL
    ];
    assert_eq!(disk.read(&cdb, 256), [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    cdb[2] = 0x01;
    assert_eq!(disk.read(&cdb, 256), [0; 8]);
    cdb[2] = 0x03;
    assert_invalid_field(disk.command(&cdb), 2, 7);
}
