//! The layout of the memory that the kernel shares: `include/uapi/linux/target_core_user.h`, version 2.
//!
//! Numbers only. Everything inside the mapping is addressed by its byte offset from the start of the mapping; ring
//! positions are relative to [`Mailbox::cmdr_off`]. All integers are in host order.

use std::mem::{offset_of, size_of};

/// The only mailbox version there is (`TCMU_MAILBOX_VERSION`).
pub const MAILBOX_VERSION: u16 = 2;
/// Entries are multiples of this many bytes (`TCMU_OP_ALIGN_SIZE`).
pub const OP_ALIGN: usize = 8;
/// Bytes of sense data in a response (`TCMU_SENSE_BUFFERSIZE`).
pub const SENSE_BUFFER_SIZE: usize = 96;
/// The longest CDB that the target core lets through (`SCSI_MAX_VARLEN_CDB_SIZE`).
pub const MAX_CDB_SIZE: usize = 260;

/// `TCMU_MAILBOX_FLAG_CAP_OOOC`: completions name their command by `cmd_id`, in any order.
pub const MAILBOX_FLAG_CAP_OOOC: u16 = 1 << 0;
/// `TCMU_MAILBOX_FLAG_CAP_READ_LEN`: `read_len` is honoured.
pub const MAILBOX_FLAG_CAP_READ_LEN: u16 = 1 << 1;
/// `TCMU_MAILBOX_FLAG_CAP_TMR`: task management entries may appear.
pub const MAILBOX_FLAG_CAP_TMR: u16 = 1 << 2;
/// `TCMU_MAILBOX_FLAG_CAP_KEEP_BUF`: a completion may keep its data blocks.
pub const MAILBOX_FLAG_CAP_KEEP_BUF: u16 = 1 << 3;

/// `TCMU_UFLAG_UNKNOWN_OP`: this entry's opcode was not understood.
pub const UFLAG_UNKNOWN_OP: u8 = 1 << 0;
/// `TCMU_UFLAG_READ_LEN`: `read_len` counts the Data-In bytes.
pub const UFLAG_READ_LEN: u8 = 1 << 1;
/// `TCMU_UFLAG_KEEP_BUF`: answer the initiator, keep the data blocks.
pub const UFLAG_KEEP_BUF: u8 = 1 << 2;

/// Bits of [`EntryHeader::len_op`] that hold the opcode (`TCMU_OP_MASK`); the others are the length, not shifted.
pub const OP_MASK: u32 = 0x7;
/// `TCMU_OP_PAD`: fills the end of the ring.
pub const OP_PAD: u32 = 0;
/// `TCMU_OP_CMD`: a SCSI command.
pub const OP_CMD: u32 = 1;
/// `TCMU_OP_TMR`: a task management notification.
pub const OP_TMR: u32 = 2;

/// Types of task management (`enum tcmu_tmr_type`).
pub mod tmr {
    #![allow(missing_docs)]
    pub const UNKNOWN: u8 = 0;
    pub const ABORT_TASK: u8 = 1;
    pub const ABORT_TASK_SET: u8 = 2;
    pub const CLEAR_ACA: u8 = 3;
    pub const CLEAR_TASK_SET: u8 = 4;
    pub const LUN_RESET: u8 = 5;
    pub const TARGET_WARM_RESET: u8 = 6;
    pub const TARGET_COLD_RESET: u8 = 7;
    pub const LUN_RESET_PRO: u8 = 128;
}

/// `struct tcmu_mailbox`.
#[repr(C, align(64))]
pub struct Mailbox {
    /// [`MAILBOX_VERSION`].
    pub version: u16,
    /// `MAILBOX_FLAG_CAP_*`.
    pub flags: u16,
    /// Where the command ring starts.
    pub cmdr_off: u32,
    /// Bytes of the command ring.
    pub cmdr_size: u32,
    /// Ring position after the newest entry; the kernel stores it with release.
    pub cmd_head: u32,
    gap: [u8; 48],
    /// Ring position of the oldest entry not handed back; ours to store, with release.
    pub cmd_tail: u32,
    gap_tail: [u8; 60],
}

