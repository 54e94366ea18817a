//! A device, for the engine in `tcmu_rs._engine`.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::command::Command;
use super::unit::LogicalUnit;
use crate::device::{Device, DeviceError, Work};
use crate::exclusion::Token;
use crate::mapping::Mapping;

/// One device's ring and doorbell.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Ring {
    device: Arc<Device>,
    intercept: AtomicBool,
}

/// Notification that commands are being aborted.
#[pyclass(frozen, get_all, module = "tcmu_rs._native")]
pub struct TaskManagement {
    /// The function: a `TCMU_TMR_*` number.
    kind: u8,
    /// The ids meant.
    commands: Vec<u16>,
}

/// Duplicates a descriptor that Python lends for the call.
#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> Result<OwnedFd, DeviceError> {
    if fd < 0 {
        return Err(std::io::Error::from(rustix::io::Errno::BADF).into());
    }
    // SAFETY: the descriptor is only borrowed for this call; a number that is not open gives EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 3).map_err(|error| std::io::Error::from(error).into())
}

#[pymethods]
impl Ring {
    /// Maps `size` bytes of `memory` and takes the ring up; `event` is read and written 4 bytes at a time. Both
    /// descriptors may be closed afterwards.
    ///
    /// Without `unit` every command is passed as it is. With `intercept` too, but then `Command.emulate` works.
    #[new]
    #[pyo3(signature = (memory, event, size, unit = None, *, intercept = false, fills_reads = false))]
    fn new(
        memory: RawFd,
        event: RawFd,
        size: usize,
        unit: Option<&LogicalUnit>,
        intercept: bool,
        fills_reads: bool,
    ) -> PyResult<Self> {
        let mapping = Mapping::new(&duplicate(memory)?, size).map_err(DeviceError::from)?;
        let unit = unit.map(|unit| unit.unit.clone());
        let device = Device::new(mapping, duplicate(event)?, unit)?;
        device.set_fills_reads(fills_reads);
        Ok(Self { device: Arc::new(device), intercept: AtomicBool::new(intercept) })
    }

    /// Whether anybody has answered a command of the device since its ring was last reset.
    #[staticmethod]
    fn was_served(memory: RawFd, size: usize) -> PyResult<bool> {
        let mapping = Mapping::new(&duplicate(memory)?, size).map_err(DeviceError::from)?;
        Ok(crate::ring::Ring::attach(Arc::new(mapping)).map_err(DeviceError::from)?.tail() != 0)
    }

    /// The descriptor to wait for.
    fn fileno(&self) -> PyResult<RawFd> {
        Ok(self.device.event_fd()?)
    }

    /// Times commands for the statistics, as from the start, or does not.
    #[pyo3(signature = (on, /))]
    fn set_timing(&self, on: bool) {
        self.device.statistics.set_timing(on);
    }

    /// Another handler serves from now on: its promises take the place of those of the one before.
    #[pyo3(signature = (*, intercept, fills_reads))]
    fn serve_another(&self, intercept: bool, fills_reads: bool) {
        self.intercept.store(intercept, Ordering::Relaxed);
        self.device.set_fills_reads(fills_reads);
    }

