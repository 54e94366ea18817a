//! A command's data as Python sees it: memoryviews over the memory that the kernel shares.
//!
//! Views are handed out by [`Segment`], which counts them in the command's [`Lease`](crate::ring::lease): that count,
//! and no `release()` or reference count, tells when the memory may be given back.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyIndexError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};

use super::fileio::{Held, Transfer};
use crate::device::Claim;
use crate::fileio::memory::{Lent, Walk};
use crate::fileio::{self, Operation};
use crate::ring::{Buffer, Extent};
use crate::scsi::DataBuffer;

/// Lends one piece of the data area through the buffer protocol.
#[pyclass(frozen, module = "tcmu_rs._native")]
struct Segment {
    claim: Arc<Claim>,
    extent: Extent,
    writable: bool,
}

#[pymethods]
impl Segment {
    /// # Safety
    ///
    /// Called by CPython with a view to fill in.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let pointer = this.claim.data().mapping().pointer(this.extent.offset, this.extent.length);
        let Ok(pointer) = pointer else {
            return Err(PyBufferError::new_err("the data is not inside the mapping"));
        };
        if !this.claim.lend() {
            return Err(answered());
        }
        // SAFETY:
        // - `view` is CPython's, and valid;
        // - the memory is in bounds (`pointer` checked) and lives as long as the view: the view holds this object,
        //   which holds the claim, which holds the mapping;
        // - it is not given to another command meanwhile: the lease counts the view;
        // - no Rust reference points into it.
        let failed = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                pointer.cast(),
                this.extent.length.cast_signed(),
                c_int::from(!this.writable),
                flags,
            )
        };
        if failed != 0 {
            this.claim.give_back();
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }

    /// # Safety
    ///
    /// Called by CPython with a view that `__getbuffer__` filled in.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.claim.give_back();
    }
}

#[derive(Clone)]
enum Source {
    /// A range of a command's buffer.
    Command { claim: Arc<Claim>, start: usize, data_in: bool },
    /// Buffers of Python objects, as flat memoryviews of bytes.
    Objects(Arc<[Py<PyMemoryView>]>),
}

/// The memory of one operation: an immutable sequence of memoryviews.
///
/// Being a sequence it goes straight into `os.preadv(fd, iov, offset)` and `os.pwritev`. The views are writable for a
/// read and read-only for a write. They must not be used after the handler's method has returned: such a view keeps
/// its memory from being used again, and is reported.
#[pyclass(frozen, sequence, module = "tcmu_rs._native")]
pub struct IoVec {
    source: Source,
    /// Total bytes.
    #[pyo3(get)]
    nbytes: usize,
    writable: bool,
}

impl IoVec {
    /// Bytes `start..start + nbytes` of a command's Data-In or Data-Out.
    pub fn of_command(claim: Arc<Claim>, data_in: bool, start: usize, nbytes: usize) -> Self {
        Self { source: Source::Command { claim, start, data_in }, nbytes, writable: data_in }
    }

    /// One object's memory.
    pub fn of_object(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::of_objects(&[flat(object)?])
    }

