//! The simulated kernel, for `tcmu_rs.testing`.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyTuple};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::device::DeviceError;
use crate::ring::sim::{Completion, Config, Kernel, Request, Ticket};

/// After which a command is not waited for any more.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A CDB, Data-Out, and bytes of Data-In.
type Outgoing = (PyBackedBytes, Option<PyBackedBytes>, usize);

/// One device of a simulated kernel: see `tcmu_rs.testing`.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct Simulator {
    kernel: Mutex<Kernel>,
    /// Bytes of the shared memory.
    #[pyo3(get)]
    size: usize,
}

impl Simulator {
    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is locked while it waits: the consumer may ask for something.
    fn drive_until<'a>(
        &self,
        mut commands: impl Iterator<Item = &'a Outgoing>,
        depth: usize,
        end: Option<Instant>,
    ) -> PyResult<usize> {
        let doorbell = self.kernel().doorbell().try_clone_to_owned()?;
        let (mut outstanding, mut done) = (0, 0);
        loop {
            let mut kernel = self.kernel();
            kernel.plug();
            while outstanding < depth && end.is_none_or(|end| Instant::now() < end) {
                let Some((cdb, data_out, data_in)) = commands.next() else { break };
                kernel.send(cdb, data_out.as_deref().unwrap_or_default(), *data_in);
                outstanding += 1;
            }
            kernel.unplug();
            drop(kernel);
            if outstanding == 0 {
                return Ok(done);
            }
            if matches!(poll(&mut [PollFd::new(&doorbell, PollFlags::IN)], Some(&PATIENCE)), Ok(0)) {
                return Err(PyRuntimeError::new_err("no command was answered for a minute"));
            }
            let count = count_good(&mut self.kernel())?;
            outstanding -= count;
            done += count;
        }
    }
}

/// Takes completions; each of them has to be GOOD.
fn count_good(kernel: &mut Kernel) -> PyResult<usize> {
    let finished = kernel.process();
    if let Some(Completion { status, sense, .. }) = finished.iter().find(|done| done.status != 0) {
        return Err(PyRuntimeError::new_err(format!("status {status:#x}, sense {sense:02x?}")));
    }
    let count = finished.len();
    kernel.recycle(finished);
    Ok(count)
}

#[pymethods]
impl Simulator {
    #[new]
    #[pyo3(signature = (*, ring_size = None, data_size = None, block_size = None, capabilities = None, checks = true))]
    fn new(
        ring_size: Option<u32>,
        data_size: Option<usize>,
        block_size: Option<usize>,
        capabilities: Option<u16>,
        checks: bool,
    ) -> PyResult<Self> {
        let default = Config::default();
        let config = Config {
            ring_size: ring_size.unwrap_or(default.ring_size),
            data_size: data_size.unwrap_or(default.data_size),
            block_size: block_size.unwrap_or(default.block_size),
            capabilities: capabilities.unwrap_or(default.capabilities),
            checks,
        };
        let kernel = Kernel::new(config).map_err(DeviceError::from)?;
        Ok(Self { size: kernel.mapping().size(), kernel: Mutex::new(kernel) })
    }

    /// The shared memory, to be mapped by the consumer.
    fn memory_fileno(&self) -> RawFd {
        self.kernel().memory().as_raw_fd()
    }

    /// The consumer's event descriptor.
    fn consumer_fileno(&self) -> RawFd {
        self.kernel().consumer().as_raw_fd()
    }

    /// Readable when `process` is due.
    fn fileno(&self) -> RawFd {
        self.kernel().doorbell().as_raw_fd()
    }

    /// The initiator sends a command; returns its ticket.
    #[pyo3(signature = (cdb, data_out = None, data_in = 0))]
    fn submit(&self, cdb: Vec<u8>, data_out: Option<&Bound<'_, PyBytes>>, data_in: usize) -> u64 {
        let data_out = data_out.map_or_else(Vec::new, |bytes| bytes.as_bytes().to_vec());
        self.kernel().submit(Request { cdb, data_out, data_in }).0
    }

