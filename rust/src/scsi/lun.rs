//! The logical unit: what it is, its state, and the way of a command through it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::cdb::Cdb;
use super::copy::{Copies, CopyDomain};
use super::job::Job;
use super::log::Statistics;
use super::opcodes::Readiness;
use super::sense::{SENSE_BYTES, SenseFormat};
use super::{Capabilities, DataBuffer, Geometry, Identity, Next, Reply, Sense, opcodes};

/// A logical unit cannot be made like this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LunError {
    /// An identification has a character outside 20h to 7Eh.
    #[error("the {field} must be printable ASCII")]
    NotPrintable {
        /// Which one.
        field: &'static str,
    },
    /// An identification has more characters than its field.
    #[error("the {field} has {length} characters; {limit} fit")]
    TooLong {
        /// Which one.
        field: &'static str,
        /// Its characters.
        length: usize,
        /// The characters of the field.
        limit: usize,
    },
    /// There is no unit serial number.
    #[error("the serial number is empty")]
    EmptySerial,
    /// The designator is not NAA 6.
    #[error("the designator must be of NAA type 6, but starts with {first:#04x}")]
    Designator {
        /// Its first byte.
        first: u8,
    },
    /// Not a size of logical blocks that initiators take.
    #[error("a block has 512, 1024, 2048 or 4096 bytes, not {0}")]
    BlockSize(u32),
    /// The medium is empty, not a whole number of blocks, or above 2⁶³ − 1 bytes.
    #[error("a medium has a multiple of {block_size} bytes, above 0 and below 2^63, not {size}")]
    Size {
        /// Its bytes.
        size: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The physical block is not the logical block times a power of two up to 2¹⁵.
    #[error("physical blocks of {physical} bytes do not go with logical blocks of {block_size}")]
    PhysicalBlockSize {
        /// Bytes of the physical block.
        physical: u32,
        /// Bytes of the logical block.
        block_size: u32,
    },
    /// Copies could not tell two units of a domain apart.
    #[error("there is a unit with this designator in the copy domain already")]
    Ambiguous,
    /// A limit of 0 would refuse every command.
    #[error("the longest transfer, discard and WRITE SAME must be at least one block, in one descriptor")]
    ZeroLimit,
    /// An optimal transfer is above the longest one, or not of whole physical blocks.
    #[error("an optimal transfer of {blocks} blocks must be of whole physical blocks, and of {max} at most")]
    OptimalTransfer {
        /// The optimal transfer, or its granularity.
        blocks: u32,
        /// The longest one.
        max: u32,
    },
    /// The discard granularity is 0, not of whole blocks or above what one UNMAP may ask for; or the alignment is not
    /// of whole blocks or not below the granularity.
    #[error("discard granularity {granularity} and alignment {alignment} do not go with blocks and limits")]
    Discard {
        /// The granularity.
        granularity: u64,
        /// The alignment.
        alignment: u64,
    },
}

/// A disk as its initiators see it. Shared by all commands in flight: its state is atomic, and each command reads what
/// it needs once.
#[derive(Debug)]
pub struct LogicalUnit {
    identity: Identity,
    geometry: Geometry,
    capabilities: Capabilities,
    blocks: AtomicU64,
    write_cache: AtomicBool,
    descriptor_sense: AtomicBool,
    software_write_protect: AtomicBool,
    stopped: AtomicBool,
    ejected: AtomicBool,
    removal_prevented: AtomicBool,
    capacity_changed: AtomicBool,
    was_reset: AtomicBool,
    job: Arc<Job>,
    statistics: Statistics,
    copies: Arc<Copies>,
    copy_domain: OnceLock<Arc<CopyDomain>>,
}

impl LogicalUnit {
    /// A started unit, with its write cache on if there is one to flush, and fixed format sense.
    ///
    /// # Errors
    /// [`LunError`] says what in the geometry does not fit together.
    pub fn new(identity: Identity, geometry: Geometry, capabilities: Capabilities) -> Result<Self, LunError> {
        geometry.check()?;
        let blocks = geometry.blocks_of(geometry.size)?;
        Ok(Self {
            identity,
            geometry: geometry.normalized(),
            capabilities: capabilities.normalized(),
            blocks: AtomicU64::new(blocks),
            write_cache: AtomicBool::new(true),
            descriptor_sense: AtomicBool::new(false),
            software_write_protect: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
            removal_prevented: AtomicBool::new(false),
            capacity_changed: AtomicBool::new(false),
            was_reset: AtomicBool::new(false),
            statistics: Statistics::default(),
            job: Arc::default(),
            copies: Arc::default(),
            copy_domain: OnceLock::new(),
        })
    }