    /// Takes up to `limit` entries: answers what needs no handler, returns the other commands, and what was said about
    /// aborted ones. With `park` nothing is looked at: all commands come as with `intercept`.
    #[pyo3(signature = (limit, park = false))]
    fn drain<'py>(
        &self,
        py: Python<'py>,
        limit: usize,
        park: bool,
    ) -> PyResult<(Bound<'py, PyList>, Vec<TaskManagement>)> {
        let work = self.device.drain(limit, park || self.intercept.load(Ordering::Relaxed))?;
        let commands = self.ready(py)?;
        let mut notices = Vec::new();
        for work in work {
            match work {
                Work::Step(claim, step) => commands.append(Command::new(py, claim, Some(step))?)?,
                Work::Command(claim) => commands.append(Command::new(py, claim, None)?)?,
                Work::TaskManagement(tmr) => {
                    let commands = tmr.commands.into_iter().map(|id| id.0).collect();
                    notices.push(TaskManagement { kind: tmr.kind, commands });
                }
            }
        }
        Ok((commands, notices))
    }

    /// Whether entries wait.
    fn pending(&self) -> PyResult<bool> {
        Ok(self.device.pending()?)
    }

    /// Looks for entries, without pause, for so many nanoseconds at most. Returns whether there are some.
    #[pyo3(signature = (nanoseconds, /))]
    fn look(&self, py: Python<'_>, nanoseconds: u64) -> PyResult<bool> {
        let end = Instant::now() + Duration::from_nanos(nanoseconds);
        py.detach(|| {
            loop {
                for _ in 0..64 {
                    if self.device.pending()? {
                        return Ok(true);
                    }
                    std::hint::spin_loop();
                }
                if Instant::now() >= end {
                    return Ok(false);
                }
            }
        })
    }

    /// Hands back what was answered, with one doorbell. True: commands that had to wait for others can begin, see
    /// `ready`.
    fn commit(&self, py: Python<'_>) -> PyResult<bool> {
        // The kernel copies the Data-In of the whole batch inside the doorbell's write().
        py.detach(|| self.device.commit())?;
        Ok(self.device.has_ready())
    }

    /// The commands that had to wait for others and can begin.
    fn ready<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for (claim, step) in self.device.take_ready()? {
            list.append(Command::new(py, claim, Some(step))?)?;
        }
        Ok(list)
    }

    /// Where another process may go on with the ring; None while commands are in flight here.
    fn quiescent_at(&self) -> Option<u32> {
        self.device.quiescent_at()
    }

    /// What initiators have set of the emulated unit, for `LogicalUnit.restore` in another process; None without one.
    fn unit_state(&self) -> Option<Vec<(&'static str, u64)>> {
        self.device.unit().map(|unit| unit.state())
    }

    /// Ids that wait for `free_kept_buf`.
    fn kept(&self) -> Vec<u16> {
        self.device.kept()
    }

    /// A piece of a copy is to touch so many bytes. Returns its name, and whether it may begin; if not, `granted` has it
    /// when it may.
    fn enter(&self, offset: u64, length: u64) -> (u64, bool) {
        let (token, granted) = self.device.enter(offset, length);
        (token.0, granted)
    }

    /// The piece of this name is over, or is given up.
    fn leave(&self, piece: u64) {
        self.device.leave(Token(piece));
    }

    /// The pieces that had to wait and can begin; to be asked after `drain` and `ready`.
    fn granted(&self) -> Vec<u64> {
        self.device.take_granted().into_iter().map(|token| token.0).collect()
    }

    /// Commands that are not answered.
    #[getter]
    fn in_flight(&self) -> usize {
        self.device.in_flight()
    }

    /// Readable when `reap` is due.
    fn wake_fileno(&self) -> PyResult<RawFd> {
        Ok(self.device.wake_fd().map_err(DeviceError::from)?)
    }

    /// Sends answers whose last view went away; returns ids for `free_kept_buf`.
    fn reap(&self) -> PyResult<Vec<u16>> {
        Ok(self.device.reap()?)
    }

    /// Counters since the start. Times are in nanoseconds; a histogram is None, or a tuple of count, sum, least, most,
    /// percentiles 50, 90, 99 and 99.9, and the counts of the times below each power of two.
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = &self.device.counters;
        let found = self.device.statistics.snapshot();
        let dict = PyDict::new(py);
        dict.set_item("commands", counters.commands.load(Ordering::Relaxed))?;
        dict.set_item("emulated", counters.emulated.load(Ordering::Relaxed))?;
        dict.set_item("doorbells", counters.doorbells.load(Ordering::Relaxed))?;
        dict.set_item("wakeups", counters.wakeups.load(Ordering::Relaxed))?;
        dict.set_item("batches", found.batches)?;
        let stages = found.stages.as_deref();
        dict.set_item("ring_wait", stages.map(|stages| summary(&stages.ring_wait)))?;
        dict.set_item("dispatch", stages.map(|stages| summary(&stages.dispatch)))?;
        dict.set_item("completion", stages.map(|stages| summary(&stages.completion)))?;
        let calls: Vec<_> = std::iter::zip(&found.calls, &found.handler)
            .map(|(calls, handler)| (calls.count, calls.bytes, handler.as_deref().map(summary)))
            .collect();
        dict.set_item("calls", calls)?;
        dict.set_item("failures", found.failures.into_iter().collect::<Vec<_>>())?;
        Ok(dict)
    }

    /// Gives the device up; idempotent.
    fn close(&self) {
        self.device.close();
    }
}

type Summary = (u64, f64, u64, u64, [u64; 4], Vec<u64>);

fn summary(histogram: &Histogram<u64>) -> Summary {
    let at = |percentile| histogram.value_at_percentile(percentile);
    // The bound of the first bucket is 1 ns: each next one has twice that.
    let buckets = histogram.iter_log(1, 2.0).map(|bucket| bucket.count_since_last_iteration()).collect();
    let sum = histogram.mean() * histogram.len() as f64;
    (histogram.len(), sum, histogram.min(), histogram.max(), [50.0, 90.0, 99.0, 99.9].map(at), buckets)
}
