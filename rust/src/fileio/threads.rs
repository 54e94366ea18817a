//! Threads of our own for what the kernel would give to a thread of its own, which costs ten times as much.
//!
//! # Theory
//!
//! Jobs are in lanes. A lane is a descriptor, and how many jobs on it help each other: buffered writes to one file wait
//! for each other inside of the kernel, so they have a lane where one runs at a time; what only computes has one for as
//! many as there are processors to spare; everything else has one where many run. Lanes take turns, so a busy file does
//! not keep others waiting, and a file that hangs takes no more than its lane.
//!
//! A few threads are enough as long as none of them hangs: [`CREW`]. One that has been at a job for [`STALL`] is not
//! counted any more, and if there are turns left another one is called up in its place, up to [`MOST`] in all. He who
//! finds that out is a thread that has nothing to do, of which there is always one while turns wait. Threads are started
//! when they are missing, and end when nobody has needed them for [`IDLE`].
//!
//! A job belongs to the lane, then to its thread, then to those that are over, and so to one at any time; [`Threads`]
//! that are dropped wait for those that have begun.
//!
//! To wake up who waits for jobs costs more than most jobs. So what is over is signalled once, until it is taken; and not
//! at all while the next jobs of the same lane follow, up to [`BATCH`]: whatever they wait for, it is the same file.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

#[cfg(loom)]
use loom::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};
#[cfg(not(loom))]
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};

/// Threads that are at work, and do not hang.
const CREW: usize = 4;
/// Threads in all.
const MOST: usize = 64;
/// Jobs of one lane that run at once, if they help each other.
pub(super) const WIDTH: usize = 16;
/// Jobs of one lane that run at once if they only compute: one processor is for those who start them.
pub(super) fn spare() -> usize {
    static SPARE: OnceLock<usize> = OnceLock::new();
    *SPARE.get_or_init(|| processors().saturating_sub(1).clamp(1, CREW))
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Jobs that are over before somebody is told, if more of the same lane follow.
const BATCH: usize = 16;
/// From when on a thread counts as hanging.
const STALL: Duration = Duration::from_millis(1);
/// How long a thread waits for work before it ends.
const IDLE: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(5) };
/// How long threads are waited for in the end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Jobs that are for one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    /// The file.
    pub(super) fd: RawFd,
    /// Jobs that run at once. One, if they wait for each other anyway.
    pub(super) width: usize,
}

/// What a thread does.
pub(super) trait Job: Send + 'static {
    /// Where it queues.
    fn lane(&self) -> Lane;

    /// Does it. May take as long as it likes.
    fn run(&mut self);
}

struct Line<J> {
    waiting: VecDeque<J>,
    running: usize,
    /// It is in `State::turns`.
    has_turn: bool,
}

struct State<J> {
    lanes: HashMap<Lane, Line<J>>,
    /// Lanes whose next job may begin.
    turns: VecDeque<Lane>,
    /// Since when each thread has been at its job.
    begun: Vec<Instant>,
    threads: usize,
    idle: usize,
    over: Vec<J>,
    /// Somebody was told of what is over.
    signalled: bool,
    closing: bool,
    /// Nobody waits for the threads any more.
    abandoned: bool,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    /// There may be something to do; or a thread has ended.
    changed: Condvar,
    signal: Box<dyn Fn() + Send + Sync>,
}

/// Threads, and what they have to do.
pub(super) struct Threads<J: Job> {
    shared: Arc<Shared<J>>,
    /// Not handed over yet.
    started: Vec<J>,
}

impl<J: Job> Threads<J> {
    /// None yet. `signal` is called, from any thread, when there is something for [`Threads::take`] that was not there
    /// when it was called last.
    pub(super) fn new(signal: Box<dyn Fn() + Send + Sync>) -> Self {
        let state = State {
            lanes: HashMap::new(),
            turns: VecDeque::new(),
            begun: Vec::new(),
            threads: 0,
            idle: 0,
            over: Vec::new(),
            signalled: false,
            closing: false,
            abandoned: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), signal });
        Self { shared, started: Vec::new() }
    }

    /// Takes a job, which begins after the next [`Threads::submit`].
    pub(super) fn start(&mut self, job: J) {
        self.started.push(job);
    }

    /// Jobs that are not handed over yet.
    pub(super) fn started(&self) -> usize {
        self.started.len()
    }

    /// Hands over what was started, and wakes up one thread for all of it.
    ///
    /// # Errors
    /// There is no thread, and none can be started. All jobs are given back, and none of them has begun.
    pub(super) fn submit(&mut self) -> Result<(), (io::Error, Vec<J>)> {
        if self.started.is_empty() {
            return Ok(());
        }
        let mut state = self.shared.lock();
        for job in self.started.drain(..) {
            state.put(job);
        }
        Shared::call_up(&self.shared, state).map_err(|error| {
            let mut state = self.shared.lock();
            state.turns.clear();
            (error, state.lanes.drain().flat_map(|(_, line)| line.waiting).collect())
        })
    }

    /// What is over.
    pub(super) fn take(&mut self) -> Vec<J> {
        let mut state = self.shared.lock();
        state.signalled = false;
        mem::take(&mut state.over)
    }

    /// Takes a job back that has not begun.
    pub(super) fn withdraw(&mut self, is_it: impl Fn(&J) -> bool) -> Option<J> {
        if let Some(at) = self.started.iter().position(&is_it) {
            return Some(self.started.remove(at));
        }
        // A lane that is left empty goes when its turn comes.
        self.shared.lock().lanes.values_mut().find_map(|line| {
            let at = line.waiting.iter().position(&is_it)?;
            line.waiting.remove(at)
        })
    }
}

