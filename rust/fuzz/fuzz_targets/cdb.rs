//! The emulation alone: any commands with any buffers. The disk of the tests checks every step and every answer.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tcmu::scsi::{Capabilities, Geometry};

#[path = "../../tests/scsi_emulation/disk.rs"]
#[allow(dead_code)]
mod disk;

use disk::{Buffer, Disk};

#[derive(Debug, Arbitrary)]
struct Shape {
    capabilities: [bool; 6],
    block_exponent: u8,
    physical_exponent: u8,
    granularity: u8,
    alignment: u8,
    size: u8,
}

#[derive(Debug, Arbitrary)]
enum Data<'a> {
    In(u16),
    Out(&'a [u8]),
    /// A block, as WRITE SAME wants it.
    Block(u8),
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    shape: Shape,
    commands: Vec<(&'a [u8], Data<'a>)>,
}

fn disk(shape: &Shape) -> Disk {
    let block_size = 512u32 << (shape.block_exponent % 4);
    let granularity = u64::from(shape.granularity % 16) + 1;
    let [write, flush, native_fua, discard, discard_zeroes, write_zeroes] = shape.capabilities;
    // A rare one is above what WRITE SAME makes at once: the memory costs more than all the rest.
    let size = if shape.size == 0xff { 3 << 20 } else { 1 << 15 };
    let geometry = Geometry {
        physical_block_size: block_size << (shape.physical_exponent % 4),
        discard_granularity: granularity * u64::from(block_size),
        discard_alignment: u64::from(shape.alignment) % granularity * u64::from(block_size),
        ..Geometry::new(block_size, size)
    };
    let capabilities =
        Capabilities { write, flush, native_fua, discard, discard_zeroes, write_zeroes, extents: false };
    Disk::with(geometry, capabilities)
}

fuzz_target!(|input: Input<'_>| {
    let mut disk = disk(&input.shape);
    for (cdb, data) in input.commands.into_iter().take(16) {
        let buffer = match data {
            Data::In(length) => Buffer::stale(length.into()),
            Data::Out(bytes) => Buffer::from(bytes.to_vec()),
            Data::Block(byte) => Buffer::from(vec![byte; disk.lu.geometry().block_size as usize]),
        };
        let reply = disk.run(cdb, &buffer);
        if let Some(sense) = &reply.sense {
            let (_, length) = disk.lu.encode_sense(sense);
            assert!(length >= 8);
        }
    }
});
