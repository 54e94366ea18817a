//! The core of tcmu-rs: SCSI devices served to the Linux kernel from user space (TCMU).
//!
//! Layers, each ignorant of the next: [`abi`] (numbers), [`mapping`] (pointers), [`ring`] (entries), [`scsi`]
//! (commands), [`netlink`] (devices come and go), [`statistics`] (what was, and how long it took), [`xts`] (sectors that
//! are encrypted), [`frames`] (units that are compressed), [`fileio`] (a command's data to and from files); `py` joins
//! them for Python.

pub mod abi;
pub mod device;
mod exclusion;
pub mod fileio;
pub mod frames;
pub mod mapping;
pub mod netlink;
pub mod ring;
pub mod scsi;
pub mod statistics;
pub mod xts;

#[cfg(feature = "python")]
mod py;
