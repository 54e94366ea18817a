//! What a device counts, and where the time of its commands goes.
//!
//! The kernel puts no time into an entry, so nothing here says how long a command was in the ring before we looked. What
//! is measured, for commands that need a handler:
//!
//! ```text
//!  the entry is seen ── ring wait ── fetched ── dispatch ── handler called ── handler ── returned ── completion ── doorbell
//! ```
//!
//! An entry is seen when a drain reads the event, or, if a drain before had to leave it for its bound, when that one
//! ended. A command of several steps has a handler time for each of them, and one of the others.
//!
//! All commands are counted. Of a full batch every fifth one is timed, and counts for five in the histograms: reading the
//! clock for each would be some percent of what a fast handler costs. Fewer than [`FULL`] at once are timed all.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};

use crate::scsi::{Reply, Status, Verb};

/// A time, in nanoseconds of the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time(pub u64);

impl Time {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        // The monotonic clock counts from the start of the machine: neither part is negative, and 584 years fit.
        Self((now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64))
    }

    /// Nanoseconds from an earlier time; 0 if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What was asked of a handler: a step of a block handler, or all of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A step, of so many bytes.
    Step(Verb, u64),
    /// A command as it is.
    Command,
}

/// How many commands a timed one stands for in the histograms; 0 for one that is not timed.
pub type Weight = u8;

/// Bytes of entries that make a full batch: eight of the smallest.
pub const FULL: u64 = 8 * 120;
/// Odd, so that it goes through all places of batches that are a power of two.
const SAMPLE: Weight = 5;

/// One timed call of a handler that is over.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// What for.
    pub asked: Asked,
    /// Commands that it stands for.
    pub weight: Weight,
    /// When the command was fetched, if this was its first call.
    pub fetched: Option<Time>,
    /// When it began.
    pub begun: Time,
    /// When it ended.
    pub returned: Time,
    /// Whether the command's answer is ready by it.
    pub answered: bool,
}

/// Why a command failed: the status, and with CHECK CONDITION sense key, ASC and ASCQ.
pub type Failure = (u8, Option<(u8, u8, u8)>);

/// How often a handler was called in one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// Those that are over.
    pub count: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

/// Histograms of the stages around the handler, in nanoseconds.
#[derive(Debug, Clone)]
pub struct Stages {
    /// From when the entry was seen to its fetch.
    pub ring_wait: Histogram<u64>,
    /// From the fetch to the call of the handler.
    pub dispatch: Histogram<u64>,
    /// From the last return of the handler to the doorbell.
    pub completion: Histogram<u64>,
}

/// All of it, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Made with the first command: an idle device has none.
    pub stages: Option<Box<Stages>>,
    /// From the call of the handler to its return, or exception. By verb: the six of [`Verb`], then whole commands.
    pub handler: [Option<Box<Histogram<u64>>>; KINDS],
    /// By verb as well.
    pub calls: [Calls; KINDS],
    /// Answers other than GOOD.
    pub failures: BTreeMap<Failure, u64>,
    /// Drains that found something.
    pub batches: u64,
}

const KINDS: usize = 7;
/// From 16 ns on, with a precision of 1 %, up to 1000 s; what is longer counts as that.
const LOWEST: u64 = 16;
const HIGHEST: u64 = 1_000_000_000_000;
const DIGITS: u8 = 2;

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(LOWEST, HIGHEST, DIGITS)
        .unwrap_or_else(|_| unreachable!("the bounds are right"))
}

impl Snapshot {
    fn stages(&mut self) -> &mut Stages {
        self.stages.get_or_insert_with(|| {
            Box::new(Stages { ring_wait: histogram(), dispatch: histogram(), completion: histogram() })
        })
    }

    fn handler(&mut self, asked: Asked) -> &mut Histogram<u64> {
        self.handler[asked.kind()].get_or_insert_with(|| Box::new(histogram()))
    }
}

impl Asked {
    const fn kind(self) -> usize {
        match self {
            Self::Step(verb, _) => verb as usize,
            Self::Command => KINDS - 1,
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    snapshot: Snapshot,
    /// Since when the answers that are not handed back yet are ready. Keeps its room.
    answered: Vec<(Time, Weight)>,
}

/// The counters of one device. Any thread may count.
#[derive(Debug, Default)]
pub struct Statistics {
    inner: Mutex<Inner>,
    calls: [(AtomicU64, AtomicU64); KINDS],
    seen: AtomicU64,
    untimed: AtomicBool,
}

impl Statistics {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A drain has fetched `new` entries that it saw at once, and `old` ones that had been seen for `waited` nanoseconds.
    pub fn fetched(&self, new: u64, old: u64, waited: u64) {
        if new + old == 0 {
            return;
        }
        let mut inner = self.lock();
        inner.snapshot.batches += 1;
        let ring_wait = &mut inner.snapshot.stages().ring_wait;
        // Counts of 0 are none; and the bound of the histogram is all that could be wrong.
        let _ = ring_wait.record_n(0, new);
        let _ = ring_wait.record_n(waited.min(HIGHEST), old);
    }

    /// Whether a command is timed; `full`: it comes with many others.
    pub fn weight(&self, full: bool) -> Weight {
        if self.untimed.load(Ordering::Relaxed) {
            0
        } else if !full {
            1
        } else if self.seen.fetch_add(1, Ordering::Relaxed).is_multiple_of(u64::from(SAMPLE)) {
            SAMPLE
        } else {
            0
        }
    }

    /// Times commands, as it does from the start, or does not: to find out what that costs.
    pub fn set_timing(&self, on: bool) {
        self.untimed.store(!on, Ordering::Relaxed);
    }

    /// A handler has returned, or raised.
    pub fn called(&self, asked: Asked, failed: bool) {
        let (count, bytes) = &self.calls[asked.kind()];
        count.fetch_add(1, Ordering::Relaxed);
        if let (Asked::Step(_, length), false) = (asked, failed) {
            bytes.fetch_add(length, Ordering::Relaxed);
        }
    }

    /// The same, if it is timed.
    pub fn timed(&self, call: &Call) {
        let mut inner = self.lock();
        let record = |histogram: &mut Histogram<u64>, time: u64| {
            histogram.saturating_record_n(time, u64::from(call.weight));
        };
        record(inner.snapshot.handler(call.asked), call.returned.since(call.begun));
        if let Some(fetched) = call.fetched {
            record(&mut inner.snapshot.stages().dispatch, call.begun.since(fetched));
        }
        if call.answered {
            inner.answered.push((call.returned, call.weight));
        }
    }

    /// An answer is on its way: counted if it is not GOOD.
    pub fn answered(&self, reply: &Reply) {
        if reply.status != Status::Good {
            let sense = reply.sense.as_ref().map(|sense| (sense.key as u8, sense.asc, sense.ascq));
            *self.lock().snapshot.failures.entry((reply.status as u8, sense)).or_default() += 1;
        }
    }

    /// What was answered is handed back.
    pub fn committed(&self) {
        let mut inner = self.lock();
        if inner.answered.is_empty() {
            return;
        }
        let now = Time::now();
        let Inner { snapshot, answered } = &mut *inner;
        let completion = &mut snapshot.stages().completion;
        for (time, weight) in answered.drain(..) {
            completion.saturating_record_n(now.since(time), u64::from(weight));
        }
    }

    /// A copy of all counters.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.lock().snapshot.clone();
        snapshot.calls = self.calls.each_ref().map(|(count, bytes)| Calls {
            count: count.load(Ordering::Relaxed),
            bytes: bytes.load(Ordering::Relaxed),
        });
        snapshot
    }
}
