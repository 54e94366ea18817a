//! The SCSI emulation through its public interface, against a disk in memory.

mod capacity;
mod copy;
mod defects;
mod disk;
mod format;
mod inquiry;
mod lba_status;
mod log;
mod mode;
mod mode_select;
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
