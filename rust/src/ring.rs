//! The command ring: entries in, completions out, in the order and with the care that the kernel needs.
//!
//! # Theory
//!
//! The kernel appends entries at `cmd_head`; we hand slots back by moving `cmd_tail`. Three positions matter:
//!
//! ```text
//!        tail            next              head
//!   ──────┼───────────────┼─────────────────┼──────
//!         │ fetched, some │ not looked at   │ the kernel's
//!         │ still running │ yet             │
//! ```
//!
//! Between `tail` and `next` we remember each slot's length ourselves, and never read it from the ring again: once a
//! slot is passed the kernel owns it, and while a command runs its slot may be used for the answer of another one.
//!
//! With `TCMU_MAILBOX_FLAG_CAP_OOOC` the kernel takes a completion from whatever slot is passed, and finds the command
//! by the id in it. So the *n*-th completion goes into the *n*-th command slot, whichever command it answers: no slow
//! command holds up the others. Without the flag the answers wait in our memory until they are at the front.
//!
//! # Invariants
//!
//! - The front of `slots` is a command slot: PAD and TMR slots are passed as soon as they get there.
//! - Commands outstanding = command slots in `slots` (with out-of-order completion), so there is a slot for each.
//! - An id is answered once: `outstanding` has it from the fetch to the answer, and [`Ring::complete`] takes it out.
//! - `cmd_tail` is only ever a sum of lengths that were checked when the entries were fetched.
//!
//! # Errors
//!
//! Anything wrong in the ring is the end of this ring ([`RingError::Corrupt`]): it is not looked at and not written
//! to again, for a wrong tail makes the kernel walk off into the weeds with a lock held.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::abi::{self, CmdRequest, CmdResponse, EntryHeader, Mailbox, TmrEntry};
use crate::mapping::{Mapping, OutOfBounds};
use crate::scsi::DataBuffer;

pub mod lease;
pub mod parking;
pub mod sim;

/// What ends a ring.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The mailbox is of another version than the one there is.
    #[error("mailbox version {0} is not supported (only {version} is)", version = abi::MAILBOX_VERSION)]
    Version(u16),
    /// The mailbox describes a ring that cannot be.
    #[error("bad mailbox: {0}")]
    Mailbox(String),
    /// An entry makes no sense.
    #[error("corrupt ring: {what} (entry at ring position {position})")]
    Corrupt {
        /// Where the entry starts.
        position: u32,
        /// What is wrong with it.
        what: String,
    },
    /// An answer for a command that is not outstanding: a defect of ours, stopped before the kernel sees it.
    #[error("command {0} is not outstanding")]
    NotOutstanding(u16),
    /// The ring failed or was closed before.
    #[error("the ring was given up after an earlier error")]
    Dead,
    /// An access outside the mapping.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
}

/// The id of an outstanding command: 1 to 65535, used again as soon as it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CmdId(pub u16);

/// A piece of the data area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset from the start of the mapping.
    pub offset: usize,
    /// Bytes.
    pub length: usize,
}

/// The data of one command: pieces of the data area, in order. Ours until the command is answered.
#[derive(Debug, Clone)]
pub struct Buffer {
    mapping: Arc<Mapping>,
    extents: SmallVec<[Extent; 2]>,
    length: usize,
}

impl Buffer {
    /// A buffer of these pieces; each must lie inside the mapping.
    ///
    /// # Errors
    /// [`OutOfBounds`] for the first piece that does not.
    pub fn new(mapping: Arc<Mapping>, extents: SmallVec<[Extent; 2]>) -> Result<Self, OutOfBounds> {
        let mut length = 0usize;
        for extent in &extents {
            mapping.pointer(extent.offset, extent.length)?;
            length = length.checked_add(extent.length).ok_or(OutOfBounds {
                offset: extent.offset,
                length: extent.length,
                size: mapping.size(),
            })?;
        }
        Ok(Self { mapping, extents, length })
    }

