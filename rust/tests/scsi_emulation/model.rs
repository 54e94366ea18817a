//! Random commands against a disk and a model of it that knows no SCSI.

use proptest::collection::vec;
use proptest::prelude::*;
use tcmu::scsi::{Capabilities, Geometry, Status};

use crate::copy::{block_to_block, cscd, extended_copy, parameter_list};
use crate::disk::{ALL, Disk, NAA};

const BLOCKS: u64 = 64;
const BLOCK: usize = 512;

#[derive(Debug, Clone)]
enum Command {
    Read {
        lba: u64,
        blocks: u8,
        form: usize,
    },
    Write {
        lba: u64,
        blocks: u8,
        form: usize,
        fua: bool,
        seed: u8,
    },
    WriteSame {
        lba: u64,
        blocks: u8,
        unmap: bool,
        no_data: bool,
        value: u8,
    },
    Unmap {
        ranges: Vec<(u64, u8)>,
    },
    SetWriteCache(bool),
    /// With what is there, or with one byte of it changed.
    Verify {
        lba: u64,
        blocks: u8,
        change: Option<usize>,
    },
    CompareAndWrite {
        lba: u64,
        blocks: u8,
        change: Option<usize>,
        value: u8,
    },
    OrWrite {
        lba: u64,
        blocks: u8,
        value: u8,
    },
    Format {
        pattern: Option<u8>,
    },
    Copy {
        segments: Vec<(u64, u64, u8)>,
    },
}

fn command() -> impl Strategy<Value = Command> {
    let lba = || 0..BLOCKS + 4;
    let blocks = || 0..20u8;
    prop_oneof![
        (lba(), blocks(), 0..4usize).prop_map(|(lba, blocks, form)| Command::Read { lba, blocks, form }),
        (lba(), blocks(), 0..4usize, any::<bool>(), any::<u8>())
            .prop_map(|(lba, blocks, form, fua, seed)| Command::Write { lba, blocks, form, fua, seed }),
        (lba(), blocks(), any::<bool>(), any::<bool>(), prop_oneof![Just(0), any::<u8>()]).prop_map(
            |(lba, blocks, unmap, no_data, value)| Command::WriteSame { lba, blocks, unmap, no_data, value }
        ),
        vec((lba(), blocks()), 0..5).prop_map(|ranges| Command::Unmap { ranges }),
        any::<bool>().prop_map(Command::SetWriteCache),
        (lba(), blocks(), any::<Option<usize>>()).prop_map(|(lba, blocks, change)| Command::Verify {
            lba,
            blocks,
            change
        }),
        (lba(), blocks(), any::<Option<usize>>(), any::<u8>()).prop_map(|(lba, blocks, change, value)| {
            Command::CompareAndWrite { lba, blocks, change, value }
        }),
        (lba(), blocks(), any::<u8>()).prop_map(|(lba, blocks, value)| Command::OrWrite {
            lba,
            blocks,
            value
        }),
        any::<Option<u8>>().prop_map(|pattern| Command::Format { pattern }),
        vec((lba(), lba(), blocks()), 0..4).prop_map(|segments| Command::Copy { segments }),
    ]
}

fn transfer_cdb(write: bool, form: usize, lba: u64, blocks: u8, fua: bool) -> Vec<u8> {
    let opcode = [0x08, 0x28, 0xa8, 0x88][form] + if write { 2 } else { 0 };
    let flags = if fua { 0x08 } else { 0 };
    let short = (lba as u32).to_be_bytes();
    match form {
        0 => vec![opcode, 0, 0, lba as u8, blocks, 0],
        1 => [&[opcode, flags], short.as_slice(), &[0, 0, blocks, 0]].concat(),
        2 => [&[opcode, flags], short.as_slice(), &[0, 0, 0, blocks, 0, 0]].concat(),
        _ => [&[opcode, flags], lba.to_be_bytes().as_slice(), &[0, 0, 0, blocks, 0, 0]].concat(),
    }
}

/// The medium as an initiator may believe it to be: `None` where it may read anything.
struct Model(Vec<Option<u8>>);

impl Model {
    fn range(lba: u64, blocks: u64) -> Option<std::ops::Range<usize>> {
        let fits = lba < BLOCKS && lba + blocks <= BLOCKS;
        fits.then(|| lba as usize * BLOCK..(lba + blocks) as usize * BLOCK)
    }
}

