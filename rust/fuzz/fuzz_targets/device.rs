//! A device as a whole: ring, emulation, claims and their views against the simulated kernel, in any order of things.
//!
//! A disk in memory carries the steps out. While nobody has poked into the shared memory, every command is answered
//! exactly once, with the data that the disk had, and the simulator has nothing to complain about. After a poke (and
//! after a close) nothing is promised but that nothing panics and nothing outside of the mapping is touched.

#![no_main]

use std::collections::HashMap;
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tcmu::device::{Answered, Claim, Device, Started, Work};
use tcmu::mapping::Mapping;
use tcmu::ring::Buffer;
use tcmu::ring::sim::{Completion, Config, Kernel, Request, Ticket};
use tcmu::scsi::opcodes::{Direction, find};
use tcmu::scsi::sense::Sense;
use tcmu::scsi::{
    Capabilities, DataBuffer, Geometry, Identity, LogicalUnit, Reply, Status, Step, StepBuffer, StepResult,
    Verb,
};

const BLOCK: usize = 512;
const BLOCKS: usize = 64;
const DATA: usize = 96 << 10;

#[derive(Debug, Arbitrary)]
struct Shape {
    /// Of the mailbox.
    offers: u8,
    two_pages: bool,
    emulated: bool,
    capabilities: [bool; 6],
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Form {
    Six,
    Ten,
    Twelve,
    Sixteen,
}

#[derive(Debug, Arbitrary)]
enum Action<'a> {
    /// A READ or WRITE that may be right.
    Transfer {
        write: bool,
        form: Form,
        fua: bool,
        lba: u8,
        blocks: u8,
        seed: u8,
        slack: i8,
    },
    /// Anything. With both lengths it is bidirectional.
    Command {
        cdb: &'a [u8],
        data_out: u16,
        data_in: u16,
    },
    /// A CDB whose Data-Out matters.
    List {
        cdb: &'a [u8],
        data_out: &'a [u8],
    },
    Drain {
        limit: u8,
        intercept: bool,
    },
    /// The handler did what it was asked for.
    Step(u8),
    /// The handler failed, or answers a command that was passed to it.
    Answer {
        which: u8,
        status: u8,
        data_in: u16,
    },
    /// An intercepted command is left to the emulation after all.
    Emulate(u8),
    /// Nobody answers.
    Drop(u8),
    View(u8),
    Release(u8),
    Commit,
    Reap,
    Process,
    Abort {
        kind: u8,
        first: u8,
        count: u8,
    },
    Expire(u8),
    Block(bool),
    Plug(bool),
    Close,
    Poke(u16, &'a [u8]),
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    shape: Shape,
    actions: Vec<Action<'a>>,
}

/// A command in the hands of the layer above.
struct Running {
    claim: Arc<Claim>,
    step: Option<Step>,
}

/// What the initiator has a right to see.
#[derive(Default)]
struct Sent {
    request: Request,
    /// The transfer, decoded a second time: whether it writes, first byte, bytes.
    transfer: Option<(bool, usize, usize)>,
    /// What the disk held when it was read.
    read: Option<Vec<u8>>,
    answered: bool,
}

struct World {
    kernel: Kernel,
    device: Arc<Device>,
    disk: Vec<u8>,
    sent: HashMap<Ticket, Sent>,
    running: Vec<Running>,
    /// Views of a command's data, and what they showed when it was answered.
    views: Vec<(Arc<Claim>, Option<Vec<u8>>)>,
    trusted: bool,
}

fn unit(capabilities: [bool; 6]) -> LogicalUnit {
    let naa = [0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let identity = Identity::new("TCMU-RS", "Fuzzed disk", "0.1", "serial", naa).unwrap();
    let [write, flush, native_fua, discard, discard_zeroes, write_zeroes] = capabilities;
    let extents = false;
    let capabilities =
        Capabilities { write, flush, native_fua, discard, discard_zeroes, write_zeroes, extents };
    LogicalUnit::new(identity, Geometry::new(BLOCK as u32, (BLOCK * BLOCKS) as u64), capabilities).unwrap()
}

fn transfer_cdb(write: bool, form: Form, fua: bool, lba: u8, blocks: u8) -> Vec<u8> {
    let flags = if fua { 8 } else { 0 };
    let write = if write { 2 } else { 0 };
    match form {
        Form::Six => vec![0x08 + write, 0, 0, lba, blocks, 0],
        Form::Ten => vec![0x28 + write, flags, 0, 0, 0, lba, 0, 0, blocks, 0],
        Form::Twelve => vec![0xa8 + write, flags, 0, 0, 0, lba, 0, 0, 0, blocks, 0, 0],
        Form::Sixteen => vec![0x88 + write, flags, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, blocks, 0, 0],
    }
}

/// Bytes by which one can tell where they belong. Made in few steps, which is what fuzzing costs.
fn pattern(seed: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![seed; length];
    for (at, word) in bytes.chunks_mut(64).enumerate() {
        word[0] = at as u8;
    }
    bytes
}

fn bytes_of(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len()];
    buffer.read(0, &mut bytes);
    bytes
}

fn pick<T>(list: &[T], which: u8) -> Option<usize> {
    (!list.is_empty()).then(|| usize::from(which) % list.len())
}

impl World {
    fn new(shape: &Shape) -> Self {
        let config = Config {
            ring_size: if shape.two_pages { 8192 } else { 4096 },
            data_size: DATA,
            capabilities: u16::from(shape.offers % 16),
            ..Config::default()
        };
        let size = config.ring_size as usize + config.data_size;
        let kernel = Kernel::new(config).unwrap();
        let mapping = Mapping::new(&kernel.memory(), size).unwrap();
        let event = kernel.consumer().try_clone_to_owned().unwrap();
        let unit = shape.emulated.then(|| Arc::new(unit(shape.capabilities)));
        let device = Arc::new(Device::new(mapping, event, unit).unwrap());
        Self {
            kernel,
            device,
            disk: pattern(0, BLOCK * BLOCKS),
            sent: HashMap::new(),
            running: Vec::new(),
            views: Vec::new(),
            trusted: true,
        }
    }

