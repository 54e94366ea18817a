//! [`crate::frames`] for Python, on the memory of commands.

use std::mem;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::fileio::Transfer;
use super::iovec::{IoVec, append_bytes};
use crate::fileio::unpacking::{Mismatch, Packed, Place, Unpacking, check};
use crate::frames::{Frame, Frames};

/// Bytes of units from which on others may run meanwhile: giving the interpreter away and getting it back takes longer
/// than a few units, if others want it.
const LARGE: usize = 32 << 10;
/// Bytes of a buffer that is kept for the next call.
const KEPT: usize = 1 << 20;

/// Units of one size, each compressed into a frame of zstd that has its content size and a checksum.
///
/// Any thread may use it. Calls for 32 KiB of units and more let other threads run Python meanwhile.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct ZstdFrames {
    packed: Arc<Packed>,
    spare: Mutex<Vec<u8>>,
}

impl ZstdFrames {
    /// The kept buffer, or, if another thread has it, a new one.
    fn buffer(&self) -> Vec<u8> {
        let mut buffer = mem::take(&mut *self.spare.lock().unwrap_or_else(PoisonError::into_inner));
        buffer.clear();
        buffer
    }

    fn keep(&self, buffer: Vec<u8>) {
        if buffer.capacity() <= KEPT {
            *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = buffer;
        }
    }
}

fn mismatch(error: Mismatch) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymethods]
impl ZstdFrames {
    /// Takes the bytes of a unit, 512 to 16 MiB, and the level of compression, 1 to 22.
    #[new]
    #[pyo3(signature = (unit, /, level = 1))]
    fn new(unit: usize, level: i32) -> PyResult<Self> {
        if !(512..=16 << 20).contains(&unit) {
            return Err(PyValueError::new_err(format!("units of {unit} bytes: they have 512 to 16 MiB")));
        }
        if !(1..=22).contains(&level) {
            return Err(PyValueError::new_err(format!("level is {level}; for zstd it is 1 to 22")));
        }
        Ok(Self { packed: Arc::new(Packed::new(Frames::new(unit, level))), spare: Mutex::default() })
    }

    /// Compresses units that follow each other; the last one may be shorter.
    ///
    /// Returns their frames as one object of bytes, and of each its length and CRC-32. A unit of zeroes has no frame: its
    /// length is 0. What cannot be compressed is stored as it is, in a frame that is a little longer than the unit.
    #[pyo3(signature = (units, /))]
    fn compress<'py>(
        &self,
        py: Python<'py>,
        units: &Bound<'py, PyAny>,
    ) -> PyResult<(Bound<'py, PyBytes>, Vec<Frame>)> {
        let mut source = self.buffer();
        append_bytes(units, &mut source)?;
        let mut stored = Vec::with_capacity(source.len() / 2 + self.packed.frames().unit());
        let mut work = || self.packed.frames().compress(&source, &mut stored);
        let made = if source.len() >= LARGE { py.detach(work) } else { work() };
        let frames = made.map_err(PyRuntimeError::new_err)?;
        self.keep(source);
        Ok((PyBytes::new(py, &stored), frames))
    }

    /// Decompresses frames that lie in `stored`, into `iov`, one behind the other.
    ///
    /// `places` has of each frame, in the order of their units, the byte where it begins, and how many bytes there are
    /// from there on: what follows the frame is ignored. The first `within` bytes of the first unit are left out, and
    /// those of the last one that `iov` has no room for. All of each unit is decompressed, and verified if the frame has
    /// a checksum. Returns how many frames were right: if it is less than there are places, the next one is damaged, and
    /// what is in `iov` from there on is not known.
    ///
    /// Raises ValueError if places are outside of `stored`, or `iov` is not inside their units.
    #[pyo3(signature = (stored, places, iov, within = 0, /))]
    fn decompress(
        &self,
        py: Python<'_>,
        stored: &Bound<'_, PyAny>,
        places: Vec<(usize, usize)>,
        iov: &IoVec,
        within: usize,
    ) -> PyResult<usize> {
        let unit = self.packed.frames().unit();
        let total = places.len() * unit;
        check(iov.nbytes(), within, places.len(), unit).map_err(mismatch)?;
        let mut source = self.buffer();
        append_bytes(stored, &mut source)?;
        let outside = |&(start, length): &(usize, usize)| {
            start.checked_add(length).is_none_or(|end| end > source.len())
        };
        if places.iter().any(outside) {
            let length = source.len();
            return Err(PyValueError::new_err(format!(
                "a place is not inside the {length} bytes that are stored"
            )));
        }
        let mut target = iov.walk(py, true)?;
        let mut work = || {
            let (mut skip, mut room) = (within, iov.nbytes());
            let frames = places.iter().map(|&(start, length)| &source[start..start + length]);
            self.packed.frames().decompress(frames, |unit| {
                let part = &unit[skip..unit.len().min(skip + room)];
                target.write(part);
                room -= part.len();
                skip = 0;
            })
        };
        let done = if total >= LARGE { py.detach(work) } else { work() };
        self.keep(source);
        Ok(done.err().unwrap_or(places.len()))
    }

    /// Reads frames out of a file and decompresses them into `iov`: to be awaited, as `IoVec.read_from`.
    ///
    /// `places` and `within` are those of `decompress`, but of the file. Less than 128 KiB of units that are in the page
    /// cache are done at once; else a thread does it, which needs no interpreter. All of it, or an OSError: EIO also if a
    /// frame is damaged; what is in `iov` is not known then. The descriptor has to stay open meanwhile, and the frames have
    /// to stay where they are: a place that gets another frame meanwhile gives the data of that.
    ///
    /// Raises ValueError if `iov` is not inside the units.
    #[pyo3(signature = (fd, places, iov, within = 0, /))]
    fn read_from(
        &self,
        py: Python<'_>,
        fd: RawFd,
        places: Vec<Place>,
        iov: &IoVec,
        within: usize,
    ) -> PyResult<Transfer> {
        let memory = iov.hold_for_filling(py)?;
        let unpacking = Unpacking::new(self.packed.clone(), fd, places, within, memory).map_err(mismatch)?;
        Ok(Transfer::new("ZstdFrames.read_from", unpacking))
    }
}