impl<J> State<J> {
    fn put(&mut self, job: J)
    where
        J: Job,
    {
        let lane = job.lane();
        let new = || Line { waiting: VecDeque::new(), running: 0, has_turn: false };
        self.lanes.entry(lane).or_insert_with(new).waiting.push_back(job);
        self.give_turn(lane);
    }

    /// Lets a lane take part if it has something to do, and forgets it if it has not.
    fn give_turn(&mut self, lane: Lane) {
        let Some(line) = self.lanes.get_mut(&lane) else { return };
        if !line.has_turn && !line.waiting.is_empty() && line.running < lane.width {
            line.has_turn = true;
            self.turns.push_back(lane);
        } else if !line.has_turn && line.waiting.is_empty() && line.running == 0 {
            self.lanes.remove(&lane);
        }
    }

    fn next(&mut self) -> Option<(Lane, J)> {
        while let Some(lane) = self.turns.pop_front() {
            let Some(line) = self.lanes.get_mut(&lane) else { continue };
            line.has_turn = false;
            let job = line.waiting.pop_front();
            line.running += usize::from(job.is_some());
            self.give_turn(lane);
            if let Some(job) = job {
                return Some((lane, job));
            }
        }
        None
    }

    /// How long enough threads are at work: nothing if there is room for one more.
    fn enough(&self, now: Instant) -> Option<Duration> {
        let mut left = self.begun.iter().filter_map(|begun| (*begun + STALL).checked_duration_since(now));
        let first = left.next()?;
        let (count, least) = left.fold((1, first), |(count, least), left| (count + 1, least.min(left)));
        (count >= CREW).then_some(least)
    }
}

impl<J: Job> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        // Nothing panics while it has the lock, and loom's has no `PoisonError` to take it from.
        self.state.lock().expect("nobody panics with the lock")
    }

    /// Sees to it that somebody looks at the turns that are left, if there are any.
    fn call_up(this: &Arc<Self>, mut state: MutexGuard<'_, State<J>>) -> io::Result<()> {
        if state.turns.is_empty() || state.closing {
            return Ok(());
        }
        if state.idle > 0 {
            drop(state);
            this.changed.notify_one();
            return Ok(());
        }
        // One that has just been started, or woken up, has not begun anything yet.
        if state.threads > state.begun.len() || state.threads >= MOST {
            return Ok(());
        }
        state.threads += 1;
        drop(state);
        let shared = this.clone();
        let started = thread::Builder::new().name("tcmu-rs files".into()).spawn(move || Self::work(&shared));
        match started {
            Ok(_) => Ok(()),
            Err(error) => {
                let mut state = this.lock();
                state.threads -= 1;
                if state.threads == 0 { Err(error) } else { Ok(()) }
            }
        }
    }

    /// The life of a thread.
    fn work(this: &Arc<Self>) {
        let mut state = this.lock();
        loop {
            let now = Instant::now();
            let enough = if state.turns.is_empty() { None } else { state.enough(now) };
            if enough.is_none()
                && let Some((lane, mut job)) = state.next()
            {
                state.begun.push(now);
                // Others have something to do, too, or will have if this one hangs.
                let _ = Self::call_up(this, state);
                job.run();
                state = this.end(this.lock(), lane, now, job);
                continue;
            }
            if state.closing {
                break;
            }
            if !state.over.is_empty() && !state.signalled {
                // What was to follow was taken back.
                state = this.tell(state);
                continue;
            }
            state.idle += 1;
            let (woken, result) = this
                .changed
                .wait_timeout(state, enough.unwrap_or(IDLE))
                .expect("nobody panics with the lock");
            state = woken;
            state.idle -= 1;
            if result.timed_out() && enough.is_none() && state.turns.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        drop(state);
        this.changed.notify_all();
    }

    fn end<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<J>>,
        lane: Lane,
        begun: Instant,
        job: J,
    ) -> MutexGuard<'a, State<J>> {
        if let Some(at) = state.begun.iter().position(|other| *other == begun) {
            state.begun.swap_remove(at);
        }
        if let Some(line) = state.lanes.get_mut(&lane) {
            line.running -= 1;
        }
        state.give_turn(lane);
        if state.abandoned {
            // Its memory may be of what is gone by now: better a leak.
            mem::forget(job);
            return state;
        }
        state.over.push(job);
        if state.turns.front() == Some(&lane) && state.over.len() < BATCH {
            return state;
        }
        self.tell(state)
    }

    /// Signals what is over, unless that was done.
    fn tell<'a>(&'a self, mut state: MutexGuard<'a, State<J>>) -> MutexGuard<'a, State<J>> {
        if state.over.is_empty() || mem::replace(&mut state.signalled, true) {
            return state;
        }
        drop(state);
        (self.signal)();
        self.lock()
    }
}