    fn submit(&mut self, mut request: Request, transfer: Option<(bool, usize, usize)>) {
        // An initiator that announces Data-In for a command with Data-Out is handed what the memory held: an entry
        // does not tell the direction.
        if let Some(unit) = self.device.unit()
            && request.data_out.is_empty()
            && find(&request.cdb, unit).is_ok_and(|row| row.direction() == Direction::Out)
        {
            request.data_out = vec![0; std::mem::take(&mut request.data_in)];
        }
        let ticket = self.kernel.submit(request.clone());
        self.sent.insert(ticket, Sent { request, transfer, ..Sent::default() });
    }

    fn play(&mut self, action: Action<'_>) {
        match action {
            Action::Transfer { write, form, fua, lba, blocks, seed, slack } => {
                let count = if blocks == 0 && matches!(form, Form::Six) { 256 } else { usize::from(blocks) };
                let length = (count * BLOCK).saturating_add_signed(slack.into());
                let (data_out, data_in) =
                    if write { (pattern(seed, length), 0) } else { (Vec::new(), length) };
                let fits = count > 0 && usize::from(lba) + count <= BLOCKS && length >= count * BLOCK;
                let transfer = fits.then_some((write, usize::from(lba) * BLOCK, count * BLOCK));
                let cdb = transfer_cdb(write, form, fua, lba, blocks);
                self.submit(Request { cdb, data_out, data_in }, transfer);
            }
            Action::Command { cdb, data_out, data_in } => {
                // Three iovecs at most, unless the data area is in pieces.
                let [data_out, data_in] = [data_out, data_in].map(|length| usize::from(length) % 9000);
                let data_out = pattern(data_in as u8, data_out);
                self.submit(Request { cdb: cdb.to_vec(), data_out, data_in }, None);
            }
            Action::List { cdb, data_out } => {
                self.submit(Request { cdb: cdb.to_vec(), data_out: data_out.to_vec(), data_in: 0 }, None);
            }
            Action::Drain { limit, intercept } => self.drain(limit.into(), intercept),
            Action::Step(which) => self.step(which),
            Action::Answer { which, status, data_in } => {
                if let Some(index) = pick(&self.running, which)
                    && !self.running[index].claim.is_answered()
                {
                    let Running { claim, .. } = self.running.swap_remove(index);
                    let status = Status::from_code(status).unwrap_or(Status::CheckCondition);
                    let sense = (status == Status::CheckCondition).then_some(Sense::ABORTED_COMMAND);
                    let input = claim.data_in();
                    let data_in = usize::from(data_in).min(input.len());
                    // Who says that bytes are valid has written them.
                    input.write(0, &pattern(0x11, data_in));
                    self.answer(&claim, Reply { status, sense, data_in });
                }
            }
            Action::Emulate(which) => {
                if let Some(index) = pick(&self.running, which)
                    && self.running[index].step.is_none()
                {
                    let claim = self.running[index].claim.clone();
                    let step = claim.start().map(|started| match started {
                        Started::Step(step) => Some(step),
                        Started::Waiting | Started::Answered => None,
                    });
                    self.go_on(index, &claim, step.map_err(drop));
                }
            }
            Action::Drop(which) => {
                if let Some(index) = pick(&self.running, which) {
                    let claim = self.running.swap_remove(index).claim;
                    // A view holds its claim: only the last holder's drop is one.
                    self.snapshot(&claim);
                }
            }
            Action::View(which) => {
                if let Some(index) = pick(&self.running, which)
                    && !self.running[index].claim.is_answered()
                {
                    let claim = &self.running[index].claim;
                    assert!(claim.lend(), "there is no answer yet");
                    self.views.push((claim.clone(), None));
                }
            }
            Action::Release(which) => {
                if let Some(index) = pick(&self.views, which) {
                    self.release(index);
                }
            }
            Action::Commit => {
                self.trust(|world| world.device.commit().map_err(drop));
                self.take_ready();
            }
            Action::Reap => self.reap(),
            Action::Process => self.process(),
            Action::Abort { kind, first, count } => {
                let tickets: Vec<Ticket> =
                    (first..first.saturating_add(count)).map(|ticket| Ticket(ticket.into())).collect();
                self.kernel.abort(kind, &tickets);
            }
            Action::Expire(ticket) => self.kernel.expire(Ticket(ticket.into())),
            Action::Block(blocked) => self.kernel.set_blocked(blocked),
            Action::Plug(true) => self.kernel.plug(),
            Action::Plug(false) => self.kernel.unplug(),
            Action::Close => {
                self.device.close();
                self.trusted = false;
            }
            Action::Poke(offset, bytes) => {
                let offset = usize::from(offset) % 8192;
                self.kernel.mapping().write(offset, &bytes[..bytes.len().min(64)]).unwrap();
                self.trusted = false;
            }
        }
    }

