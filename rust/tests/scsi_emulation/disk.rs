//! The other side of the emulation: a buffer that knows which bytes were written, and a medium that checks every step.

use std::cell::RefCell;
use std::sync::Arc;

use tcmu::scsi::sense::KeySpecific;
use tcmu::scsi::{
    BlockState, Capabilities, DataBuffer, Geometry, Identity, LogicalUnit, MediumExtent, Next, Reply, Sense,
    Status, Step, StepBuffer, StepResult, Task, Verb,
};

pub const NAA: [u8; 16] = [0x60, 0x01, 0x40, 0x5a, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
/// What discarding leaves where nobody promised zeroes.
pub const DISCARDED: u8 = 0xdd;
/// What was in the data area before the command.
const STALE: u8 = 0xa5;

pub fn identity() -> Identity {
    named(NAA)
}

pub fn named(naa: [u8; 16]) -> Identity {
    Identity::new("TCMU-RS", "Test disk", "0.1", "serial-1", naa).unwrap()
}

pub const ALL: Capabilities = Capabilities {
    write: true,
    flush: true,
    native_fua: false,
    discard: true,
    discard_zeroes: true,
    write_zeroes: true,
    extents: true,
};

/// A command's data buffer.
#[derive(Debug)]
pub struct Buffer {
    bytes: RefCell<Vec<u8>>,
    written: RefCell<Vec<bool>>,
}

impl Buffer {
    pub fn stale(length: usize) -> Self {
        Self::from(vec![STALE; length])
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self { written: RefCell::new(vec![false; bytes.len()]), bytes: RefCell::new(bytes) }
    }
}

impl DataBuffer for Buffer {
    fn len(&self) -> usize {
        self.bytes.borrow().len()
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.bytes.borrow()[offset..offset + into.len()]);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.bytes.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
        self.written.borrow_mut()[offset..offset + from.len()].fill(true);
    }
}

/// A logical unit and the medium below it.
pub struct Disk {
    pub lu: Arc<LogicalUnit>,
    pub medium: Vec<u8>,
    /// Bytes that a loss of power would lose.
    pub volatile: Vec<bool>,
    /// Every step since the last look.
    pub steps: Vec<Step>,
    /// What the handler says of its storage; nothing is the whole medium in one piece.
    pub extents: Vec<MediumExtent>,
    /// A command that was answered and goes on, if it is to be watched (see [`Disk::go_on`]).
    pub early: Option<Option<(Step, Task)>>,
    /// The disks that pieces of copies may be for.
    pub neighbours: Vec<Disk>,
    /// The write cache is turned off while a write is under way.
    pub loses_cache: bool,
    /// So many steps succeed, then all fail with this.
    pub failure: Option<(usize, Reply)>,
}

impl Disk {
    pub fn new(blocks: u64, capabilities: Capabilities) -> Self {
        Self::with(Geometry::new(512, blocks * 512), capabilities)
    }

    pub fn with(geometry: Geometry, capabilities: Capabilities) -> Self {
        Self::of(identity(), geometry, capabilities)
    }

    pub fn of(identity: Identity, geometry: Geometry, capabilities: Capabilities) -> Self {
        let size = geometry.size as usize;
        let lu = LogicalUnit::new(identity, geometry, capabilities).unwrap();
        Self {
            lu: Arc::new(lu),
            medium: vec![0; size],
            volatile: vec![false; size],
            steps: Vec::new(),
            extents: Vec::new(),
            early: None,
            neighbours: Vec::new(),
            loses_cache: false,
            failure: None,
        }
    }

