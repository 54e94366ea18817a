//! The Python module `tcmu_rs._native`.

mod netlink;

/// The part of tcmu-rs that is written in Rust.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use super::netlink::{DeviceEvent, NetlinkSocket, ReceivedEvents};
}