    fn of_objects(views: &[Bound<'_, PyMemoryView>]) -> PyResult<Self> {
        let mut nbytes = 0usize;
        let mut writable = true;
        for view in views {
            nbytes += view.len()?;
            writable &= !view.getattr("readonly")?.extract::<bool>()?;
        }
        let views = views.iter().map(|view| view.clone().unbind()).collect();
        Ok(Self { source: Source::Objects(views), nbytes, writable })
    }

    /// Total bytes.
    pub fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// A walk over the bytes from the first one on, for code that works on plain memory.
    pub fn walk(&self, py: Python<'_>, writing: bool) -> PyResult<Walk<Held>> {
        if writing {
            self.check_writable()?;
        }
        if self.writable
            && let Source::Command { claim, .. } = &self.source
        {
            claim.zero_unless_filled();
        }
        Ok(Walk::new(self.hold(py)?))
    }

    fn buffer(claim: &Claim, data_in: bool) -> &Buffer {
        if data_in { claim.data_in() } else { claim.data() }
    }

    /// Views as Python objects.
    fn views<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyMemoryView>>> {
        match &self.source {
            Source::Objects(views) => Ok(views.iter().map(|view| view.bind(py).clone()).collect()),
            Source::Command { claim, start, data_in } => {
                if self.writable {
                    claim.zero_unless_filled();
                }
                Self::buffer(claim, *data_in)
                    .pieces(*start..*start + self.nbytes)
                    .map(|extent| {
                        let segment = Segment { claim: claim.clone(), extent, writable: self.writable };
                        PyMemoryView::from(Bound::new(py, segment)?.as_any())
                    })
                    .collect()
            }
        }
    }

    /// Calls `copy` with each piece of memory; keeps what is behind it alive and in place meanwhile.
    fn each(&self, py: Python<'_>, mut copy: impl FnMut(*mut u8, usize)) -> PyResult<()> {
        match &self.source {
            Source::Command { claim, start, data_in } => {
                if !claim.lend() {
                    return Err(answered());
                }
                for extent in Self::buffer(claim, *data_in).pieces(*start..*start + self.nbytes) {
                    if let Ok(pointer) = claim.data().mapping().pointer(extent.offset, extent.length) {
                        copy(pointer, extent.length);
                    }
                }
                claim.give_back();
            }
            Source::Objects(views) => {
                for view in views.iter() {
                    let buffer = PyUntypedBuffer::get(view.bind(py))?;
                    copy(buffer.buf_ptr().cast(), buffer.len_bytes());
                }
            }
        }
        Ok(())
    }

    /// The memory, lent for as long as a transfer needs it.
    fn hold(&self, py: Python<'_>) -> PyResult<Held> {
        match &self.source {
            Source::Command { claim, start, data_in } => {
                match Lent::new(claim.clone(), *data_in, *start, self.nbytes) {
                    Some(lent) => Ok(Held::Command(lent)),
                    None => Err(answered()),
                }
            }
            Source::Objects(views) => {
                let export = |view: &Py<PyMemoryView>| PyUntypedBuffer::get(view.bind(py));
                Ok(Held::Objects(views.iter().map(export).collect::<PyResult<_>>()?))
            }
        }
    }

    /// The memory, for work that says when it has written all of it.
    pub fn hold_for_filling(&self, py: Python<'_>) -> PyResult<Held> {
        self.check_writable()?;
        // All of Data-In counts as written when it is.
        if self.fills().is_none()
            && let Source::Command { claim, .. } = &self.source
        {
            claim.zero_unless_filled();
        }
        self.hold(py)
    }

    pub fn check_length(&self, length: usize, what: &str) -> PyResult<()> {
        if length == self.nbytes {
            return Ok(());
        }
        let nbytes = self.nbytes;
        Err(PyValueError::new_err(format!(
            "{what} has {length} bytes, the IoVec {nbytes}: transfers are whole"
        )))
    }

    fn check_writable(&self) -> PyResult<()> {
        if self.writable {
            Ok(())
        } else {
            Err(PyTypeError::new_err("this IoVec is read-only: it holds what is written to the disk"))
        }
    }

    /// Whether this is all of a command's Data-In.
    fn fills(&self) -> Option<&Claim> {
        match &self.source {
            Source::Command { claim, start: 0, data_in: true } if self.nbytes == claim.data_in().len() => {
                Some(claim)
            }
            _ => None,
        }
    }

    fn before_write(&self) -> PyResult<()> {
        self.check_writable()?;
        match (self.fills(), &self.source) {
            (Some(claim), _) => claim.set_filled(),
            (None, Source::Command { claim, .. }) => claim.zero_unless_filled(),
            _ => {}
        }
        Ok(())
    }
}

fn answered() -> PyErr {
    PyBufferError::new_err("the command was answered: its data is not there any more")
}

/// Appends the bytes of an object with a contiguous buffer.
pub fn append_bytes(object: &Bound<'_, PyAny>, into: &mut Vec<u8>) -> PyResult<()> {
    let buffer = contiguous(object)?;
    let (start, length) = (into.len(), buffer.len_bytes());
    into.resize(start + length, 0);
    // SAFETY: the source is valid for `length` bytes as long as `buffer` exports it, and the target has just been made
    // so long; it is new memory, so they do not overlap.
    unsafe { ptr::copy_nonoverlapping(buffer.buf_ptr().cast::<u8>(), into[start..].as_mut_ptr(), length) };
    Ok(())
}

/// A memoryview of bytes over any contiguous buffer. A strided one would be taken for what lies behind its first byte.
fn flat<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyMemoryView>> {
    let view = PyMemoryView::from(object)?;
    contiguous(view.as_any())?;
    if view.getattr("format")?.extract::<&str>()? == "B" && view.getattr("ndim")?.extract::<usize>()? == 1 {
        return Ok(view);
    }
    Ok(view.call_method1("cast", ("B",))?.cast_into()?)
}

fn contiguous(object: &Bound<'_, PyAny>) -> PyResult<PyUntypedBuffer> {
    let buffer = PyUntypedBuffer::get(object)?;
    if buffer.is_c_contiguous() {
        Ok(buffer)
    } else {
        Err(PyBufferError::new_err("the buffer is not contiguous"))
    }
}

#[pymethods]
impl IoVec {
    /// An IoVec over buffers of your own, to test or to stack handlers with.
    #[new]
    #[pyo3(signature = (buffers, /))]
    fn new(buffers: Vec<Bound<'_, PyAny>>) -> PyResult<Self> {
        Self::of_objects(&buffers.iter().map(flat).collect::<PyResult<Vec<_>>>()?)
    }

