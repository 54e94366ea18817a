//! What the emulation has to know of a disk.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::scsi::{Capabilities, CopyDomain as Domain, Geometry, Identity, LogicalUnit as Unit, LunError};

impl From<LunError> for PyErr {
    fn from(error: LunError) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A disk as its initiators see it; made by `tcmu_rs._service` from a block handler's attributes.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct LogicalUnit {
    pub(super) unit: Arc<Unit>,
}

#[pymethods]
impl LogicalUnit {
    #[new]
    #[pyo3(signature = (
        *, size, block_size, vendor, product, revision, serial, naa, physical_block_size = None, rotational = false,
        discard_granularity = 0, writable = false, flush = false, native_fua = false, discard = false,
        discard_zeroes = false, write_zeroes = false, extents = false, max_atomic_write = 0,
        removable = false,
    ))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)]
    fn new(
        size: u64,
        block_size: u32,
        vendor: &str,
        product: &str,
        revision: &str,
        serial: &str,
        naa: [u8; 16],
        physical_block_size: Option<u32>,
        rotational: bool,
        discard_granularity: u64,
        writable: bool,
        flush: bool,
        native_fua: bool,
        discard: bool,
        discard_zeroes: bool,
        write_zeroes: bool,
        extents: bool,
        max_atomic_write: u64,
        removable: bool,
    ) -> PyResult<Self> {
        let mut geometry = Geometry::new(block_size, size);
        geometry.rotational = rotational;
        geometry.removable = removable;
        geometry.physical_block_size = physical_block_size.unwrap_or(block_size);
        geometry.discard_granularity = discard_granularity.max(block_size.into());
        let atomic_blocks =
            u32::try_from(max_atomic_write / u64::from(block_size.max(1))).unwrap_or(u32::MAX);
        geometry.max_atomic_write_blocks = atomic_blocks.min(geometry.max_transfer_blocks);
        let capabilities = Capabilities {
            write: writable,
            flush,
            native_fua,
            discard,
            discard_zeroes,
            write_zeroes,
            extents,
        };
        let identity = Identity::new(vendor, product, revision, serial, naa)?;
        Ok(Self { unit: Arc::new(Unit::new(identity, geometry, capabilities)?) })
    }

    /// Bytes that initiators see.
    #[getter]
    fn size(&self) -> u64 {
        self.unit.size()
    }

    /// Changes the size, and has the next command tell it. Raises ValueError if it is not a size of a medium.
    #[pyo3(signature = (size, /))]
    fn set_size(&self, size: u64) -> PyResult<()> {
        Ok(self.unit.set_size(size)?)
    }

    /// Has the next command tell that the size is not the one that initiators know.
    fn announce_capacity(&self) {
        self.unit.announce_capacity();
    }

    /// Has the next command tell that what initiators had set is forgotten.
    fn announce_reset(&self) {
        self.unit.announce_reset();
    }

    /// What initiators have set, for the unit that goes on in another process.
    fn state(&self) -> Vec<(&'static str, u64)> {
        self.unit.state()
    }

    /// Takes over what `state` returned in another process. Raises ValueError, and changes nothing, if that one knew more
    /// than this one.
    #[pyo3(signature = (state, /))]
    fn restore(&self, state: Vec<(String, u64)>) -> PyResult<()> {
        if self.unit.restore(&state) {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("the state of the unit has something unknown here: {state:?}")))
    }
}

/// Units between which initiators may copy; see `tcmu_rs.CopyDomain`.
#[pyclass(frozen, module = "tcmu_rs._native")]
pub struct CopyDomain {
    domain: Arc<Domain>,
}

#[pymethods]
impl CopyDomain {
    #[new]
    fn new() -> Self {
        Self { domain: Arc::default() }
    }

    /// Takes a unit in; ValueError if there is one with its designator.
    fn join(&self, unit: &LogicalUnit) -> PyResult<()> {
        Ok(self.domain.join(&unit.unit)?)
    }

    /// Lets a unit go.
    fn leave(&self, unit: &LogicalUnit) {
        self.domain.leave(&unit.unit);
    }
}
