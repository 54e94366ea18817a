//! Which commands may run at the same time: some have to have their bytes for themselves.
//!
//! A command enters once, before its first step, with the range that it will touch in all its steps, and leaves when it
//! is over. Most are shared: they run beside each other, overlapping or not. An exclusive one (COMPARE AND WRITE, say)
//! waits for all that overlap it, and they for it.
//!
//! # While there is no exclusive command
//!
//! A shared command puts its range into a slot of its own, by its id, and looks at one counter: no lock is taken, nothing
//! is allocated. An exclusive command first raises the counter and then looks at the slots. Both do so in one total
//! order (`SeqCst`), so that either the shared command sees the counter, or the exclusive one sees the range.
//!
//! # While there is one
//!
//! Commands go through the queue. A command waits for those that hold an overlapping range, and for those that wait
//! before it for one, where one of the two is exclusive. So it waits only for commands that came before it: nobody
//! waits in a circle, and nobody is overtaken for ever.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::scsi::Reach;

const CHUNK: usize = 256;

/// The range of a shared command; empty if `end` is 0.
#[derive(Debug, Default)]
struct Slot {
    first: AtomicU64,
    end: AtomicU64,
}

type Chunk = OnceLock<Box<[Slot]>>;

/// What a command has entered with; to be given to [`Exclusion::leave`] once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Nothing.
    #[default]
    None,
    /// The slot of its id.
    Shared,
    /// A place among those who hold or wait.
    Queued(Token),
}

/// The name of a command in the queue; its id may be another one's while it is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(pub(crate) u64);

#[derive(Debug)]
struct Waiting<T> {
    token: Token,
    id: u16,
    reach: Reach,
    item: T,
}

#[derive(Debug)]
struct Queue<T> {
    holders: Vec<(Token, Reach)>,
    waiting: VecDeque<Waiting<T>>,
    ready: Vec<T>,
    closed: bool,
}

/// The ranges of all commands of a device. `T` is what is kept of a command that waits.
#[derive(Debug)]
pub(crate) struct Exclusion<T> {
    /// Commands in the queue, holding or waiting.
    queued: AtomicUsize,
    /// Slots by command id, made in pieces when they are needed: ids are as small as the kernel can have them.
    chunks: Box<[Chunk]>,
    tokens: AtomicU64,
    ready: AtomicUsize,
    queue: Mutex<Queue<T>>,
}

impl<T> Default for Exclusion<T> {
    fn default() -> Self {
        Self {
            queued: AtomicUsize::new(0),
            chunks: (0..=usize::from(u16::MAX) / CHUNK).map(|_| OnceLock::new()).collect(),
            tokens: AtomicU64::new(0),
            ready: AtomicUsize::new(0),
            queue: Mutex::new(Queue {
                holders: Vec::new(),
                waiting: VecDeque::new(),
                ready: Vec::new(),
                closed: false,
            }),
        }
    }
}

impl<T> Exclusion<T> {
    fn slot(&self, id: u16) -> &Slot {
        let chunk = self.chunks[usize::from(id) / CHUNK]
            .get_or_init(|| (0..CHUNK).map(|_| Slot::default()).collect());
        &chunk[usize::from(id) % CHUNK]
    }

    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name for a command that is about to enter the queue.
    pub(crate) fn token(&self) -> Token {
        Token(self.tokens.fetch_add(1, Ordering::Relaxed))
    }

    /// Enters without the queue, if that is enough.
    pub(crate) fn enter_unqueued(&self, id: u16, reach: &Reach) -> Option<Hold> {
        if reach.is_empty() {
            return Some(Hold::None);
        }
        if reach.exclusive || self.queued.load(Ordering::Relaxed) != 0 {
            return None;
        }
        let slot = self.slot(id);
        slot.first.store(reach.first, Ordering::Relaxed);
        slot.end.store(reach.end, Ordering::SeqCst);
        if self.queued.load(Ordering::SeqCst) == 0 {
            return Some(Hold::Shared);
        }
        // Somebody may wait for this slot already; whoever enters the queue next looks after those who wait.
        slot.end.store(0, Ordering::SeqCst);
        None
    }

    /// Enters the queue. Returns `item` if the command may begin; otherwise it comes out of [`Exclusion::take_ready`]
    /// when it may. After [`Exclusion::close`] it waits for ever, and is not kept.
    pub(crate) fn enter(&self, token: Token, id: u16, reach: Reach, item: T) -> Option<T> {
        let mut queue = self.lock();
        self.queued.fetch_add(1, Ordering::SeqCst);
        if queue.closed {
            return None;
        }
        let behind = queue.waiting.len();
        let granted = if self.is_blocked(&queue, &reach, behind) {
            queue.waiting.push_back(Waiting { token, id, reach, item });
            None
        } else {
            queue.holders.push((token, reach));
            Some(item)
        };
        self.promote(&mut queue);
        granted
    }