    /// The mapping that the pieces are in.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The pieces of `range` of the buffer (clipped to its length), in order.
    pub fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = Extent> + '_ {
        let mut start = 0usize;
        self.extents.iter().filter_map(move |extent| {
            let from = range.start.clamp(start, start + extent.length);
            let to = range.end.clamp(start, start + extent.length);
            let piece = Extent { offset: extent.offset + (from - start), length: to.saturating_sub(from) };
            start += extent.length;
            (piece.length > 0).then_some(piece)
        })
    }

    /// Sets `range` of the buffer to zero.
    pub fn zero(&self, range: Range<usize>) {
        for piece in self.pieces(range) {
            // Checked in `new`; a mapping does not shrink.
            let _ = self.mapping.fill(piece.offset, piece.length, 0);
        }
    }
}

impl DataBuffer for Buffer {
    fn len(&self) -> usize {
        self.length
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        let mut done = 0;
        for piece in self.pieces(offset..offset.saturating_add(into.len())) {
            let _ = self.mapping.read(piece.offset, &mut into[done..done + piece.length]);
            done += piece.length;
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        let mut done = 0;
        for piece in self.pieces(offset..offset.saturating_add(from.len())) {
            let _ = self.mapping.write(piece.offset, &from[done..done + piece.length]);
            done += piece.length;
        }
    }
}

/// The bytes of a CDB: as many as the kernel copies for its group.
pub type Cdb = SmallVec<[u8; 16]>;

/// A command as fetched: our own copy of everything, since its slot may be used for another answer.
#[derive(Debug)]
pub struct Command {
    /// Its name until it is answered.
    pub id: CmdId,
    /// The command descriptor block.
    pub cdb: Cdb,
    /// Data-Out, or Data-In if the command only reads.
    pub data: Buffer,
    /// Data-In of a bidirectional command.
    pub bidi_in: Option<Buffer>,
}

/// A notification that commands were aborted; needs no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskManagement {
    /// One of [`abi::tmr`].
    pub kind: u8,
    /// The commands meant, but for those that were answered before it was fetched.
    pub commands: Vec<CmdId>,
}

/// What was in the ring.
#[derive(Debug)]
pub enum Entry {
    /// To be answered exactly once.
    Command(Command),
    /// To be heeded.
    TaskManagement(TaskManagement),
}

/// The answer to a command.
#[derive(Debug, Clone)]
pub struct Response {
    /// SAM status byte.
    pub status: u8,
    /// Sense data; looked at by the kernel only with CHECK CONDITION.
    pub sense: SmallVec<[u8; 32]>,
    /// Data-In bytes that are valid, if not all. The kernel ignores 0: see [`Ring::complete`].
    pub read_len: Option<u32>,
    /// Keep the data blocks and the id until they are freed through configfs.
    pub keep_buf: bool,
}

#[derive(Debug)]
enum Slot {
    Command { position: u32, length: u32, id: CmdId, answer: Option<Response> },
    Skip { length: u32 },
}

/// A set of 16-bit ids.
#[derive(Debug)]
struct IdSet(Box<[u64; 1024]>);

impl IdSet {
    fn new() -> Self {
        Self(Box::new([0; 1024]))
    }

    /// Returns whether it was absent.
    fn insert(&mut self, id: CmdId) -> bool {
        let (word, bit) = (usize::from(id.0 >> 6), 1u64 << (id.0 & 63));
        let absent = self.0[word] & bit == 0;
        self.0[word] |= bit;
        absent
    }

    fn contains(&self, id: CmdId) -> bool {
        self.0[usize::from(id.0 >> 6)] & 1u64 << (id.0 & 63) != 0
    }

    /// Returns whether it was present.
    fn remove(&mut self, id: CmdId) -> bool {
        let (word, bit) = (usize::from(id.0 >> 6), 1u64 << (id.0 & 63));
        let present = self.0[word] & bit != 0;
        self.0[word] &= !bit;
        present
    }
}