impl<J: Job> Drop for Threads<J> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closing = true;
        state.turns.clear();
        let lanes = mem::take(&mut state.lanes);
        self.shared.changed.notify_all();
        let end = Instant::now() + PATIENCE;
        while state.threads > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.abandoned = true;
                break;
            }
            (state, _) = self.shared.changed.wait_timeout(state, left).expect("nobody panics with the lock");
        }
        let over = mem::take(&mut state.over);
        drop(state);
        // Not under the lock: whose memory it is may have something to do when it gets it back.
        drop((lanes, over));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Goes on when it is let.
    struct Gate {
        number: usize,
        lane: Lane,
        gate: Option<Receiver<()>>,
        held: Arc<AtomicUsize>,
    }

    impl Job for Gate {
        fn lane(&self) -> Lane {
            self.lane
        }

        fn run(&mut self) {
            if let Some(gate) = &self.gate {
                let _ = gate.recv();
            }
        }
    }

    impl Drop for Gate {
        fn drop(&mut self) {
            self.held.fetch_sub(1, Ordering::SeqCst);
        }
    }

    struct Fixture {
        threads: Threads<Gate>,
        signals: Receiver<()>,
        held: Arc<AtomicUsize>,
    }

    impl Fixture {
        fn new() -> Self {
            let (told, signals) = channel();
            let told = Mutex::new(told);
            let signal = move || told.lock().unwrap().send(()).unwrap_or_default();
            Self { threads: Threads::new(Box::new(signal)), signals, held: Arc::default() }
        }

        fn start(&mut self, number: usize, fd: RawFd, one_by_one: bool, gate: Option<Receiver<()>>) {
            self.held.fetch_add(1, Ordering::SeqCst);
            let lane = Lane { fd, width: if one_by_one { 1 } else { WIDTH } };
            self.threads.start(Gate { number, lane, gate, held: self.held.clone() });
        }

        fn gated(&mut self, number: usize, fd: RawFd, one_by_one: bool) -> Sender<()> {
            let (open, gate) = channel();
            self.start(number, fd, one_by_one, Some(gate));
            open
        }

        fn submit(&mut self) {
            assert!(self.threads.submit().is_ok());
        }

        /// The numbers of what is over, when that is something.
        fn wait(&mut self) -> Vec<usize> {
            self.signals.recv_timeout(Duration::from_secs(30)).expect("nothing is over");
            self.threads.take().iter().map(|job| job.number).collect()
        }

        fn wait_for(&mut self, count: usize) -> Vec<usize> {
            let mut found = Vec::new();
            while found.len() < count {
                found.extend(self.wait());
            }
            assert_eq!(found.len(), count);
            found
        }
    }

    #[test]
    fn jobs_that_wait_for_each_other_run_in_order_and_alone() {
        let mut fixture = Fixture::new();
        let first = fixture.gated(0, 7, true);
        for number in 1..100 {
            fixture.start(number, 7, true, None);
        }
        fixture.submit();
        // Nothing overtakes the first one, which would be over by now.
        fixture.start(100, 8, true, None);
        fixture.submit();
        assert_eq!(fixture.wait_for(1), [100]);
        first.send(()).unwrap();
        assert_eq!(fixture.wait_for(100), Vec::from_iter(0..100));
    }

    #[test]
    fn files_that_hang_do_not_stop_others() {
        let mut fixture = Fixture::new();
        // More than the crew, and a file with more jobs than its lane takes.
        let mut gates: Vec<_> = (0..3 * CREW).map(|n| fixture.gated(n, n as RawFd, true)).collect();
        gates.extend((0..2 * WIDTH).map(|_| fixture.gated(99, 99, false)));
        fixture.submit();
        for number in 1000..1010 {
            fixture.start(number, 500, true, None);
            fixture.submit();
            assert_eq!(fixture.wait_for(1), [number]);
        }
        let count = gates.len();
        drop(gates);
        fixture.wait_for(count);
    }

    #[test]
    fn only_what_has_not_begun_is_taken_back() {
        let mut fixture = Fixture::new();
        let gate = fixture.gated(0, 7, true);
        fixture.start(1, 7, true, None);
        fixture.submit();
        fixture.start(2, 7, true, None);
        fixture.start(3, 8, true, None);
        fixture.submit();
        assert_eq!(fixture.wait_for(1), [3]);
        // By now somebody is at the first one, or about to be: the lane before this one had its turn earlier.
        fixture.start(4, 7, true, None);
        for number in [1, 4] {
            assert!(fixture.threads.withdraw(|job| job.number == number).is_some());
            assert!(fixture.threads.withdraw(|job| job.number == number).is_none());
        }
        gate.send(()).unwrap();
        assert_eq!(fixture.wait_for(2), [0, 2]);
        assert!(fixture.threads.withdraw(|job| job.number == 2).is_none());
        assert_eq!(fixture.held.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn the_end_waits_for_what_has_begun_and_gives_back_the_rest() {
        let mut fixture = Fixture::new();
        let gate = fixture.gated(0, 7, true);
        fixture.start(1, 7, true, None);
        fixture.start(2, 8, true, None);
        fixture.submit();
        assert_eq!(fixture.wait_for(1), [2]);
        fixture.start(3, 9, true, None);
        let held = fixture.held.clone();
        let opener = std::thread::spawn(move || gate.send(()));
        drop(fixture);
        assert_eq!(held.load(Ordering::SeqCst), 0);
        // Nobody is at it any more, or nobody has begun it.
        let _ = opener.join().unwrap();
    }

    #[test]
    fn threads_that_nobody_needs_end_and_come_back() {
        let mut fixture = Fixture::new();
        for number in 0..3 {
            fixture.start(number, 7, true, None);
            fixture.submit();
            assert_eq!(fixture.wait_for(1), [number]);
            while fixture.threads.shared.lock().threads > 0 {
                std::thread::sleep(IDLE);
            }
            assert!(fixture.threads.shared.lock().lanes.is_empty());
        }
    }

    #[test]
    fn one_signal_until_it_is_looked_at() {
        let mut fixture = Fixture::new();
        for number in 0..50 {
            fixture.start(number, 7, true, None);
        }
        fixture.submit();
        while fixture.threads.shared.lock().over.len() < 50 {
            std::thread::yield_now();
        }
        fixture.wait_for(50);
        assert!(fixture.signals.try_recv().is_err());
    }
}

/// Run with `rust/check-memory loom`.
#[cfg(all(test, loom))]
mod model {
    use loom::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    struct Count(RawFd, usize, Arc<AtomicUsize>);

    impl Job for Count {
        fn lane(&self) -> Lane {
            Lane { fd: self.0, width: 1 }
        }

        fn run(&mut self) {
            self.2.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Two jobs; the second one may be called off.
    fn explore(fds: [RawFd; 2], call_off: bool) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(move || {
            let signalled = Arc::new((Mutex::new(0), Condvar::new()));
            let told = signalled.clone();
            let mut threads = Threads::new(Box::new(move || {
                *told.0.lock().unwrap() += 1;
                told.1.notify_one();
            }));
            let ran = Arc::new(AtomicUsize::new(0));
            for (number, fd) in fds.into_iter().enumerate() {
                threads.start(Count(fd, number, ran.clone()));
                assert!(threads.submit().is_ok());
            }
            let left = if call_off && threads.withdraw(|job| job.1 == 1).is_some() { 1 } else { 2 };
            let mut over = 0;
            while over < left {
                // Whoever is not told waits for ever, which loom finds.
                let mut signals = signalled.0.lock().unwrap();
                while *signals == 0 {
                    signals = signalled.1.wait(signals).unwrap();
                }
                *signals = 0;
                drop(signals);
                over += threads.take().len();
            }
            drop(threads);
            assert_eq!((over, ran.load(Ordering::Relaxed)), (left, left));
        });
    }

    #[test]
    fn every_job_is_done_once_and_its_end_is_told() {
        explore([7, 7], false);
    }

    #[test]
    fn jobs_for_two_files() {
        explore([7, 8], false);
    }

    /// What was over was not told, for more was to follow, and that was called off.
    #[test]
    fn what_is_called_off_leaves_nobody_untold() {
        explore([7, 7], true);
    }
}