    /// Gives back what a command has entered with, whether it held it or still waited.
    pub(crate) fn leave(&self, id: u16, hold: Hold) {
        match hold {
            Hold::None => (),
            Hold::Shared => {
                self.slot(id).end.store(0, Ordering::SeqCst);
                if self.queued.load(Ordering::SeqCst) != 0 {
                    self.promote(&mut self.lock());
                }
            }
            Hold::Queued(token) => {
                let mut queue = self.lock();
                queue.holders.retain(|(holder, _)| *holder != token);
                let place = queue.waiting.iter().position(|waiting| waiting.token == token);
                let gone = place.and_then(|place| queue.waiting.remove(place));
                self.queued.fetch_sub(1, Ordering::SeqCst);
                self.promote(&mut queue);
                drop(queue);
                // What is dropped may want the lock.
                drop(gone);
            }
        }
    }

    fn is_blocked(&self, queue: &Queue<T>, reach: &Reach, behind: usize) -> bool {
        let waits_for = |other: &Reach| reach.excludes(other);
        queue.holders.iter().any(|(_, other)| waits_for(other))
            || queue.waiting.iter().take(behind).any(|waiting| waits_for(&waiting.reach))
            || reach.exclusive && self.is_in_slots(reach)
    }

    fn is_in_slots(&self, reach: &Reach) -> bool {
        self.chunks.iter().filter_map(OnceLock::get).flat_map(|chunk| chunk.iter()).any(|slot| {
            // In this order: a slot that is read as taken has its first byte already.
            let end = slot.end.load(Ordering::SeqCst);
            let first = slot.first.load(Ordering::SeqCst);
            end != 0 && reach.excludes(&Reach { first, end, exclusive: false })
        })
    }

    /// Lets those begin who can, in the order in which they came.
    fn promote(&self, queue: &mut Queue<T>) {
        let mut at = 0;
        while let Some(waiting) = queue.waiting.get(at) {
            if self.is_blocked(queue, &waiting.reach, at) {
                at += 1;
            } else if let Some(Waiting { token, reach, item, .. }) = queue.waiting.remove(at) {
                queue.holders.push((token, reach));
                queue.ready.push(item);
                self.ready.store(queue.ready.len(), Ordering::Release);
            }
        }
    }

