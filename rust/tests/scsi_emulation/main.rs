//! The SCSI emulation through its public interface, against a disk in memory.

mod capacity;
mod disk;
mod inquiry;
mod mode;
mod model;
mod opcodes;
mod power;
mod properties;
mod provisioning;
mod sense;
mod transfer;
mod unit;