    /// Does what must work as long as nobody has touched what is not his.
    fn trust<T: Default>(&mut self, act: impl FnOnce(&mut Self) -> Result<T, ()>) -> T {
        let result = act(self);
        assert!(result.is_ok() || !self.trusted, "the device failed by itself");
        result.unwrap_or_default()
    }

    fn drain(&mut self, limit: usize, intercept: bool) {
        let work = self.trust(|world| world.device.drain(limit, intercept).map_err(drop));
        for item in work {
            let (claim, step) = match item {
                Work::TaskManagement(_) => continue,
                Work::Command(claim) => (claim, None),
                Work::Step(claim, step) => (claim, Some(step)),
            };
            if self.trusted && !claim.is_answered() {
                let sent = &self.sent[&self.kernel.ticket(claim.id().0).unwrap()];
                let request = &sent.request;
                assert!(request.cdb.starts_with(claim.cdb()) || claim.cdb().starts_with(&request.cdb));
                if !request.data_out.is_empty() {
                    assert_eq!(bytes_of(claim.data()), request.data_out);
                }
                assert_eq!(
                    claim.data_in().len(),
                    match request.data_in {
                        0 => request.data_out.len(),
                        room => room,
                    }
                );
            }
            if let Some(step) = &step {
                self.check(&claim, step);
            }
            self.running.push(Running { claim, step });
        }
        self.take_ready();
    }