    /// Runs a command to its end, checking each step and the answer.
    pub fn run(&mut self, cdb: &[u8], buffer: &Buffer) -> Reply {
        let mut next = self.lu.start(cdb, buffer);
        let mut answer = None;
        loop {
            match next {
                Next::Done(reply) => {
                    let reply = answer.unwrap_or(reply);
                    self.check_reply(&reply, buffer);
                    return reply;
                }
                Next::Early(step, task) => match &mut self.early {
                    Some(early) => {
                        *early = Some((step, task));
                        return Reply::good(0);
                    }
                    None => {
                        answer = Some(Reply::good(0));
                        next = self.carry_on(step, task, buffer);
                    }
                },
                Next::Call(step, task) => next = self.carry_on(step, task, buffer),
            }
        }
    }

    /// One step of the command that was answered early. `false`: it has ended.
    pub fn go_on(&mut self) -> bool {
        let (step, task) = self.early.as_mut().unwrap().take().unwrap();
        match self.carry_on(step, task, &Buffer::stale(0)) {
            Next::Call(step, task) => {
                self.early = Some(Some((step, task)));
                true
            }
            Next::Done(_) => false,
            Next::Early(..) => panic!("answered twice"),
        }
    }

    fn carry_on(&mut self, step: Step, task: Task, buffer: &Buffer) -> Next {
        if let Some((left, reply)) = &mut self.failure {
            match left.checked_sub(1) {
                Some(less) => *left = less,
                None => return Next::Done(self.lu.fail(task, *reply)),
            }
        }
        let own = step.unit.is_none_or(|unit| unit == *self.lu.identity().naa());
        let neighbour = |disk: &&mut Self| Some(*disk.lu.identity().naa()) == step.unit;
        let disk = if own { &mut *self } else { self.neighbours.iter_mut().find(neighbour).unwrap() };
        disk.check_step(&step, buffer);
        let result = disk.carry_out(&step, buffer);
        if disk.loses_cache && step.verb == Verb::Write {
            disk.lu.set_write_cache(false);
        }
        self.steps.push(step);
        self.lu.resume(task, buffer, result)
    }

    /// A command with Data-In: the bytes that reach the initiator.
    pub fn read(&mut self, cdb: &[u8], length: usize) -> Vec<u8> {
        let buffer = Buffer::stale(length);
        let reply = self.run(cdb, &buffer);
        assert_eq!(reply.status, Status::Good, "{reply:?}");
        let mut bytes = buffer.bytes.into_inner();
        bytes.truncate(reply.data_in);
        bytes
    }

    /// A command with Data-Out.
    pub fn write(&mut self, cdb: &[u8], data: &[u8]) -> Reply {
        self.run(cdb, &Buffer::from(data.to_vec()))
    }

    /// A command without data.
    pub fn command(&mut self, cdb: &[u8]) -> Reply {
        self.write(cdb, &[])
    }

    /// What was done since the last look.
    pub fn verbs(&mut self) -> Vec<Verb> {
        self.steps.drain(..).map(|step| step.verb).collect()
    }

    fn check_reply(&self, reply: &Reply, buffer: &Buffer) {
        assert_eq!(reply.status == Status::CheckCondition, reply.sense.is_some(), "{reply:?}");
        assert!(reply.sense.is_none() || reply.data_in == 0, "{reply:?}");
        let written = buffer.written.borrow();
        assert!(written[..reply.data_in].iter().all(|&written| written), "stale bytes in {reply:?}");
    }

