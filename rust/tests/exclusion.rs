//! Commands that exclude each other, from the ring to the answer.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use proptest::prelude::*;
use tcmu::device::{Claim, Device, Started, Work};
use tcmu::mapping::Mapping;
use tcmu::ring::sim::{Config, Kernel, Request, Ticket};
use tcmu::scsi::{Capabilities, Geometry, Identity, LogicalUnit, Reply, Step, StepBuffer, StepResult, Verb};

const BLOCK: usize = 512;
const BLOCKS: usize = 16;

/// A device whose handler is this test: steps are carried out when it says so.
struct Bench {
    kernel: Kernel,
    device: Arc<Device>,
    /// Steps that the handler has been asked for, by the order in which they came.
    asked: Vec<(Arc<Claim>, Step)>,
    medium: Vec<u8>,
    replies: BTreeMap<Ticket, u8>,
}

impl Bench {
    fn new() -> Self {
        let config = Config { ring_size: 64 << 10, data_size: 1 << 20, ..Config::default() };
        let size = config.ring_size as usize + config.data_size;
        let kernel = Kernel::new(config).unwrap();
        let identity = Identity::new("v", "p", "r", "s", [0x60; 16]).unwrap();
        let geometry =
            Geometry { max_atomic_write_blocks: 8, ..Geometry::new(BLOCK as u32, (BLOCKS * BLOCK) as u64) };
        let capabilities = Capabilities { write: true, ..Capabilities::default() };
        let unit = LogicalUnit::new(identity, geometry, capabilities).unwrap();
        let mapping = Mapping::new(&kernel.memory(), size).unwrap();
        let event: OwnedFd = kernel.consumer().try_clone_to_owned().unwrap();
        let device = Arc::new(Device::new(mapping, event, Some(Arc::new(unit))).unwrap());
        let medium = vec![0; BLOCKS * BLOCK];
        Self { kernel, device, asked: Vec::new(), medium, replies: BTreeMap::new() }
    }

    fn submit(&mut self, cdb: Vec<u8>, data_out: Vec<u8>, data_in: usize) -> Ticket {
        let ticket = self.kernel.submit(Request { cdb, data_out, data_in });
        self.pump();
        ticket
    }

    fn read(&mut self, lba: u8) -> Ticket {
        self.submit(vec![0x08, 0, 0, lba, 1, 0], Vec::new(), BLOCK)
    }

    fn write(&mut self, lba: u8, value: u8) -> Ticket {
        self.submit(vec![0x0a, 0, 0, lba, 1, 0], vec![value; BLOCK], 0)
    }

    fn compare_and_write(&mut self, lba: u8, old: u8, new: u8) -> Ticket {
        let data = [[old; BLOCK], [new; BLOCK]].concat();
        self.submit(vec![0x89, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, 1, 0, 0], data, 0)
    }

    fn orwrite(&mut self, lba: u8, blocks: u8, value: u8) -> Ticket {
        let data = vec![value; usize::from(blocks) * BLOCK];
        self.submit(vec![0x8b, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, blocks, 0, 0], data, 0)
    }

    fn pump(&mut self) {
        for work in self.device.drain(64, false).unwrap() {
            if let Work::Step(claim, step) = work {
                self.asked.push((claim, step));
            }
        }
        self.asked.extend(self.device.take_ready().unwrap());
        self.device.commit().unwrap();
        self.kernel.kick();
        for completion in self.kernel.process() {
            assert!(self.replies.insert(completion.ticket, completion.status).is_none(), "answered twice");
        }
    }

    /// Carries out one of the steps that were asked for.
    fn work(&mut self, index: usize) {
        use tcmu::scsi::DataBuffer;
        let (claim, step) = self.asked.remove(index);
        let range = step.offset.0 as usize..(step.offset.0 + step.length) as usize;
        let mut result = StepResult::None;
        match (step.verb, &step.buffer) {
            (Verb::Read, StepBuffer::Command(at)) => claim.data().write(*at, &self.medium[range]),
            (Verb::Read, _) => result = StepResult::Bytes(self.medium[range].to_vec()),
            (Verb::Write, StepBuffer::Command(at)) => claim.data().read(*at, &mut self.medium[range]),
            (Verb::Write, StepBuffer::Owned(data)) => self.medium[range].copy_from_slice(data),
            other => panic!("{other:?}"),
        }
        if let Some(step) = claim.advance(result).unwrap() {
            self.asked.push((claim, step));
        }
        self.pump();
    }

    fn finish(&mut self) {
        while !self.asked.is_empty() {
            self.work(0);
        }
        assert_eq!(self.device.in_flight(), 0, "every command is answered");
        assert!(!self.device.has_ready());
    }
}

