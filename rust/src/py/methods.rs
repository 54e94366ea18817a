//! The methods of a handler, and the commands that wait in them for a transfer, for the engine in `tcmu_rs._engine`.
//!
//! # Theory
//!
//! A coroutine that suspends needs a task of trio's to be gone on with, because what it waits for knows the task. Not so
//! if it waits for a [`Transfer`]: that yields itself, and whoever runs the coroutine starts it, and goes on with the
//! coroutine when it is over, in whatever task. What the coroutine holds meanwhile must not belong to a task either, as
//! locks and cancel scopes of trio's do. So it is done for methods that say so (`taskless`), and only while they are run
//! from here: an await elsewhere finds no [`Engine`], and suspends a task as ever.
//!
//! A command that waits is a [`Waiting`]. The queue has it until the transfer is over, then [`Methods`] have it, until the
//! engine calls [`Methods::resume`].

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;
use pyo3::types::PyIterator;
use pyo3::types::iterator::PySendResult;
use pyo3::{PyTraverseError, PyVisit};

use super::command::Command;
use super::exceptions::TransferCancelled;
use super::fileio::{FileQueue, Transfer};
use crate::scsi::Verb;

thread_local! {
    static ENGINE: RefCell<Option<Engine>> = const { RefCell::new(None) };
}

/// Who runs a coroutine on this thread, and takes the transfers that it waits for.
pub struct Engine {
    /// Where they go.
    pub queue: Py<FileQueue>,
    /// There are other commands to run meanwhile.
    pub more: bool,
}

impl Engine {
    /// What `look` finds, if there is one.
    pub fn current<T>(look: impl FnOnce(&Self) -> T) -> Option<T> {
        ENGINE.with_borrow(|engine| engine.as_ref().map(look))
    }

    fn run<T>(self, call: impl FnOnce() -> T) -> T {
        struct Restore(Option<Engine>);
        impl Drop for Restore {
            fn drop(&mut self) {
                ENGINE.set(self.0.take());
            }
        }
        let _restore = Restore(ENGINE.replace(Some(self)));
        call()
    }
}

/// How far a coroutine was run.
enum Ran<'py> {
    Returned(Bound<'py, PyAny>),
    Suspended(Bound<'py, PyAny>),
}

/// Runs a coroutine up to its next suspension, or its end.
fn send<'py>(coroutine: &Bound<'py, PyAny>) -> PyResult<Ran<'py>> {
    // SAFETY: `send` only calls `PyIter_Send`, which takes any object.
    let iterator = unsafe { coroutine.cast_unchecked::<PyIterator>() };
    Ok(match iterator.send(&coroutine.py().None().into_bound(coroutine.py()))? {
        PySendResult::Return(value) => Ran::Returned(value),
        PySendResult::Next(trap) => Ran::Suspended(trap),
    })
}

/// The same, with an exception.
fn throw<'py>(coroutine: &Bound<'py, PyAny>, error: PyErr) -> PyResult<Ran<'py>> {
    let py = coroutine.py();
    match coroutine.call_method1("throw", (error.into_value(py),)) {
        Ok(trap) => Ok(Ran::Suspended(trap)),
        Err(stop) if stop.is_instance_of::<PyStopIteration>(py) => {
            Ok(Ran::Returned(stop.value(py).getattr("value")?))
        }
        Err(error) => Err(error),
    }
}

/// How a handler's method is called for one verb.
pub struct Method {
    callable: Py<PyAny>,
    /// The same with `fua=True`, if the method takes it.
    durable: Option<Py<PyAny>>,
    /// Whether it is an `async def`.
    suspends: bool,
    /// Whether it may go on in another task.
    taskless: bool,
}

/// The methods of a handler that [`Command::run`] calls by itself, those that run in the event loop; and the commands
/// that wait in them for a transfer.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Methods {
    read: Option<Method>,
    write: Option<Method>,
    flush: Option<Method>,
    /// Raises what is to be said of a result other than None: called with the verb and the result.
    refuse: Py<PyAny>,
    /// Is called when there is something to resume, and was not before.
    wake: Py<PyAny>,
    /// Where the transfers of taskless methods are done.
    queue: Py<FileQueue>,
    over: Mutex<VecDeque<(Py<Waiting>, Option<PyErr>)>>,
    /// Commands that wait for a transfer, and those in `over`.
    waiting: AtomicUsize,
}