    /// What initiators have set or may have been told, for the unit that goes on in another process: names and numbers.
    #[must_use]
    pub fn state(&self) -> Vec<(&'static str, u64)> {
        let mut state: Vec<_> = self
            .flags()
            .iter()
            .map(|(name, flag)| (*name, u64::from(flag.load(Ordering::Acquire))))
            .collect();
        state.push(("job", self.job.to_number().into()));
        state
    }

    /// Takes over the state of the unit in another process. False, and nothing is changed, if a name is unknown: that
    /// process knew more of the unit than this one does.
    pub fn restore(&self, state: &[(String, u64)]) -> bool {
        let flags = self.flags();
        let find = |name: &str| flags.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
        if !state.iter().all(|(name, _)| name == "job" || find(name).is_some()) {
            return false;
        }
        for (name, value) in state {
            match find(name) {
                Some(flag) => flag.store(*value != 0, Ordering::Release),
                None => self.job.set_number(u32::try_from(*value).unwrap_or_default()),
            }
        }
        true
    }

    const fn flags(&self) -> [(&'static str, &AtomicBool); 8] {
        [
            ("write cache", &self.write_cache),
            ("descriptor sense", &self.descriptor_sense),
            ("software write protect", &self.software_write_protect),
            ("stopped", &self.stopped),
            ("ejected", &self.ejected),
            ("removal prevented", &self.removal_prevented),
            ("capacity changed", &self.capacity_changed),
            ("was reset", &self.was_reset),
        ]
    }

    /// Looks at a command: its CDB (which may be longer than the command needs) and its data buffer. Whatever the
    /// bytes are, there is an answer, and steps are in range and inside the buffer.
    ///
    /// **Lengths.** A buffer longer than the transfer is used as far as the CDB says. A READ or WRITE whose buffer is
    /// shorter is refused before anything is done (INVALID FIELD IN COMMAND INFORMATION UNIT, the answer that FCP-4
    /// has for it: the CDB is right, the length beside it is not): TCMU has no way to report the overflow, and half a
    /// transfer must not look like a whole one. Other Data-In is truncated to the
    /// allocation length and the buffer; a parameter list that the buffer does not hold is a PARAMETER LIST LENGTH
    /// ERROR.
    pub fn start(&self, cdb: &[u8], buffer: &dyn DataBuffer) -> Next {
        self.admit(cdb)
            .and_then(|command| (command.run)(self, Cdb::new(cdb), buffer))
            .unwrap_or_else(|sense| Next::Done(Reply::check(sense)))
    }

    /// The checks that every command has: it exists, may write, is well-formed, finds the unit ready.
    fn admit(&self, cdb: &[u8]) -> Result<&'static opcodes::Command, Sense> {
        let command = opcodes::find(cdb, self)?;
        if command.reports_attention()
            && let Some(sense) = self.take_attention()
        {
            return Err(sense);
        }
        if command.writes()
            && let Some(sense) = self.is_write_protected()
        {
            return Err(sense);
        }
        command.validate(cdb, self)?;
        self.check_ready(command.readiness()).map(|()| command)
    }

    pub(super) fn check_ready(&self, needed: Readiness) -> Result<(), Sense> {
        let stopped = || match self.is_stopped() {
            true => Some(Sense::LOGICAL_UNIT_NOT_READY_INITIALIZING_COMMAND_REQUIRED),
            false => None,
        };
        let obstacle = match needed {
            Readiness::Always => None,
            Readiness::Loaded => self.absence(),
            Readiness::Idle => self.job.running(),
            Readiness::Started => self.job.running().or_else(|| self.absence()).or_else(stopped),
            Readiness::Medium => self.job.condition().or_else(|| self.absence()).or_else(stopped),
        };
        obstacle.map_or(Ok(()), Err)
    }

    /// Sense data on the wire, in the format that D_SENSE chooses, and its length.
    #[must_use]
    pub fn encode_sense(&self, sense: &Sense) -> ([u8; SENSE_BYTES], usize) {
        sense.encode(if self.has_descriptor_sense() { SenseFormat::Descriptor } else { SenseFormat::Fixed })
    }