    fn __len__(&self) -> usize {
        match &self.source {
            Source::Objects(views) => views.len(),
            Source::Command { claim, start, data_in } => {
                Self::buffer(claim, *data_in).pieces(*start..*start + self.nbytes).count()
            }
        }
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: isize) -> PyResult<Bound<'py, PyMemoryView>> {
        let mut views = self.views(py)?;
        let from_the_end = index.checked_add_unsigned(views.len());
        match usize::try_from(index).or_else(|_| from_the_end.unwrap_or(-1).try_into()) {
            Ok(index) if index < views.len() => Ok(views.swap_remove(index)),
            _ => Err(PyIndexError::new_err("IoVec index out of range")),
        }
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Ok(self.views(py)?.into_pyobject(py)?.try_iter()?.into_any())
    }

    /// Whether the memory can be written: it can for a read.
    #[getter]
    fn readonly(&self) -> bool {
        !self.writable
    }

    /// Copies `source`, which must have exactly `nbytes` bytes, into the memory.
    #[pyo3(signature = (source, /))]
    fn copy_from(&self, py: Python<'_>, source: &Bound<'_, PyAny>) -> PyResult<()> {
        let buffer = contiguous(source)?;
        self.check_length(buffer.len_bytes(), "the source")?;
        self.before_write()?;
        let mut from = buffer.buf_ptr().cast::<u8>().cast_const();
        self.each(py, |into, length| {
            // SAFETY:
            // - both sides are valid for `length` bytes: the pieces sum up to `nbytes`, which is the source's length;
            // - the source stays where it is: `buffer` exports it; the target: `each`;
            // - they may overlap (a view of this very memory), so it is a move, not a copy.
            unsafe {
                ptr::copy(from, into, length);
                from = from.add(length);
            }
        })
    }

    /// Copies the memory into `target`, which must be writable and have exactly `nbytes` bytes.
    #[pyo3(signature = (target, /))]
    fn copy_into(&self, py: Python<'_>, target: &Bound<'_, PyAny>) -> PyResult<()> {
        let buffer = contiguous(target)?;
        if buffer.readonly() {
            return Err(PyTypeError::new_err("the target is read-only"));
        }
        self.check_length(buffer.len_bytes(), "the target")?;
        let mut into = buffer.buf_ptr().cast::<u8>();
        self.each(py, |from, length| {
            // SAFETY: as in `copy_from`, the other way.
            unsafe {
                ptr::copy(from.cast_const(), into, length);
                into = into.add(length);
            }
        })
    }

