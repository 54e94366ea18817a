//! The SCSI emulation through its public interface, against a disk in memory.

mod capacity;
mod defects;
mod disk;
mod format;
mod inquiry;
mod lba_status;
mod mode;
mod model;
mod modify;
mod opcodes;
mod power;
mod properties;
mod provisioning;
mod sanitize;
mod sense;
mod transfer;
mod unit;
mod verify;
