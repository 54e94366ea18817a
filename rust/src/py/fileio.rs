//! Transfers between files and an `IoVec`, for `tcmu_rs._files`.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyRuntimeWarning};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::exceptions::DamagedFrameError;
use super::methods::{Engine, Methods, Waiting};
use crate::fileio::memory::{Lent, Memory};
use crate::fileio::queue::{Queue, Ticket};
use crate::fileio::unpacking::Damaged;
use crate::fileio::{self, Operation, Work};

/// From so many bytes on a copy is worth the handing over of the interpreter (about 0.1 us, see `bench/RESULTS.md`).
pub const RELEASE: usize = 128 << 10;

/// Frames that threads have to decompress before it is done here as well.
const SHARED: usize = 16;

fn is_large(work: &Work<Held>) -> bool {
    work.weight() >= RELEASE
}

/// The memory of a transfer.
pub enum Held {
    /// A command's.
    Command(Lent),
    /// Python objects', which cannot be moved or resized while they are exported.
    Objects(Vec<PyUntypedBuffer>),
    /// None is needed.
    Nothing,
}

// SAFETY:
// - a command's: `Lent`;
// - of objects: an export of the buffer protocol keeps the memory valid and in place until it is released, which is when
//   this is dropped. Whether it is writable is checked before a read is made of it. Python code may look at it
//   meanwhile, but has no Rust reference to it.
unsafe impl Memory for Held {
    fn length(&self) -> usize {
        match self {
            Self::Command(lent) => lent.length(),
            Self::Objects(buffers) => buffers.iter().map(PyUntypedBuffer::len_bytes).sum(),
            Self::Nothing => 0,
        }
    }

    fn pieces(&self, start: usize, each: &mut dyn FnMut(*mut u8, usize)) {
        match self {
            Self::Command(lent) => lent.pieces(start, each),
            Self::Objects(buffers) => {
                let mut skip = start;
                for buffer in buffers {
                    let length = buffer.len_bytes();
                    let from = skip.min(length);
                    skip -= from;
                    // SAFETY: `from` is inside of the buffer, or its end.
                    each(unsafe { buffer.buf_ptr().cast::<u8>().add(from) }, length - from);
                }
            }
            Self::Nothing => {}
        }
    }

    fn filled(&self) {
        if let Self::Command(lent) = self {
            lent.filled();
        }
    }
}

enum State {
    New(Work<Held>),
    /// To be yielded to the engine.
    Due(Work<Held>),
    /// The engine has been told.
    Told(Work<Held>),
    Begun,
}

/// Work on a file that is done when it is awaited.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Transfer {
    state: Mutex<State>,
    what: &'static str,
}

impl Transfer {
    /// What `what`, a name of a function, returns.
    pub fn new(what: &'static str, work: impl Into<Work<Held>>) -> Self {
        Self { state: Mutex::new(State::New(work.into())), what }
    }