type Given = (Py<PyAny>, Option<Py<PyAny>>, bool, bool);
/// A command that needs more than its methods, what it needs as `Command.run` says it or what was raised, and whether it
/// was cancelled.
type Resumed<'py> = (Bound<'py, Command>, Bound<'py, PyAny>, bool);

#[pymethods]
impl Methods {
    /// Each method is given as what is called (with offset and `IoVec`, but for `flush`), the same for a write that has to
    /// be durable, whether it is an `async def`, and whether it is taskless.
    #[new]
    #[pyo3(signature = (queue, wake, refuse, *, read = None, write = None, flush = None))]
    fn new(
        queue: Py<FileQueue>,
        wake: Py<PyAny>,
        refuse: Py<PyAny>,
        read: Option<Given>,
        write: Option<Given>,
        flush: Option<Given>,
    ) -> Self {
        let method =
            |(callable, durable, suspends, taskless)| Method { callable, durable, suspends, taskless };
        Self {
            read: read.map(method),
            write: write.map(method),
            flush: flush.map(method),
            refuse,
            wake,
            queue,
            over: Mutex::default(),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Commands whose handlers wait for a transfer, or are to be resumed.
    #[getter]
    fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Commands that are to be resumed.
    #[getter]
    fn over(&self) -> usize {
        self.lock().len()
    }

    /// All of `waiting`, one by one.
    fn suspended<'py>(slf: &Bound<'py, Self>) -> Vec<Bound<'py, Waiting>> {
        let py = slf.py();
        let over = slf.get().lock().iter().map(|(waiting, _)| waiting.bind(py).clone()).collect();
        slf.get().queue.get().waiting_in(slf, over)
    }

    /// Begins the transfers of the commands that wait.
    fn submit(&self, py: Python<'_>) -> PyResult<()> {
        self.queue.get().submit(py)
    }

    /// Goes on with the commands whose transfers are over, one after the other.
    ///
    /// Returns None if there are none left; else one that needs more, what that is (as `Command.run` says it, or what the
    /// handler has raised), and whether it was cancelled.
    fn resume<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Resumed<'py>>> {
        let py = slf.py();
        loop {
            let Some((waiting, error)) = slf.get().lock().pop_front() else { return Ok(None) };
            let waiting = waiting.into_bound(py);
            let more = match slf.get().go_on(&waiting, error) {
                Ok(Some(more)) if more.is(py.Ellipsis()) => continue,
                Ok(more) => more,
                Err(error) => Some(error.into_value(py).into_bound(py).into_any()),
            };
            slf.get().waiting.fetch_sub(1, Ordering::Relaxed);
            if let Some(more) = more {
                let this = waiting.get();
                return Ok(Some((this.command.bind(py).clone(), more, this.cancel_called())));
            }
        }
    }

    // A handler may hold its device, which holds this. Whoever else is in such a circle breaks it.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.refuse)?;
        visit.call(&self.wake)?;
        visit.call(&self.queue)?;
        for method in [&self.read, &self.write, &self.flush].into_iter().flatten() {
            visit.call(&method.callable)?;
            visit.call(&method.durable)?;
        }
        Ok(())
    }
}

impl Methods {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(Py<Waiting>, Option<PyErr>)>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is called for a verb, if there is a method for it.
    pub fn find(&self, verb: Verb, fua: bool) -> Option<(&Py<PyAny>, &Method)> {
        let method = match verb {
            Verb::Read => self.read.as_ref()?,
            Verb::Write => self.write.as_ref()?,
            Verb::Flush => self.flush.as_ref()?,
            _ => return None,
        };
        Some((if fua { method.durable.as_ref()? } else { &method.callable }, method))
    }

