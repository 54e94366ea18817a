//! The kernel's side of a ring, played in a memory file: what `target_core_user` does, without the kernel.
//!
//! [`Kernel`] places commands as `queue_cmd_ring()` does (lowest free id, lowest free block, merged iovecs, padding,
//! waiting queue) and takes completions as `tcmu_handle_completions()` does. Beyond that it watches: a consumer that
//! breaks a rule which the real kernel does not check is reported in [`Kernel::violations`]. With
//! [`Config::checks`], Data-In is filled with a pattern before the consumer sees it, so that a byte which was never
//! written is found, and the data area is scribbled over as soon as a command is answered, so that a late access is.
//!
//! What it does not play: data pages that do not exist (SIGBUS), time (commands expire when [`Kernel::expire`] is
//! called), and the checks of the target core before the ring (reservations, ALUA, unit attentions).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use smallvec::SmallVec;

use super::{Buffer, Extent};
use crate::abi::{self, CmdRequest, CmdResponse, EntryHeader, Mailbox, TmrEntry};
use crate::mapping::{Mapping, OutOfBounds};
use crate::scsi::DataBuffer;

mod blocks;

use blocks::{Blocks, Taken};

/// Fills Data-In before the consumer sees it.
const POISON: [u8; 8] = *b"\xa5STALE!\x5a";
/// Fills the data area after a command is answered.
const SCRIBBLE: u8 = 0xdb;
/// NOT READY, LOGICAL UNIT COMMUNICATION FAILURE: what the target core makes of a completion without sense.
const COMMUNICATION_FAILURE: [u8; 18] = [0x70, 0, 2, 0, 0, 0, 0, 10, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0];
/// ILLEGAL REQUEST, INVALID FIELD IN CDB: a command that no ring could take.
const INVALID_FIELD: [u8; 18] = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0, 0, 0];

/// The shape of a simulated device.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes of mailbox and ring together: a multiple of 4096.
    pub ring_size: u32,
    /// Bytes of the data area.
    pub data_size: usize,
    /// Bytes of a data block: a multiple of 4096.
    pub block_size: usize,
    /// `MAILBOX_FLAG_CAP_*`.
    pub capabilities: u16,
    /// Poison, scribble and compare; costs a pass over the data.
    pub checks: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ring_size: 1 << 20,
            data_size: 64 << 20,
            block_size: 4096,
            capabilities: abi::MAILBOX_FLAG_CAP_OOOC
                | abi::MAILBOX_FLAG_CAP_READ_LEN
                | abi::MAILBOX_FLAG_CAP_TMR
                | abi::MAILBOX_FLAG_CAP_KEEP_BUF,
            checks: true,
        }
    }
}

/// A command of the initiator. With both directions it is bidirectional.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The CDB; cut to, or filled with zeroes up to, what its group says.
    pub cdb: Vec<u8>,
    /// Data-Out.
    pub data_out: Vec<u8>,
    /// Bytes of Data-In that the initiator has room for.
    pub data_in: usize,
}

/// The initiator's name of a command: never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the initiator gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Which command.
    pub ticket: Ticket,
    /// SAM status.
    pub status: u8,
    /// Sense data, empty without CHECK CONDITION.
    pub sense: Vec<u8>,
    /// Data-In.
    pub data_in: Vec<u8>,
    /// Data-In bytes that were asked for and not delivered.
    pub residual: usize,
}

#[derive(Debug)]
struct Outstanding {
    ticket: Ticket,
    /// The main buffer, then Data-In of a bidirectional command.
    data: Buffer,
    bidi_in: Option<Buffer>,
    reads: bool,
    blocks: Taken,
    expired: bool,
    kept: bool,
}

#[derive(Debug, Clone, Copy)]
struct Placed {
    position: u32,
    len_op: u32,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    request: Request,
}

enum Refusal {
    Full,
    Never,
}

