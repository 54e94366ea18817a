//! A device: one ring, its doorbell, and what it emulates. Joins [`ring`](crate::ring) and [`scsi`](crate::scsi).
//!
//! # The duty to answer
//!
//! A [`Claim`] stands for one outstanding command. [`Claim::answer`] works once, whoever calls it and how often; a
//! claim that is dropped unanswered answers ABORTED COMMAND by itself. Nothing else completes commands.
//!
//! # When views of the data outlive the answer
//!
//! The answer closes the data (see [`lease`](crate::ring::lease)). If views are left, the data blocks must not be
//! used for another command yet: where the kernel can keep buffers the initiator is answered at once and the blocks
//! are freed later, through configfs, by whoever calls [`Device::reap`]; elsewhere the answer itself waits.
//!
//! # Commands that exclude each other
//!
//! A command whose bytes another one has for itself waits (see [`exclusion`](crate::exclusion)): its claim is kept here,
//! and comes out of [`Device::take_ready`] when it may begin. Its range is given back when it is answered, or, if it goes
//! on behind its answer, when its last step is done.
//!
//! # Threads
//!
//! One task drains. Answers, drops and releases may come from any thread; the ring is behind a mutex for them, which
//! is held for a few stores only, and never while foreign code runs.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use smallvec::SmallVec;

use crate::abi;
use crate::exclusion::{Exclusion, Hold, Token};
use crate::mapping::Mapping;
use crate::ring::lease::{Closed, Lease};
use crate::ring::parking::Parking;
use crate::ring::{Buffer, Cdb, CmdId, Entry, Response, Ring, RingError, TaskManagement};
use crate::scsi::LogicalUnit;
use crate::scsi::opcodes::{Direction, find};
use crate::scsi::sense::{Sense, SenseFormat};
use crate::scsi::{DataBuffer, Next, Reach, Reply, Status, Step, StepResult, Task, Verb};
use crate::statistics::{Asked, Call, FULL, Statistics, Time, Weight};

/// What ends a device. A command that fails is not among it: that is an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The kernel removed the device.
    #[error("the kernel removed the device")]
    Removed,
    /// The ring cannot be trusted any more.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The descriptor failed.
    #[error("the device's descriptor failed: {0}")]
    Io(#[from] io::Error),
}

/// Counters since the start, for people and tests.
#[derive(Debug, Default)]
pub struct Counters {
    /// Commands fetched.
    pub commands: AtomicU64,
    /// Commands answered with no help of a handler.
    pub emulated: AtomicU64,
    /// Times that the doorbell was rung.
    pub doorbells: AtomicU64,
    /// Times that an event was taken.
    pub wakeups: AtomicU64,
}

/// What a drain found for the layer above.
#[derive(Debug)]
pub enum Work {
    /// The handler is needed for this step.
    Step(Arc<Claim>, Step),
    /// Nothing was decided yet: the layer above answers, or asks [`Claim::start`].
    Command(Arc<Claim>),
    /// Commands that were aborted.
    TaskManagement(TaskManagement),
}

/// Who waits for a range.
#[derive(Debug, Clone)]
enum Waiter {
    /// A command, with its first step.
    Command(Arc<Claim>, Step),
    /// A piece of a copy: see [`Device::enter`].
    Piece(Token),
}

