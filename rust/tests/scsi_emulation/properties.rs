//! Whatever the bytes are: an answer, no step out of range, no stale byte (all checked by `Disk::run`).

use proptest::collection::vec;
use proptest::prelude::*;
use tcmu::scsi::{Capabilities, Geometry, Next, Sense};

use crate::disk::{Buffer, Disk};
use crate::opcodes::{set_action, supported, usage};

fn capabilities() -> impl Strategy<Value = Capabilities> {
    any::<[bool; 7]>().prop_map(
        |[write, flush, native_fua, discard, discard_zeroes, write_zeroes, extents]| Capabilities {
            write,
            flush,
            native_fua,
            discard,
            discard_zeroes,
            write_zeroes,
            extents,
        },
    )
}

fn geometry() -> impl Strategy<Value = Geometry> {
    (9..=12u32, 1..40u64, 1..8u64, 0..8u64, 1..20u32).prop_map(
        |(shift, blocks, granularity, alignment, limit)| {
            let block_size = 1 << shift;
            Geometry {
                discard_granularity: granularity << shift,
                discard_alignment: (alignment % granularity) << shift,
                max_transfer_blocks: limit,
                max_compare_blocks: limit.min(8) as u8,
                max_atomic_write_blocks: limit / 2,
                max_discard_blocks: limit.max(8),
                max_discard_descriptors: 4,
                max_write_same_blocks: limit.into(),
                ..Geometry::new(block_size, blocks << shift)
            }
        },
    )
}

/// Fields with small numbers in them: random bytes alone are nearly always out of range.
fn field_bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![6 => Just(0), 2 => 0..20u8, 1 => any::<u8>()], 32)
}

proptest! {
    #[test]
    fn any_cdb_has_an_answer(
        geometry in geometry(),
        capabilities in capabilities(),
        cdb in vec(any::<u8>(), 0..40),
        data in vec(any::<u8>(), 0..300),
        stopped: bool,
    ) {
        let mut disk = Disk::with(geometry, capabilities);
        if stopped {
            disk.command(&[0x1b, 0, 0, 0, 0, 0]);
        }
        disk.run(&cdb, &Buffer::from(data));
    }

    #[test]
    fn plausible_commands_have_answers(
        geometry in geometry(),
        capabilities in capabilities(),
        commands in vec((any::<prop::sample::Index>(), field_bytes(), 0..40usize, -2..3isize, any::<bool>()), 1..20),
        write_cache: bool,
    ) {
        let mut disk = Disk::with(geometry, capabilities);
        disk.lu.set_write_cache(write_cache);
        let supported = supported(&mut disk);
        for (command, fields, blocks, more, keep) in commands {
            let (opcode, action, length) = supported[command.index(supported.len())];
            let mut cdb = fields[..length].to_vec();
            if keep {
                let usage = usage(&mut disk, opcode, action);
                cdb.iter_mut().zip(usage).for_each(|(byte, usage)| *byte &= usage);
            }
            cdb[0] = opcode;
            if let Some(action) = action {
                match opcode {
                    0x7f => (),
                    _ => cdb[1] &= !0x1f,
                }
                set_action(&mut cdb, Some(action));
            }
            let block_size = disk.lu.geometry().block_size as usize;
            let buffer = Buffer::from(vec![0; (blocks * block_size).saturating_add_signed(more)]);
            let reply = disk.run(&cdb, &buffer);
            let is_write_through = capabilities.flush && !write_cache;
            if is_write_through && reply.sense.is_none() {
                prop_assert!(!disk.volatile.contains(&true), "GOOD, but not durable: {:02x?}", cdb);
            }
        }
    }

    #[test]
    fn any_unmap_list_has_an_answer(
        geometry in geometry(),
        list in vec(prop_oneof![4 => Just(0), 1 => 0..40u8, 1 => any::<u8>()], 0..80),
        length in 0..80u8,
    ) {
        let mut disk = Disk::with(geometry, crate::disk::ALL);
        disk.run(&[0x42, 0, 0, 0, 0, 0, 0, 0, length, 0], &Buffer::from(list));
    }

    #[test]
    fn sense_is_encoded_in_both_formats(
        information in any::<Option<u64>>(),
        byte: u16,
        bit: u8,
    ) {
        let mut sense = Sense::INVALID_FIELD_IN_CDB.at_cdb(byte, bit);
        sense.information = information;
        for format in [tcmu::scsi::sense::SenseFormat::Fixed, tcmu::scsi::sense::SenseFormat::Descriptor] {
            let (bytes, length) = sense.encode(format);
            prop_assert_eq!(usize::from(bytes[7]) + 8, length);
            prop_assert!(bytes[length..].iter().all(|&byte| byte == 0));
        }
    }
}

/// Plain reads and writes carry no allocation: their task is a few words.
#[test]
fn a_task_is_small() {
    assert!(size_of::<tcmu::scsi::Task>() <= 3 * size_of::<usize>());
    assert!(size_of::<Next>() <= 128);
}