    /// Who the unit is.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Sizes and limits; for the present size see [`LogicalUnit::size`].
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What the handler can do.
    #[must_use]
    pub const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Bytes of the medium.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.blocks() * u64::from(self.geometry.block_size)
    }

    /// Changes the size of the medium, and has the next command tell it (CAPACITY DATA HAS CHANGED). The kernel does not
    /// say which initiator a command comes from, so that only one of several hears of it from here. Commands that have begun keep the range they were checked for, except that
    /// later steps of WRITE SAME and UNMAP stop at a new end.
    ///
    /// # Errors
    /// [`LunError::Size`] if it is not a size of a medium.
    pub fn set_size(&self, bytes: u64) -> Result<(), LunError> {
        let blocks = self.geometry.blocks_of(bytes)?;
        if self.blocks.swap(blocks, Ordering::AcqRel) != blocks {
            self.announce_capacity();
        }
        Ok(())
    }

    /// Has the next command tell that the size is another one (CAPACITY DATA HAS CHANGED): for a unit that has it from
    /// the start, and takes the place of one that initiators know.
    pub fn announce_capacity(&self) {
        self.capacity_changed.store(true, Ordering::Release);
    }

    /// Has the next command tell that all is as after a power failure (DEVICE INTERNAL RESET): for a unit that takes the
    /// place of one whose process has died, and does not know what initiators had set there.
    pub fn announce_reset(&self) {
        self.was_reset.store(true, Ordering::Release);
    }

    /// Whether writes may stay in a volatile cache (WCE).
    #[must_use]
    pub fn has_write_cache(&self) -> bool {
        self.capabilities.flush && self.write_cache.load(Ordering::Relaxed)
    }

    /// Turns the write cache on or off; without [`Capabilities::flush`] there is none. What it holds when it is
    /// turned off has still to be flushed.
    pub fn set_write_cache(&self, on: bool) {
        self.write_cache.store(on, Ordering::Relaxed);
    }

    /// Whether sense data is in descriptor format (D_SENSE).
    #[must_use]
    pub fn has_descriptor_sense(&self) -> bool {
        self.descriptor_sense.load(Ordering::Relaxed)
    }

    /// Chooses the sense format.
    pub fn set_descriptor_sense(&self, on: bool) {
        self.descriptor_sense.store(on, Ordering::Relaxed);
    }

    /// Whether an initiator has asked for write protection (SWP).
    #[must_use]
    pub fn has_software_write_protect(&self) -> bool {
        self.software_write_protect.load(Ordering::Relaxed)
    }

    /// Refuses writes, or no longer.
    pub fn set_software_write_protect(&self, on: bool) {
        self.software_write_protect.store(on, Ordering::Relaxed);
    }

    /// LOGICAL UNIT RESET: removal of the medium is allowed again, results of copies are forgotten. Mode parameters stay as they are: an initiator that
    /// has turned the write cache off flushes no more, and must not find it on again.
    pub fn reset(&self) {
        self.set_removal_prevented(false);
        self.copies.reset();
    }

    /// The first one stays; without one, a copy stays within the unit.
    pub(super) fn set_copy_domain(&self, domain: Arc<CopyDomain>) {
        let _ = self.copy_domain.set(domain);
    }

    pub(super) fn copy_domain(&self) -> Option<&Arc<CopyDomain>> {
        self.copy_domain.get()
    }

    pub(super) const fn copies(&self) -> &Arc<Copies> {
        &self.copies
    }

    /// Why nothing can be written, if so.
    pub(super) fn is_write_protected(&self) -> Option<Sense> {
        if !self.capabilities.write {
            Some(Sense::WRITE_PROTECTED)
        } else if self.has_software_write_protect() {
            Some(Sense::SOFTWARE_WRITE_PROTECTED)
        } else {
            None
        }
    }

    /// The unit attention condition, which is told once; a reset before others (SAM-5 5.14).
    pub(super) fn take_attention(&self) -> Option<Sense> {
        // A load first: nearly always there is nothing.
        let take = |flag: &AtomicBool| flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::AcqRel);
        if take(&self.was_reset) {
            Some(Sense::DEVICE_INTERNAL_RESET)
        } else if take(&self.capacity_changed) {
            Some(Sense::CAPACITY_DATA_HAS_CHANGED)
        } else {
            None
        }
    }

    /// What is counted.
    pub(super) const fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Why there is no medium, if there is none.
    pub(super) fn absence(&self) -> Option<Sense> {
        self.ejected.load(Ordering::Acquire).then_some(Sense::MEDIUM_NOT_PRESENT)
    }

    pub(super) fn set_ejected(&self, ejected: bool) {
        self.ejected.store(ejected, Ordering::Release);
    }

    /// Whether PREVENT ALLOW MEDIUM REMOVAL keeps the medium in.
    pub(super) fn is_removal_prevented(&self) -> bool {
        self.removal_prevented.load(Ordering::Acquire)
    }

    pub(super) fn set_removal_prevented(&self, prevented: bool) {
        self.removal_prevented.store(prevented, Ordering::Release);
    }

    /// Whether START STOP UNIT has stopped the unit.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(super) fn set_stopped(&self, stopped: bool) {
        if self.stopped.swap(stopped, Ordering::AcqRel) && !stopped {
            self.statistics.start();
        }
    }

    pub(super) const fn job(&self) -> &Arc<Job> {
        &self.job
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Acquire)
    }

    /// Whether every write has to be made durable before its GOOD, because the cache below is turned off.
    pub(super) fn is_write_through(&self) -> bool {
        self.capabilities.flush && !self.write_cache.load(Ordering::Relaxed)
    }
}
