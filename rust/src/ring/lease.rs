//! Who may still look at a command's data: counts the views that were lent, and says once when the last is gone.
//!
//! A view may outlive the handler's call: a slice in a list, an exception's traceback, a thread inside `readv`. Only
//! the count tells the truth. So the data is closed when the handler returns, and released when it is closed *and* no
//! view is left: [`Lease::close`] or the last [`Lease::release`], whichever comes later, from any thread, exactly once.

#[cfg(not(loom))]
use std::sync::atomic::{AtomicUsize, Ordering};

#[cfg(loom)]
use loom::sync::atomic::{AtomicUsize, Ordering};

const CLOSED: usize = 1 << (usize::BITS - 1);

/// The count of views, and whether new ones are still given out.
#[derive(Debug, Default)]
pub struct Lease(AtomicUsize);

/// What [`Lease::close`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// No view is left: the data is free now.
    Free,
    /// Views were left: the data is free when [`Lease::release`] says so, or said so meanwhile.
    Lent {
        /// How many.
        views: usize,
    },
    /// It was closed before.
    Already,
}

impl Lease {
    /// Nothing lent.
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Counts a new view. Returns `false`, and counts nothing, when the data is closed.
    #[must_use]
    pub fn acquire(&self) -> bool {
        let mut state = self.0.load(Ordering::Relaxed);
        loop {
            if state & CLOSED != 0 {
                return false;
            }
            match self.0.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }

    /// Counts a view out. Returns whether this was the last one of closed data, which the caller has to free then.
    ///
    /// Release, so that what was done through the view is over before the data is given back.
    #[must_use]
    pub fn release(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == CLOSED | 1
    }

    /// Gives out no more views.
    #[must_use]
    pub fn close(&self) -> Closed {
        let state = self.0.fetch_or(CLOSED, Ordering::AcqRel);
        match state {
            0 => Closed::Free,
            _ if state & CLOSED != 0 => Closed::Already,
            views => Closed::Lent { views },
        }
    }

    /// Views now lent.
    #[must_use]
    pub fn lent(&self) -> usize {
        self.0.load(Ordering::Acquire) & !CLOSED
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn free_at_close_when_nothing_is_lent() {
        let lease = Lease::new();
        assert!(lease.acquire());
        assert!(!lease.release());
        assert_eq!(lease.close(), Closed::Free);
        assert_eq!(lease.close(), Closed::Already);
        assert!(!lease.acquire());
    }

    #[test]
    fn the_last_release_frees() {
        let lease = Lease::new();
        assert!(lease.acquire() && lease.acquire());
        assert_eq!(lease.close(), Closed::Lent { views: 2 });
        assert!(!lease.release());
        assert_eq!(lease.lent(), 1);
        assert!(lease.release());
    }
}

/// Run with `rust/check-memory loom`.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Views in two threads and the close in a third: whatever the order, the data is freed exactly once, and never
    /// while a view is lent.
    #[test]
    fn freed_exactly_once() {
        loom::model(|| {
            let lease = Arc::new(Lease::new());
            let freed = Arc::new(AtomicUsize::new(0));
            assert!(lease.acquire());
            let readers: Vec<_> = [true, false]
                .into_iter()
                .map(|lent| {
                    let (lease, freed) = (lease.clone(), freed.clone());
                    thread::spawn(move || {
                        if lent || lease.acquire() {
                            assert_eq!(freed.load(Ordering::SeqCst), 0);
                            if lease.release() {
                                freed.fetch_add(1, Ordering::SeqCst);
                            }
                        }
                    })
                })
                .collect();
            if lease.close() == Closed::Free {
                freed.fetch_add(1, Ordering::SeqCst);
            }
            for reader in readers {
                reader.join().unwrap();
            }
            assert_eq!(freed.load(Ordering::SeqCst), 1);
        });
    }
}
