//! Work on files: transfers between a file and memory that somebody lends, and what goes with them.
//!
//! A [`Transfer`] is one piece of work, whole or failed. What the page cache can do is done at once
//! ([`Transfer::attempt`]); what is left goes on in a [`queue::Queue`], where it stopped: through io_uring, if the file can
//! tell that it would have to wait (`RWF_NOWAIT`), and else in a thread that may ([`Transfer::block`]).
//!
//! An [`Unpacking`] is one, too: it reads frames, and puts what they hold into the memory. Threads do it also for want of
//! processors, not only of the page cache.
//!
//! The memory is behind [`Memory`], and belongs to the transfer from its making to its end. What that end is, the kernel
//! says: a transfer that nobody waits for any more is not over.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU8};

use libc::iovec;
use smallvec::SmallVec;

pub mod memory;
pub mod queue;
mod syscall;
mod threads;
pub mod unpacking;
mod uring;

use memory::{Bounce, Memory};
use unpacking::Unpacking;

/// Pieces that a system call takes: `IOV_MAX`.
const MAX_PIECES: usize = 1024;

/// What is to be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// From the file into the memory: `preadv2(2)`.
    Read,
    /// From the memory into the file: `pwritev2(2)`.
    Write {
        /// It is over when the data is durable (`RWF_DSYNC`).
        durable: bool,
    },
    /// What was written becomes durable: `fdatasync(2)`.
    Sync,
    /// `fallocate(2)`.
    Allocate {
        /// `FALLOC_FL_*`.
        mode: i32,
        /// Bytes.
        length: u64,
    },
}

/// What was learnt of the file of a descriptor. Another file may have the descriptor by now: it is never believed for long,
/// or where more than time depends on it.
struct Learnt {
    /// Buffered writes that go to a thread without a question: the file system has said that it does not know `RWF_NOWAIT`
    /// for them (ext4), and to hear that takes three system calls.
    unasked: AtomicU8,
    /// It was in memory: that is asked first, then.
    in_memory: AtomicBool,
}

static LEARNT: [Learnt; 1024] =
    [const { Learnt { unasked: AtomicU8::new(0), in_memory: AtomicBool::new(false) } }; 1024];

impl Learnt {
    fn of(fd: RawFd) -> Option<&'static Self> {
        LEARNT.get(usize::try_from(fd).ok()?)
    }

    /// Whether a buffered write is to go to a thread without a question.
    fn waits(fd: RawFd) -> bool {
        let less = |left: u8| left.checked_sub(1);
        Self::of(fd).is_some_and(|learnt| learnt.unasked.fetch_update(Relaxed, Relaxed, less).is_ok())
    }

    /// The flags of a call that must not wait: none for a file that was in memory and still is.
    fn flags(fd: RawFd) -> libc::c_int {
        let was_in_memory = Self::of(fd).is_some_and(|learnt| learnt.in_memory.load(Relaxed));
        if was_in_memory && syscall::is_memory(fd) { 0 } else { libc::RWF_NOWAIT }
    }

    /// The file system does not know `RWF_NOWAIT`, or not for this. Returns whether the flag is not needed: tmpfs has
    /// nothing to wait for.
    fn refused(fd: RawFd, plain_write: bool) -> bool {
        let in_memory = syscall::is_memory(fd);
        if let Some(learnt) = Self::of(fd) {
            learnt.in_memory.store(in_memory, Relaxed);
            if plain_write {
                learnt.unasked.store(if in_memory { 0 } else { u8::MAX }, Relaxed);
            }
        }
        in_memory
    }
}

/// Addresses and lengths for a system call. They are valid as long as the transfer has its memory.
#[derive(Debug, Default)]
pub(crate) struct Vectors(SmallVec<[iovec; 4]>);

/// Work on a file.
#[derive(Debug)]
pub struct Transfer<M> {
    fd: RawFd,
    operation: Operation,
    offset: u64,
    length: usize,
    done: usize,
    memory: M,
    bounce: Option<Bounce>,
    /// The descriptor goes around the page cache; `None`: nobody has asked.
    direct: Option<bool>,
    /// The file knows `RWF_NOWAIT`, for this: io_uring may try it without a thread. With one that does not, io_uring asks
    /// the file system whether it can be waited for, and waits for the answer, in our thread: a FUSE server, perhaps in
    /// this very process, would have to give it. Then it takes a thread, which costs ten times what one of ours costs.
    tries: bool,
}

