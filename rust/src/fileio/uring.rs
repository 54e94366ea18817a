//! Transfers that wait for storage, in io_uring: no thread, many at once.
//!
//! # Theory
//!
//! The kernel gets addresses and lengths, and gives them back with the completion, which may be long after everybody has
//! lost interest. So ownership follows the kernel: a slot has the transfer, with its memory, from [`Uring::start`] to
//! its completion, and nothing else ends that. [`Uring::cancel`] asks the kernel to hurry; it changes nothing here. One
//! that is dropped with transfers in it waits for them; those of a kernel that does not answer are leaked, with their
//! memory, for a leak is harmless and a write into memory of others is not.
//!
//! At most as many are in the kernel as it has room for completions; the rest waits in a queue of ours. So completions
//! are never dropped, and the submission queue is never full.
//!
//! Neither buffers nor files are registered. Registered buffers stay pinned as long as the ring lives, and the kernel
//! takes unused pages of TCMU's data area away and gives it others: what is pinned would not be what is mapped.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::memory::Memory;
use super::queue::{Finished, Ticket, canceled};
use super::{Operation, Transfer, Vectors};

/// Transfers that may be in the kernel at once.
const DEPTH: u32 = 256;
/// The `user_data` of requests that are no transfer's.
const NOBODY: u64 = u64::MAX;
/// How long a dropped queue waits for the kernel.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Slot<M> {
    ticket: Ticket,
    transfer: Transfer<M>,
    /// What the kernel reads: stays where it is, for slots are boxed.
    vectors: Vectors,
    in_kernel: bool,
    cancelled: bool,
}

// SAFETY: what is not `Send` are the addresses in `vectors`. They are passed on to the kernel and never used from Rust,
// and the memory that they are of is in `transfer`, which may change threads.
unsafe impl<M: Send> Send for Slot<M> {}

/// Transfers under way.
#[derive(Debug)]
pub(super) struct Uring<M: Memory> {
    ring: Ring,
    slots: Vec<Option<Box<Slot<M>>>>,
    free: Vec<u32>,
    waiting: VecDeque<u32>,
    cancels: VecDeque<Ticket>,
    in_kernel: u32,
    generation: u32,
    finished: Vec<Finished<M>>,
}

struct Ring(IoUring);

impl std::fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "io_uring {}", self.0.as_raw_fd())
    }
}

impl<M: Memory> Uring<M> {
    /// None yet. `event`, an eventfd, is told of each completion.
    ///
    /// # Errors
    /// EPERM or ENOSYS where io_uring is forbidden or absent; EOPNOTSUPP where it lacks what is needed (before Linux
    /// 5.6); ENOMEM under a small RLIMIT_MEMLOCK (before Linux 5.12).
    pub(super) fn new(event: BorrowedFd<'_>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .dontfork()
            .setup_coop_taskrun()
            .build(DEPTH)
            .or_else(|_| IoUring::builder().dontfork().build(DEPTH))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::AsyncCancel::CODE,
        ];
        if !needed.iter().all(|&code| probe.is_supported(code)) || !ring.params().is_feature_nodrop() {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring: Ring(ring),
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            cancels: VecDeque::new(),
            in_kernel: 0,
            generation: 0,
            finished: Vec::new(),
        })
    }

    /// Transfers that are not over.
    pub(super) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes what [`Transfer::attempt`] has left of a transfer. It begins with the next [`Uring::submit`].
    pub(super) fn start(&mut self, transfer: Transfer<M>) -> Ticket {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        self.generation = self.generation.wrapping_add(1);
        // Never `NOBODY`: there are not 2^32 slots.
        let ticket = Ticket(u64::from(self.generation) | u64::from(index) << 32);
        self.slots[index as usize] = Some(Box::new(Slot {
            ticket,
            transfer,
            vectors: Vectors::default(),
            in_kernel: false,
            cancelled: false,
        }));
        self.waiting.push_back(index);
        ticket
    }

    fn slot(&mut self, ticket: Ticket) -> Option<&mut Slot<M>> {
        let slot = self.slots.get_mut((ticket.0 >> 32) as usize)?.as_deref_mut()?;
        (slot.ticket == ticket).then_some(slot)
    }

    /// Asks for an early end, with the next [`Uring::submit`]. The transfer ends as any other, and as it likes: done,
    /// failed, or with ECANCELED. Harmless for one that is over.
    pub(super) fn cancel(&mut self, ticket: Ticket) {
        let Some(slot) = self.slot(ticket) else { return };
        slot.cancelled = true;
        if slot.in_kernel && !self.cancels.contains(&ticket) {
            self.cancels.push_back(ticket);
        }
    }

    /// Hands what was started to the kernel, with one system call. The event is told of what is over by now.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` says.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.push() > 0 { self.enter() } else { Ok(()) }
    }

    /// Hands what was started to the kernel, and adds what is over to `finished`, if only by this very call.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` says; what is over is added by the next call then.
    pub(super) fn finish(&mut self, finished: &mut Vec<Finished<M>>) -> io::Result<()> {
        loop {
            self.collect();
            if self.push() == 0 {
                finished.append(&mut self.finished);
                return Ok(());
            }
            self.enter()?;
        }
    }

    /// Gives the kernel what is in the submission queue.
    fn enter(&self) -> io::Result<()> {
        loop {
            match self.ring.0.submit() {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    // The last two: short of memory for the moment. Nobody would come back for what was not taken.
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Fills the submission queue. Returns how many requests are in it.
    fn push(&mut self) -> usize {
        let mut submission = self.ring.0.submission();
        while !submission.is_full()
            && let Some(Ticket(ticket)) = self.cancels.pop_front()
        {
            let request = opcode::AsyncCancel::new(ticket).build().user_data(NOBODY);
            // SAFETY: no memory is involved.
            let _ = unsafe { submission.push(&request) };
        }
        while self.in_kernel < DEPTH
            && !submission.is_full()
            && let Some(index) = self.waiting.pop_front()
        {
            let Some(slot) = self.slots[index as usize].as_deref_mut() else { continue };
            if slot.cancelled {
                self.finished.extend(release(&mut self.slots, &mut self.free, index, Err(canceled())));
                continue;
            }
            slot.in_kernel = true;
            slot.transfer.gather(&mut slot.vectors);
            let request = slot.request();
            // SAFETY:
            // - the request's addresses are of the vectors, which are in a box that stays in `slots`, and of the memory
            //   that `transfer` has, which is valid and stays where it is until it is dropped (`Memory`);
            // - both are dropped in `collect` only, when the kernel has posted the completion of this very request, or
            //   in `drop` when it has posted all: until then the slot is not touched (`in_kernel`), whoever cancels;
            // - the memory is writable for a read, and no Rust reference points into it: `Memory` again.
            let pushed = unsafe { submission.push(&request) };
            debug_assert!(pushed.is_ok(), "there was room");
            self.in_kernel += 1;
        }
        submission.sync();
        submission.len()
    }

    /// Takes completions.
    fn collect(&mut self) {
        for entry in self.ring.0.completion() {
            let ticket = Ticket(entry.user_data());
            let index = (ticket.0 >> 32) as u32;
            // An answer to a cancel request says nothing that the transfer's own does not say.
            let Some(slot) = self.slots.get_mut(index as usize).and_then(|slot| slot.as_deref_mut()) else {
                continue;
            };
            if slot.ticket != ticket || !slot.in_kernel {
                continue;
            }
            slot.in_kernel = false;
            self.in_kernel -= 1;
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().wrapping_neg()));
            let over = match slot.transfer.settle(result) {
                Ok(true) => Ok(()),
                Ok(false) if slot.cancelled => Err(canceled()),
                Ok(false) => {
                    self.waiting.push_back(index);
                    continue;
                }
                Err(error) => Err(error),
            };
            self.finished.extend(release(&mut self.slots, &mut self.free, index, over));
        }
    }
}