/// The blocks of the medium as they are, or with one byte changed, and where.
fn expectation(disk: &Disk, range: &std::ops::Range<usize>, change: Option<usize>) -> (Vec<u8>, Option<u64>) {
    let mut data = disk.medium[range.clone()].to_vec();
    let changed = change.filter(|_| !data.is_empty()).map(|at| at % data.len());
    if let Some(at) = changed {
        data[at] ^= 0x10;
    }
    (data, changed.map(|at| at as u64))
}

fn play(disk: &mut Disk, model: &mut Model, command: Command) -> Result<(), TestCaseError> {
    match command {
        Command::SetWriteCache(on) => disk.lu.set_write_cache(on),
        Command::Read { lba, blocks, form } => {
            let count = if form == 0 && blocks == 0 { 256 } else { u64::from(blocks) };
            let cdb = transfer_cdb(false, form, lba, blocks, false);
            match Model::range(lba, count) {
                Some(range) => {
                    let data = disk.read(&cdb, range.len() + 100);
                    prop_assert_eq!(data.len(), range.len());
                    for (read, known) in data.iter().zip(&model.0[range]) {
                        prop_assert!(known.is_none_or(|known| known == *read));
                    }
                }
                None => prop_assert!(disk.write(&cdb, &vec![0; count as usize * BLOCK]).sense.is_some()),
            }
        }
        Command::Write { lba, blocks, form, fua, seed } => {
            let count = if form == 0 && blocks == 0 { 256 } else { u64::from(blocks) };
            let data: Vec<u8> = (0..count as usize * BLOCK).map(|at| (at / 3) as u8 ^ seed).collect();
            let fua = fua && form != 0;
            let reply = disk.write(&transfer_cdb(true, form, lba, blocks, fua), &data);
            let range = Model::range(lba, count);
            prop_assert_eq!(reply.status == Status::Good, range.is_some());
            if let Some(range) = range {
                model.0[range.clone()].iter_mut().zip(data).for_each(|(known, byte)| *known = Some(byte));
                let must_be_durable = fua || !disk.lu.has_write_cache();
                if must_be_durable && disk.lu.capabilities().flush {
                    prop_assert!(!disk.volatile[range].contains(&true));
                }
            }
        }
        Command::WriteSame { lba, blocks, unmap, no_data, value } => {
            let flags = if unmap { 0x08 } else { 0 } | u8::from(no_data);
            let head = [0x93, flags];
            let cdb = [&head, lba.to_be_bytes().as_slice(), &[0, 0, 0, blocks, 0, 0]].concat();
            let reply = disk.write(&cdb, &vec![value; if no_data { 0 } else { BLOCK }]);
            let range = Model::range(lba, blocks.into())
                .filter(|range| !range.is_empty() && (!unmap || disk.lu.capabilities().discard_zeroes));
            prop_assert_eq!(reply.status == Status::Good, range.is_some());
            if let Some(range) = range {
                model.0[range].fill(Some(if no_data { 0 } else { value }));
            }
        }
        Command::Verify { lba, blocks, change } => {
            let cdb = [&[0x8f, 0x02], lba.to_be_bytes().as_slice(), &[0, 0, 0, blocks, 0, 0]].concat();
            match Model::range(lba, blocks.into()) {
                Some(range) => {
                    let (data, difference) = expectation(disk, &range, change);
                    let reply = disk.write(&cdb, &data);
                    prop_assert_eq!(reply.sense.and_then(|sense| sense.information), difference);
                    prop_assert_eq!(reply.status == Status::Good, difference.is_none());
                }
                None => prop_assert!(disk.write(&cdb, &[0; 20 * BLOCK]).sense.is_some()),
            }
        }
        Command::CompareAndWrite { lba, blocks, change, value } => {
            let cdb = [&[0x89, 0], lba.to_be_bytes().as_slice(), &[0, 0, 0, blocks, 0, 0]].concat();
            match Model::range(lba, blocks.into()) {
                Some(range) => {
                    let (mut data, difference) = expectation(disk, &range, change);
                    data.resize(2 * range.len(), value);
                    let reply = disk.write(&cdb, &data);
                    prop_assert_eq!(reply.sense.and_then(|sense| sense.information), difference);
                    prop_assert_eq!(reply.status == Status::Good, difference.is_none());
                    if difference.is_none() {
                        model.0[range].fill(Some(value));
                    }
                }
                None => prop_assert!(disk.write(&cdb, &[0; 40 * BLOCK]).sense.is_some()),
            }
        }
        Command::OrWrite { lba, blocks, value } => {
            let cdb = [&[0x8b, 0], lba.to_be_bytes().as_slice(), &[0, 0, 0, blocks, 0, 0]].concat();
            let reply = disk.write(&cdb, &vec![value; usize::from(blocks) * BLOCK]);
            let range = Model::range(lba, blocks.into());
            prop_assert_eq!(reply.status == Status::Good, range.is_some());
            for known in range.map_or(&mut [][..], |range| &mut model.0[range]) {
                *known = known.map(|known| known | value);
            }
        }
        Command::Copy { segments } => {
            let descriptors =
                segments.iter().map(|&(from, to, blocks)| block_to_block(from, to, blocks.into()));
            let list = parameter_list(0, 0, &[cscd(NAA)], &descriptors.collect::<Vec<_>>());
            let reply = disk.write(&extended_copy(&list), &list);
            let ranges = segments.iter().map(|&(from, to, blocks)| {
                let fits = |lba: u64| lba + u64::from(blocks) <= BLOCKS;
                let apart = from + u64::from(blocks) <= to || to + u64::from(blocks) <= from;
                (fits(from) && fits(to) && (apart || blocks == 0)).then_some((from, to, usize::from(blocks)))
            });
            let ranges: Option<Vec<_>> = ranges.collect();
            prop_assert_eq!(reply.status == Status::Good, ranges.is_some());
            for (from, to, blocks) in ranges.into_iter().flatten() {
                let source = model.0[from as usize * BLOCK..][..blocks * BLOCK].to_vec();
                let range = to as usize * BLOCK..to as usize * BLOCK + blocks * BLOCK;
                model.0[range.clone()].copy_from_slice(&source);
                if disk.lu.capabilities().flush && !disk.lu.has_write_cache() {
                    prop_assert!(!disk.volatile[range].contains(&true));
                }
            }
        }
        Command::Format { pattern } => {
            let reply = match pattern {
                Some(pattern) => disk.write(&[0x04, 0x10, 0, 0, 0, 0], &[0, 0x88, 0, 0, 0, 1, 0, 1, pattern]),
                None => disk.command(&[0x04, 0, 0, 0, 0, 0]),
            };
            prop_assert_eq!(reply.status, Status::Good);
            model.0.fill(Some(pattern.unwrap_or(0)));
        }
        Command::Unmap { ranges } => {
            let length = ranges.len() as u8 * 16;
            let mut list = vec![0, length + 6, 0, length, 0, 0, 0, 0];
            for (lba, blocks) in &ranges {
                list.extend(lba.to_be_bytes());
                list.extend(u32::from(*blocks).to_be_bytes());
                list.extend([0; 4]);
            }
            let reply = disk.write(&[0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], &list);
            let fits = ranges.iter().all(|&(lba, blocks)| lba + u64::from(blocks) <= BLOCKS);
            prop_assert_eq!(reply.status == Status::Good, fits && disk.lu.capabilities().discard);
            if reply.status == Status::Good {
                let value = disk.lu.capabilities().discard_zeroes.then_some(0);
                for (lba, blocks) in ranges {
                    model.0[lba as usize * BLOCK..(lba as usize + usize::from(blocks)) * BLOCK].fill(value);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn the_disk_is_what_the_model_says(
        commands in vec(command(), 1..60),
        [flush, native_fua, discard, discard_zeroes, write_zeroes] in any::<[bool; 5]>(),
        granularity in 1..9u64,
    ) {
        let capabilities =
            Capabilities { flush, native_fua, discard, discard_zeroes, write_zeroes, ..ALL };
        let geometry = Geometry {
            discard_granularity: granularity * BLOCK as u64,
            discard_alignment: (granularity - 1) * BLOCK as u64,
            ..Geometry::new(BLOCK as u32, BLOCKS * BLOCK as u64)
        };
        let mut disk = Disk::with(geometry, capabilities);
        let mut model = Model(vec![Some(0); BLOCKS as usize * BLOCK]);
        for command in commands {
            play(&mut disk, &mut model, command)?;
        }
        for (byte, known) in disk.medium.iter().zip(&model.0) {
            prop_assert!(known.is_none_or(|known| known == *byte));
        }
    }
}