    fn take(&self) -> PyResult<Work<Held>> {
        match mem::replace(&mut *lock(&self.state), State::Begun) {
            State::New(work) | State::Due(work) | State::Told(work) => Ok(work),
            State::Begun => Err(PyRuntimeError::new_err("a transfer can be awaited once")),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An `OSError` with an errno, so that it is of the right class and can become sense data.
fn os_error(error: &io::Error) -> PyErr {
    if let Some(damaged) = error.get_ref().and_then(|inner| inner.downcast_ref::<Damaged>()) {
        return DamagedFrameError::new_err((damaged.to_string(), damaged.number));
    }
    match error.raw_os_error() {
        Some(number) => {
            // Python says the number itself.
            let text = error.to_string().replace(&format!(" (os error {number})"), "");
            PyOSError::new_err((number, text))
        }
        None => PyOSError::new_err((libc::EIO, error.to_string())),
    }
}

static FINISH: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

#[pymethods]
impl Transfer {
    /// Does what can be done at once. What is left is for the engine, or for `tcmu_rs._files.finish`, which suspends.
    fn __await__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let this = slf.get();
        let mut work = this.take()?;
        let computes = matches!(work, Work::Unpacking(_));
        let engine = Engine::current(|engine| computes && engine.more && engine.queue.get().has_room());
        let over = match engine {
            // Others are to be served meanwhile.
            Some(true) if work.suits_a_thread() => Ok(false),
            _ if is_large(&work) => py.detach(|| work.attempt()),
            _ => work.attempt(),
        };
        if over.map_err(|error| os_error(&error))? {
            return Ok(slf.into_any());
        }
        if engine.is_some() {
            *lock(&this.state) = State::Due(work);
            return Ok(slf.into_any());
        }
        *lock(&this.state) = State::New(work);
        let finish = FINISH
            .get_or_try_init(py, || py.import("tcmu_rs._files")?.getattr("finish").map(Bound::unbind))?;
        finish.bind(py).call1((slf,))?.call_method0("__await__")
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Itself, for the engine to take; then the end of the await.
    fn __next__(slf: Bound<'_, Self>) -> Option<Bound<'_, Self>> {
        let mut state = lock(&slf.get().state);
        match mem::replace(&mut *state, State::Begun) {
            State::Due(work) => *state = State::Told(work),
            other => {
                *state = other;
                return None;
            }
        }
        drop(state);
        Some(slf)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let State::New(_) = &*lock(&self.state) {
            let text = format!("{} was never awaited: nothing was moved\0", self.what);
            Python::attach(|py| {
                let text = std::ffi::CStr::from_bytes_with_nul(text.as_bytes()).unwrap_or(c"never awaited");
                let category = py.get_type::<PyRuntimeWarning>();
                if let Err(error) = PyErr::warn(py, &category, text, 1) {
                    error.write_unraisable(py, None);
                }
            });
        }
    }
}

/// Transfers under way, in io_uring and in threads: see `tcmu_rs._files`.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct FileQueue {
    /// Nothing when it is closed.
    queue: Mutex<Option<Queue<Held>>>,
    /// The commands that wait for a transfer without a task, by its ticket.
    waiting: Mutex<HashMap<u64, Py<Waiting>>>,
}

impl FileQueue {
    fn with<T>(&self, call: impl FnOnce(&mut Queue<Held>) -> T) -> PyResult<T> {
        let closed = || PyRuntimeError::new_err("the queue is closed");
        Ok(call(lock(&self.queue).as_mut().ok_or_else(closed)?))
    }

    /// Whether threads have too little to do. One that has work goes on with the next; so it is not to be woken up for
    /// each, but not idle either.
    pub fn has_room(&self) -> bool {
        self.with(|queue| queue.in_threads() < SHARED).unwrap_or(false)
    }

    /// Takes a transfer that a command waits for. It begins with the next `submit`; what is large at once.
    pub fn wait_for(&self, waiting: &Bound<'_, Waiting>, transfer: &Transfer) -> PyResult<()> {
        let work = transfer.take()?;
        let (computes, large) = (matches!(work, Work::Unpacking(_)), is_large(&work));
        let ticket = self.with(|queue| if computes { queue.share(work) } else { queue.start(work) })?.0;
        waiting.get().set_ticket(ticket);
        lock(&self.waiting).insert(ticket, waiting.clone().unbind());
        if large { self.submit(waiting.py()) } else { Ok(()) }
    }

    /// The commands of some methods that wait, behind those that are given.
    pub fn waiting_in<'py>(
        &self,
        methods: &Bound<'py, Methods>,
        mut found: Vec<Bound<'py, Waiting>>,
    ) -> Vec<Bound<'py, Waiting>> {
        let map = lock(&self.waiting);
        let of_them = map.values().filter(|waiting| waiting.get().is_of(methods));
        found.extend(of_them.map(|waiting| waiting.bind(methods.py()).clone()));
        found
    }

    /// Begins what was started.
    pub fn submit(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.with(Queue::submit))?.map_err(|error| os_error(&error))
    }
}