/// One device.
#[derive(Debug)]
pub struct Device {
    ring: Mutex<Ring>,
    event: Mutex<Option<Arc<OwnedFd>>>,
    unit: Option<Arc<LogicalUnit>>,
    keeps_buffers: bool,
    reads_len: bool,
    parking: Parking<Response>,
    kept: Mutex<Vec<u16>>,
    exclusion: Exclusion<Waiter>,
    granted: Mutex<Vec<Token>>,
    fills_reads: AtomicBool,
    wake: OnceLock<OwnedFd>,
    /// Entries that the last drain had to leave: up to which of [`Ring::seen`], and when it left them.
    left: Mutex<Option<(u64, Time)>>,
    /// What happened so far.
    pub counters: Counters,
    /// The same in more detail, and how long it took.
    pub statistics: Statistics,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while one of these is held leaves no half-done state that matters more than going on.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Takes up the ring in `mapping`; `event` is the UIO descriptor (non-blocking), or the simulator's.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when the mailbox is not one that we can serve.
    pub fn new(
        mapping: Mapping,
        event: OwnedFd,
        unit: Option<Arc<LogicalUnit>>,
    ) -> Result<Self, DeviceError> {
        let ring = Ring::attach(Arc::new(mapping))?;
        Ok(Self {
            // In strict order the answer that keeps a buffer may wait for others, and `reap` would not know it.
            keeps_buffers: ring.has(abi::MAILBOX_FLAG_CAP_KEEP_BUF) && ring.has(abi::MAILBOX_FLAG_CAP_OOOC),
            reads_len: ring.has(abi::MAILBOX_FLAG_CAP_READ_LEN),
            ring: Mutex::new(ring),
            event: Mutex::new(Some(Arc::new(event))),
            unit,
            parking: Parking::default(),
            kept: Mutex::default(),
            exclusion: Exclusion::default(),
            granted: Mutex::default(),
            fills_reads: AtomicBool::new(false),
            wake: OnceLock::new(),
            left: Mutex::default(),
            counters: Counters::default(),
            statistics: Statistics::default(),
        })
    }

    /// The emulated unit, unless commands are passed as they are.
    #[must_use]
    pub fn unit(&self) -> Option<&Arc<LogicalUnit>> {
        self.unit.as_ref()
    }

    /// Whoever serves the device from now on promises to write all of the memory of a read, or does not.
    pub fn set_fills_reads(&self, fills: bool) {
        self.fills_reads.store(fills, Ordering::Relaxed);
    }

    fn event(&self) -> Result<Arc<OwnedFd>, DeviceError> {
        lock(&self.event).clone().ok_or(DeviceError::Ring(RingError::Dead))
    }

    /// The descriptor that is readable when commands wait.
    ///
    /// # Errors
    /// [`RingError::Dead`] after [`Device::close`].
    pub fn event_fd(&self) -> Result<RawFd, DeviceError> {
        Ok(self.event()?.as_raw_fd())
    }

