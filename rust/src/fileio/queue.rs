//! Transfers that are under way, wherever they are done.
//!
//! io_uring does what the kernel can do without a thread; what it could not, threads of ours do. Both say that something
//! is over by one eventfd. Where there is no io_uring the threads do everything.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::Work;
use super::memory::Memory;
use super::threads::{Job, Lane, Threads};
use super::uring::Uring;

/// Work that is handed to threads together.
const GROUP: usize = 4;
/// Set in the tickets of what threads do.
const THREADS: u64 = 1 << 63;

/// The name of a transfer in a queue: never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A transfer that is over.
#[derive(Debug)]
pub struct Finished<M> {
    /// Which one.
    pub ticket: Ticket,
    /// How it ended. ECANCELED is the doing of [`Queue::cancel`].
    pub result: io::Result<()>,
    /// What it was, with the memory, which nobody uses any more.
    pub work: Work<M>,
}

/// What a thread does.
struct Task<M> {
    ticket: Ticket,
    work: Work<M>,
    result: io::Result<()>,
}

impl<M: Memory + 'static> Job for Task<M> {
    fn lane(&self) -> Lane {
        self.work.lane()
    }

    fn run(&mut self) {
        // Somebody waits for it, whatever happens.
        self.result = panic::catch_unwind(AssertUnwindSafe(|| self.work.block()))
            .unwrap_or_else(|_| Err(io::Error::other("a defect: the transfer panicked")));
    }
}

impl<M> Task<M> {
    fn finished(self) -> Finished<M> {
        Finished { ticket: self.ticket, result: self.result, work: self.work }
    }
}

/// Transfers under way.
pub struct Queue<M: Memory + 'static> {
    uring: Option<Uring<M>>,
    threads: Threads<Task<M>>,
    /// Behind those who use it, so that it is closed when they are gone.
    event: Arc<OwnedFd>,
    in_threads: usize,
    started: u64,
    /// It was told that something is to be begun.
    due: bool,
    finished: Vec<Finished<M>>,
}

impl<M: Memory + 'static> std::fmt::Debug for Queue<M> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "queue of {} transfers", self.outstanding())
    }
}

impl<M: Memory + 'static> Queue<M> {
    /// An empty queue, with io_uring or without.
    ///
    /// # Errors
    /// With io_uring: EPERM or ENOSYS where it is forbidden or absent; EOPNOTSUPP where it lacks what is needed (before
    /// Linux 5.6); ENOMEM under a small RLIMIT_MEMLOCK (before Linux 5.12). EMFILE or ENFILE.
    pub fn new(with_io_uring: bool) -> io::Result<Self> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let uring = if with_io_uring { Some(Uring::new(event.as_fd())?) } else { None };
        // The end of the queue closes it, and not that of a thread, which may come a moment later.
        let told = Arc::downgrade(&event);
        let threads = Threads::new(Box::new(move || {
            if let Some(event) = told.upgrade() {
                signal(&event);
            }
        }));
        Ok(Self { uring, threads, event, in_threads: 0, started: 0, due: false, finished: Vec::new() })
    }

    /// The descriptor that is readable when [`Queue::finish`] is due: it has something to begin, or to return.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Transfers that are not over.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.in_threads + self.uring.as_ref().map_or(0, Uring::outstanding)
    }

    /// Takes what [`Work::attempt`] has left. It begins with the next [`Queue::finish`], together with all that is
    /// started until then.
    pub fn start(&mut self, work: impl Into<Work<M>>) -> Ticket {
        self.set_due();
        match (work.into(), &mut self.uring) {
            (Work::Transfer(transfer), Some(uring)) if transfer.tries => uring.start(transfer),
            (work, _) => self.give_to_threads(work),
        }
    }

    /// As [`Queue::start`], for work that a thread suits. It begins earlier if more of it comes: in groups, for to hand over
    /// costs as much as a part of it.
    pub fn share(&mut self, work: impl Into<Work<M>>) -> Ticket {
        self.set_due();
        let ticket = self.give_to_threads(work.into());
        if self.threads.started() >= GROUP {
            self.hand_over();
        }
        ticket
    }

    fn give_to_threads(&mut self, work: Work<M>) -> Ticket {
        self.started += 1;
        let ticket = Ticket(self.started | THREADS);
        self.in_threads += 1;
        self.threads.start(Task { ticket, work, result: Ok(()) });
        ticket
    }

    /// Work that threads have, and that is not known to be over.
    #[must_use]
    pub fn in_threads(&self) -> usize {
        self.in_threads
    }

    /// Asks for an early end, with the next [`Queue::finish`]. The transfer ends as any other, and as it likes: done,
    /// failed, or with ECANCELED. What a thread has begun is not disturbed. Harmless for one that is over.
    pub fn cancel(&mut self, ticket: Ticket) {
        if ticket.0 & THREADS == 0 {
            if let Some(uring) = &mut self.uring {
                uring.cancel(ticket);
                self.set_due();
            }
            return;
        }
        if let Some(task) = self.threads.withdraw(|task| task.ticket == ticket) {
            self.give_up(vec![task], &canceled());
        }
    }

    /// Begins what was started, with one system call or none. What is over by now makes the descriptor readable.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` says.
    pub fn submit(&mut self) -> io::Result<()> {
        self.due = false;
        self.hand_over();
        self.uring.as_mut().map_or(Ok(()), Uring::submit)
    }

    /// Begins what was started, and returns what is over.
    ///
    /// # Errors
    /// What `io_uring_enter(2)` says; what is over is returned by the next call then.
    pub fn finish(&mut self) -> io::Result<Vec<Finished<M>>> {
        // First this: what is over from now on is told again.
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        self.submit()?;
        for task in self.threads.take() {
            self.in_threads -= 1;
            self.finished.push(task.finished());
        }
        if let Some(uring) = &mut self.uring {
            uring.finish(&mut self.finished)?;
        }
        Ok(std::mem::take(&mut self.finished))
    }

    fn hand_over(&mut self) {
        if let Err((error, tasks)) = self.threads.submit() {
            self.give_up(tasks, &error);
        }
    }

    fn set_due(&mut self) {
        if !std::mem::replace(&mut self.due, true) {
            signal(&self.event);
        }
    }

    fn give_up(&mut self, tasks: Vec<Task<M>>, error: &io::Error) {
        for mut task in tasks {
            self.in_threads -= 1;
            task.result = Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EAGAIN)));
            self.finished.push(task.finished());
        }
        signal(&self.event);
    }
}

fn signal(event: &OwnedFd) {
    // It fails if it is readable already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

pub(super) fn canceled() -> io::Error {
    io::Error::from_raw_os_error(libc::ECANCELED)
}
