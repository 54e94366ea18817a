//! INQUIRY and its pages.

use tcmu::scsi::{Capabilities, Geometry};

use crate::disk::{ALL, Disk, NAA, assert_invalid_field};

#[rustfmt::skip]
fn inquiry(evpd: u8, page: u8, allocation: u16) -> [u8; 6] {
    let [high, low] = allocation.to_be_bytes();
    [
        0x12, // INQUIRY
        evpd, // EVPD
        page, // PAGE CODE
        high, low, // ALLOCATION LENGTH
        0, // CONTROL
    ]
}

fn page(disk: &mut Disk, code: u8) -> Vec<u8> {
    let data = disk.read(&inquiry(1, code, 255), 255);
    assert_eq!(data[1], code);
    assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])) + 4, data.len());
    data
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(data[at..at + 4].try_into().unwrap())
}

#[test]
fn standard_data() {
    let data = Disk::new(8, ALL).read(&inquiry(0, 0, 255), 255);
    #[rustfmt::skip]
    assert_eq!(data[..36], *[
        &[
            0x00, // connected, direct access block device
            0x00, // not removable
            0x06, // SPC-4
            0x12, // HISUP, response data format 2
            91, // ADDITIONAL LENGTH
            0x08, // 3PC, no TPGS, PROTECT
            0x00,
            0x02, // CMDQUE
        ],
        b"TCMU-RS ".as_slice(),
        b"Test disk       ",
        b"0.1 ",
    ].concat());
    assert_eq!(data[58..66], [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0, 0, 0]);
    assert_eq!(data.len(), 96);
}

#[test]
fn data_ends_at_the_allocation_length_and_at_the_buffer() {
    let mut disk = Disk::new(8, ALL);
    for allocation in 0..=255 {
        for buffer in [0, 5, 36, 255] {
            let data = disk.read(&inquiry(0, 0, allocation), buffer);
            assert_eq!(data.len(), buffer.min(allocation.into()).min(96));
        }
    }
}

#[test]
fn a_page_code_needs_evpd() {
    assert_invalid_field(Disk::new(8, ALL).command(&inquiry(0, 0x83, 255)), 2, 7);
}

#[test]
fn every_page_that_is_listed_is_there_and_no_other() {
    let mut disk = Disk::new(8, ALL);
    let listed = page(&mut disk, 0x00)[4..].to_vec();
    assert_eq!(listed, [0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2, 0xb7]);
    for code in 0..=u8::MAX {
        if listed.contains(&code) {
            page(&mut disk, code);
        } else {
            assert_invalid_field(disk.command(&inquiry(1, code, 255)), 2, 7);
        }
    }
}

#[test]
fn unit_serial_number() {
    assert_eq!(page(&mut Disk::new(8, ALL), 0x80)[4..], *b"serial-1");
}

#[test]
fn device_identification() {
    #[rustfmt::skip]
    let expected = [
        &[
            0x01, // binary
            0x03, // logical unit, NAA
            0, 16,
        ],
        NAA.as_slice(),
        &[
            0x02, // ASCII
            0x01, // logical unit, T10 vendor ID
            0, 32,
        ],
        b"TCMU-RS ",
        b"Test disk       ",
        b"serial-1",
    ].concat();
    assert_eq!(page(&mut Disk::new(8, ALL), 0x83)[4..], expected);
}

#[test]
fn block_limits() {
    let geometry = Geometry {
        physical_block_size: 4096,
        optimal_transfer_granularity_blocks: 8,
        optimal_transfer_blocks: 128,
        max_transfer_blocks: 1024,
        discard_granularity: 65536,
        discard_alignment: 4096,
        max_discard_blocks: 0x0012_3456,
        max_discard_descriptors: 77,
        max_write_same_blocks: 0x1_0000_0001,
        max_compare_blocks: 100,
        max_atomic_write_blocks: 3,
        ..Geometry::new(512, 1 << 30)
    };
    let data = page(&mut Disk::with(geometry.clone(), ALL), 0xb0);
    assert_eq!(data.len(), 64);
    assert_eq!(data[4], 0x01, "WSNZ");
    assert_eq!(data[5], 100, "MAXIMUM COMPARE AND WRITE LENGTH");
    assert_eq!(data[6..8], [0, 8], "OPTIMAL TRANSFER LENGTH GRANULARITY");
    assert_eq!(u32_at(&data, 8), 1024, "MAXIMUM TRANSFER LENGTH");
    assert_eq!(u32_at(&data, 12), 128, "OPTIMAL TRANSFER LENGTH");
    assert_eq!(u32_at(&data, 16), 0, "MAXIMUM PREFETCH LENGTH");
    assert_eq!(u32_at(&data, 20), 0x0012_3456, "MAXIMUM UNMAP LBA COUNT");
    assert_eq!(u32_at(&data, 24), 77, "MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT");
    assert_eq!(u32_at(&data, 28), 128, "OPTIMAL UNMAP GRANULARITY");
    assert_eq!(u32_at(&data, 32), 1 << 31 | 8, "UGAVALID, UNMAP GRANULARITY ALIGNMENT");
    assert_eq!(data[36..44], 0x1_0000_0001u64.to_be_bytes(), "MAXIMUM WRITE SAME LENGTH");
    assert_eq!(u32_at(&data, 44), 3, "MAXIMUM ATOMIC TRANSFER LENGTH");
    assert_eq!(data[48..], [0; 16], "any alignment and granularity, no boundaries");

    let none = Capabilities { discard: false, ..ALL };
    assert_eq!(page(&mut Disk::with(geometry, none), 0xb0)[20..36], [0; 16]);
}

#[test]
fn extended_inquiry_data() {
    let data = page(&mut Disk::new(8, ALL), 0x86);
    assert_eq!((data.len(), data[5], data[6], data[13]), (64, 0x01, 0x01, 96));
    let without_cache = Capabilities { flush: false, ..ALL };
    assert_eq!(page(&mut Disk::new(8, without_cache), 0x86)[6], 0);
    assert_eq!(page(&mut Disk::new(8, ALL), 0xb7)[4..], [0; 60]);
}

#[test]
fn block_device_characteristics() {
    let data = page(&mut Disk::new(8, ALL), 0xb1);
    assert_eq!(data.len(), 64);
    assert_eq!(data[4..6], [0, 1], "MEDIUM ROTATION RATE: none");
    assert_eq!(data[7], 0x40, "WABEREQ: erased blocks can be read");
    let rotational = Geometry { rotational: true, ..Geometry::new(512, 1 << 20) };
    assert_eq!(page(&mut Disk::with(rotational, ALL), 0xb1)[4..6], [0, 0]);
}

#[test]
fn logical_block_provisioning() {
    let cases = [
        // LBPU, LBPWS, LBPWS10, LBPRZ 1; thin
        (ALL, [0, 0xe4, 0x02, 0]),
        // LBPU; thin
        (Capabilities { discard_zeroes: false, ..ALL }, [0, 0x80, 0x02, 0]),
        (Capabilities { discard: false, ..ALL }, [0, 0, 0, 0]),
    ];
    for (capabilities, expected) in cases {
        assert_eq!(page(&mut Disk::new(8, capabilities), 0xb2)[4..], expected);
    }
}
