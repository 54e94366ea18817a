//! A device and its commands, for the runtime in `tcmu_rs._runtime`.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList};

use super::iovec::IoVec;
use super::unit::LogicalUnit;
use crate::device::{Claim, Device, DeviceError, Started, Work};
use crate::exclusion::Token;
use crate::mapping::Mapping;
use crate::scsi::sense::{Sense, SenseKey};
use crate::scsi::{BlockState, DataBuffer, MediumExtent, Reply, Status, Step, StepBuffer, StepResult, Verb};
use crate::statistics::Asked;

/// One device's ring and doorbell.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Ring {
    device: Arc<Device>,
    intercept: AtomicBool,
    fills_reads: AtomicBool,
}

/// Notification that commands are being aborted.
#[pyclass(frozen, get_all, module = "tcmu_rs._native")]
pub struct TaskManagement {
    /// The function: a `TCMU_TMR_*` number.
    kind: u8,
    /// The ids meant; they may be stale.
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
        Ok(Self {
            device: Arc::new(device),
            intercept: AtomicBool::new(intercept),
            fills_reads: AtomicBool::new(fills_reads),
        })
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
        self.fills_reads.store(fills_reads, Ordering::Relaxed);
    }

    /// Takes up to `limit` entries: answers what needs no handler, returns the rest. With `park` nothing is looked at:
    /// all commands come as with `intercept`.
    #[pyo3(signature = (limit, park = false))]
    fn drain<'py>(&self, py: Python<'py>, limit: usize, park: bool) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        let work = self.device.drain(limit, park || self.intercept.load(Ordering::Relaxed))?;
        for (claim, step) in self.device.take_ready()? {
            list.append(self.command(py, claim, Some(step))?)?;
        }
        for work in work {
            match work {
                Work::Step(claim, step) => list.append(self.command(py, claim, Some(step))?)?,
                Work::Command(claim) => list.append(self.command(py, claim, None)?)?,
                Work::TaskManagement(tmr) => {
                    let commands = tmr.commands.into_iter().map(|id| id.0).collect();
                    list.append(Bound::new(py, TaskManagement { kind: tmr.kind, commands })?)?;
                }
            }
        }
        Ok(list)
    }

    /// Whether entries wait.
    fn pending(&self) -> PyResult<bool> {
        Ok(self.device.pending()?)
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
            list.append(self.command(py, claim, Some(step))?)?;
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

impl Ring {
    fn command<'py>(
        &self,
        py: Python<'py>,
        claim: Arc<Claim>,
        step: Option<Step>,
    ) -> PyResult<Bound<'py, Command>> {
        let command = Command {
            claim,
            step: Mutex::new(step),
            scratch: Mutex::new(None),
            extents: Mutex::default(),
            fills_reads: self.fills_reads.load(Ordering::Relaxed),
        };
        Bound::new(py, command)
    }
}

/// One command that waits for its answer. Dropped unanswered it answers ABORTED COMMAND.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Command {
    claim: Arc<Claim>,
    step: Mutex<Option<Step>>,
    scratch: Mutex<Option<Py<PyByteArray>>>,
    extents: Mutex<Vec<MediumExtent>>,
    fills_reads: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Command {
    fn set(&self, step: Option<Step>) -> bool {
        let more = step.is_some();
        *lock(&self.step) = step;
        more
    }

    fn asked(&self) -> Asked {
        lock(&self.step).as_ref().map_or(Asked::Command, |step| Asked::Step(step.verb, step.length))
    }

    fn sense(key: u8, asc: u8, ascq: u8, information: Option<u64>) -> PyResult<Sense> {
        let key = SenseKey::from_code(key)
            .ok_or_else(|| PyValueError::new_err(format!("no sense key {key:#x}")))?;
        let sense = Sense::new(key, asc, ascq);
        Ok(information.map_or(sense, |information| sense.with_information(information)))
    }
}

#[pymethods]
impl Command {
    /// Its id on the ring: unique among those that are not answered.
    #[getter]
    fn id(&self) -> u16 {
        self.claim.id().0
    }