    /// Commands that waited for the range of another one.
    fn take_ready(&mut self) {
        for (claim, step) in self.trust(|world| world.device.take_ready().map_err(drop)) {
            self.check(&claim, &step);
            self.running.push(Running { claim, step: Some(step) });
        }
    }

    fn check(&self, claim: &Claim, step: &Step) {
        let unit = self.device.unit().unwrap();
        let offset = usize::try_from(step.offset.0).unwrap();
        let length = usize::try_from(step.length).unwrap();
        assert!(offset + length <= self.disk.len(), "{step:?}");
        assert!(offset.is_multiple_of(BLOCK) && length.is_multiple_of(BLOCK), "{step:?}");
        assert_eq!(length == 0, step.verb == Verb::Flush, "{step:?}");
        assert!(unit.capabilities().write || matches!(step.verb, Verb::Read | Verb::Flush), "{step:?}");
        match &step.buffer {
            StepBuffer::None | StepBuffer::Scratch => {}
            StepBuffer::Command(at) if step.verb == Verb::Read => {
                assert!(at + length <= claim.data_in().len(), "{step:?}");
            }
            StepBuffer::Command(at) => assert!(at + length <= claim.data().len(), "{step:?}"),
            StepBuffer::Owned(bytes) => assert_eq!(bytes.len(), length),
        }
        if let Some((write, first, bytes)) = self.sent_as(claim).and_then(|sent| sent.transfer)
            && step.verb != Verb::Flush
        {
            let verb = if write { Verb::Write } else { Verb::Read };
            assert_eq!((step.verb, offset, length), (verb, first, bytes));
        }
    }

    fn sent_as(&self, claim: &Claim) -> Option<&Sent> {
        // A command that was answered early has no ticket any more, though it goes on.
        (self.trusted && !claim.is_answered()).then(|| &self.sent[&self.kernel.ticket(claim.id().0).unwrap()])
    }

    fn step(&mut self, which: u8) {
        let Some(index) = pick(&self.running, which) else { return };
        let claim = self.running[index].claim.clone();
        let Some(step) = self.running[index].step.take() else { return };
        let range = step.offset.0 as usize..(step.offset.0 + step.length) as usize;
        let mut scratch = StepResult::None;
        match (step.verb, step.buffer) {
            (Verb::Flush, _) => {}
            (Verb::Read, StepBuffer::Command(at)) => {
                let bytes = self.disk[range].to_vec();
                claim.data_in().write(at, &bytes);
                claim.set_filled();
                if let Some(ticket) = self.kernel.ticket(claim.id().0)
                    && let Some(sent) = self.sent.get_mut(&ticket)
                {
                    sent.read = Some(bytes);
                }
            }
            (Verb::Read, _) => scratch = StepResult::Bytes(self.disk[range].to_vec()),
            (Verb::Write, StepBuffer::Owned(bytes)) => self.disk[range].copy_from_slice(&bytes),
            (Verb::Write, StepBuffer::Command(at)) => {
                claim.data().read(at, &mut self.disk[range.clone()]);
                if let Some(sent) = self.sent_as(&claim) {
                    assert_eq!(self.disk[range.clone()], sent.request.data_out[at..at + range.len()]);
                }
            }
            (Verb::Write, _) => unreachable!("a write has data"),
            (Verb::Discard | Verb::WriteZeroes, _) => self.disk[range].fill(0),
            (Verb::Extents, _) => unreachable!("this unit cannot tell"),
        }
        let next = claim.advance(scratch).map_err(drop);
        self.go_on(index, &claim, next);
    }

    fn go_on(&mut self, index: usize, claim: &Arc<Claim>, next: Result<Option<Step>, ()>) {
        match self.trust(|_| next) {
            Some(step) => {
                self.check(claim, &step);
                self.running[index].step = Some(step);
            }
            None => {
                self.running.swap_remove(index);
                self.snapshot(claim);
            }
        }
    }