    /// Calls a method of theirs, and runs what it returns. Returns what [`Command::run`] does.
    pub fn call<'py>(
        slf: &Bound<'py, Self>,
        command: &Bound<'py, Command>,
        verb: Verb,
        (callable, method): (&Py<PyAny>, &Method),
        arguments: impl pyo3::call::PyCallArgs<'py>,
        more: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = slf.py();
        let this = slf.get();
        let result = callable.bind(py).call1(arguments)?;
        if !method.suspends {
            return command.get().returned(this, verb, &result);
        }
        let ran = if method.taskless {
            let more = more.map_or(Ok(false), PyAnyMethods::is_truthy)?;
            this.engine(py, more).run(|| send(&result))?
        } else {
            send(&result)?
        };
        match ran {
            Ran::Returned(value) => {
                // The frame goes, and what it holds, before the answer.
                drop(result);
                command.get().returned(this, verb, &value)
            }
            Ran::Suspended(trap) => match trap.cast::<Transfer>() {
                Ok(transfer) if method.taskless => {
                    let waiting = Waiting {
                        methods: slf.clone().unbind(),
                        command: command.clone().unbind(),
                        verb,
                        coroutine: result.unbind(),
                        ticket: AtomicU64::new(0),
                        cancelled: AtomicBool::new(false),
                    };
                    this.queue.get().wait_for(&Bound::new(py, waiting)?, transfer.get())?;
                    this.waiting.fetch_add(1, Ordering::Relaxed);
                    Ok(Some(py.Ellipsis().into_bound(py)))
                }
                _ => Ok(Some((result, trap).into_pyobject(py)?.into_any())),
            },
        }
    }

    /// Raises what is to be said of a method's result that is not None.
    pub fn refuse(&self, verb: Verb, result: &Bound<'_, PyAny>) -> PyResult<()> {
        self.refuse.bind(result.py()).call1((verb as u8, result)).map(drop)
    }

    fn engine(&self, py: Python<'_>, more: bool) -> Engine {
        Engine { queue: self.queue.clone_ref(py), more }
    }

    /// Goes on with a coroutine whose transfer is over. Returns what [`Command::run`] does.
    fn go_on<'py>(
        &self,
        waiting: &Bound<'py, Waiting>,
        error: Option<PyErr>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = waiting.py();
        let this = waiting.get();
        let coroutine = this.coroutine.bind(py);
        let cancelled = || TransferCancelled::new_err("the command is cancelled");
        let was_cancelled = |error: &PyErr| {
            let number = error.value(py).getattr("errno").and_then(|number| number.extract::<i32>());
            this.cancel_called() && number.is_ok_and(|number| number == libc::ECANCELED)
        };
        let mut error = error.map(|error| if was_cancelled(&error) { cancelled() } else { error });
        loop {
            let ran = self.engine(py, false).run(|| match error.take() {
                Some(error) => throw(coroutine, error),
                None => send(coroutine),
            })?;
            match ran {
                Ran::Returned(value) => return this.command.get().returned(self, this.verb, &value),
                Ran::Suspended(trap) => match trap.cast::<Transfer>() {
                    Ok(_) if this.cancel_called() => error = Some(cancelled()),
                    Ok(transfer) => {
                        self.queue.get().wait_for(waiting, transfer.get())?;
                        return Ok(Some(py.Ellipsis().into_bound(py)));
                    }
                    Err(_) => return Ok(Some((coroutine, trap).into_pyobject(py)?.into_any())),
                },
            }
        }
    }
}

/// A command whose handler waits for a transfer, without a task.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Waiting {
    methods: Py<Methods>,
    command: Py<Command>,
    verb: Verb,
    coroutine: Py<PyAny>,
    ticket: AtomicU64,
    cancelled: AtomicBool,
}

#[pymethods]
impl Waiting {
    /// Asks for an early end: if the transfer ends by that, and for every later one, `TransferCancelled` is raised in the
    /// handler.
    fn cancel(&self) -> PyResult<()> {
        self.cancelled.store(true, Ordering::Relaxed);
        self.methods.get().queue.get().cancel(self.ticket.load(Ordering::Relaxed))
    }

    /// Whether `cancel` was called.
    #[getter]
    fn cancel_called(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The command.
    #[getter]
    fn command<'py>(&self, py: Python<'py>) -> Bound<'py, Command> {
        self.command.bind(py).clone()
    }

    /// What waits.
    #[getter]
    fn coroutine<'py>(&self, py: Python<'py>) -> Bound<'py, PyAny> {
        self.coroutine.bind(py).clone()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.methods)?;
        visit.call(&self.command)?;
        visit.call(&self.coroutine)
    }
}

impl Waiting {
    /// Notes the transfer that it waits for.
    pub fn set_ticket(&self, ticket: u64) {
        self.ticket.store(ticket, Ordering::Relaxed);
    }

    /// Whether it is one of these methods'.
    pub fn is_of(&self, methods: &Bound<'_, Methods>) -> bool {
        self.methods.is(methods)
    }

    /// The transfer is over. Returns whom to wake for that, if nobody was to be woken yet.
    pub fn over(waiting: Py<Self>, py: Python<'_>, error: Option<PyErr>) -> Option<Py<PyAny>> {
        let methods = waiting.get().methods.clone_ref(py);
        let mut over = methods.get().lock();
        over.push_back((waiting, error));
        (over.len() == 1).then(|| methods.get().wake.clone_ref(py))
    }
}