    /// Whether [`Exclusion::take_ready`] has something.
    pub(crate) fn has_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) != 0
    }

    /// Those who have waited and may begin now.
    pub(crate) fn take_ready(&self) -> Vec<T> {
        if !self.has_ready() {
            return Vec::new();
        }
        let mut queue = self.lock();
        self.ready.store(0, Ordering::Release);
        std::mem::take(&mut queue.ready)
    }

    /// Those who wait under one of these ids. They still have to leave.
    pub(crate) fn waiting_with_ids(&self, ids: impl Fn(u16) -> bool) -> Vec<T>
    where
        T: Clone,
    {
        if self.queued.load(Ordering::SeqCst) == 0 {
            return Vec::new();
        }
        let queue = self.lock();
        queue.waiting.iter().filter(|waiting| ids(waiting.id)).map(|waiting| waiting.item.clone()).collect()
    }

    /// Forgets all who wait, and who will come.
    pub(crate) fn close(&self) -> (VecDeque<impl Sized>, Vec<T>) {
        let mut queue = self.lock();
        queue.closed = true;
        self.ready.store(0, Ordering::Release);
        (std::mem::take(&mut queue.waiting), std::mem::take(&mut queue.ready))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shared(first: u64, end: u64) -> Reach {
        Reach { first, end, exclusive: false }
    }

    fn exclusive(first: u64, end: u64) -> Reach {
        Reach { first, end, exclusive: true }
    }

    fn enter(exclusion: &Exclusion<u16>, id: u16, reach: Reach) -> (Hold, bool) {
        if let Some(hold) = exclusion.enter_unqueued(id, &reach) {
            return (hold, true);
        }
        let token = exclusion.token();
        (Hold::Queued(token), exclusion.enter(token, id, reach, id).is_some())
    }

    #[test]
    fn shared_commands_do_not_meet() {
        let exclusion = Exclusion::default();
        for id in 1..=1000 {
            assert_eq!(enter(&exclusion, id, shared(0, 8)), (Hold::Shared, true));
        }
        assert_eq!(enter(&exclusion, 1001, shared(5, 5)), (Hold::None, true));
    }

    #[test]
    fn an_exclusive_command_waits_for_those_before_it_and_those_behind_it_for_it() {
        let exclusion = Exclusion::default();
        let (before, _) = enter(&exclusion, 1, shared(0, 8));
        let (alone, runs) = enter(&exclusion, 2, exclusive(4, 12));
        assert!(!runs);
        let (elsewhere, runs) = enter(&exclusion, 3, exclusive(12, 13));
        assert!(runs);
        let (behind, runs) = enter(&exclusion, 4, shared(11, 20));
        assert!(!runs);
        exclusion.leave(1, before);
        assert_eq!(exclusion.take_ready(), [2]);
        exclusion.leave(3, elsewhere);
        assert!(exclusion.take_ready().is_empty());
        exclusion.leave(2, alone);
        assert_eq!(exclusion.take_ready(), [4]);
        exclusion.leave(4, behind);
        assert_eq!(enter(&exclusion, 5, shared(0, 8)), (Hold::Shared, true));
    }

    #[test]
    fn a_command_that_gives_up_is_waited_for_no_longer() {
        let exclusion = Exclusion::default();
        let (before, _) = enter(&exclusion, 1, shared(0, 8));
        let (alone, _) = enter(&exclusion, 2, exclusive(0, 8));
        let (behind, runs) = enter(&exclusion, 3, shared(0, 8));
        assert!(!runs);
        exclusion.leave(2, alone);
        assert_eq!(exclusion.take_ready(), [3]);
        exclusion.leave(1, before);
        exclusion.leave(3, behind);
        assert!(!exclusion.has_ready());
    }

    /// A table that knows nothing of slots and tokens.
    #[derive(Default)]
    struct Model {
        running: Vec<(u16, Reach)>,
        waiting: Vec<(u16, Reach)>,
    }

    impl Model {
        fn promote(&mut self) {
            let mut still: Vec<(u16, Reach)> = Vec::new();
            for (id, reach) in std::mem::take(&mut self.waiting) {
                let blocked = self.running.iter().chain(&still).any(|(_, other)| reach.excludes(other));
                if blocked { still.push((id, reach)) } else { self.running.push((id, reach)) }
            }
            self.waiting = still;
        }
    }

    proptest! {
        #[test]
        fn the_table_is_what_the_model_says(
            steps in prop::collection::vec((1..40u16, 0..20u64, 0..6u64, any::<bool>()), 1..200),
        ) {
            let exclusion = Exclusion::default();
            let mut model = Model::default();
            let mut holds = std::collections::HashMap::new();
            let mut running = std::collections::BTreeSet::new();
            for (id, first, length, alone) in steps {
                if let Some(hold) = holds.remove(&id) {
                    exclusion.leave(id, hold);
                    running.remove(&id);
                    model.running.retain(|(other, _)| *other != id);
                    model.waiting.retain(|(other, _)| *other != id);
                } else {
                    let reach = Reach { first, end: first + length, exclusive: alone };
                    let (hold, runs) = enter(&exclusion, id, reach);
                    holds.insert(id, hold);
                    if runs {
                        running.insert(id);
                    }
                    model.waiting.push((id, reach));
                }
                model.promote();
                running.extend(exclusion.take_ready());
                let expected = model.running.iter().map(|(id, _)| *id).collect();
                prop_assert_eq!(&running, &expected);
            }
        }
    }

    #[test]
    fn threads_never_overlap_with_an_exclusive_one() {
        use std::sync::atomic::AtomicIsize;
        let exclusion = Exclusion::<u16>::default();
        // Above 0: so many shared ones; below: an exclusive one.
        let inside = AtomicIsize::new(0);
        std::thread::scope(|scope| {
            for id in 1..=4u16 {
                let (exclusion, inside) = (&exclusion, &inside);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let alone = id == 1 && round % 3 == 0;
                        let reach = Reach { first: 0, end: 8, exclusive: alone };
                        let (hold, runs) = enter(exclusion, id, reach);
                        if !runs {
                            // Another thread's turn decides; this one gives up.
                            exclusion.leave(id, hold);
                            exclusion.take_ready();
                            continue;
                        }
                        let change = if alone { -1000 } else { 1 };
                        let before = inside.fetch_add(change, Ordering::SeqCst);
                        assert!(if alone { before == 0 } else { before >= 0 }, "{before}");
                        inside.fetch_sub(change, Ordering::SeqCst);
                        exclusion.leave(id, hold);
                    }
                });
            }
        });
        assert_eq!(exclusion.queued.load(Ordering::SeqCst), 0);
    }
}