    /// Takes the event, then up to `limit` entries. With `intercept` no command is looked at here; otherwise those
    /// that need no storage are answered, and the others come with their first step.
    ///
    /// The event is taken first: one that arrives during the scan makes the descriptor readable again.
    ///
    /// # Errors
    /// [`DeviceError`]: the device is over.
    pub fn drain(self: &Arc<Self>, limit: usize, intercept: bool) -> Result<Vec<Work>, DeviceError> {
        let mut count = [0u8; 4];
        match rustix::io::read(&*self.event()?, &mut count) {
            Ok(4) => {
                self.counters.wakeups.fetch_add(1, Ordering::Relaxed);
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Ok(_) | Err(rustix::io::Errno::IO) => return Err(DeviceError::Removed),
            Err(error) => return Err(io::Error::from(error).into()),
        }
        let mut work = Vec::new();
        let now = Time::now();
        let left = lock(&self.left).take();
        let full = {
            let mut ring = lock(&self.ring);
            ring.seen()? - ring.fetched() >= FULL
        };
        let (mut new, mut old) = (0, 0);
        let mut empty = false;
        for _ in 0..limit {
            // The lock is not held over the emulation, nor over the drop of a claim.
            let (entry, fetched) = {
                let mut ring = lock(&self.ring);
                (ring.fetch()?, ring.fetched())
            };
            if entry.is_some() {
                *(if left.is_some_and(|(seen, _)| fetched <= seen) { &mut old } else { &mut new }) += 1;
            }
            match entry {
                None => {
                    empty = true;
                    break;
                }
                Some(Entry::TaskManagement(tmr)) => {
                    self.abort_waiting(&tmr)?;
                    if let (abi::tmr::LUN_RESET, Some(unit)) = (tmr.kind, &self.unit) {
                        unit.reset();
                    }
                    work.push(Work::TaskManagement(tmr));
                }
                Some(Entry::Command(command)) => {
                    self.counters.commands.fetch_add(1, Ordering::Relaxed);
                    let claim = Arc::new(Claim {
                        device: self.clone(),
                        id: command.id,
                        cdb: command.cdb,
                        data: command.data,
                        bidi_in: command.bidi_in,
                        lease: Lease::new(),
                        filled: AtomicBool::new(false),
                        data_out: AtomicBool::new(false),
                        answered: AtomicBool::new(false),
                        place: Mutex::default(),
                        outlived_by: AtomicUsize::new(0),
                        fetched: now,
                        weight: self.statistics.weight(full),
                        begun: AtomicU64::new(0),
                        called: AtomicBool::new(false),
                    });
                    if intercept || self.unit.is_none() {
                        work.push(Work::Command(claim));
                    } else {
                        match claim.start()? {
                            Started::Step(step) => work.push(Work::Step(claim, step)),
                            Started::Waiting => {}
                            Started::Answered => {
                                self.counters.emulated.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                }
            }
        }
        self.statistics.fetched(new, old, left.map_or(0, |(_, since)| now.since(since)));
        if !empty {
            let seen = lock(&self.ring).seen()?;
            *lock(&self.left) = Some((seen, now));
        }
        Ok(work)
    }

    /// Whether entries wait that were not drained, or commands in [`Device::take_ready`].
    ///
    /// # Errors
    /// [`DeviceError::Ring`].
    pub fn pending(&self) -> Result<bool, DeviceError> {
        Ok(self.has_ready() || lock(&self.ring).pending()?)
    }

    /// Whether commands that had to wait for others can begin.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        self.exclusion.has_ready()
    }

    /// The commands that had to wait for others and can begin, with their first steps.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] from the answer to one that cannot begin any more.
    pub fn take_ready(&self) -> Result<Vec<(Arc<Claim>, Step)>, DeviceError> {
        let mut ready = Vec::new();
        for waiter in self.exclusion.take_ready() {
            match waiter {
                Waiter::Command(claim, step) => ready.push((claim, step)),
                Waiter::Piece(token) => lock(&self.granted).push(token),
            }
        }
        let size = self.unit.as_ref().map_or(u64::MAX, |unit| unit.size());
        let mut outside = Vec::new();
        ready.retain(|(claim, step)| {
            // It was looked at before it waited, and the medium may have shrunk since.
            let fits = step.offset.0.checked_add(step.length).is_some_and(|end| end <= size);
            if !fits {
                outside.push(claim.clone());
            }
            fits
        });
        for claim in outside {
            claim.answer(Reply::check(Sense::LBA_OUT_OF_RANGE))?;
        }
        Ok(ready)
    }

    /// A piece of a copy is to touch `length` bytes from `offset` on, like a READ or WRITE of them. Returns its name for
    /// [`Device::leave`], and whether it may begin; if not, [`Device::take_granted`] has it when it may, after
    /// [`Device::take_ready`].
    pub fn enter(&self, offset: u64, length: u64) -> (Token, bool) {
        let token = self.exclusion.token();
        let reach = Reach { first: offset, end: offset.saturating_add(length), exclusive: false };
        // No command has the id 0.
        (token, self.exclusion.enter(token, 0, reach, Waiter::Piece(token)).is_some())
    }

    /// The piece is over, or is given up.
    pub fn leave(&self, token: Token) {
        self.exclusion.leave(0, Hold::Queued(token));
    }

    /// The pieces that had to wait and may begin.
    pub fn take_granted(&self) -> Vec<Token> {
        std::mem::take(&mut *lock(&self.granted))
    }

    /// Answers the aborted ones among the commands that wait. One that was answered before is not meant: its id is
    /// another command's.
    fn abort_waiting(&self, tmr: &TaskManagement) -> Result<(), DeviceError> {
        for waiter in self.exclusion.waiting_with_ids(|id| tmr.commands.contains(&CmdId(id))) {
            if let Waiter::Command(claim, _) = waiter
                && !claim.is_answered()
                && !claim.detach()?
            {
                claim.answer(Reply::status(Status::TaskAborted))?;
            }
        }
        Ok(())
    }

    /// Hands back what was answered, and rings the doorbell if there is anything.
    ///
    /// # Errors
    /// [`DeviceError`]: the device is over.
    pub fn commit(&self) -> Result<(), DeviceError> {
        // Tail and doorbell under one lock: otherwise the kernel, in its loop for another thread's doorbell, may read
        // our new tail before the slots on a weakly ordered CPU.
        let mut ring = lock(&self.ring);
        if !ring.commit()? {
            return Ok(());
        }
        let event = self.event()?;
        self.statistics.committed();
        self.counters.doorbells.fetch_add(1, Ordering::Relaxed);
        match rustix::io::write(&*event, &1u32.to_ne_bytes()) {
            // A full socket (the simulator's) has been rung often enough.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::IO | rustix::io::Errno::PIPE) => {
                Err(DeviceError::Removed)
            }
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// Commands that are not answered yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        lock(&self.ring).in_flight()
    }

    /// Where another process may go on with the ring, if nothing is in flight here; see [`Ring::quiescent_at`].
    #[must_use]
    pub fn quiescent_at(&self) -> Option<u32> {
        lock(&self.ring).quiescent_at()
    }

    /// Ids of commands that were answered while views of their data were left, and whose buffers the kernel keeps.
    #[must_use]
    pub fn kept(&self) -> Vec<u16> {
        lock(&self.kept).clone()
    }

    /// Readable when the last view of an answered command went away: [`Device::reap`] is due. Made at the first call;
    /// what was released before is not lost, if `reap` is called once after it.
    ///
    /// # Errors
    /// What `eventfd(2)` says.
    pub fn wake_fd(&self) -> io::Result<RawFd> {
        if self.wake.get().is_none() {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let _ = self.wake.set(fd);
        }
        self.wake.get().map(AsRawFd::as_raw_fd).ok_or_else(|| io::Error::other("no eventfd"))
    }

    /// Ends what waited for views that are gone: sends the answers that were held, and returns the ids whose kept
    /// buffers have to be freed (`action/free_kept_buf`).
    ///
    /// Commits, for the kernel knows a kept buffer only when it has the answer that keeps it.
    ///
    /// # Errors
    /// [`DeviceError`]: the device is over.
    pub fn reap(&self) -> Result<Vec<u16>, DeviceError> {
        if let Some(fd) = self.wake.get() {
            let _ = rustix::io::read(fd, &mut [0u8; 8]);
        }
        let mut kept = Vec::new();
        for (id, held) in self.parking.take() {
            match held {
                Some(response) => lock(&self.ring).complete(id, response)?,
                None => kept.push(id.0),
            }
        }
        lock(&self.kept).retain(|id| !kept.contains(id));
        self.commit()?;
        Ok(kept)
    }

    fn released(&self, id: CmdId) {
        self.parking.release(id);
        if let Some(fd) = self.wake.get() {
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }

    /// Gives the device up: the descriptor is closed, answers go nowhere from now on. The memory stays mapped while
    /// views of it are left.
    pub fn close(&self) {
        lock(&self.ring).abandon();
        lock(&self.event).take();
        // Claims that wait hold the device, and it holds them.
        drop(self.exclusion.close());
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// It is on its way, with the next commit.
    Sent,
    /// It is on its way, and the data blocks stay with `views` views.
    Kept {
        /// Views left.
        views: usize,
    },
    /// It waits for `views` views.
    Held {
        /// Views left.
        views: usize,
    },
    /// There was an answer before.
    Already,
}

/// What became of a command that the emulation has looked at.
#[derive(Debug)]
pub enum Started {
    /// The handler is needed.
    Step(Step),
    /// It will be, when other commands are over: see [`Device::take_ready`].
    Waiting,
    /// It is answered.
    Answered,
}

/// Where a command is: what is left to do, and which range it has for that.
#[derive(Debug, Default)]
struct Place {
    task: Option<Task>,
    hold: Hold,
}

/// One outstanding command, and the duty to answer it.
#[derive(Debug)]
pub struct Claim {
    device: Arc<Device>,
    id: CmdId,
    cdb: Cdb,
    data: Buffer,
    bidi_in: Option<Buffer>,
    lease: Lease,
    /// Every byte of the Data-In was written, by somebody who means it or by a zeroing.
    filled: AtomicBool,
    /// The main buffer is known to hold Data-Out: zeroing it would cost every write a pass over the memory. Known by
    /// the CDB, for an entry does not tell: an initiator that announces Data-In for a WRITE has written what the memory
    /// held, which is data of this device, and is handed one byte of it.
    data_out: AtomicBool,
    answered: AtomicBool,
    place: Mutex<Place>,
    /// Views that were left at the answer.
    outlived_by: AtomicUsize,
    fetched: Time,
    /// Whether it is timed.
    weight: Weight,
    /// When the handler was called for the present step; 0 before the first, 1 if it is not timed.
    begun: AtomicU64,
    /// Whether the handler has returned from an earlier step.
    called: AtomicBool,
}

impl Claim {
    /// Its id on the ring.
    #[must_use]
    pub fn id(&self) -> CmdId {
        self.id
    }

    /// The command descriptor block.
    #[must_use]
    pub fn cdb(&self) -> &[u8] {
        &self.cdb
    }

    /// The main buffer.
    #[must_use]
    pub fn data(&self) -> &Buffer {
        &self.data
    }

    /// Where Data-In goes: of a bidirectional command its own buffer.
    #[must_use]
    pub fn data_in(&self) -> &Buffer {
        self.bidi_in.as_ref().unwrap_or(&self.data)
    }

    /// Whether there was an answer.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Acquire)
    }

    /// Views that were left when the command was answered, by whatever way that came about.
    #[must_use]
    pub fn outlived_by(&self) -> usize {
        self.outlived_by.load(Ordering::Relaxed)
    }

    /// Lets the emulation look at the command.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] from the answer.
    pub fn start(self: &Arc<Self>) -> Result<Started, DeviceError> {
        let next = match &self.device.unit {
            Some(unit) => unit.start(&self.cdb, self.emulated_buffer(unit)),
            None => Next::Done(Reply::check(Sense::INVALID_OPCODE)),
        };
        match next {
            Next::Done(reply) => self.answer(reply).map(|_| Started::Answered),
            Next::Call(step, task) => Ok(self.enter(step, task)),
            Next::Early(step, task) => {
                // The task goes on without the initiator: what holds it is the step that is handed out.
                self.send(Reply::good(0))?;
                Ok(self.enter(step, task))
            }
        }
    }

    /// Begins with the first step as soon as no other command is in the way.
    fn enter(self: &Arc<Self>, step: Step, task: Task) -> Started {
        if step.verb == Verb::Write {
            self.data_out.store(true, Ordering::Relaxed);
        }
        let exclusion = &self.device.exclusion;
        let reach = task.reach(&step);
        let mut place = lock(&self.place);
        place.task = Some(task);
        if step.unit.is_some() {
            // Each piece enters by itself, where it is for.
            return Started::Step(step);
        }
        if let Some(hold) = exclusion.enter_unqueued(self.id.0, &reach) {
            place.hold = hold;
            return Started::Step(step);
        }
        let token = exclusion.token();
        // The place stays locked: whoever gives up this command finds it in the queue.
        place.hold = Hold::Queued(token);
        match exclusion.enter(token, self.id.0, reach, Waiter::Command(self.clone(), step)) {
            Some(Waiter::Command(_, step)) => Started::Step(step),
            _ => Started::Waiting,
        }
    }

    /// Does nothing more for this command: what is left is dropped, which tells the unit, and others may have its range.
    fn finish(&self) {
        let Place { task, hold } = std::mem::take(&mut *lock(&self.place));
        drop(task);
        self.device.exclusion.leave(self.id.0, hold);
    }

    /// How long ago the command was fetched, in nanoseconds.
    #[must_use]
    pub fn age(&self) -> u64 {
        Time::now().since(self.fetched)
    }

    /// The handler is called now.
    pub fn begin(&self) {
        let now = if self.weight == 0 { 1 } else { Time::now().0 };
        self.begun.store(now, Ordering::Relaxed);
    }

    /// Runs `then`, which goes on with the command, for a handler that has returned from what it was `asked`, or has
    /// raised; counts that call, if there was one.
    pub fn returned<T>(&self, asked: Asked, failed: bool, then: impl FnOnce() -> T) -> T {
        let begun = Time(self.begun.load(Ordering::Relaxed));
        if begun == Time::default() {
            return then();
        }
        self.device.statistics.called(asked, failed);
        let weight = self.weight;
        if weight == 0 {
            return then();
        }
        let returned = Time::now();
        let early = self.is_answered();
        let result = then();
        let answered = !early && self.is_answered();
        // The next step begins where this one ends.
        self.begun.store(returned.0, Ordering::Relaxed);
        let fetched = (!self.called.swap(true, Ordering::Relaxed)).then_some(self.fetched);
        self.device.statistics.timed(&Call { asked, weight, fetched, begun, returned, answered });
        result
    }

    /// The step succeeded, with `result`: returns the next one, or `None` if there is no more to do. The command is
    /// answered then, or was before.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] from the answer.
    pub fn advance(&self, result: StepResult) -> Result<Option<Step>, DeviceError> {
        let task = lock(&self.place).task.take();
        match (&self.device.unit, task) {
            (Some(unit), Some(task)) => self.go_on(unit.resume(task, self.emulated_buffer(unit), result)),
            _ => Ok(None),
        }
    }

    /// The buffer for the way that the command's data goes. The fabric may announce both ways for any command; of those
    /// that are emulated none uses both.
    fn emulated_buffer(&self, unit: &LogicalUnit) -> &Buffer {
        match &self.bidi_in {
            Some(data_in)
                if find(&self.cdb, unit).is_ok_and(|command| command.direction() == Direction::In) =>
            {
                data_in
            }
            _ => &self.data,
        }
    }

    fn go_on(&self, next: Next) -> Result<Option<Step>, DeviceError> {
        match next {
            Next::Done(reply) => self.answer(reply).map(|_| None),
            Next::Early(step, task) => {
                self.send(Reply::good(0))?;
                lock(&self.place).task = Some(task);
                Ok(Some(step))
            }
            Next::Call(step, task) => {
                lock(&self.place).task = Some(task);
                // It stays so: the flush after a write has no data of its own.
                if step.verb == Verb::Write {
                    self.data_out.store(true, Ordering::Relaxed);
                }
                Ok(Some(step))
            }
        }
    }

    /// Whether whoever serves the device now has promised to write every byte of Data-In.
    #[must_use]
    pub fn fills_reads(&self) -> bool {
        self.device.fills_reads.load(Ordering::Relaxed)
    }

    /// Whether every byte of Data-In was written.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Relaxed)
    }

    /// Somebody takes it on himself that every byte of Data-In is written.
    pub fn set_filled(&self) {
        self.filled.store(true, Ordering::Relaxed);
    }

    /// Zeroes Data-In before its first partial use: what a handler forgets to write is zeroes then, and never what
    /// the memory held before. Nothing is done when the command is answered: the memory may be another one's.
    pub fn zero_unless_filled(&self) {
        if !self.is_filled() && self.lend() {
            if !self.filled.swap(true, Ordering::Relaxed) {
                self.data_in().zero(0..usize::MAX);
            }
            self.give_back();
        }
    }

    /// Counts a view of the data. `false`: the command is answered, there is nothing to see any more.
    #[must_use]
    pub fn lend(&self) -> bool {
        self.lease.acquire()
    }

    /// Counts a view out; the last one of an answered command frees its data.
    pub fn give_back(&self) {
        if self.lease.release() {
            self.device.released(self.id);
        }
    }

    /// The command is aborted. `true`: that has been answered, and it goes on all the same, as a SANITIZE does (SBC-4);
    /// `false`: nothing was done, and it is to end.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] from the answer.
    pub fn detach(&self) -> Result<bool, DeviceError> {
        let outlives = lock(&self.place).task.as_ref().is_some_and(Task::outlives_abort);
        if outlives {
            self.send(Reply::status(Status::TaskAborted))?;
        }
        Ok(outlives)
    }

    /// The step has failed with `reply`: answers as the command has it.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] from the answer.
    pub fn fail(&self, reply: Reply) -> Result<Answered, DeviceError> {
        let task = lock(&self.place).task.take();
        self.answer(match (&self.device.unit, task) {
            (Some(unit), Some(task)) => unit.fail(task, reply),
            _ => reply,
        })
    }

    /// Answers the command, once.
    ///
    /// # Errors
    /// [`DeviceError::Ring`] when the ring is dead: the answer goes nowhere then, and the device is over.
    pub fn answer(&self, reply: Reply) -> Result<Answered, DeviceError> {
        // Before the answer: once it is on its way, the id may be another command's.
        self.finish();
        self.send(reply)
    }

    fn send(&self, reply: Reply) -> Result<Answered, DeviceError> {
        if self.answered.swap(true, Ordering::AcqRel) {
            return Ok(Answered::Already);
        }
        self.device.statistics.answered(&reply);
        let response = self.response(reply);
        let complete = |response| lock(&self.device.ring).complete(self.id, response);
        let answered = self.device.parking.close(self.id, &self.lease, |closed| match closed {
            Closed::Lent { views } if self.device.keeps_buffers => {
                let kept = Response { keep_buf: true, ..response };
                lock(&self.device.kept).push(self.id.0);
                (complete(kept).map(|()| Answered::Kept { views }), None)
            }
            Closed::Lent { views } => (Ok(Answered::Held { views }), Some(response)),
            Closed::Free | Closed::Already => (complete(response).map(|()| Answered::Sent), None),
        });
        let answered = answered?;
        if let Answered::Kept { views } | Answered::Held { views } = answered {
            self.outlived_by.store(views, Ordering::Relaxed);
        }
        Ok(answered)
    }

    fn response(&self, reply: Reply) -> Response {
        let mut sense: SmallVec<[u8; 32]> = SmallVec::new();
        if let Some(data) = &reply.sense {
            let (bytes, length) = match &self.device.unit {
                Some(unit) => unit.encode_sense(data),
                None => data.encode(SenseFormat::Fixed),
            };
            sense.extend_from_slice(&bytes[..length]);
        }
        let data_in = self.data_in();
        let valid = reply.data_in.min(data_in.len());
        let mut read_len = None;
        let input = self.bidi_in.is_some() || !self.data_out.load(Ordering::Relaxed);
        // With CHECK CONDITION the kernel copies no data unless told a length. With every other status it copies the
        // whole buffer, to where the initiator can see it.
        if input && valid < data_in.len() {
            if valid > 0 && self.device.reads_len && self.bidi_in.is_none() {
                read_len = u32::try_from(valid).ok();
            }
            let told = read_len.is_some() && matches!(reply.status, Status::Good | Status::CheckCondition);
            if !told && reply.status != Status::CheckCondition {
                data_in.zero(valid..usize::MAX);
            }
        } else if valid > 0 && reply.status == Status::CheckCondition && self.device.reads_len {
            read_len = u32::try_from(valid).ok();
        } else if !input && reply.status == Status::Good && self.device.reads_len {
            // Data-Out has no such length and the kernel ignores it. Of a Data-In that the initiator announced all the
            // same it copies no more than this; 0 would be ignored, too.
            read_len = Some(1);
        }
        Response { status: reply.status as u8, sense, read_len, keep_buf: false }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // One that went on behind its answer has its range still.
        self.finish();
        if !self.is_answered() && self.answer(Reply::check(Sense::ABORTED_COMMAND)).is_ok() {
            let _ = self.device.commit();
        }
    }
}