    /// Fills the memory from a file: to be awaited.
    ///
    /// What the page cache has is there at once, without suspending; the rest comes without a thread, where io_uring is
    /// allowed. All of it, or an OSError: EIO if the file ends before. The memory stays the transfer's until the kernel
    /// is done with it: when it is cancelled, the call returns no earlier. Until then the descriptor has to stay open.
    #[pyo3(signature = (fd, offset, /))]
    fn read_from(&self, py: Python<'_>, fd: RawFd, offset: u64) -> PyResult<Transfer> {
        let memory = self.hold_for_filling(py)?;
        Ok(Transfer::new("IoVec.read_from", fileio::Transfer::new(fd, Operation::Read, offset, memory)))
    }

    /// Writes the memory to a file: to be awaited, and as `read_from`. With `fua` it is durable then (RWF_DSYNC).
    #[pyo3(signature = (fd, offset, /, *, fua = false))]
    fn write_to(&self, py: Python<'_>, fd: RawFd, offset: u64, fua: bool) -> PyResult<Transfer> {
        if self.writable
            && let Source::Command { claim, .. } = &self.source
        {
            claim.zero_unless_filled();
        }
        let operation = Operation::Write { durable: fua };
        let transfer = fileio::Transfer::new(fd, operation, offset, self.hold(py)?);
        Ok(Transfer::new("IoVec.write_to", transfer))
    }

    /// Sets all of the memory to zero.
    fn zero(&self, py: Python<'_>) -> PyResult<()> {
        self.before_write()?;
        self.each(py, |into, length| {
            // SAFETY: `each` gives memory that is valid for `length` bytes and stays so.
            unsafe { ptr::write_bytes(into, 0, length) };
        })
    }

    /// A copy of all bytes.
    fn tobytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        if self.writable
            && let Source::Command { claim, .. } = &self.source
        {
            claim.zero_unless_filled();
        }
        PyBytes::new_with(py, self.nbytes, |target| {
            let mut into = target.as_mut_ptr();
            self.each(py, |from, length| {
                // SAFETY: the pieces sum up to `nbytes`, the length of `target`, which nothing else sees yet.
                unsafe {
                    ptr::copy_nonoverlapping(from.cast_const(), into, length);
                    into = into.add(length);
                }
            })
        })
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.tobytes(py)
    }

    /// The bytes from `start` up to `stop`, as an IoVec over the same memory.
    #[pyo3(signature = (start, stop, /))]
    fn slice(&self, py: Python<'_>, start: usize, stop: usize) -> PyResult<Self> {
        if start > stop || stop > self.nbytes {
            let nbytes = self.nbytes;
            return Err(PyValueError::new_err(format!(
                "{start}..{stop} is not inside an IoVec of {nbytes} bytes"
            )));
        }
        let nbytes = stop - start;
        let source = match &self.source {
            Source::Command { claim, start: base, data_in } => {
                Source::Command { claim: claim.clone(), start: base + start, data_in: *data_in }
            }
            Source::Objects(views) => {
                let mut at = 0usize;
                let mut parts = Vec::new();
                for view in views.iter() {
                    let view = view.bind(py);
                    let length = view.len()?;
                    let (from, to) = (start.clamp(at, at + length) - at, stop.clamp(at, at + length) - at);
                    if to > from {
                        let part = pyo3::types::PySlice::new(py, from.cast_signed(), to.cast_signed(), 1);
                        parts.push(view.get_item(part)?.cast_into::<PyMemoryView>()?.unbind());
                    }
                    at += length;
                }
                Source::Objects(parts.into())
            }
        };
        Ok(Self { source, nbytes, writable: self.writable })
    }

    fn __repr__(&self) -> String {
        let mode = if self.writable { "writable" } else { "read-only" };
        format!("<tcmu_rs.IoVec of {} bytes in {} pieces, {mode}>", self.nbytes, self.__len__())
    }
}