/// One device of the kernel.
#[derive(Debug)]
pub struct Kernel {
    config: Config,
    file: File,
    mapping: Arc<Mapping>,
    ours: OwnedFd,
    theirs: OwnedFd,
    cmdr_size: u32,
    head: u32,
    last_cleaned: u32,
    placed: VecDeque<Placed>,
    /// By id.
    commands: Vec<Option<Outstanding>>,
    free_ids: BinaryHeap<Reverse<u16>>,
    next_id: u32,
    blocks: Blocks,
    waiting: VecDeque<Waiting>,
    waiting_tmrs: VecDeque<(u8, Vec<u16>)>,
    next_ticket: u64,
    finished: Vec<Completion>,
    /// Of initiators that are done with theirs.
    buffers: Vec<Vec<u8>>,
    violations: Vec<String>,
    events: u32,
    plugged: bool,
    broken: bool,
    blocked: bool,
}

const CMDR_OFFSET: usize = size_of::<Mailbox>();

impl Kernel {
    /// Makes a device.
    ///
    /// # Errors
    /// What the system says about the memory file and the sockets; `InvalidInput` for an impossible configuration.
    pub fn new(config: Config) -> io::Result<Self> {
        let page = 4096usize;
        if !(config.ring_size as usize).is_multiple_of(page) || config.ring_size < 4096 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "ring_size must be a multiple of 4096"));
        }
        if !config.block_size.is_multiple_of(page)
            || config.block_size == 0
            || config.data_size < config.block_size
        {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "block_size must be a multiple of 4096"));
        }
        let size = config.ring_size as usize + config.data_size;
        let file = File::from(memfd_create("tcmu-simulated", MemfdFlags::CLOEXEC)?);
        file.set_len(size as u64)?;
        let mapping = Arc::new(Mapping::new(&file, size)?);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let cmdr_size = config.ring_size - CMDR_OFFSET as u32;
        let blocks = config.data_size / config.block_size;
        let kernel = Self {
            file,
            mapping,
            ours,
            theirs,
            cmdr_size,
            head: 0,
            last_cleaned: 0,
            placed: VecDeque::new(),
            commands: Vec::new(),
            free_ids: BinaryHeap::new(),
            next_id: 1,
            blocks: Blocks::new(blocks),
            waiting: VecDeque::new(),
            waiting_tmrs: VecDeque::new(),
            next_ticket: 0,
            finished: Vec::new(),
            buffers: Vec::new(),
            violations: Vec::new(),
            events: 0,
            plugged: false,
            broken: false,
            blocked: false,
            config,
        };
        kernel.write_mailbox().map_err(io::Error::other)?;
        Ok(kernel)
    }

    fn write_mailbox(&self) -> Result<(), OutOfBounds> {
        use std::mem::offset_of;
        self.mapping.write_u16(offset_of!(Mailbox, version), abi::MAILBOX_VERSION)?;
        self.mapping.write_u16(offset_of!(Mailbox, flags), self.config.capabilities)?;
        self.mapping.write_u32(offset_of!(Mailbox, cmdr_off), CMDR_OFFSET as u32)?;
        self.mapping.write_u32(offset_of!(Mailbox, cmdr_size), self.cmdr_size)
    }

    /// The shared memory as a file, for the consumer to map.
    #[must_use]
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The consumer's descriptor: reads of 4 bytes wait for commands, writes of 4 bytes are the doorbell.
    #[must_use]
    pub fn consumer(&self) -> BorrowedFd<'_> {
        self.theirs.as_fd()
    }

    /// Readable when the doorbell was rung: [`Kernel::process`] is due.
    #[must_use]
    pub fn doorbell(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    /// The shared memory as mapped here.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// What the consumer did that it must not: empty for a good one.
    #[must_use]
    pub fn violations(&self) -> &[String] {
        &self.violations
    }

    /// Commands on the ring or waiting for it.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.commands.iter().flatten().filter(|command| !command.kept && !command.expired).count()
            + self.waiting.len()
    }

    /// The command that has this id now, if one has.
    #[must_use]
    pub fn ticket(&self, id: u16) -> Option<Ticket> {
        self.command(id).map(|command| command.ticket)
    }

    /// Buffers that were kept with `TCMU_UFLAG_KEEP_BUF` and not freed.
    #[must_use]
    pub fn kept(&self) -> Vec<u16> {
        self.ids(|command| command.kept).collect()
    }

    fn command(&self, id: u16) -> Option<&Outstanding> {
        self.commands.get(usize::from(id))?.as_ref()
    }

    fn ids(&self, which: impl Fn(&Outstanding) -> bool) -> impl Iterator<Item = u16> {
        let chosen = move |command: &Option<Outstanding>| command.as_ref().is_some_and(&which);
        std::iter::zip(0.., &self.commands).filter(move |(_, command)| chosen(command)).map(|(id, _)| id)
    }

    /// Whether the kernel gave the ring up (`TCMU_DEV_BIT_BROKEN`).
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The initiator sends a command.
    pub fn submit(&mut self, request: Request) -> Ticket {
        self.send(&request.cdb, &request.data_out, request.data_in)
    }

    /// The same, of what belongs to somebody else: the CDB, Data-Out, and bytes of Data-In.
    pub fn send(&mut self, cdb: &[u8], data_out: &[u8], data_in: usize) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let mut whole: SmallVec<[u8; 32]> = SmallVec::from_slice(cdb);
        whole.resize(cdb.len().max(8), 0);
        let size = abi::cdb_size(whole[0], whole[7]);
        whole.resize(size, 0);
        let cdb = &whole[..];
        let wait = || Waiting {
            ticket,
            request: Request { cdb: cdb.to_vec(), data_out: data_out.to_vec(), data_in },
        };
        if size > abi::MAX_CDB_SIZE {
            // The target core refuses it (`target_cmd_init_cdb`).
            self.finish(ticket, 0x02, &INVALID_FIELD, Vec::new(), data_in);
        } else if self.blocked {
            self.finish(ticket, 0x08, &[], Vec::new(), data_in);
        } else if self.broken {
            self.finish(ticket, 0x02, &COMMUNICATION_FAILURE, Vec::new(), data_in);
        } else if !self.waiting.is_empty() {
            self.waiting.push_back(wait());
        } else {
            match self.place(ticket, cdb, data_out, data_in) {
                Ok(()) => self.notify(),
                Err(Refusal::Full) => self.waiting.push_back(wait()),
                Err(Refusal::Never) => self.finish(ticket, 0x02, &INVALID_FIELD, Vec::new(), data_in),
            }
        }
        ticket
    }

    /// The initiator is done with what [`Kernel::process`] returned: its memory is used again.
    pub fn recycle(&mut self, completions: Vec<Completion>) {
        self.buffers.extend(completions.into_iter().map(|done| done.data_in).filter(|data| !data.is_empty()));
    }

    /// Task management: names commands that are being aborted (`tcmu_tmr_notify`). Tickets that are not on the ring
    /// are left out, as the kernel does.
    pub fn abort(&mut self, kind: u8, tickets: &[Ticket]) {
        if self.config.capabilities & abi::MAILBOX_FLAG_CAP_TMR == 0 || self.broken {
            return;
        }
        let on_ring = |command: &Outstanding| tickets.contains(&command.ticket) && !command.kept;
        let mut ids: Vec<u16> = self.ids(on_ring).collect();
        ids.reverse();
        self.waiting_tmrs.push_back((kind, ids));
        self.place_tmrs();
    }

    /// Holds events back until [`Kernel::unplug`], as the target core does for a batch.
    pub fn plug(&mut self) {
        self.plugged = true;
    }

    /// One event for all that was placed since [`Kernel::plug`].
    pub fn unplug(&mut self) {
        self.plugged = false;
        self.notify();
    }

    /// The command's time is over: the initiator is told, the entry stays (`tcmu_check_expired_ring_cmd`).
    pub fn expire(&mut self, ticket: Ticket) {
        if let Some(command) = self
            .commands
            .iter_mut()
            .flatten()
            .find(|command| command.ticket == ticket && !command.kept && !command.expired)
        {
            command.expired = true;
            let room = if command.reads { command.data.len() } else { 0 };
            self.finish(ticket, 0x02, &COMMUNICATION_FAILURE, Vec::new(), room);
        }
    }

    /// `action/block_dev`: new commands get BUSY.
    pub fn set_blocked(&mut self, blocked: bool) {
        self.blocked = blocked;
        if blocked {
            self.kick();
            for Waiting { ticket, request } in std::mem::take(&mut self.waiting) {
                self.finish(ticket, 0x08, &[], Vec::new(), request.data_in);
            }
        }
    }

    /// `action/reset_ring` with 1: everything outstanding gets BUSY, the ring is empty afterwards.
    pub fn reset_ring(&mut self) {
        for command in std::mem::take(&mut self.commands).into_iter().flatten() {
            if !command.expired && !command.kept {
                let room = if command.reads { command.data.len() } else { 0 };
                self.finish(command.ticket, 0x08, &[], Vec::new(), room);
            }
        }
        self.blocks.free_all();
        self.free_ids.clear();
        self.next_id = 1;
        self.placed.clear();
        self.waiting_tmrs.clear();
        self.head = 0;
        self.last_cleaned = 0;
        self.broken = false;
        // Checked when the mapping was made.
        let _ = self.mapping.store_release(std::mem::offset_of!(Mailbox, cmd_head), 0);
        let _ = self.mapping.store_release(std::mem::offset_of!(Mailbox, cmd_tail), 0);
        self.run_waiting();
    }

    /// `action/free_kept_buf`. Returns whether there was such a buffer.
    pub fn free_kept(&mut self, id: u16) -> bool {
        if !self.command(id).is_some_and(|command| command.kept) {
            return false;
        }
        if let Some(command) = self.commands[usize::from(id)].take() {
            self.free(id, &command);
        }
        self.run_waiting();
        true
    }

    /// Takes the doorbell, if it was rung, and returns what was finished since the last call.
    pub fn process(&mut self) -> Vec<Completion> {
        let mut bytes = [0u8; 1024];
        let mut rung = 0;
        while let Ok(count) = rustix::io::read(&self.ours, &mut bytes[..]) {
            rung += count;
            if count < bytes.len() {
                break;
            }
        }
        if rung % 4 != 0 {
            self.violations.push(format!("the doorbell was rung with {rung} bytes, not with 4 each"));
        }
        if rung > 0 {
            self.kick();
        }
        std::mem::take(&mut self.finished)
    }

    /// Takes completions (`tcmu_irqcontrol`) whether the doorbell was rung or not.
    pub fn kick(&mut self) {
        if self.broken {
            return;
        }
        if let Err(error) = self.take_completions() {
            self.violations.push(format!("the ring cannot be read: {error}"));
            self.broken = true;
        }
        self.place_tmrs();
        if self.waiting_tmrs.is_empty() {
            self.run_waiting();
        }
    }

    fn take_completions(&mut self) -> Result<(), OutOfBounds> {
        let tail = self.mapping.load_acquire(std::mem::offset_of!(Mailbox, cmd_tail))?;
        if tail != self.last_cleaned
            && tail != self.head
            && !self.placed.iter().any(|slot| slot.position == tail)
        {
            // The real kernel walks past such a tail, into an endless loop or into old entries.
            self.violations.push(format!("the tail {tail} is not where an entry starts"));
            self.broken = true;
            return Ok(());
        }
        while self.last_cleaned != tail {
            let Some(slot) = self.placed.pop_front() else {
                self.violations.push(format!("the tail {tail} is past the head {}", self.head));
                self.broken = true;
                return Ok(());
            };
            let base = CMDR_OFFSET + slot.position as usize;
            let len_op = self.mapping.read_u32(base)?;
            if len_op != slot.len_op {
                self.violations.push(format!("len_op at {} was changed to {len_op:#x}", slot.position));
                self.broken = true;
                return Ok(());
            }
            if slot.len_op & abi::OP_MASK == abi::OP_CMD && !self.take_completion(base)? {
                self.broken = true;
                return Ok(());
            }
            self.last_cleaned = (self.last_cleaned + (slot.len_op & !abi::OP_MASK)) % self.cmdr_size;
        }
        Ok(())
    }

    /// Returns whether the slot named an outstanding command.
    fn take_completion(&mut self, base: usize) -> Result<bool, OutOfBounds> {
        use std::mem::offset_of;
        let id = self.mapping.read_u16(base + offset_of!(EntryHeader, cmd_id))?;
        let uflags = self.mapping.read_u8(base + offset_of!(EntryHeader, uflags))?;
        let status = self.mapping.read_u8(base + offset_of!(CmdResponse, scsi_status))?;
        let read_len = self.mapping.read_u32(base + offset_of!(CmdResponse, read_len))? as usize;
        // The kernel looks at it with CHECK CONDITION only.
        let mut sense = vec![0u8; if status == 0x02 { abi::SENSE_BUFFER_SIZE } else { 0 }];
        self.mapping.read(base + offset_of!(CmdResponse, sense_buffer), &mut sense)?;

        let index = usize::from(id);
        let Some(command) =
            self.commands.get_mut(index).and_then(Option::as_mut).filter(|command| !command.kept)
        else {
            self.violations.push(format!("cmd_id {id} was completed but is not outstanding"));
            return Ok(false);
        };
        command.kept = uflags & abi::UFLAG_KEEP_BUF != 0;
        if uflags & abi::UFLAG_KEEP_BUF != 0 && self.config.capabilities & abi::MAILBOX_FLAG_CAP_KEEP_BUF == 0
        {
            self.violations.push("KEEP_BUF used though it is not offered".into());
        }
        if uflags & abi::UFLAG_READ_LEN != 0 && self.config.capabilities & abi::MAILBOX_FLAG_CAP_READ_LEN == 0
        {
            self.violations.push("READ_LEN used though it is not offered".into());
        }
        let (ticket, expired, kept) = (command.ticket, command.expired, command.kept);
        let input = command.bidi_in.as_ref().or(command.reads.then_some(&command.data));
        let room = input.map_or(0, DataBuffer::len);
        let mut data_in = Vec::new();
        if let Some(input) = input {
            data_in = self.buffers.pop().unwrap_or_default();
            let told = uflags & abi::UFLAG_READ_LEN != 0 && read_len > 0 && command.bidi_in.is_none();
            let length = match status {
                _ if uflags & abi::UFLAG_UNKNOWN_OP != 0 => 0,
                _ if told => read_len.min(room),
                0x02 => 0,
                _ => room,
            };
            data_in.resize(length, 0);
            input.read(0, &mut data_in);
        }
        if self.config.checks
            && !expired
            && let Some(at) = find_poison(&data_in)
        {
            self.violations.push(format!("byte {at} of the Data-In of cmd_id {id} was never written"));
        }
        // The bytes are in the initiator's memory with BUSY, too, but a driver does not look at them.
        if !matches!(status, 0x00 | 0x02) {
            data_in.clear();
        }
        if !kept && let Some(command) = self.commands[index].take() {
            self.free(id, &command);
        }
        if !expired {
            match status {
                _ if uflags & abi::UFLAG_UNKNOWN_OP != 0 => {
                    self.finish(ticket, 0x02, &COMMUNICATION_FAILURE, data_in, room);
                }
                0x02 => self.finish(ticket, status, &sense, data_in, room),
                _ => self.finish(ticket, status, &[], data_in, room),
            }
        }
        Ok(true)
    }

    fn free(&mut self, id: u16, command: &Outstanding) {
        self.blocks.free(&command.blocks);
        if self.config.checks {
            let buffers = std::iter::once(&command.data).chain(&command.bidi_in);
            for piece in buffers.flat_map(|buffer| buffer.pieces(0..usize::MAX)) {
                let _ = self.mapping.fill(piece.offset, piece.length, SCRIBBLE);
            }
        }
        self.free_ids.push(Reverse(id));
    }

    fn finish(&mut self, ticket: Ticket, status: u8, sense: &[u8], data_in: Vec<u8>, room: usize) {
        let residual = room.saturating_sub(data_in.len());
        self.finished.push(Completion { ticket, status, sense: sense.to_vec(), data_in, residual });
    }

    fn notify(&mut self) {
        self.events = self.events.wrapping_add(1);
        if self.plugged {
            return;
        }
        // A UIO device is readable while its counter differs from what the reader saw last, however often it rose.
        let mut unread = [PollFd::new(&self.theirs, PollFlags::IN)];
        if matches!(poll(&mut unread, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0)) {
            let _ = rustix::io::write(&self.ours, &self.events.to_ne_bytes());
        }
    }

    fn run_waiting(&mut self) {
        let mut placed = false;
        while let Some(Waiting { ticket, request }) = self.waiting.pop_front() {
            match self.place(ticket, &request.cdb, &request.data_out, request.data_in) {
                Ok(()) => placed = true,
                Err(Refusal::Never) => self.finish(ticket, 0x02, &INVALID_FIELD, Vec::new(), request.data_in),
                Err(Refusal::Full) => {
                    self.waiting.push_front(Waiting { ticket, request });
                    break;
                }
            }
        }
        if placed {
            self.notify();
        }
    }

    fn place_tmrs(&mut self) {
        while let Some((kind, ids)) = self.waiting_tmrs.front() {
            let (kind, ids) = (*kind, ids.clone());
            let length =
                (std::mem::offset_of!(TmrEntry, cmd_ids) + 2 * ids.len()).next_multiple_of(abi::OP_ALIGN);
            match self.put(abi::OP_TMR, length, |mapping, base| {
                mapping.write_u8(base + std::mem::offset_of!(TmrEntry, tmr_type), kind)?;
                mapping.write_u32(base + std::mem::offset_of!(TmrEntry, cmd_cnt), ids.len() as u32)?;
                for (index, id) in ids.iter().enumerate() {
                    mapping.write_u16(base + std::mem::offset_of!(TmrEntry, cmd_ids) + 2 * index, *id)?;
                }
                Ok(())
            }) {
                Ok(()) => self.notify(),
                Err(Refusal::Full) => break,
                Err(Refusal::Never) => {}
            }
            self.waiting_tmrs.pop_front();
        }
    }

    /// `queue_cmd_ring()`.
    fn place(&mut self, ticket: Ticket, cdb: &[u8], data_out: &[u8], data_in: usize) -> Result<(), Refusal> {
        let bidi = !data_out.is_empty() && data_in > 0;
        let reads = data_out.is_empty();
        let main = if reads { data_in } else { data_out.len() };
        let block_size = self.config.block_size;
        let blocks_of = |bytes: usize| bytes.div_ceil(block_size);
        let bidi_in = if bidi { data_in } else { 0 };
        let needed = blocks_of(main) + blocks_of(bidi_in);
        if needed > self.blocks.count() {
            return Err(Refusal::Never);
        }
        let blocks = self.blocks.take(needed).ok_or(Refusal::Full)?;
        let (main_blocks, bidi_blocks) = blocks.split_at(blocks_of(main));
        let data = self.extents(main_blocks, main);
        let bidi_data = self.extents(bidi_blocks, bidi_in);
        let vectors: SmallVec<[Extent; 4]> = data.iter().chain(&bidi_data).copied().collect();

        let iov = std::mem::offset_of!(CmdRequest, iov);
        let base_size = (iov + vectors.len() * size_of::<abi::IoVec>()).max(size_of::<CmdResponse>());
        let length = base_size + cdb.len().next_multiple_of(abi::OP_ALIGN);
        let id = self.peek_id();
        let poison = self.config.checks;
        let result = match id {
            None => Err(Refusal::Full),
            Some(id) => self.put(abi::OP_CMD, length, |mapping, base| {
                use std::mem::offset_of;
                mapping.write_u16(base + offset_of!(EntryHeader, cmd_id), id)?;
                mapping.write_u32(base + offset_of!(CmdRequest, iov_cnt), data.len() as u32)?;
                mapping.write_u32(base + offset_of!(CmdRequest, iov_bidi_cnt), bidi_data.len() as u32)?;
                mapping.write_u64(base + offset_of!(CmdRequest, cdb_off), (base + base_size) as u64)?;
                for (index, vector) in vectors.iter().enumerate() {
                    let at = base + iov + index * size_of::<abi::IoVec>();
                    mapping.write_u64(at, vector.offset as u64)?;
                    mapping.write_u64(at + 8, vector.length as u64)?;
                }
                mapping.write(base + base_size, cdb)?;
                let mut done = 0;
                for extent in data.iter().filter(|_| !reads) {
                    mapping.write(extent.offset, &data_out[done..done + extent.length])?;
                    done += extent.length;
                }
                let input = if reads { &data } else { &bidi_data };
                if poison {
                    let length: usize = input.iter().map(|extent| extent.length).sum();
                    let pattern = POISON.repeat(length.div_ceil(POISON.len()));
                    let mut done = 0;
                    for extent in input {
                        mapping.write(extent.offset, &pattern[done..done + extent.length])?;
                        done += extent.length;
                    }
                }
                Ok(())
            }),
        };
        let (Some(id), Ok(())) = (id, &result) else {
            self.blocks.free(&blocks);
            return result;
        };
        self.take_id(id);
        let buffer = |extents| Buffer::new(self.mapping.clone(), extents).map_err(|_| Refusal::Never);
        let bidi_in = if bidi { Some(buffer(bidi_data)?) } else { None };
        let data = buffer(data)?;
        let command = Outstanding { ticket, data, bidi_in, reads, blocks, expired: false, kept: false };
        let index = usize::from(id);
        if self.commands.len() <= index {
            self.commands.resize_with(index + 1, || None);
        }
        self.commands[index] = Some(command);
        Ok(())
    }

    /// Ring space, padding, the zeroed entry, and its publication.
    fn put(
        &mut self,
        opcode: u32,
        length: usize,
        fill: impl FnOnce(&Mapping, usize) -> Result<(), OutOfBounds>,
    ) -> Result<(), Refusal> {
        if length > self.cmdr_size as usize / 2 {
            return Err(Refusal::Never);
        }
        let length = length as u32;
        let gap = self.cmdr_size - self.head;
        let used = (self.head + self.cmdr_size - self.last_cleaned) % self.cmdr_size;
        let free = self.cmdr_size - used - 1;
        if free < if gap >= length { length } else { length + gap } {
            return Err(Refusal::Full);
        }
        let write = |kernel: &mut Self| -> Result<(), OutOfBounds> {
            if gap < length {
                let base = CMDR_OFFSET + kernel.head as usize;
                kernel.mapping.write_u64(base, 0)?;
                kernel.mapping.write_u32(base, gap | abi::OP_PAD)?;
                kernel.publish(gap | abi::OP_PAD)?;
            }
            let base = CMDR_OFFSET + kernel.head as usize;
            kernel.mapping.fill(base, length as usize, 0)?;
            fill(&kernel.mapping, base)?;
            kernel.mapping.write_u32(base, length | opcode)?;
            kernel.publish(length | opcode)
        };
        write(self).map_err(|_| Refusal::Never)
    }

    fn publish(&mut self, len_op: u32) -> Result<(), OutOfBounds> {
        self.placed.push_back(Placed { position: self.head, len_op });
        self.head = (self.head + (len_op & !abi::OP_MASK)) % self.cmdr_size;
        self.mapping.store_release(std::mem::offset_of!(Mailbox, cmd_head), self.head)
    }

    fn peek_id(&self) -> Option<u16> {
        match self.free_ids.peek() {
            Some(&Reverse(id)) => Some(id),
            None => u16::try_from(self.next_id).ok(),
        }
    }

    fn take_id(&mut self, id: u16) {
        if self.free_ids.peek() == Some(&Reverse(id)) {
            self.free_ids.pop();
        } else {
            self.next_id += 1;
        }
    }

    /// Adjacent blocks are one iovec; the last block is used in part.
    fn extents(&self, blocks: &[usize], mut length: usize) -> SmallVec<[Extent; 2]> {
        let mut extents: SmallVec<[Extent; 2]> = SmallVec::new();
        for &block in blocks {
            let offset = self.config.ring_size as usize + block * self.config.block_size;
            let part = length.min(self.config.block_size);
            length -= part;
            match extents.last_mut() {
                Some(last) if last.offset + last.length == offset => last.length += part,
                _ => extents.push(Extent { offset, length: part }),
            }
        }
        extents
    }
}

/// Where a byte sequence starts that was there before the consumer saw the buffer.
fn find_poison(data: &[u8]) -> Option<usize> {
    data.chunks(POISON.len())
        .position(|chunk| chunk.len() >= 4 && chunk == &POISON[..chunk.len()])
        .map(|index| index * POISON.len())
}
