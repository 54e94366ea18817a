//! [`crate::xts`] for Python, on the memory of commands.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::fileio::{Held, RELEASE};
use super::iovec::IoVec;
use crate::fileio::memory::Walk;
use crate::xts::{Direction, Xts};

/// Bytes that are taken out of shared memory, worked on, and put where they go: they stay in the first level cache.
const STEP: usize = 8192;

/// AES-XTS with the tweaks of dm-crypt's `plain64`.
///
/// Sectors are numbered in units of 512 bytes, whatever their size. Memory may be in pieces of any lengths. The key is
/// overwritten in memory when the object goes.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct AesXts {
    xts: Xts,
}

impl AesXts {
    fn check(&self, number: u64, nbytes: usize) -> PyResult<()> {
        let size = self.xts.sector_size();
        if !nbytes.is_multiple_of(size) {
            return Err(PyValueError::new_err(format!("{nbytes} bytes are not whole sectors of {size}")));
        }
        match number.checked_add((nbytes / 512) as u64) {
            Some(_) => Ok(()),
            None => Err(PyValueError::new_err("the numbers of the sectors do not fit into 64 bits")),
        }
    }

    fn transform(
        &self,
        py: Python<'_>,
        direction: Direction,
        number: u64,
        source: &IoVec,
        target: &IoVec,
    ) -> PyResult<()> {
        let (mut from, mut into) = (source.walk(py, false)?, target.walk(py, true)?);
        let length = source.nbytes();
        if length < RELEASE {
            self.walk(direction, number, &mut from, &mut into, length);
        } else {
            py.detach(|| self.walk(direction, number, &mut from, &mut into, length));
        }
        Ok(())
    }

    fn walk(
        &self,
        direction: Direction,
        mut number: u64,
        from: &mut Walk<Held>,
        into: &mut Walk<Held>,
        mut left: usize,
    ) {
        let mut buffer = [0; STEP];
        while left > 0 {
            let part = &mut buffer[..left.min(STEP)];
            from.read(part);
            self.xts.apply(direction, number, part);
            into.write(part);
            left -= part.len();
            number = number.wrapping_add((part.len() / 512) as u64);
        }
    }
}

#[pymethods]
impl AesXts {
    /// Takes a key of 32 (AES-128) or 64 bytes (AES-256), and the size of sectors: 512, 1024, 2048 or 4096.
    #[new]
    #[pyo3(signature = (key, /, sector_size))]
    fn new(py: Python<'_>, key: &Bound<'_, PyAny>, sector_size: usize) -> PyResult<Self> {
        let key = IoVec::of_object(key)?;
        let mut copy = zeroize::Zeroizing::new([0; 64]);
        let length = key.nbytes().min(copy.len());
        key.walk(py, false)?.read(&mut copy[..length]);
        let xts = match key.nbytes() {
            65.. => return Err(PyValueError::new_err("a key of more than 64 bytes is none for AES-XTS")),
            _ => Xts::new(&copy[..length], sector_size),
        };
        xts.map(|xts| Self { xts }).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// Whether the processor has AES; without it this is many times slower.
    #[staticmethod]
    fn hardware_accelerated() -> bool {
        aes::hardware_accelerated()
    }

    /// Encrypts whole sectors of `source` into `target`, which has as many bytes and may be the same memory.
    #[pyo3(signature = (number, source, target, /))]
    fn encrypt(&self, py: Python<'_>, number: u64, source: &IoVec, target: &IoVec) -> PyResult<()> {
        self.check(number, source.nbytes())?;
        target.check_length(source.nbytes(), "the source")?;
        self.transform(py, Direction::Encrypt, number, source, target)
    }

    /// Decrypts whole sectors where they are.
    #[pyo3(signature = (number, iov, /))]
    fn decrypt(&self, py: Python<'_>, number: u64, iov: &IoVec) -> PyResult<()> {
        self.check(number, iov.nbytes())?;
        self.transform(py, Direction::Decrypt, number, iov, iov)
    }
}