/// One device's ring, seen from the consumer's side.
#[derive(Debug)]
pub struct Ring {
    mapping: Arc<Mapping>,
    capabilities: u16,
    ring_offset: usize,
    ring_size: u32,
    data: Range<usize>,
    tail: u32,
    published_tail: u32,
    next: u32,
    fetched: u64,
    slots: VecDeque<Slot>,
    outstanding: IdSet,
    dead: bool,
}

const CMD_TAIL: usize = std::mem::offset_of!(Mailbox, cmd_tail);
const CMD_HEAD: usize = std::mem::offset_of!(Mailbox, cmd_head);

impl Ring {
    /// Takes a ring up where `cmd_tail` stands.
    ///
    /// # Errors
    /// [`RingError::Version`] or [`RingError::Mailbox`] when the mailbox is not one that we can serve.
    pub fn attach(mapping: Arc<Mapping>) -> Result<Self, RingError> {
        let version = mapping.read_u16(std::mem::offset_of!(Mailbox, version))?;
        if version != abi::MAILBOX_VERSION {
            return Err(RingError::Version(version));
        }
        let capabilities = mapping.read_u16(std::mem::offset_of!(Mailbox, flags))?;
        let ring_offset = mapping.read_u32(std::mem::offset_of!(Mailbox, cmdr_off))?;
        let ring_size = mapping.read_u32(std::mem::offset_of!(Mailbox, cmdr_size))?;
        let tail = mapping.read_u32(CMD_TAIL)?;

        let bad = |what: String| Err(RingError::Mailbox(what));
        if (ring_offset as usize) < size_of::<Mailbox>()
            || !(ring_offset as usize).is_multiple_of(abi::OP_ALIGN)
        {
            return bad(format!("the ring cannot start at {ring_offset}"));
        }
        // The smallest ring that could take a command at all: half of it must hold an entry.
        if (ring_size as usize) < 2 * size_of::<CmdResponse>()
            || !(ring_size as usize).is_multiple_of(abi::OP_ALIGN)
        {
            return bad(format!("a ring of {ring_size} bytes cannot be"));
        }
        let data_start = ring_offset as usize + ring_size as usize;
        if data_start > mapping.size() {
            return bad(format!("the ring ends at {data_start}, the mapping at {}", mapping.size()));
        }
        if tail >= ring_size || !(tail as usize).is_multiple_of(abi::OP_ALIGN) {
            return bad(format!("the tail cannot be at {tail}"));
        }
        Ok(Self {
            data: data_start..mapping.size(),
            mapping,
            capabilities,
            ring_offset: ring_offset as usize,
            ring_size,
            tail,
            published_tail: tail,
            next: tail,
            fetched: 0,
            slots: VecDeque::new(),
            outstanding: IdSet::new(),
            dead: false,
        })
    }

    /// The shared memory.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Where somebody else may go on: everything before is answered and handed back, and nothing behind was looked at.
    /// `None` while it is not so.
    #[must_use]
    pub fn quiescent_at(&self) -> Option<u32> {
        (!self.dead && self.slots.is_empty() && self.published_tail == self.next).then_some(self.next)
    }

    /// Where the oldest entry is that was not handed back; 0 in a ring that nobody has served.
    #[must_use]
    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// Whether the mailbox has a capability flag (`MAILBOX_FLAG_CAP_*`).
    #[must_use]
    pub fn has(&self, capability: u16) -> bool {
        self.capabilities & capability != 0
    }