/// `struct tcmu_cmd_entry_hdr`, at the start of every entry.
#[repr(C)]
pub struct EntryHeader {
    /// Opcode and length.
    pub len_op: u32,
    /// The command's id; 0 for PAD and TMR.
    pub cmd_id: u16,
    /// Always 0 so far.
    pub kflags: u8,
    /// `UFLAG_*`, ours to set.
    pub uflags: u8,
}

/// `struct iovec` of a 64-bit kernel; `iov_base` is an offset from the start of the mapping.
#[repr(C)]
pub struct IoVec {
    /// Offset from the start of the mapping.
    pub iov_base: u64,
    /// Bytes.
    pub iov_len: u64,
}

/// `struct tcmu_cmd_entry` as the kernel fills it.
#[repr(C)]
pub struct CmdRequest {
    /// The header.
    pub hdr: EntryHeader,
    /// Elements of `iov` for the main buffer.
    pub iov_cnt: u32,
    /// Further elements: Data-In of a bidirectional command.
    pub iov_bidi_cnt: u32,
    /// Never set by a kernel so far.
    pub iov_dif_cnt: u32,
    hole: u32,
    /// Offset of the CDB from the start of the mapping.
    pub cdb_off: u64,
    pad1: u64,
    pad2: u64,
    /// `iov_cnt + iov_bidi_cnt` elements.
    pub iov: [IoVec; 0],
}

/// `struct tcmu_cmd_entry` as we answer it; overlaps [`CmdRequest`].
#[repr(C)]
pub struct CmdResponse {
    /// The header.
    pub hdr: EntryHeader,
    /// SAM status.
    pub scsi_status: u8,
    pad1: u8,
    pad2: u16,
    /// Data-In bytes, with [`UFLAG_READ_LEN`].
    pub read_len: u32,
    /// Sense data of a CHECK CONDITION.
    pub sense_buffer: [u8; SENSE_BUFFER_SIZE],
}

/// `struct tcmu_tmr_entry`.
#[repr(C)]
pub struct TmrEntry {
    /// The header.
    pub hdr: EntryHeader,
    /// One of [`tmr`].
    pub tmr_type: u8,
    pad1: u8,
    pad2: u16,
    /// Elements of `cmd_ids`.
    pub cmd_cnt: u32,
    pad3: u64,
    pad4: u64,
    /// The commands meant, in no order.
    pub cmd_ids: [u16; 0],
}

const _: () = {
    assert!(size_of::<Mailbox>() == 128);
    assert!(offset_of!(Mailbox, cmdr_off) == 4);
    assert!(offset_of!(Mailbox, cmdr_size) == 8);
    assert!(offset_of!(Mailbox, cmd_head) == 12);
    assert!(offset_of!(Mailbox, cmd_tail) == 64);
    assert!(size_of::<EntryHeader>() == 8);
    assert!(offset_of!(EntryHeader, cmd_id) == 4);
    assert!(offset_of!(EntryHeader, uflags) == 7);
    assert!(offset_of!(CmdRequest, iov_cnt) == 8);
    assert!(offset_of!(CmdRequest, cdb_off) == 24);
    assert!(offset_of!(CmdRequest, iov) == 48);
    assert!(size_of::<CmdResponse>() == 112);
    assert!(offset_of!(CmdResponse, read_len) == 12);
    assert!(offset_of!(CmdResponse, sense_buffer) == 16);
    assert!(offset_of!(TmrEntry, cmd_cnt) == 12);
    assert!(offset_of!(TmrEntry, cmd_ids) == 32);
    assert!(size_of::<usize>() == 8, "only 64-bit kernels are supported");
};

/// Bytes of a CDB by its operation code: the kernel's `scsi_command_size()`, which knows a length for every group.
///
/// `additional` is byte 7 of the CDB, needed for the variable-length operation code 7Fh only.
#[must_use]
pub fn cdb_size(opcode: u8, additional: u8) -> usize {
    match opcode {
        0x7f => usize::from(additional) + 8,
        0x00..=0x1f => 6,
        0x60..=0x7e | 0xa0..=0xbf => 12,
        0x80..=0x9f => 16,
        0x20..=0x5f | 0xc0..=0xff => 10,
    }
}