#[pymethods]
impl FileQueue {
    /// Raises OSError if there is to be io_uring, and there is none, or it is forbidden.
    #[new]
    #[pyo3(signature = (*, io_uring))]
    fn new(io_uring: bool) -> PyResult<Self> {
        let queue = Queue::new(io_uring).map_err(|error| os_error(&error))?;
        Ok(Self { queue: Mutex::new(Some(queue)), waiting: Mutex::default() })
    }

    /// Readable when `finish` is due.
    fn fileno(&self) -> PyResult<RawFd> {
        self.with(|queue| queue.fd())
    }

    /// Transfers that are not over.
    #[getter]
    fn outstanding(&self) -> PyResult<usize> {
        self.with(|queue| queue.outstanding())
    }

    /// Takes a transfer, to begin with the next `finish`, which is due then; returns its ticket.
    fn start(&self, transfer: &Transfer) -> PyResult<u64> {
        let work = transfer.take()?;
        self.with(|queue| queue.start(work).0)
    }

    /// Asks for an early end, with the next `finish`, which is due then.
    pub fn cancel(&self, ticket: u64) -> PyResult<()> {
        self.with(|queue| queue.cancel(Ticket(ticket)))
    }

    /// Commands that wait for a transfer without a task.
    #[getter]
    fn waiting(&self) -> usize {
        lock(&self.waiting).len()
    }

    /// Begins what was started, and returns what is over: tickets, each with an OSError or None; but for commands that
    /// wait without a task, which are told.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        // What is begun may be much, and a file system may want an answer from another thread of this process.
        let finished = match py.detach(|| self.with(Queue::finish))? {
            Ok(finished) => finished,
            Err(broken) => {
                // Only a defect can do that. The memory stays lent.
                let all = mem::take(&mut *lock(&self.waiting));
                let woken =
                    all.into_values().filter_map(|one| Waiting::over(one, py, Some(os_error(&broken))));
                wake(py, woken.collect());
                return Err(os_error(&broken));
            }
        };
        let list = PyList::empty(py);
        let mut woken = Vec::new();
        for done in finished {
            // The memory goes back before anybody learns that it is over; and not under the lock, for the objects that
            // it is of may be gone with it.
            drop(done.work);
            let ticket = done.ticket.0;
            let error = done.result.err().map(|error| os_error(&error));
            let waiting = lock(&self.waiting).remove(&ticket);
            if let Some(waiting) = waiting {
                woken.extend(Waiting::over(waiting, py, error));
            } else {
                let done: Bound<'_, PyTuple> =
                    (ticket, error.map(|error| error.into_value(py))).into_pyobject(py)?;
                list.append(done)?;
            }
        }
        wake(py, woken);
        Ok(list)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Nobody else has the lock: whoever has it has the interpreter, too.
        if let Ok(waiting) = self.waiting.try_lock() {
            for one in waiting.values() {
                visit.call(one)?;
            }
        }
        Ok(())
    }

    /// Gives the descriptor back. Waits for transfers that nobody waits for.
    fn close(&self, py: Python<'_>) {
        let queue = lock(&self.queue).take();
        py.detach(|| drop(queue));
    }
}

fn wake(py: Python<'_>, woken: Vec<Py<PyAny>>) {
    for call in woken {
        if let Err(error) = call.call0(py) {
            error.write_unraisable(py, Some(call.bind(py)));
        }
    }
}

/// Makes durable what was written to a file, as fdatasync(2): to be awaited.
#[pyfunction]
#[pyo3(signature = (fd, /))]
pub fn fdatasync(fd: RawFd) -> Transfer {
    Transfer::new("fdatasync", fileio::Transfer::new(fd, Operation::Sync, 0, Held::Nothing))
}

/// Changes the space that a range of a file has, as fallocate(2): to be awaited.
#[pyfunction]
#[pyo3(signature = (fd, mode, offset, length, /))]
pub fn fallocate(fd: RawFd, mode: i32, offset: u64, length: u64) -> Transfer {
    let operation = Operation::Allocate { mode, length };
    Transfer::new("fallocate", fileio::Transfer::new(fd, operation, offset, Held::Nothing))
}