    /// How many commands wait for their answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot, Slot::Command { answer: None, .. })).count()
    }

    /// Whether entries wait that [`Ring::fetch`] has not returned yet.
    ///
    /// # Errors
    /// [`RingError::Corrupt`] for an impossible head, [`RingError::Dead`].
    pub fn pending(&mut self) -> Result<bool, RingError> {
        Ok(self.head()? != self.next)
    }

    /// Bytes of entries that were fetched so far.
    #[must_use]
    pub const fn fetched(&self) -> u64 {
        self.fetched
    }

    /// What [`Ring::fetched`] will be when all that is in the ring now has been fetched.
    ///
    /// # Errors
    /// As [`Ring::pending`].
    pub fn seen(&mut self) -> Result<u64, RingError> {
        let head = self.head()?;
        let waiting = if head >= self.next { head - self.next } else { head + (self.ring_size - self.next) };
        Ok(self.fetched + u64::from(waiting))
    }

    fn head(&mut self) -> Result<u32, RingError> {
        if self.dead {
            return Err(RingError::Dead);
        }
        // Pairs with the kernel's store-release of `cmd_head`: without it an entry may be read before it is written.
        let head = self.mapping.load_acquire(CMD_HEAD)?;
        if head >= self.ring_size || !(head as usize).is_multiple_of(abi::OP_ALIGN) {
            return Err(self.corrupt(self.next, format!("the head cannot be at {head}")));
        }
        // Seen from the tail a head only moves forward. One that went back would have us run around the whole ring,
        // and take entries of the past for commands.
        let ahead = |position: u32| {
            (u64::from(position) + u64::from(self.ring_size - self.tail)) % u64::from(self.ring_size)
        };
        if ahead(head) < ahead(self.next) {
            return Err(self.corrupt(self.next, format!("the head went back to {head}")));
        }
        Ok(head)
    }

    /// The next entry, if there is one. PADs and unknown opcodes are dealt with here.
    ///
    /// # Errors
    /// [`RingError::Corrupt`]: the ring is dead then.
    pub fn fetch(&mut self) -> Result<Option<Entry>, RingError> {
        let head = self.head()?;
        while self.next != head {
            let position = self.next;
            let base = self.ring_offset + position as usize;
            let len_op = self.mapping.read_u32(base)?;
            let length = len_op & !abi::OP_MASK;
            let opcode = len_op & abi::OP_MASK;
            let room = if head > position { head - position } else { self.ring_size - position };
            if length == 0 || length > room {
                return Err(self.corrupt(position, format!("an entry of {length} bytes where {room} are")));
            }
            let entry = match opcode {
                abi::OP_CMD => Some(Entry::Command(self.read_command(position, base, length as usize)?)),
                abi::OP_TMR => Some(Entry::TaskManagement(self.read_tmr(position, base, length as usize)?)),
                abi::OP_PAD if position + length != self.ring_size => {
                    return Err(self.corrupt(position, "padding that does not end the ring".into()));
                }
                abi::OP_PAD => None,
                _ => {
                    let uflags = base + std::mem::offset_of!(EntryHeader, uflags);
                    self.mapping.write_u8(uflags, abi::UFLAG_UNKNOWN_OP)?;
                    None
                }
            };
            self.next = (position + length) % self.ring_size;
            self.fetched += u64::from(length);
            self.slots.push_back(match &entry {
                Some(Entry::Command(command)) => {
                    Slot::Command { position, length, id: command.id, answer: None }
                }
                _ => Slot::Skip { length },
            });
            self.pass_skips();
            if entry.is_some() {
                return Ok(entry);
            }
        }
        Ok(None)
    }

    fn read_command(&mut self, position: u32, base: usize, length: usize) -> Result<Command, RingError> {
        if length < size_of::<CmdResponse>() {
            return Err(self.corrupt(position, format!("a command entry of {length} bytes")));
        }
        let id = CmdId(self.mapping.read_u16(base + std::mem::offset_of!(EntryHeader, cmd_id))?);
        let count = self.mapping.read_u32(base + std::mem::offset_of!(CmdRequest, iov_cnt))? as usize;
        let bidi_count =
            self.mapping.read_u32(base + std::mem::offset_of!(CmdRequest, iov_bidi_cnt))? as usize;
        let cdb_offset = self.mapping.read_u64(base + std::mem::offset_of!(CmdRequest, cdb_off))?;

        let iov = std::mem::offset_of!(CmdRequest, iov);
        let vectors = (length - iov) / size_of::<abi::IoVec>();
        // Both counts are below 2^32, so their sum cannot wrap a usize.
        if count + bidi_count > vectors {
            return Err(self.corrupt(position, format!("{count}+{bidi_count} iovecs in {length} bytes")));
        }
        let body = base + iov + (count + bidi_count) * size_of::<abi::IoVec>();
        let end = base + length;
        let cdb_offset = usize::try_from(cdb_offset).unwrap_or(usize::MAX);
        if cdb_offset < body || cdb_offset >= end {
            return Err(self.corrupt(position, format!("a CDB at offset {cdb_offset}, outside of its entry")));
        }
        let opcode = self.mapping.read_u8(cdb_offset)?;
        let additional =
            if opcode == 0x7f && cdb_offset + 8 <= end { self.mapping.read_u8(cdb_offset + 7)? } else { 0 };
        let size = abi::cdb_size(opcode, additional);
        if size > end - cdb_offset || size > abi::MAX_CDB_SIZE {
            return Err(
                self.corrupt(position, format!("a CDB of {size} bytes, cut off by the end of its entry"))
            );
        }
        let mut cdb = SmallVec::from_elem(0, size);
        self.mapping.read(cdb_offset, &mut cdb)?;

        let data = self.read_iovecs(position, base + iov, count)?;
        let bidi_in = match bidi_count {
            0 => None,
            _ => {
                Some(self.read_iovecs(position, base + iov + count * size_of::<abi::IoVec>(), bidi_count)?)
            }
        };
        if id.0 == 0 || !self.outstanding.insert(id) {
            return Err(self.corrupt(position, format!("command id {} is zero or outstanding already", id.0)));
        }
        Ok(Command { id, cdb, data, bidi_in })
    }

    fn read_iovecs(&mut self, position: u32, base: usize, count: usize) -> Result<Buffer, RingError> {
        let mut extents = SmallVec::with_capacity(count);
        for at in (0..count).map(|index| base + index * size_of::<abi::IoVec>()) {
            let offset = usize::try_from(self.mapping.read_u64(at)?).unwrap_or(usize::MAX);
            let length = usize::try_from(self.mapping.read_u64(at + 8)?).unwrap_or(usize::MAX);
            let end = offset.checked_add(length);
            if offset < self.data.start || end.is_none_or(|end| end > self.data.end) {
                let what = format!("an iovec of {length} bytes at {offset}, outside of the data area");
                return Err(self.corrupt(position, what));
            }
            extents.push(Extent { offset, length });
        }
        Ok(Buffer::new(self.mapping.clone(), extents)?)
    }

    fn read_tmr(&mut self, position: u32, base: usize, length: usize) -> Result<TaskManagement, RingError> {
        let ids = std::mem::offset_of!(TmrEntry, cmd_ids);
        if length < ids {
            return Err(self.corrupt(position, format!("a task management entry of {length} bytes")));
        }
        let kind = self.mapping.read_u8(base + std::mem::offset_of!(TmrEntry, tmr_type))?;
        let count = self.mapping.read_u32(base + std::mem::offset_of!(TmrEntry, cmd_cnt))? as usize;
        if count > (length - ids) / 2 {
            return Err(self.corrupt(position, format!("{count} task management ids in {length} bytes")));
        }
        let mut commands = Vec::new();
        for index in 0..count {
            let id = CmdId(self.mapping.read_u16(base + ids + 2 * index)?);
            // Of one that is answered the id may be that of a command behind this entry.
            if self.outstanding.contains(id) {
                commands.push(id);
            }
        }
        Ok(TaskManagement { kind, commands })
    }

    /// Answers a command. The kernel learns of it with the next [`Ring::commit`].
    ///
    /// `read_len` is passed on only where the mailbox offers it, and a `read_len` of 0 is ignored by the kernel: for
    /// both the caller has to zero what is not valid.
    ///
    /// # Errors
    /// [`RingError::NotOutstanding`] for an id that is not ours to answer; nothing is written then.
    pub fn complete(&mut self, id: CmdId, response: Response) -> Result<(), RingError> {
        if self.dead {
            return Err(RingError::Dead);
        }
        if !self.outstanding.remove(id) {
            return Err(RingError::NotOutstanding(id.0));
        }
        if self.has(abi::MAILBOX_FLAG_CAP_OOOC) {
            let Some(&Slot::Command { position, length, .. }) = self.slots.front() else {
                unreachable!("each outstanding command has a slot, and the front slot is a command's");
            };
            self.write_response(position, id, &response)?;
            self.pass(length);
        } else {
            for slot in &mut self.slots {
                if let Slot::Command { id: slot_id, answer, .. } = slot
                    && *slot_id == id
                    && answer.is_none()
                {
                    *answer = Some(response);
                    break;
                }
            }
            while let Some(Slot::Command { position, length, id, answer }) = self.slots.front_mut() {
                let Some(response) = answer.take() else { break };
                let (position, length, id) = (*position, *length, *id);
                self.write_response(position, id, &response)?;
                self.pass(length);
            }
        }
        Ok(())
    }

    fn write_response(&self, position: u32, id: CmdId, response: &Response) -> Result<(), RingError> {
        let base = self.ring_offset + position as usize;
        let mut uflags = 0;
        if response.read_len.is_some() && self.has(abi::MAILBOX_FLAG_CAP_READ_LEN) {
            uflags |= abi::UFLAG_READ_LEN;
        }
        if response.keep_buf && self.has(abi::MAILBOX_FLAG_CAP_KEEP_BUF) {
            uflags |= abi::UFLAG_KEEP_BUF;
        }
        self.mapping.write_u16(base + std::mem::offset_of!(EntryHeader, cmd_id), id.0)?;
        self.mapping.write_u8(base + std::mem::offset_of!(EntryHeader, uflags), uflags)?;
        // The response lies over the request: all of it is written, or iovecs would show through in the sense data.
        let mut body = [0u8; size_of::<CmdResponse>() - size_of::<EntryHeader>()];
        let start = size_of::<EntryHeader>();
        body[std::mem::offset_of!(CmdResponse, scsi_status) - start] = response.status;
        let read_len = std::mem::offset_of!(CmdResponse, read_len) - start;
        body[read_len..read_len + 4].copy_from_slice(&response.read_len.unwrap_or(0).to_ne_bytes());
        let sense = std::mem::offset_of!(CmdResponse, sense_buffer) - start;
        let sense_len = response.sense.len().min(abi::SENSE_BUFFER_SIZE);
        body[sense..sense + sense_len].copy_from_slice(&response.sense[..sense_len]);
        self.mapping.write(base + start, &body)?;
        Ok(())
    }

    fn pass(&mut self, length: u32) {
        self.slots.pop_front();
        self.tail = (self.tail + length) % self.ring_size;
        self.pass_skips();
    }

    fn pass_skips(&mut self) {
        while let Some(&Slot::Skip { length }) = self.slots.front() {
            self.slots.pop_front();
            self.tail = (self.tail + length) % self.ring_size;
        }
    }

    /// Publishes the tail. Returns whether it moved: the doorbell is due then, for the whole batch.
    ///
    /// # Errors
    /// [`RingError::Dead`].
    pub fn commit(&mut self) -> Result<bool, RingError> {
        if self.dead {
            return Err(RingError::Dead);
        }
        if self.tail == self.published_tail {
            return Ok(false);
        }
        // Pairs with the kernel's read of `cmd_tail`: everything in the slots and in the data area goes before it.
        self.mapping.store_release(CMD_TAIL, self.tail)?;
        self.published_tail = self.tail;
        Ok(true)
    }

    /// Gives the ring up: nothing is read or written any more. The mapping goes as soon as no data of a command is
    /// looked at, though somebody may still hold the ring: the kernel lets nobody else open the device before.
    pub fn abandon(&mut self) {
        self.dead = true;
        if let Ok(nothing) = Mapping::anonymous() {
            self.mapping = Arc::new(nothing);
        }
    }

    /// Whether the ring was given up, by an error or by [`Ring::abandon`].
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    fn corrupt(&mut self, position: u32, what: String) -> RingError {
        self.dead = true;
        RingError::Corrupt { position, what }
    }
}