    /// Takes completions, returns what was finished: (ticket, status, sense, Data-In, residual).
    fn process<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let finished = self.kernel().process();
        finished
            .into_iter()
            .map(|done| {
                let (sense, data_in) = (PyBytes::new(py, &done.sense), PyBytes::new(py, &done.data_in));
                (done.ticket.0, done.status, sense, data_in, done.residual).into_pyobject(py)
            })
            .collect()
    }

    /// The initiator sends many commands with one event, for benchmarks: their CDBs of 16 bytes one behind the other.
    #[pyo3(signature = (cdbs, data_out = None, data_in = 0))]
    fn submit_batch(&self, cdbs: &[u8], data_out: Option<&[u8]>, data_in: usize) {
        let mut kernel = self.kernel();
        kernel.plug();
        for cdb in cdbs.chunks(16) {
            kernel.send(cdb, data_out.unwrap_or_default(), data_in);
        }
        kernel.unplug();
    }

    /// Takes completions and tells only how many, for benchmarks.
    ///
    /// Raises RuntimeError if one of them is not GOOD.
    fn process_batch(&self) -> PyResult<usize> {
        count_good(&mut self.kernel())
    }

    /// Sends commands, at most `depth` at a time, until there are no more; with `seconds` again and again, for so long.
    /// Returns how many were done.
    ///
    /// It is the initiator and the kernel, on a processor of their own, for benchmarks: it blocks, without the
    /// interpreter, so it is run in a thread. A command is its CDB, Data-Out, and bytes of Data-In.
    ///
    /// Raises RuntimeError if one of them is not GOOD, or is not answered for a minute.
    #[pyo3(signature = (commands, depth, seconds = None))]
    fn drive(
        &self,
        py: Python<'_>,
        commands: Vec<Outgoing>,
        depth: usize,
        seconds: Option<f64>,
    ) -> PyResult<usize> {
        py.detach(|| match seconds {
            None => self.drive_until(commands.iter(), depth, None),
            Some(seconds) => {
                let end = Instant::now() + Duration::from_secs_f64(seconds);
                self.drive_until(commands.iter().cycle(), depth, Some(end))
            }
        })
    }

    /// Holds events back until `unplug`.
    fn plug(&self) {
        self.kernel().plug();
    }

    /// One event for all that was submitted since `plug`.
    fn unplug(&self) {
        self.kernel().unplug();
    }

    /// Announces that commands are being aborted.
    fn abort(&self, kind: u8, tickets: Vec<u64>) {
        let tickets: Vec<Ticket> = tickets.into_iter().map(Ticket).collect();
        self.kernel().abort(kind, &tickets);
    }

    /// Lets a command's time run out.
    fn expire(&self, ticket: u64) {
        self.kernel().expire(Ticket(ticket));
    }

    /// `action/block_dev`.
    fn set_blocked(&self, blocked: bool) {
        self.kernel().set_blocked(blocked);
    }

    /// `action/reset_ring`.
    fn reset_ring(&self) {
        self.kernel().reset_ring();
    }

    /// Ids of kept buffers.
    fn kept(&self) -> Vec<u16> {
        self.kernel().kept()
    }

    /// `action/free_kept_buf`.
    fn free_kept(&self, id: u16) -> bool {
        self.kernel().free_kept(id)
    }

    /// Commands without an answer.
    #[getter]
    fn outstanding(&self) -> usize {
        self.kernel().outstanding()
    }

    /// Whether the kernel gave the ring up.
    #[getter]
    fn broken(&self) -> bool {
        self.kernel().is_broken()
    }

    /// What the consumer did that it must not.
    #[getter]
    fn violations(&self) -> Vec<String> {
        self.kernel().violations().to_vec()
    }

    /// Overwrites shared memory, as a kernel gone mad would.
    fn poke(&self, offset: usize, data: &[u8]) -> PyResult<()> {
        self.kernel().mapping().write(offset, data).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// Reads shared memory.
    fn peek<'py>(&self, py: Python<'py>, offset: usize, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let kernel = self.kernel();
        PyBytes::new_with(py, length, |bytes| {
            kernel.mapping().read(offset, bytes).map_err(|error| PyValueError::new_err(error.to_string()))
        })
    }
}