    fn answer(&mut self, claim: &Arc<Claim>, reply: Reply) {
        let answered = self.trust(|_| claim.answer(reply).map(Some).map_err(drop));
        let views = self.views.iter().filter(|(viewed, _)| Arc::ptr_eq(viewed, claim)).count();
        match answered {
            Some(Answered::Sent) => assert_eq!(views, 0),
            Some(Answered::Kept { views: left } | Answered::Held { views: left }) => assert_eq!(views, left),
            Some(Answered::Already) => panic!("answered before"),
            None => {}
        }
        assert!(!claim.lend(), "no views of answered commands");
        assert!(matches!(claim.answer(Reply::good(0)), Ok(Answered::Already)));
        self.snapshot(claim);
    }

    /// Remembers what views of a command show when it is answered.
    fn snapshot(&mut self, claim: &Arc<Claim>) {
        for (viewed, shown) in &mut self.views {
            if Arc::ptr_eq(viewed, claim) && claim.is_answered() {
                *shown = Some(bytes_of(claim.data()));
            }
        }
    }

    fn release(&mut self, index: usize) {
        let (claim, shown) = self.views.swap_remove(index);
        if let Some(shown) = shown
            && self.trusted
        {
            assert_eq!(bytes_of(claim.data()), shown, "the memory under a view was given away");
        }
        claim.give_back();
    }

    fn reap(&mut self) {
        let kept = self.trust(|world| world.device.reap().map_err(drop));
        // The kernel takes completions inside the write that rings, so it has seen these answers.
        self.process();
        for id in kept {
            assert!(self.kernel.free_kept(id) || !self.trusted, "buffer {id} was never kept");
        }
    }

    fn process(&mut self) {
        if !self.trusted {
            // The simulator trusts its own ring, which is not its own any more.
            return;
        }
        for completion in self.kernel.process() {
            self.finished(&completion);
        }
        assert_eq!(self.kernel.violations(), &[] as &[String]);
        assert!(!self.kernel.is_broken());
    }

    fn finished(&mut self, completion: &Completion) {
        let sent = self.sent.get_mut(&completion.ticket).unwrap();
        assert!(!sent.answered, "{:?} was answered twice", completion.ticket);
        sent.answered = true;
        assert_eq!(completion.sense.is_empty(), completion.status != 2);
        if completion.status == 0
            && let Some(read) = &sent.read
        {
            let (data, rest) = completion.data_in.split_at(read.len());
            assert_eq!(data, read);
            assert!(rest.iter().all(|&byte| byte == 0));
        }
    }

    /// Everybody does what he owes, so that every command finds its end.
    fn wind_up(mut self) {
        self.kernel.unplug();
        self.kernel.set_blocked(false);
        for _ in 0..1000 {
            self.drain(256, false);
            while !self.running.is_empty() {
                match self.running[0].step {
                    Some(_) => self.step(0),
                    None => {
                        let claim = self.running.swap_remove(0).claim;
                        if claim.is_answered() {
                            continue;
                        }
                        self.answer(&claim, Reply::check(Sense::ABORTED_COMMAND));
                    }
                }
            }
            while !self.views.is_empty() {
                self.release(0);
            }
            self.reap();
            self.trust(|world| world.device.commit().map_err(drop));
            self.process();
            if !self.trusted || self.kernel.outstanding() == 0 {
                break;
            }
        }
        if self.trusted {
            assert_eq!(self.kernel.outstanding(), 0);
            assert_eq!(self.kernel.kept(), [] as [u16; 0]);
            assert_eq!(self.device.in_flight(), 0);
            assert!(self.sent.values().all(|sent| sent.answered));
        }
        // As its owner does, whatever has happened; then nothing of it is left in memory.
        self.device.close();
    }
}

fuzz_target!(|input: Input<'_>| {
    let mut world = World::new(&input.shape);
    for action in input.actions {
        world.play(action);
    }
    world.wind_up();
});
