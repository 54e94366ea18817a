//! [`crate::netlink`] for Python.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError, RwLock};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use rustix::io::Errno;

use crate::netlink::{Change, Event, Kind, NetlinkError, Question, Socket};

impl From<NetlinkError> for PyErr {
    /// Not by way of `std::io::Error`, which reaches Python without its `errno`.
    fn from(error: NetlinkError) -> Self {
        PyOSError::new_err((error.errno().raw_os_error(), error.to_string()))
    }
}

/// An announcement of the kernel.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct DeviceEvent {
    /// "added", "removed" or "reconfig".
    #[pyo3(get)]
    kind: &'static str,
    /// Name of the UIO device, decoded like a file name.
    #[pyo3(get)]
    name: OsString,
    /// Number of the UIO device.
    #[pyo3(get)]
    minor: u32,
    /// The kernel's number of the device.
    #[pyo3(get)]
    device_id: u32,
    /// The configuration to be, if that is what changes.
    #[pyo3(get)]
    config: Option<OsString>,
    /// The size to be, if that is what changes.
    #[pyo3(get)]
    size: Option<u64>,
    /// The write cache setting to be, if that is what changes.
    #[pyo3(get)]
    write_cache: Option<u8>,
    /// Gone once answered: a second answer could meet a later event of the same device.
    question: Mutex<Option<Question>>,
}

impl From<Event> for DeviceEvent {
    fn from(event: Event) -> Self {
        let (kind, change) = match event.kind {
            Kind::Added => ("added", None),
            Kind::Removed => ("removed", None),
            Kind::Reconfig(change) => ("reconfig", Some(change)),
        };
        let (mut config, mut size, mut write_cache) = (None, None, None);
        match change {
            Some(Change::Config(to)) => config = Some(to),
            Some(Change::Size(to)) => size = Some(to),
            Some(Change::WriteCache(to)) => write_cache = Some(to),
            None => {}
        }
        Self {
            kind,
            name: event.device,
            minor: event.minor,
            device_id: event.question.device_id(),
            config,
            size,
            write_cache,
            question: Mutex::new(Some(event.question)),
        }
    }
}

#[pymethods]
impl DeviceEvent {
    /// The "added" event of a device whose own got lost.
    ///
    /// Only for a device that exists in sysfs while its `enable` in configfs still reads 0; `device_id` is in
    /// `statistics/scsi_dev/indx`. At any other time the kernel may wait for a different answer and hang.
    #[staticmethod]
    fn added(name: OsString, minor: u32, device_id: u32) -> Self {
        Event { kind: Kind::Added, device: name, minor, question: Question::added(device_id) }.into()
    }

    fn __repr__(&self) -> String {
        let change = match (&self.config, self.size, self.write_cache) {
            (Some(config), ..) => format!(" config={config:?}"),
            (_, Some(size), _) => format!(" size={size}"),
            (.., Some(write_cache)) => format!(" write_cache={write_cache}"),
            _ => String::new(),
        };
        let Self { kind, name, minor, device_id, .. } = self;
        format!("<DeviceEvent {kind} {name:?} minor={minor} device_id={device_id}{change}>")
    }
}

/// What was in a `NetlinkSocket`.
#[pyclass(frozen, get_all, module = "tcmu_rs._native")]
pub struct ReceivedEvents {
    /// In the order they were sent.
    events: Vec<Py<DeviceEvent>>,
    /// Events were lost: scan sysfs.
    overflow: bool,
    /// A description of each message that could not be understood.
    malformed: Vec<String>,
}

/// A listener to the kernel's announcements of TCMU devices.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct NetlinkSocket {
    socket: RwLock<Option<Socket>>,
}

impl NetlinkSocket {
    /// The lock is taken and left without the interpreter, so that neither can wait for the other.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&Socket) -> Result<T, NetlinkError> + Send,
    ) -> PyResult<T> {
        let result =
            py.detach(|| self.socket.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(call));
        let closed = || PyOSError::new_err((Errno::BADF.raw_os_error(), "the netlink socket is closed"));
        Ok(result.ok_or_else(closed)??)
    }
}

#[pymethods]
impl NetlinkSocket {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let socket = py.detach(Socket::open)?;
        Ok(Self { socket: RwLock::new(Some(socket)) })
    }

    /// The descriptor that is readable when something has arrived.
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.with(py, |socket| Ok(socket.as_fd().as_raw_fd()))
    }

    /// Everything that has arrived, without waiting.
    fn receive(&self, py: Python<'_>) -> PyResult<ReceivedEvents> {
        let received = self.with(py, Socket::receive)?;
        let events = received.events.into_iter().map(|event| Py::new(py, DeviceEvent::from(event)));
        Ok(ReceivedEvents {
            events: events.collect::<PyResult<_>>()?,
            overflow: received.overflow,
            malformed: received.malformed.iter().map(ToString::to_string).collect(),
        })
    }

    /// Answers an event with 0 or a negative error number; says whether the kernel was waiting for it.
    fn reply(&self, py: Python<'_>, event: &DeviceEvent, status: i32) -> PyResult<bool> {
        let outcome = match status {
            0 => Ok(()),
            // The range of error numbers that the kernel knows.
            -4095..0 => Err(Errno::from_raw_os_error(-status)),
            _ => return Err(PyValueError::new_err("status must be 0 or a negative error number")),
        };
        let question = event.question.lock().unwrap_or_else(PoisonError::into_inner).take();
        let question = question.ok_or_else(|| PyValueError::new_err("the event has been answered"))?;
        self.with(py, |socket| socket.reply(question, outcome))
    }

    /// Tells the kernel whether events of devices enabled from now on are answered, by anybody.
    fn set_features(&self, py: Python<'_>, reply_supported: bool) -> PyResult<()> {
        self.with(py, |socket| socket.set_features(reply_supported))
    }

    /// Leaves the group. Whatever waits for the descriptor must have been told before.
    fn close(&self, py: Python<'_>) {
        py.detach(|| *self.socket.write().unwrap_or_else(PoisonError::into_inner) = None);
    }
}
