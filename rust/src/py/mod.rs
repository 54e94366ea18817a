//! The Python module `tcmu_rs._native`. Knows PyO3, and nothing of the kernel's layout.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

use crate::device::DeviceError;

mod command;
mod fileio;
mod frames;
mod iovec;
mod methods;
mod netlink;
mod ring;
mod simulator;
mod unit;
mod xts;

mod exceptions {
    #![allow(missing_docs)]
    pyo3::import_exception!(tcmu_rs._errors, DamagedFrameError);
    pyo3::import_exception!(tcmu_rs._errors, DeviceRemovedError);
    pyo3::import_exception!(tcmu_rs._errors, RingCorruptError);
    pyo3::import_exception!(tcmu_rs._errors, TransferCancelled);
}

impl From<DeviceError> for PyErr {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Removed => exceptions::DeviceRemovedError::new_err(error.to_string()),
            DeviceError::Io(error) => PyOSError::new_err((error.raw_os_error(), error.to_string())),
            DeviceError::Ring(error) => exceptions::RingCorruptError::new_err(error.to_string()),
        }
    }
}

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::command::Command;
    #[pymodule_export]
    use super::fileio::{FileQueue, Transfer, fallocate, fdatasync};
    #[pymodule_export]
    use super::frames::ZstdFrames;
    #[pymodule_export]
    use super::iovec::IoVec;
    #[pymodule_export]
    use super::methods::{Methods, Waiting};
    #[pymodule_export]
    use super::netlink::{DeviceEvent, NetlinkSocket, ReceivedEvents};
    #[pymodule_export]
    use super::ring::{Ring, TaskManagement};
    #[pymodule_export]
    use super::simulator::Simulator;
    #[pymodule_export]
    use super::unit::{CopyDomain, LogicalUnit};
    #[pymodule_export]
    use super::xts::AesXts;

    /// The version of the package.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Whether this was compiled without optimisation.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const debug_build: bool = cfg!(debug_assertions);
}