    fn check_step(&self, step: &Step, buffer: &Buffer) {
        let capabilities = self.lu.capabilities();
        let block_size = u64::from(self.lu.geometry().block_size);
        if step.verb == Verb::Flush {
            assert_eq!((step.offset.0, step.length, &step.buffer), (0, 0, &StepBuffer::None));
            assert!(capabilities.flush);
            return;
        }
        assert!(step.length > 0 && step.length.is_multiple_of(block_size), "{step:?}");
        assert!(step.offset.0.is_multiple_of(block_size), "{step:?}");
        assert!(step.offset.0.checked_add(step.length).unwrap() <= self.lu.size(), "{step:?}");
        match &step.buffer {
            StepBuffer::None | StepBuffer::Scratch => (),
            StepBuffer::Command(at) => assert!(at + step.length as usize <= buffer.len(), "{step:?}"),
            StepBuffer::Owned(data) => assert_eq!(data.len() as u64, step.length),
        }
        assert!(!step.fua || (step.verb == Verb::Write && capabilities.native_fua));
        match step.verb {
            Verb::Read => assert!(matches!(step.buffer, StepBuffer::Command(_) | StepBuffer::Scratch)),
            Verb::Write => {
                assert!(capabilities.write);
                assert!(matches!(step.buffer, StepBuffer::Command(_) | StepBuffer::Owned(_)));
            }
            Verb::Discard => {
                assert!(capabilities.write && capabilities.discard && step.buffer == StepBuffer::None);
                let geometry = self.lu.geometry();
                let is_granule =
                    |offset: u64| offset % geometry.discard_granularity == geometry.discard_alignment;
                let end = step.offset.0 + step.length;
                assert!(is_granule(step.offset.0), "{step:?}");
                assert!(is_granule(end) || end == self.lu.size(), "{step:?}");
            }
            Verb::WriteZeroes => {
                assert!(capabilities.write && capabilities.write_zeroes && step.buffer == StepBuffer::None);
            }
            Verb::Extents => assert!(capabilities.extents && step.buffer == StepBuffer::None),
            Verb::Flush => unreachable!(),
        }
    }

    fn carry_out(&mut self, step: &Step, buffer: &Buffer) -> StepResult {
        let range = step.offset.0 as usize..(step.offset.0 + step.length) as usize;
        match (step.verb, &step.buffer) {
            (Verb::Flush, _) => {
                self.volatile.fill(false);
                return StepResult::None;
            }
            (Verb::Read, StepBuffer::Command(at)) => {
                buffer.write(*at, &self.medium[range]);
                return StepResult::None;
            }
            (Verb::Read, _) => return StepResult::Bytes(self.medium[range].to_vec()),
            (Verb::Extents, _) if self.extents.is_empty() => {
                let whole = MediumExtent { length: step.length, state: BlockState::Mapped };
                return StepResult::Extents(vec![whole]);
            }
            (Verb::Extents, _) => return StepResult::Extents(self.extents.clone()),
            (Verb::Write, StepBuffer::Command(at)) => buffer.read(*at, &mut self.medium[range.clone()]),
            (Verb::Write, StepBuffer::Owned(data)) => self.medium[range.clone()].copy_from_slice(data),
            (Verb::Write, _) => unreachable!(),
            (Verb::Discard, _) if !self.lu.capabilities().discard_zeroes => {
                self.medium[range.clone()].fill(DISCARDED);
            }
            (Verb::Discard | Verb::WriteZeroes, _) => self.medium[range.clone()].fill(0),
        }
        self.volatile[range].fill(!step.fua);
        StepResult::None
    }
}

/// CHECK CONDITION with this triple.
#[track_caller]
pub fn assert_check(reply: Reply, expected: Sense) {
    let sense = reply.sense.unwrap_or_else(|| panic!("expected {expected:?}, got {reply:?}"));
    assert_eq!(
        (reply.status, sense.key, sense.asc, sense.ascq),
        (Status::CheckCondition, expected.key, expected.asc, expected.ascq)
    );
}

/// INVALID FIELD IN CDB, pointing there.
#[track_caller]
pub fn assert_invalid_field(reply: Reply, byte: u16, bit: u8) {
    assert_check(reply, Sense::INVALID_FIELD_IN_CDB);
    let Some(KeySpecific::Cdb(pointer)) = reply.sense.unwrap().specific else {
        panic!("no field pointer in {reply:?}");
    };
    assert_eq!((pointer.byte, pointer.bit), (byte, Some(bit)));
}

#[track_caller]
pub fn assert_good(reply: Reply) {
    assert_eq!(reply, Reply::good(reply.data_in));
}

/// A CDB, field by field.
pub fn fields(fields: &[&[u8]]) -> Vec<u8> {
    fields.concat()
}