impl<M: Memory> Slot<M> {
    fn request(&self) -> squeue::Entry {
        let transfer = &self.transfer;
        let fd = types::Fd(transfer.fd);
        let (vectors, count) = (self.vectors.0.as_ptr(), self.vectors.0.len() as u32);
        let request = match transfer.operation {
            Operation::Read => opcode::Readv::new(fd, vectors, count).offset(transfer.position()).build(),
            Operation::Write { durable } => opcode::Writev::new(fd, vectors, count)
                .offset(transfer.position())
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Operation::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Allocate { mode, length } => {
                opcode::Fallocate::new(fd, length).offset(transfer.position()).mode(mode).build()
            }
        };
        // What was tried and has to wait for a thread after all gets one of the kernel's.
        let flags = if transfer.tries { squeue::Flags::empty() } else { squeue::Flags::ASYNC };
        request.flags(flags).user_data(self.ticket.0)
    }
}

/// Takes a transfer out that the kernel does not have.
fn release<M>(
    slots: &mut [Option<Box<Slot<M>>>],
    free: &mut Vec<u32>,
    index: u32,
    result: io::Result<()>,
) -> Option<Finished<M>> {
    let slot = slots[index as usize].take()?;
    free.push(index);
    Some(Finished { ticket: slot.ticket, result, work: slot.transfer.into() })
}

impl<M: Memory> Drop for Uring<M> {
    fn drop(&mut self) {
        self.waiting.clear();
        let under_way: Vec<Ticket> =
            self.slots.iter().flatten().filter(|slot| slot.in_kernel).map(|slot| slot.ticket).collect();
        let end = Instant::now() + PATIENCE;
        while self.in_kernel > 0 && Instant::now() < end {
            // In each round: a cancellation that comes while a worker of the kernel takes a transfer up is lost.
            for &ticket in &under_way {
                self.cancel(ticket);
            }
            if self.finish(&mut Vec::new()).is_err() {
                break;
            }
            let mut poll = libc::pollfd { fd: self.ring.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid structure, for the call.
            unsafe { libc::poll(&raw mut poll, 1, 100) };
        }
        for slot in self.slots.iter_mut().filter_map(Option::take).filter(|slot| slot.in_kernel) {
            // Whatever the kernel writes, now or in an hour, it writes into memory that stays.
            std::mem::forget(slot);
        }
    }
}