#[test]
fn compare_and_write_has_its_blocks_for_itself() {
    let mut bench = Bench::new();
    let before = bench.write(3, 1);
    let first = bench.compare_and_write(3, 1, 2);
    let second = bench.compare_and_write(3, 1, 3);
    let behind = bench.read(3);
    bench.write(4, 9);
    assert_eq!(bench.asked.len(), 2, "the write before, and the one elsewhere");
    bench.work(1);
    assert_eq!(bench.asked.len(), 1);
    bench.work(0);
    assert_eq!(bench.replies.get(&before), Some(&0));
    assert_eq!(bench.asked.len(), 1, "the first COMPARE AND WRITE reads");
    bench.work(0);
    assert_eq!(bench.asked.len(), 1, "and writes");
    bench.work(0);
    assert_eq!(bench.replies.get(&first), Some(&0));
    assert_eq!(bench.asked.len(), 1, "the second one reads");
    bench.work(0);
    assert_eq!(bench.replies.get(&second), Some(&2), "and finds what the first one wrote");
    assert!(!bench.replies.contains_key(&behind));
    bench.finish();
    assert_eq!(bench.replies.get(&behind), Some(&0));
    assert_eq!(bench.medium[3 * BLOCK], 2);
}

#[test]
fn reads_and_writes_do_not_wait_for_each_other() {
    let mut bench = Bench::new();
    for value in 0..20 {
        bench.write(3, value);
        bench.read(3);
    }
    assert_eq!(bench.asked.len(), 40);
    bench.finish();
}

#[test]
fn a_failed_command_gives_its_range_back() {
    let mut bench = Bench::new();
    bench.compare_and_write(0, 0, 1);
    let behind = bench.read(0);
    let (claim, _) = bench.asked.remove(0);
    claim.answer(Reply::status(tcmu::scsi::Status::Busy)).unwrap();
    drop(claim);
    bench.pump();
    bench.finish();
    assert_eq!(bench.replies.get(&behind), Some(&0));
}

#[test]
fn a_forgotten_command_gives_its_range_back() {
    let mut bench = Bench::new();
    bench.compare_and_write(0, 0, 1);
    let behind = bench.read(0);
    bench.asked.clear();
    bench.pump();
    bench.finish();
    assert_eq!(bench.replies.get(&behind), Some(&0));
}

#[test]
fn a_command_that_waits_can_be_aborted() {
    let mut bench = Bench::new();
    bench.write(0, 1);
    let waits = bench.compare_and_write(0, 0, 1);
    let behind = bench.read(0);
    assert_eq!(bench.asked.len(), 1);
    bench.kernel.abort(1, &[waits]);
    bench.pump();
    assert_eq!(bench.asked.len(), 2, "nobody is in the way of the read any more");
    bench.finish();
    assert_eq!(bench.replies.get(&behind), Some(&0));
}

#[test]
fn closing_forgets_those_who_wait() {
    let mut bench = Bench::new();
    bench.write(0, 1);
    bench.compare_and_write(0, 0, 1);
    bench.compare_and_write(0, 0, 1);
    let device = Arc::downgrade(&bench.device);
    bench.device.close();
    bench.asked.clear();
    drop(bench);
    assert!(device.upgrade().is_none(), "the device and its commands held each other");
}

#[test]
fn nobody_waits_in_a_closed_device() {
    let mut bench = Bench::new();
    bench.write(0, 1);
    let data_out = vec![0; 2 * BLOCK];
    bench.kernel.submit(Request {
        cdb: vec![0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        data_out,
        data_in: 0,
    });
    let work = bench.device.drain(64, true).unwrap();
    let [Work::Command(claim)] = work.as_slice() else { panic!("{work:?}") };
    let device = Arc::downgrade(&bench.device);
    bench.device.close();
    assert!(matches!(claim.start(), Ok(Started::Waiting)));
    drop(work);
    bench.asked.clear();
    drop(bench);
    assert!(device.upgrade().is_none(), "the device keeps a command that keeps the device");
}

proptest! {
    /// Each command is answered once, and the medium is what the commands would have made one after the other.
    #[test]
    fn nothing_is_lost_and_nothing_is_torn(
        steps in prop::collection::vec((0..6u8, 0..8u8, 0..5u8, any::<prop::sample::Index>()), 1..80),
    ) {
        let mut bench = Bench::new();
        let mut tickets = Vec::new();
        for (kind, lba, value, which) in steps {
            match kind {
                0 => tickets.push(bench.read(lba)),
                1 => tickets.push(bench.orwrite(lba, 1 + value, 1 << value)),
                2 => tickets.push(bench.compare_and_write(lba, value, value + 1)),
                3 => tickets.push(bench.orwrite(0, 8, 0)),
                _ if bench.asked.is_empty() => {}
                _ => bench.work(which.index(bench.asked.len())),
            }
        }
        bench.finish();
        prop_assert_eq!(bench.replies.len(), tickets.len());
        for block in bench.medium.chunks(BLOCK) {
            prop_assert!(block.iter().all(|byte| *byte == block[0]), "half of a command");
        }
    }
}
