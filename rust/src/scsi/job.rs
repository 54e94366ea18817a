//! FORMAT UNIT and SANITIZE as states of the unit: while one runs, and after one that failed, the medium is not ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Sense;

const STATE: u32 = 16;
const IDLE: u32 = 0;
const FORMATTING: u32 = 1;
const SANITIZING: u32 = 2;
const FORMAT_FAILED: u32 = 3;
const SANITIZE_FAILED: u32 = 4;
/// The failed SANITIZE allowed (AUSE) that the unit is used again without another one.
const SANITIZE_FAILED_MAY_EXIT: u32 = 5;

/// What such an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Format,
    Sanitize {
        /// AUSE: after a failure EXIT FAILURE MODE is enough.
        may_exit: bool,
    },
}

/// The state: what it is in the upper half, the progress in 65536ths in the lower one. A command looks at it with one
/// load.
#[derive(Debug, Default)]
pub(super) struct Job(AtomicU32);

impl Job {
    fn state(&self) -> (u32, u16) {
        let value = self.0.load(Ordering::Acquire);
        (value >> STATE, value as u16)
    }

    /// The state as a number, for [`Job::set_number`] in another process.
    pub(super) fn to_number(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Takes a state over. One that is running elsewhere, which nobody hands over, would never end here: it has failed.
    pub(super) fn set_number(&self, number: u32) {
        let state = match number >> STATE {
            FORMATTING => FORMAT_FAILED,
            SANITIZING => SANITIZE_FAILED,
            state => state.min(SANITIZE_FAILED_MAY_EXIT),
        };
        self.0.store(state << STATE, Ordering::Release);
    }

    /// Why the medium cannot be used, if it cannot.
    pub(super) fn condition(&self) -> Option<Sense> {
        Some(match self.state() {
            (IDLE, _) => return None,
            (FORMATTING, progress) => {
                Sense::LOGICAL_UNIT_NOT_READY_FORMAT_IN_PROGRESS.with_progress(progress)
            }
            (SANITIZING, progress) => {
                Sense::LOGICAL_UNIT_NOT_READY_SANITIZE_IN_PROGRESS.with_progress(progress)
            }
            (FORMAT_FAILED, _) => Sense::FORMAT_COMMAND_FAILED,
            _ => Sense::SANITIZE_COMMAND_FAILED,
        })
    }

    /// Why nothing else can be done now, if an operation runs.
    pub(super) fn running(&self) -> Option<Sense> {
        matches!(self.state().0, FORMATTING | SANITIZING).then(|| self.condition()).flatten()
    }

    /// Begins an operation, unless one runs. What a failed SANITIZE has left only another one may touch.
    pub(super) fn begin(self: &Arc<Self>, kind: Kind) -> Result<Running, Sense> {
        let (state, failed) = match kind {
            Kind::Format => (FORMATTING, FORMAT_FAILED),
            Kind::Sanitize { may_exit: false } => (SANITIZING, SANITIZE_FAILED),
            Kind::Sanitize { may_exit: true } => (SANITIZING, SANITIZE_FAILED_MAY_EXIT),
        };
        let begin = |value: u32| match (value >> STATE, kind) {
            (FORMATTING | SANITIZING, _) | (SANITIZE_FAILED | SANITIZE_FAILED_MAY_EXIT, Kind::Format) => None,
            _ => Some(state << STATE),
        };
        match self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, begin) {
            Ok(_) => Ok(Running { job: self.clone(), failed }),
            Err(_) => Err(self.condition().unwrap_or(Sense::LOGICAL_UNIT_NOT_READY_FORMAT_IN_PROGRESS)),
        }
    }

    /// EXIT FAILURE MODE: `false` if the failed SANITIZE does not allow it.
    pub(super) fn exit_failure_mode(&self) -> bool {
        let exit = |value: u32| match value >> STATE {
            SANITIZE_FAILED => None,
            SANITIZE_FAILED_MAY_EXIT => Some(IDLE),
            _ => Some(value),
        };
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, exit).is_ok()
    }
}

/// A running operation: it has failed, unless somebody says that it has succeeded before this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    job: Arc<Job>,
    failed: u32,
}

impl Running {
    pub(super) fn progress(&self, done: u64, total: u64) {
        let progress = u128::from(done) * 0xffff / u128::from(total.max(1));
        let state = self.job.0.load(Ordering::Relaxed) & !0xffff;
        self.job.0.store(state | progress.min(0xffff) as u32, Ordering::Release);
    }

    pub(super) const fn sanitizes(&self) -> bool {
        matches!(self.failed, SANITIZE_FAILED | SANITIZE_FAILED_MAY_EXIT)
    }

    pub(super) fn succeed(mut self) {
        self.failed = IDLE;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.job.0.store(self.failed << STATE, Ordering::Release);
    }
}