impl<M: Memory> Transfer<M> {
    /// Work on the file behind `fd`, at `offset`; `memory` is what is moved, nothing for work that moves nothing.
    ///
    /// The descriptor has to stay open until the transfer is over.
    #[must_use]
    pub fn new(fd: RawFd, operation: Operation, offset: u64, memory: M) -> Self {
        let length = match operation {
            Operation::Read | Operation::Write { .. } => memory.length(),
            Operation::Sync | Operation::Allocate { .. } => 0,
        };
        Self { fd, operation, offset, length, done: 0, memory, bounce: None, direct: None, tries: false }
    }

    /// Bytes that are to be moved.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Does what can be done without waiting for storage. Returns whether it is over.
    ///
    /// That is what the page cache has or takes (`RWF_NOWAIT`). Around the page cache the flag does not help: the call
    /// waits for the storage all the same; nor does anything where data has to become durable.
    ///
    /// # Errors
    /// What the system says; [`EndOfFile`].
    pub fn attempt(&mut self) -> io::Result<bool> {
        if matches!(self.operation, Operation::Sync | Operation::Allocate { .. }) {
            return Ok(false);
        }
        if self.length == 0 {
            return Ok(true);
        }
        let plain_write = self.operation == (Operation::Write { durable: false });
        if plain_write && Learnt::waits(self.fd) {
            return Ok(false);
        }
        if self.is_direct()? {
            self.tries = syscall::tries_direct(self.fd);
            return Ok(false);
        }
        if self.operation == (Operation::Write { durable: true }) {
            return Ok(false);
        }
        let mut vectors = Vectors::default();
        let mut flags = Learnt::flags(self.fd);
        loop {
            self.gather(&mut vectors);
            match syscall::vectored(self, &vectors, flags) {
                Ok(bytes) => {
                    if self.moved(bytes)? {
                        return Ok(true);
                    }
                }
                Err(error) => {
                    return match error.raw_os_error() {
                        Some(libc::EINTR) => continue,
                        Some(libc::EAGAIN) => {
                            self.tries = true;
                            Ok(false)
                        }
                        Some(libc::EOPNOTSUPP | libc::EINVAL) if flags != 0 => {
                            if Learnt::refused(self.fd, plain_write) {
                                flags = 0;
                                continue;
                            }
                            Ok(false)
                        }
                        _ => Err(error),
                    };
                }
            }
        }
    }

    /// Does all that [`Transfer::attempt`] has left, and waits for it.
    ///
    /// # Errors
    /// What the system says; [`EndOfFile`] when the file ends before the transfer does.
    pub fn block(&mut self) -> io::Result<()> {
        self.is_direct()?;
        let mut vectors = Vectors::default();
        loop {
            self.gather(&mut vectors);
            let result = match self.operation {
                Operation::Read => syscall::vectored(self, &vectors, 0),
                Operation::Write { durable } => {
                    syscall::vectored(self, &vectors, if durable { libc::RWF_DSYNC } else { 0 })
                }
                Operation::Sync => syscall::sync(self.fd),
                Operation::Allocate { mode, length } => syscall::allocate(self.fd, mode, self.offset, length),
            };
            if self.settle(result)? {
                return Ok(());
            }
        }
    }

    fn is_direct(&mut self) -> io::Result<bool> {
        match self.direct {
            Some(direct) => Ok(direct),
            None => Ok(*self.direct.insert(syscall::is_direct(self.fd)?)),
        }
    }

    /// Among whom it queues for a thread.
    fn lane(&self) -> threads::Lane {
        // File systems that cannot say whether a buffered write has to wait have a lock for each file around it.
        let one_by_one = self.direct != Some(true) && self.operation == (Operation::Write { durable: false });
        threads::Lane { fd: self.fd, width: if one_by_one { 1 } else { threads::WIDTH } }
    }

