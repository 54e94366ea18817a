//! A command, for the engine in `tcmu_rs._engine`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};

use super::iovec::IoVec;
use super::methods::Methods;
use crate::device::{Claim, Started};
use crate::scsi::sense::{Sense, SenseKey};
use crate::scsi::{BlockState, DataBuffer, MediumExtent, Reply, Status, Step, StepBuffer, StepResult, Verb};
use crate::statistics::Asked;

/// What is to be done next for a command, and what the handler has brought of it.
#[derive(Default)]
struct Progress {
    step: Option<Step>,
    scratch: Option<Py<PyByteArray>>,
    extents: Vec<MediumExtent>,
}

/// One command that waits for its answer. Dropped unanswered it answers ABORTED COMMAND.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Command {
    claim: Arc<Claim>,
    progress: Mutex<Progress>,
}

impl Command {
    pub fn new(py: Python<'_>, claim: Arc<Claim>, step: Option<Step>) -> PyResult<Bound<'_, Self>> {
        Bound::new(py, Self { claim, progress: Mutex::new(Progress { step, ..Progress::default() }) })
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, step: Option<Step>) -> bool {
        let more = step.is_some();
        self.progress().step = step;
        more
    }

    fn asked(&self) -> Asked {
        self.progress().step.as_ref().map_or(Asked::Command, |step| Asked::Step(step.verb, step.length))
    }

    fn sense(key: u8, asc: u8, ascq: u8, information: Option<u64>) -> PyResult<Sense> {
        let key = SenseKey::from_code(key)
            .ok_or_else(|| PyValueError::new_err(format!("no sense key {key:#x}")))?;
        let sense = Sense::new(key, asc, ascq);
        Ok(information.map_or(sense, |information| sense.with_information(information)))
    }

    /// The command's own memory, for a step that reads or writes.
    fn memory(&self, verb: Verb, start: usize, length: usize) -> IoVec {
        let data_in = verb == Verb::Read;
        if data_in && self.claim.fills_reads() {
            self.claim.set_filled();
        }
        IoVec::of_command(self.claim.clone(), data_in, start, length)
    }

    /// The step succeeded: see `advance`.
    fn done(&self, py: Python<'_>) -> PyResult<bool> {
        let unwritten = || Err(PyRuntimeError::new_err("read() returned without filling its IoVec"));
        let mut progress = self.progress();
        let asked = progress.step.as_ref().map_or(Asked::Command, |step| Asked::Step(step.verb, step.length));
        let result = match &progress.step {
            Some(Step { verb: Verb::Read, buffer: StepBuffer::Command(_), length: 1.., .. })
                if !self.claim.is_filled() =>
            {
                return unwritten();
            }
            Some(Step { buffer: StepBuffer::Scratch, .. }) => match progress.scratch.take() {
                Some(scratch) => StepResult::Bytes(scratch.bind(py).to_vec()),
                None => return unwritten(),
            },
            Some(Step { verb: Verb::Extents, .. }) => {
                StepResult::Extents(std::mem::take(&mut progress.extents))
            }
            _ => StepResult::None,
        };
        progress.step = self.claim.returned(asked, false, || self.claim.advance(result))?;
        Ok(progress.step.is_some())
    }

    /// A method has returned. What [`Command::run`] returns then.
    pub fn returned<'py>(
        &self,
        methods: &Methods,
        verb: Verb,
        result: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = result.py();
        if !result.is_none() {
            methods.refuse(verb, result)?;
        } else if self.done(py)? {
            return otherwise(py);
        }
        if self.claim.outlived_by() == 0 {
            return Ok(None);
        }
        Ok(Some((verb as u8).into_pyobject(py)?.into_any()))
    }
}

#[allow(clippy::unnecessary_wraps)]
fn otherwise(py: Python<'_>) -> PyResult<Option<Bound<'_, PyAny>>> {
    Ok(Some(py.NotImplemented().into_bound(py)))
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

    /// Does the present step, if it is one of those that `methods` has a method for.
    ///
    /// Returns None: the command is over. Ellipsis: its handler waits for a transfer, see `Methods.resume`. A verb: it is
    /// over, and left views of its data. NotImplemented: it needs more than that, from its present step on. Else the
    /// coroutine, which has suspended, and what it waits for. Unless `more` is empty there are other commands to run now.
    ///
    /// Raises what the handler raises; the command is not answered then.
    #[pyo3(signature = (methods, more = None, /))]
    fn run<'py>(
        slf: &Bound<'py, Self>,
        methods: &Bound<'py, Methods>,
        more: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = slf.py();
        let this = slf.get();
        let (verb, offset, memory, fua) = match &this.progress().step {
            Some(Step {
                verb: verb @ (Verb::Read | Verb::Write),
                offset,
                length,
                buffer,
                fua,
                unit: None,
            }) => {
                let StepBuffer::Command(start) = *buffer else { return otherwise(py) };
                (*verb, offset.0, Some((start, usize::try_from(*length)?)), *fua)
            }
            Some(Step { verb: Verb::Flush, unit: None, .. }) => (Verb::Flush, 0, None, false),
            _ => return otherwise(py),
        };
        // With IMMED the initiator does not wait for what follows.
        let Some(method) = methods.get().find(verb, fua).filter(|_| !this.claim.is_answered()) else {
            return otherwise(py);
        };
        this.claim.begin();
        match memory {
            Some((start, length)) => {
                let memory = this.memory(verb, start, length);
                Methods::call(methods, slf, verb, method, (offset, memory), more)
            }
            None => Methods::call(methods, slf, verb, method, (), more),
        }
    }

    /// What the handler is asked for: the number of a verb, or None.
    #[getter]
    fn verb(&self) -> Option<u8> {
        self.progress().step.as_ref().filter(|step| step.unit.is_none()).map(|step| step.verb as u8)
    }

    /// Of a copy what is to be done next, by the unit with this NAA designator: that, and the number of a verb.
    #[getter]
    fn piece<'py>(&self, py: Python<'py>) -> Option<(Bound<'py, PyBytes>, u8)> {
        let progress = self.progress();
        let step = progress.step.as_ref()?;
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
        self.progress().step.as_ref().map_or(0, |step| step.offset.0)
    }

    /// How much, in bytes.
    #[getter]
    fn length(&self) -> u64 {
        self.progress().step.as_ref().map_or(0, |step| step.length)
    }

    /// Whether the write has to be durable when it returns.
    #[getter]
    fn fua(&self) -> bool {
        self.progress().step.as_ref().is_some_and(|step| step.fua)
    }

    /// The step's memory.
    #[getter]
    fn iov(&self, py: Python<'_>) -> PyResult<IoVec> {
        let (verb, length, buffer) = match &self.progress().step {
            Some(step) => (step.verb, step.length, step.buffer.clone()),
            None => return Err(PyRuntimeError::new_err("the command has no step")),
        };
        let length = usize::try_from(length)?;
        match buffer {
            StepBuffer::Command(start) => Ok(self.memory(verb, start, length)),
            StepBuffer::Owned(bytes) => IoVec::of_object(PyBytes::new(py, &bytes).as_any()),
            StepBuffer::Scratch => {
                let scratch = PyByteArray::new_with(py, length, |bytes| {
                    bytes.fill(0);
                    Ok(())
                })?;
                self.progress().scratch = Some(scratch.clone().unbind());
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
        self.done(py)
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
        self.progress().extents = extents.into_iter().map(known).collect::<PyResult<_>>()?;
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
