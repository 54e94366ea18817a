//! Where commands wait that were answered while views of their data were left.
//!
//! Two parties meet here, on any threads: who answers, and who gives the last view back. Whichever comes second must
//! find what the first one left. So the lease is closed, and what follows from it is done, under the same lock that a
//! release takes: a command that [`Parking::take`] returns has had its answer written, or comes with it.

#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard};

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};

use std::collections::HashMap;
use std::sync::PoisonError;

use super::CmdId;
use super::lease::{Closed, Lease};

/// Answers of type `T` that wait for the last view, and commands whose last view is gone.
#[derive(Debug)]
pub struct Parking<T>(Mutex<Parked<T>>);

#[derive(Debug)]
struct Parked<T> {
    held: HashMap<CmdId, T>,
    released: Vec<CmdId>,
}

impl<T> Default for Parking<T> {
    fn default() -> Self {
        Self(Mutex::new(Parked { held: HashMap::new(), released: Vec::new() }))
    }
}

impl<T> Parking<T> {
    fn lock(&self) -> MutexGuard<'_, Parked<T>> {
        // A panic while it is held leaves no half-done state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the data of a command. `answer` gets what was found, and either sends the answer or returns it, to be
    /// held until the last view is gone.
    pub fn close<R>(&self, id: CmdId, lease: &Lease, answer: impl FnOnce(Closed) -> (R, Option<T>)) -> R {
        let mut parked = self.lock();
        let (result, held) = answer(lease.close());
        parked.held.extend(held.map(|held| (id, held)));
        result
    }

    /// The last view of a closed command is gone.
    pub fn release(&self, id: CmdId) {
        self.lock().released.push(id);
    }

    /// The commands whose last view is gone, with the answers that were held.
    pub fn take(&self) -> Vec<(CmdId, Option<T>)> {
        let mut parked = self.lock();
        let released = std::mem::take(&mut parked.released);
        released.into_iter().map(|id| (id, parked.held.remove(&id))).collect()
    }
}

/// Run with `rust/check-memory loom`.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    const ID: CmdId = CmdId(1);

    /// An answer, the release of the only view and somebody who reaps, in any order. Returns what was reaped.
    fn race(hold: bool) -> Vec<Option<&'static str>> {
        let shared = Arc::new((Lease::new(), Parking::default(), AtomicBool::new(false)));
        assert!(shared.0.acquire());
        let releaser = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (lease, parking, _) = &*shared;
                if lease.release() {
                    parking.release(ID);
                }
            })
        };
        let reaper = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (_, parking, sent) = &*shared;
                let taken = parking.take();
                assert!(taken.is_empty() || hold || sent.load(Ordering::Relaxed), "freed before it was kept");
                taken
            })
        };
        let (lease, parking, sent) = &*shared;
        let closed = parking.close(ID, lease, |closed| {
            let held = (hold && closed != Closed::Free).then_some("answer");
            sent.store(held.is_none(), Ordering::Relaxed);
            (closed, held)
        });
        releaser.join().unwrap();
        let mut taken = reaper.join().unwrap();
        taken.extend(parking.take());
        assert_eq!(taken.len(), usize::from(closed != Closed::Free));
        taken.into_iter().map(|(id, held)| (id == ID).then_some(held).flatten()).collect()
    }

    #[test]
    fn a_held_answer_is_found_once() {
        loom::model(|| assert!(race(true).iter().all(|held| *held == Some("answer"))));
    }

    #[test]
    fn a_kept_buffer_is_freed_once_and_after_its_answer() {
        loom::model(|| assert!(race(false).iter().all(Option::is_none)));
    }
}