    /// Where the next system call begins.
    fn position(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// What is left to move, as far as one system call takes it.
    fn gather(&self, vectors: &mut Vectors) {
        vectors.0.clear();
        let mut push = |pointer: *mut u8, length: usize| {
            if length > 0 && vectors.0.len() < MAX_PIECES {
                vectors.0.push(iovec { iov_base: pointer.cast(), iov_len: length });
            }
        };
        match &self.bounce {
            Some(bounce) => bounce.pieces(self.done, &mut push),
            None => self.memory.pieces(self.done, &mut push),
        }
    }

    /// Takes the result of a system call. Returns whether the work is over.
    fn settle(&mut self, result: io::Result<usize>) -> io::Result<bool> {
        match result {
            Ok(bytes) => self.moved(bytes),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => Ok(false),
                Some(libc::EAGAIN) => {
                    // It was tried, and is not to be tried again.
                    self.tries = false;
                    Ok(false)
                }
                // O_DIRECT wants memory that begins and ends at blocks. The kernel's does, that of other layers need not.
                Some(libc::EINVAL)
                    if self.direct == Some(true) && self.length > 0 && self.bounce.is_none() =>
                {
                    let bounce = Bounce::new(self.length)?;
                    if self.operation != Operation::Read {
                        bounce.fill_from(&self.memory);
                    }
                    self.bounce = Some(bounce);
                    // From the start: what was moved so far may have ended inside of a block.
                    self.done = 0;
                    Ok(false)
                }
                _ => Err(error),
            },
        }
    }

    fn moved(&mut self, bytes: usize) -> io::Result<bool> {
        if self.length == 0 {
            return Ok(true);
        }
        if bytes == 0 {
            let end = self.position();
            return Err(io::Error::other(EndOfFile(end)));
        }
        self.done += bytes;
        if self.done < self.length {
            return Ok(false);
        }
        if self.operation == Operation::Read {
            if let Some(bounce) = &self.bounce {
                bounce.copy_to(&self.memory);
            }
            self.memory.filled();
        }
        Ok(true)
    }
}

/// What a queue takes.
#[derive(Debug)]
pub enum Work<M> {
    /// Bytes that are moved as they are, or nothing that is moved.
    Transfer(Transfer<M>),
    /// Frames that are decompressed on their way.
    Unpacking(Box<Unpacking<M>>),
}

impl<M> From<Transfer<M>> for Work<M> {
    fn from(transfer: Transfer<M>) -> Self {
        Self::Transfer(transfer)
    }
}

impl<M> From<Unpacking<M>> for Work<M> {
    fn from(unpacking: Unpacking<M>) -> Self {
        Self::Unpacking(Box::new(unpacking))
    }
}

impl<M: Memory> Work<M> {
    /// How long an attempt may take, in bytes that are copied in this time.
    #[must_use]
    pub fn weight(&self) -> usize {
        match self {
            Self::Transfer(transfer) => transfer.length(),
            Self::Unpacking(unpacking) => unpacking.weight(),
        }
    }

    /// Whether a thread is to do it while the caller has other work. Not a copy: to hand that over costs as much.
    pub fn suits_a_thread(&mut self) -> bool {
        match self {
            Self::Transfer(_) => false,
            Self::Unpacking(unpacking) => unpacking.share(),
        }
    }

    /// See [`Transfer::attempt`] and [`Unpacking::attempt`].
    ///
    /// # Errors
    /// Theirs.
    pub fn attempt(&mut self) -> io::Result<bool> {
        match self {
            Self::Transfer(transfer) => transfer.attempt(),
            Self::Unpacking(unpacking) => unpacking.attempt(),
        }
    }

    /// Does all that is left, and waits for it.
    ///
    /// # Errors
    /// See [`Transfer::block`] and [`Unpacking::block`].
    pub fn block(&mut self) -> io::Result<()> {
        match self {
            Self::Transfer(transfer) => transfer.block(),
            Self::Unpacking(unpacking) => unpacking.block(),
        }
    }

    fn lane(&self) -> threads::Lane {
        match self {
            Self::Transfer(transfer) => transfer.lane(),
            Self::Unpacking(unpacking) => unpacking.lane(),
        }
    }
}

/// The file ends where there should have been more of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the file ends at {0}: it was truncated")]
pub struct EndOfFile(pub u64);