    /// The command descriptor block.
    #[getter]
    fn cdb<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.claim.cdb())
    }

    /// What the handler is asked for: the number of a verb, or None.
    #[getter]
    fn verb(&self) -> Option<u8> {
        lock(&self.step).as_ref().filter(|step| step.unit.is_none()).map(|step| step.verb as u8)
    }

    /// Of a copy what is to be done next, by the unit with this NAA designator: that, and the number of a verb.
    #[getter]
    fn piece<'py>(&self, py: Python<'py>) -> Option<(Bound<'py, PyBytes>, u8)> {
        let step = lock(&self.step);
        let step = step.as_ref()?;
        Some((PyBytes::new(py, step.unit.as_ref()?), step.verb as u8))
    }

    /// The handler is called now: for this verb, or for all of the command if it is None.
    fn begin(&self) -> Option<u8> {
        self.claim.begin();
        self.verb()
    }

    /// Nanoseconds since the command was fetched.
    #[getter]
    fn age(&self) -> u64 {
        self.claim.age()
    }

    /// Where, in bytes.
    #[getter]
    fn offset(&self) -> u64 {
        lock(&self.step).as_ref().map_or(0, |step| step.offset.0)
    }

    /// How much, in bytes.
    #[getter]
    fn length(&self) -> u64 {
        lock(&self.step).as_ref().map_or(0, |step| step.length)
    }

    /// Whether the write has to be durable when it returns.
    #[getter]
    fn fua(&self) -> bool {
        lock(&self.step).as_ref().is_some_and(|step| step.fua)
    }

    /// The step's memory.
    #[getter]
    fn iov(&self, py: Python<'_>) -> PyResult<IoVec> {
        let (verb, length, buffer) = match &*lock(&self.step) {
            Some(step) => (step.verb, step.length, step.buffer.clone()),
            None => return Err(PyRuntimeError::new_err("the command has no step")),
        };
        let length = usize::try_from(length)?;
        match buffer {
            StepBuffer::Command(start) => {
                let data_in = verb == Verb::Read;
                if data_in && self.fills_reads {
                    self.claim.set_filled();
                }
                Ok(IoVec::of_command(self.claim.clone(), data_in, start, length))
            }
            StepBuffer::Owned(bytes) => IoVec::of_object(PyBytes::new(py, &bytes).as_any()),
            StepBuffer::Scratch => {
                let scratch = PyByteArray::new_with(py, length, |bytes| {
                    bytes.fill(0);
                    Ok(())
                })?;
                *lock(&self.scratch) = Some(scratch.clone().unbind());
                IoVec::of_object(scratch.as_any())
            }
            StepBuffer::None => IoVec::of_object(PyBytes::new(py, b"").as_any()),
        }
    }

    /// All of the main buffer, as data that the initiator sent.
    #[getter]
    fn data_out(&self) -> IoVec {
        IoVec::of_command(self.claim.clone(), false, 0, self.claim.data().len())
    }

    /// All of the buffer for data that the initiator wants.
    #[getter]
    fn data_in(&self) -> IoVec {
        IoVec::of_command(self.claim.clone(), true, 0, self.claim.data_in().len())
    }

    /// Lets the emulation look at an intercepted command. True: there is a step. False: it is answered, or has to wait for
    /// others, and comes out of the ring again when it can begin.
    fn emulate(&self) -> PyResult<bool> {
        Ok(self.set(match self.claim.start()? {
            Started::Step(step) => Some(step),
            Started::Waiting | Started::Answered => None,
        }))
    }

    /// The command is aborted. True: that is answered, and it goes on all the same (SANITIZE); False: it is to end.
    fn detach(&self) -> PyResult<bool> {
        Ok(self.claim.detach()?)
    }

    /// The step succeeded. True: there is another one, even if the command is answered by now (IMMED); False: there is
    /// no more to do.
    ///
    /// Raises RuntimeError, and answers nothing, if a read left Data-In unwritten.
    fn advance(&self, py: Python<'_>) -> PyResult<bool> {
        let unwritten = || Err(PyRuntimeError::new_err("read() returned without filling its IoVec"));
        let mut step = lock(&self.step);
        let asked = step.as_ref().map_or(Asked::Command, |step| Asked::Step(step.verb, step.length));
        let result = match &*step {
            Some(Step { verb: Verb::Read, buffer: StepBuffer::Command(_), length: 1.., .. })
                if !self.claim.is_filled() =>
            {
                return unwritten();
            }
            Some(Step { buffer: StepBuffer::Scratch, .. }) => match lock(&self.scratch).take() {
                Some(scratch) => StepResult::Bytes(scratch.bind(py).to_vec()),
                None => return unwritten(),
            },
            Some(Step { verb: Verb::Extents, .. }) => {
                StepResult::Extents(std::mem::take(&mut lock(&self.extents)))
            }
            _ => StepResult::None,
        };
        *step = self.claim.returned(asked, false, || self.claim.advance(result))?;
        Ok(step.is_some())
    }

    /// What the handler answered to the verb for extents: lengths in bytes, and states with the codes of GET LBA
    /// STATUS.
    #[pyo3(signature = (extents, /))]
    fn set_extents(&self, extents: Vec<(u64, u8)>) -> PyResult<()> {
        let known = |(length, state)| {
            let state = BlockState::from_code(state)
                .ok_or_else(|| PyValueError::new_err(format!("no state of an extent: {state}")))?;
            Ok(MediumExtent { length, state })
        };
        *lock(&self.extents) = extents.into_iter().map(known).collect::<PyResult<_>>()?;
        Ok(())
    }

    /// Answers with a status and, for CHECK CONDITION, sense data. Harmless if there was an answer.
    #[pyo3(signature = (status, key = 0, asc = 0, ascq = 0, information = None))]
    fn fail(&self, status: u8, key: u8, asc: u8, ascq: u8, information: Option<u64>) -> PyResult<()> {
        let status = Status::from_code(status)
            .ok_or_else(|| PyValueError::new_err(format!("no status {status:#x}")))?;
        let reply = match status {
            Status::CheckCondition => Reply::check(Self::sense(key, asc, ascq, information)?),
            status => Reply::status(status),
        };
        let failed = status != Status::Good;
        self.claim.returned(self.asked(), failed, || self.claim.fail(reply))?;
        self.set(None);
        Ok(())
    }

    /// Answers GOOD with `data_in` valid bytes of Data-In (by default all, if any of them was written).
    #[pyo3(signature = (data_in = None))]
    fn succeed(&self, data_in: Option<usize>) -> PyResult<()> {
        let whole = if self.claim.is_filled() { self.claim.data_in().len() } else { 0 };
        // Bytes that are said to be valid and were never written: zeroes, and not what the memory held before.
        if data_in > Some(0) {
            self.claim.zero_unless_filled();
        }
        self.claim
            .returned(self.asked(), false, || self.claim.answer(Reply::good(data_in.unwrap_or(whole))))?;
        self.set(None);
        Ok(())
    }

    /// Whether there is an answer.
    #[getter]
    fn answered(&self) -> bool {
        self.claim.is_answered()
    }

    /// Views that were left when the command was answered: memory that cannot be used again yet.
    #[getter]
    fn lent(&self) -> usize {
        self.claim.outlived_by()
    }
}
