//! The table of commands: what exists, how its CDB looks, who answers. Dispatch, the check of reserved bits and REPORT
//! SUPPORTED OPERATION CODES come from it, so that they cannot disagree.
//!
//! A new command is a new row. Rows are ordered by operation code and service action.

use super::cdb::{Cdb, invalid_field};
use super::{
    DataBuffer, LogicalUnit, Next, Sense, capacity, copy, defects, format, inquiry, lba_status, log, luns,
    mode, mode_select, modify, power, ready, sanitize, supported, transfer, unmap, verify, write_same,
};

/// Which way a command's data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// No data.
    None,
    /// To the initiator.
    In,
    /// From the initiator.
    Out,
}

/// What a command (or a bit of its CDB) needs from the handler; where it is missing, the command does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Feature {
    /// Discarding.
    Discard,
    /// Discarding as a way to write zeroes.
    DiscardZeroes,
    /// Writes that are whole or not done, whatever happens.
    AtomicWrite,
    /// A medium that can be ejected.
    Removable,
}

impl Feature {
    const fn is_in(self, lu: &LogicalUnit) -> bool {
        match self {
            Self::Discard => lu.capabilities().discard,
            Self::DiscardZeroes => lu.capabilities().discard_zeroes,
            Self::AtomicWrite => lu.geometry().max_atomic_write_blocks > 0,
            Self::Removable => lu.geometry().removable,
        }
    }
}

/// The state in which a command finds the unit, or is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Readiness {
    /// Any.
    Always,
    /// There is a medium.
    Loaded,
    /// No FORMAT UNIT and no SANITIZE runs.
    Idle,
    /// The same, there is a medium, and the unit is not stopped.
    Started,
    /// The same, and the last FORMAT UNIT or SANITIZE did not fail.
    Medium,
}

/// How a command ends or goes on, or why it cannot begin.
pub(super) type Outcome = Result<Next, Sense>;
type Run = fn(&LogicalUnit, Cdb<'_>, &dyn DataBuffer) -> Outcome;

/// A row of the table.
#[derive(Debug)]
pub struct Command {
    name: &'static str,
    /// The CDB usage data of REPORT SUPPORTED OPERATION CODES: operation code, service action, and a one for each bit
    /// that is looked at. As long as the CDB.
    usage: &'static [u8],
    service_action: Option<u16>,
    direction: Direction,
    readiness: Readiness,
    writes: bool,
    kernel: bool,
    needs: Option<Feature>,
    /// Bits of a byte of `usage` that are reserved without this feature.
    optional: Option<(usize, u8, Feature)>,
    pub(super) run: Run,
}

impl Command {
    const fn new(name: &'static str, direction: Direction, usage: &'static [u8], run: Run) -> Self {
        Self {
            name,
            usage,
            service_action: None,
            direction,
            readiness: Readiness::Always,
            writes: false,
            kernel: false,
            needs: None,
            optional: None,
            run,
        }
    }

    /// One of several commands with the same operation code.
    const fn action(mut self, service_action: u16) -> Self {
        self.service_action = Some(service_action);
        self
    }

    /// Refused unless the unit is in this state.
    const fn when(mut self, readiness: Readiness) -> Self {
        self.readiness = readiness;
        self
    }

    /// Refused while the medium cannot be used.
    const fn on_medium(self) -> Self {
        self.when(Readiness::Medium)
    }

    /// Changes the medium: refused if the unit is write protected.
    const fn writing(mut self) -> Self {
        self.writes = true;
        self.on_medium()
    }

    /// The kernel's target core answers before the unit sees the command: it is listed, and nothing more. Where the
    /// kernel is told not to (`pgr_support`, `emulate_pr`), it is an invalid command.
    const fn by_kernel(name: &'static str, direction: Direction, usage: &'static [u8]) -> Self {
        Self { kernel: true, ..Self::new(name, direction, usage, |_, _, _| Err(Sense::INVALID_OPCODE)) }
    }

    const fn needing(mut self, feature: Feature) -> Self {
        self.needs = Some(feature);
        self
    }

    const fn with_optional(mut self, byte: usize, bits: u8, feature: Feature) -> Self {
        self.optional = Some((byte, bits, feature));
        self
    }

    /// Its name in the standard.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Which way its data goes.
    #[must_use]
    pub const fn direction(&self) -> Direction {
        self.direction
    }

    /// Bytes of its CDB.
    #[must_use]
    pub const fn cdb_length(&self) -> usize {
        self.usage.len()
    }

    pub(super) const fn opcode(&self) -> u8 {
        self.usage[0]
    }

    pub(super) const fn service_action(&self) -> Option<u16> {
        self.service_action
    }

    pub(super) const fn readiness(&self) -> Readiness {
        self.readiness
    }

    /// Whether it may be answered with a unit attention instead (SAM-5): INQUIRY and REPORT LUNS never are, and REQUEST
    /// SENSE has it as its data.
    pub(super) const fn reports_attention(&self) -> bool {
        !matches!(self.opcode(), 0x03 | 0x12 | 0xa0)
    }

    pub(super) const fn writes(&self) -> bool {
        self.writes
    }

    pub(super) fn exists(&self, lu: &LogicalUnit) -> bool {
        self.needs.is_none_or(|feature| feature.is_in(lu))
    }

    /// A byte of the usage data of this unit.
    pub(super) fn usage(&self, byte: usize, lu: &LogicalUnit) -> u8 {
        match self.optional {
            Some((at, bits, feature)) if at == byte && !feature.is_in(lu) => self.usage[byte] & !bits,
            _ => self.usage[byte],
        }
    }

    /// Refuses a CDB that is too short, or has a bit set that means nothing here: an initiator that asks for
    /// something and is not understood must not hear GOOD. This covers CONTROL (NACA is not supported, LINK is
    /// obsolete) and the group number.
    ///
    /// One exception: bits 7 to 5 of byte 1 of a 6-byte CDB, where they are not used, had the LUN in SCSI-2. An old
    /// initiator sets them before it knows the version of the unit, and they ask for nothing.
    pub(super) fn validate(&self, cdb: &[u8], lu: &LogicalUnit) -> Result<(), Sense> {
        let length = self.usage.len();
        let cdb = cdb.get(..length).ok_or_else(|| invalid_field(cdb.len(), 7))?;
        // ADDITIONAL CDB LENGTH: a command of another length is another command.
        if self.opcode() == VARIABLE_LENGTH && cdb[7] != self.usage[7] {
            return Err(invalid_field(7, 7));
        }
        let stray =
            cdb.iter().zip(self.usage).skip(1).fold(0, |stray, (byte, usage)| stray | (byte & !usage));
        if stray == 0 && self.optional.is_none() {
            return Ok(());
        }
        for (at, byte) in cdb.iter().enumerate().skip(1) {
            let mut usage = self.usage(at, lu);
            if length == 6 && at == 1 && usage & OBSOLETE_LUN == 0 {
                usage |= OBSOLETE_LUN;
            }
            let stray = byte & !usage;
            if stray != 0 {
                return Err(invalid_field(at, 7 - stray.leading_zeros() as u8));
            }
        }
        Ok(())
    }
}

const OBSOLETE_LUN: u8 = 0xe0;
const VARIABLE_LENGTH: u8 = 0x7f;

/// Byte and most significant bit of the SERVICE ACTION field.
const fn service_action_field(opcode: u8) -> (usize, u8) {
    if opcode == VARIABLE_LENGTH { (8, 7) } else { (1, 4) }
}

/// Every command of the unit, in order.
pub(super) fn all(lu: &LogicalUnit) -> impl Iterator<Item = &'static Command> {
    TABLE.iter().filter(|row| row.exists(lu))
}

/// The commands of the unit with this operation code.
pub(super) fn with_opcode(opcode: u8, lu: &LogicalUnit) -> impl Iterator<Item = &'static Command> + Clone {
    let (first, end) = INDEX[usize::from(opcode)];
    TABLE[usize::from(first)..usize::from(end)].iter().filter(|row| row.exists(lu))
}

/// The row of a CDB. An unknown operation code is an invalid command, an unknown service action of a known one is an
/// invalid field (SPC-5, sense data of unsupported commands).
///
/// # Errors
/// INVALID COMMAND OPERATION CODE or INVALID FIELD IN CDB.
pub fn find(cdb: &[u8], lu: &LogicalUnit) -> Result<&'static Command, Sense> {
    let &opcode = cdb.first().ok_or(Sense::INVALID_OPCODE)?;
    let mut rows = with_opcode(opcode, lu).filter(|row| !row.kernel);
    let first = rows.clone().next().ok_or(Sense::INVALID_OPCODE.at_cdb(0, 7))?;
    if first.service_action.is_none() {
        return Ok(first);
    }
    let (byte, bit) = service_action_field(opcode);
    let wanted = match opcode {
        VARIABLE_LENGTH => cdb.get(8..10).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]])),
        _ => cdb.get(1).map(|byte| u16::from(byte & 0x1f)),
    };
    rows.find(|row| row.service_action == wanted).ok_or_else(|| invalid_field(byte, bit))
}

use Direction::{In, None as NoData, Out};

#[rustfmt::skip]
static TABLE: &[Command] = &[
    Command::new("TEST UNIT READY", NoData, &[0x00, 0, 0, 0, 0, 0], ready::test_unit_ready)
        .on_medium(),
    Command::new("REQUEST SENSE", In, &[0x03, 0x01, 0, 0, 0xff, 0], ready::request_sense),
    Command::new("FORMAT UNIT", Out, &[0x04, 0xff, 0, 0, 0, 0], format::format_unit)
        .writing().when(Readiness::Started),
    Command::new("READ(6)", In, &[0x08, 0x1f, 0xff, 0xff, 0xff, 0], transfer::read::<6>)
        .on_medium(),
    Command::new("WRITE(6)", Out, &[0x0a, 0x1f, 0xff, 0xff, 0xff, 0], transfer::write::<6>)
        .writing(),
    Command::new("INQUIRY", In, &[0x12, 0x01, 0xff, 0xff, 0xff, 0], inquiry::inquiry),
    Command::new("MODE SELECT(6)", Out, &[0x15, 0x11, 0, 0, 0xff, 0], mode_select::mode_select_6)
        .when(Readiness::Idle),
    Command::by_kernel("RESERVE(6)", NoData, &[0x16, 0, 0, 0, 0, 0]),
    Command::by_kernel("RELEASE(6)", NoData, &[0x17, 0, 0, 0, 0, 0]),
    Command::new("MODE SENSE(6)", In, &[0x1a, 0x08, 0xff, 0xff, 0xff, 0], mode::mode_sense_6),
    Command::new("START STOP UNIT", NoData, &[0x1b, 0x01, 0, 0, 0xf7, 0], power::start_stop_unit)
        .when(Readiness::Idle).with_optional(4, 0x02, Feature::Removable),
    Command::new("PREVENT ALLOW MEDIUM REMOVAL", NoData, &[0x1e, 0, 0, 0, 0x03, 0], power::prevent_allow)
        .needing(Feature::Removable),
    Command::new("READ CAPACITY(10)", In, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], capacity::read_capacity_10)
        .when(Readiness::Loaded),
    Command::new("READ(10)", In,
        &[0x28, 0xfa, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], transfer::read::<10>)
        .on_medium(),
    Command::new("WRITE(10)", Out,
        &[0x2a, 0xfa, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], transfer::write::<10>)
        .writing(),
    Command::new("WRITE AND VERIFY(10)", Out,
        &[0x2e, 0xf6, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], verify::write_and_verify::<10>)
        .writing(),
    Command::new("VERIFY(10)", Out, &[0x2f, 0xf6, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], verify::verify::<10>)
        .on_medium(),
    Command::new("PRE-FETCH(10)", NoData,
        &[0x34, 0x02, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], transfer::prefetch::<10>)
        .on_medium(),
    Command::new("SYNCHRONIZE CACHE(10)", NoData,
        &[0x35, 0x06, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], transfer::synchronize_cache::<10>)
        .on_medium(),
    Command::new("READ DEFECT DATA(10)", In,
        &[0x37, 0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 0], defects::read_defect_data_10)
        .on_medium(),
    Command::new("WRITE SAME(10)", Out,
        &[0x41, 0xe8, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0], write_same::write_same::<10>)
        .writing().with_optional(1, 0x08, Feature::DiscardZeroes),
    Command::new("UNMAP", Out, &[0x42, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0], unmap::unmap)
        .writing().needing(Feature::Discard),
    Command::new("SANITIZE, OVERWRITE", Out,
        &[0x48, 0xa1, 0, 0, 0, 0, 0, 0xff, 0xff, 0], sanitize::overwrite)
        .action(0x01).writing().when(Readiness::Started),
    Command::new("SANITIZE, BLOCK ERASE", NoData,
        &[0x48, 0xa2, 0, 0, 0, 0, 0, 0xff, 0xff, 0], sanitize::block_erase)
        .action(0x02).writing().when(Readiness::Started).needing(Feature::Discard),
    Command::new("SANITIZE, EXIT FAILURE MODE", NoData,
        &[0x48, 0xbf, 0, 0, 0, 0, 0, 0xff, 0xff, 0], sanitize::exit_failure_mode)
        .action(0x1f).writing().when(Readiness::Started),
    Command::new("LOG SELECT", Out, &[0x4c, 0x03, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0], log::log_select),
    Command::new("LOG SENSE", In,
        &[0x4d, 0x01, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, 0], log::log_sense),
    Command::new("MODE SELECT(10)", Out,
        &[0x55, 0x11, 0, 0, 0, 0, 0, 0xff, 0xff, 0], mode_select::mode_select_10)
        .when(Readiness::Idle),
    Command::by_kernel("RESERVE(10)", NoData, &[0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    Command::by_kernel("RELEASE(10)", NoData, &[0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    Command::new("MODE SENSE(10)", In,
        &[0x5a, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0], mode::mode_sense_10),
    Command::by_kernel("PERSISTENT RESERVE IN, READ KEYS", In, &[0x5e, 0x00, 0, 0, 0, 0, 0, 0xff, 0xff, 0])
        .action(0x00),
    Command::by_kernel("PERSISTENT RESERVE IN, READ RESERVATION", In, &[0x5e, 0x01, 0, 0, 0, 0, 0, 0xff, 0xff, 0])
        .action(0x01),
    Command::by_kernel("PERSISTENT RESERVE IN, REPORT CAPABILITIES", In, &[0x5e, 0x02, 0, 0, 0, 0, 0, 0xff, 0xff, 0])
        .action(0x02),
    Command::by_kernel("PERSISTENT RESERVE IN, READ FULL STATUS", In, &[0x5e, 0x03, 0, 0, 0, 0, 0, 0xff, 0xff, 0])
        .action(0x03),
    Command::by_kernel("PERSISTENT RESERVE OUT, REGISTER", Out,
        &[0x5f, 0x00, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x00),
    Command::by_kernel("PERSISTENT RESERVE OUT, RESERVE", Out,
        &[0x5f, 0x01, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x01),
    Command::by_kernel("PERSISTENT RESERVE OUT, RELEASE", Out,
        &[0x5f, 0x02, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x02),
    Command::by_kernel("PERSISTENT RESERVE OUT, CLEAR", Out,
        &[0x5f, 0x03, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x03),
    Command::by_kernel("PERSISTENT RESERVE OUT, PREEMPT", Out,
        &[0x5f, 0x04, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x04),
    Command::by_kernel("PERSISTENT RESERVE OUT, PREEMPT AND ABORT", Out,
        &[0x5f, 0x05, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x05),
    Command::by_kernel("PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY", Out,
        &[0x5f, 0x06, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x06),
    Command::by_kernel("PERSISTENT RESERVE OUT, REGISTER AND MOVE", Out,
        &[0x5f, 0x07, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0])
        .action(0x07),
    Command::new("READ(32)", In,
        &[0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x09, 0xfa, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
          0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], transfer::read::<32>)
        .action(0x09).on_medium(),
    Command::new("VERIFY(32)", Out,
        &[0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x0a, 0xf6, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
          0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], verify::verify::<32>)
        .action(0x0a).on_medium(),
    Command::new("WRITE(32)", Out,
        &[0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x0b, 0xfa, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
          0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], transfer::write::<32>)
        .action(0x0b).writing(),
    Command::new("WRITE AND VERIFY(32)", Out,
        &[0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x0c, 0xf6, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
          0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], verify::write_and_verify::<32>)
        .action(0x0c).writing(),
    Command::new("WRITE SAME(32)", Out,
        &[0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x0d, 0xe9, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
          0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], write_same::write_same::<32>)
        .action(0x0d).writing().with_optional(10, 0x08, Feature::DiscardZeroes),
    Command::new("EXTENDED COPY(LID1)", Out,
        &[0x83, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], copy::extended_copy)
        .action(0x00).on_medium(),
    Command::new("RECEIVE COPY STATUS(LID1)", In,
        &[0x84, 0x00, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], copy::copy_status)
        .action(0x00),
    Command::new("RECEIVE COPY OPERATING PARAMETERS", In,
        &[0x84, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], copy::operating_parameters)
        .action(0x03),
    Command::new("RECEIVE COPY FAILURE DETAILS(LID1)", In,
        &[0x84, 0x04, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], copy::failed_segment_details)
        .action(0x04),
    Command::new("READ(16)", In,
        &[0x88, 0xfa, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        transfer::read::<16>)
        .on_medium(),
    Command::new("COMPARE AND WRITE", Out,
        &[0x89, 0xfa, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0, 0],
        modify::compare_and_write)
        .writing(),
    Command::new("WRITE(16)", Out,
        &[0x8a, 0xfa, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        transfer::write::<16>)
        .writing(),
    Command::new("ORWRITE(16)", Out,
        &[0x8b, 0xfa, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], modify::orwrite)
        .writing(),
    Command::new("WRITE AND VERIFY(16)", Out,
        &[0x8e, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        verify::write_and_verify::<16>)
        .writing(),
    Command::new("VERIFY(16)", Out,
        &[0x8f, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], verify::verify::<16>)
        .on_medium(),
    Command::new("PRE-FETCH(16)", NoData,
        &[0x90, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], transfer::prefetch::<16>)
        .on_medium(),
    Command::new("SYNCHRONIZE CACHE(16)", NoData,
        &[0x91, 0x06, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        transfer::synchronize_cache::<16>)
        .on_medium(),
    Command::new("WRITE SAME(16)", Out,
        &[0x93, 0xe9, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        write_same::write_same::<16>)
        .writing().with_optional(1, 0x08, Feature::DiscardZeroes),
    Command::new("WRITE ATOMIC(16)", Out,
        &[0x9c, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0],
        transfer::write_atomic)
        .writing().needing(Feature::AtomicWrite),
    Command::new("READ CAPACITY(16)", In,
        &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], capacity::read_capacity_16)
        .action(0x10).when(Readiness::Loaded),
    Command::new("GET LBA STATUS", In,
        &[0x9e, 0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        lba_status::get_lba_status)
        .action(0x12).on_medium(),
    Command::new("REPORT LUNS", In,
        &[0xa0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], luns::report_luns),
    Command::new("REPORT SUPPORTED OPERATION CODES", In,
        &[0xa3, 0x0c, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], supported::operation_codes)
        .action(0x0c),
    Command::new("REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", In,
        &[0xa3, 0x0d, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], supported::task_management_functions)
        .action(0x0d),
    Command::new("READ(12)", In,
        &[0xa8, 0xfa, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], transfer::read::<12>)
        .on_medium(),
    Command::new("WRITE(12)", Out,
        &[0xaa, 0xfa, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], transfer::write::<12>)
        .writing(),
    Command::new("WRITE AND VERIFY(12)", Out,
        &[0xae, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], verify::write_and_verify::<12>)
        .writing(),
    Command::new("VERIFY(12)", Out,
        &[0xaf, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], verify::verify::<12>)
        .on_medium(),
    Command::new("READ DEFECT DATA(12)", In,
        &[0xb7, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], defects::read_defect_data_12)
        .on_medium(),
];

/// First and end of the rows of each operation code. Building it proves the table: rows in order, service actions in
/// their place in the usage data, CDB lengths that the operation code's group has.
static INDEX: [(u8, u8); 256] = {
    let mut index = [(0, 0); 256];
    let mut at = 0;
    while at < TABLE.len() {
        let row = &TABLE[at];
        let opcode = row.opcode() as usize;
        let (first, end) = index[opcode];
        if end == 0 {
            assert!(at == 0 || TABLE[at - 1].opcode() < row.opcode(), "rows are ordered by operation code");
            index[opcode] = (at as u8, at as u8 + 1);
        } else {
            assert!(end as usize == at, "rows of one operation code are together");
            index[opcode] = (first, end + 1);
        }
        let length = match row.opcode() >> 5 {
            0 => 6,
            1 | 2 => 10,
            4 => 16,
            5 => 12,
            _ => row.usage.len(),
        };
        assert!(row.usage.len() == length, "the CDB is as long as its group says");
        if let Some(action) = row.service_action {
            let stated = match service_action_field(row.opcode()) {
                (8, _) => (row.usage[8] as u16) << 8 | row.usage[9] as u16,
                (byte, _) => (row.usage[byte] & 0x1f) as u16,
            };
            assert!(stated == action, "the usage data has the service action");
        }
        at += 1;
    }
    index
};

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::super::cdb::LOOKED_AT;
    use super::super::{Capabilities, Geometry, Identity};
    use super::*;

    #[derive(Debug)]
    struct Memory(RefCell<Vec<u8>>);

    impl DataBuffer for Memory {
        fn len(&self) -> usize {
            self.0.borrow().len()
        }

        fn read(&self, offset: usize, into: &mut [u8]) {
            into.copy_from_slice(&self.0.borrow()[offset..offset + into.len()]);
        }

        fn write(&self, offset: usize, from: &[u8]) {
            self.0.borrow_mut()[offset..offset + from.len()].copy_from_slice(from);
        }
    }

    fn unit() -> LogicalUnit {
        let all = Capabilities {
            write: true,
            flush: true,
            native_fua: true,
            discard: true,
            discard_zeroes: true,
            write_zeroes: true,
            extents: true,
        };
        let mut naa = [0; 16];
        naa[0] = 0x60;
        let identity = Identity::new("v", "p", "r", "s", naa).unwrap();
        let geometry =
            Geometry { removable: true, max_atomic_write_blocks: 8, ..Geometry::new(512, 64 * 512) };
        let unit = LogicalUnit::new(identity, geometry, all).unwrap();
        // A copy of nothing, for RECEIVE COPY STATUS to tell of.
        let before = LOOKED_AT.get();
        let copied = copy::extended_copy(
            &unit,
            Cdb::new(&[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0]),
            &Memory(RefCell::new(vec![0; 16])),
        );
        assert!(copied.is_ok());
        LOOKED_AT.set(before);
        unit
    }

    /// Bits that a command may have set and that nobody looks at, with the reason.
    fn without_effect(name: &str, byte: usize) -> u8 {
        match (name, byte) {
            // CMPLST and DEFECT LIST FORMAT: no list has defects in it.
            ("FORMAT UNIT", 1) => 0x0f,
            // IMMED allows an early answer and does not ask for one; what SYNC_NV leaves out is written, too.
            ("START STOP UNIT", 1) => 0x01,
            ("PRE-FETCH(10)" | "PRE-FETCH(16)", 1) => 0x02,
            ("SYNCHRONIZE CACHE(10)" | "SYNCHRONIZE CACHE(16)", 1) => 0x06,
            // Which failures a SANITIZE may leave by itself is of no meaning for leaving it.
            ("SANITIZE, EXIT FAILURE MODE", 1) => 0xa0,
            // What is expected of protection information, which there is none of.
            (name, 20..=27) if name.ends_with("(32)") => 0xff,
            _ => 0,
        }
    }

    /// The usage data is what initiators are told; this is what becomes of it.
    #[test]
    fn the_usage_data_is_what_is_looked_at() {
        let mut runner = TestRunner::deterministic();
        for command in all(&unit()).filter(|command| !command.kernel) {
            LOOKED_AT.set([0; 32]);
            for attempt in 0..200 {
                let mut noise =
                    || prop::collection::vec(any::<u8>(), 64).new_tree(&mut runner).unwrap().current();
                let (cdb, sparse, data) = (noise(), noise(), noise());
                let mut cdb: Vec<u8> = (0..command.cdb_length())
                    .map(|at| {
                        let fixed = at == 0
                            || at == 1 && command.service_action.is_some()
                            || command.opcode() == 0x7f && at < 10;
                        let random =
                            cdb[at] & if attempt % 2 == 0 { 0xff } else { sparse[at] & sparse[32 + at] & 3 };
                        if fixed {
                            command.usage[at] & if at == 1 { 0x1f } else { 0xff }
                        } else {
                            random & command.usage[at]
                        }
                    })
                    .collect();
                let length = [0, 24, 512, 1024, 4096][attempt % 5];
                let mut data: Vec<u8> = data.iter().copied().cycle().take(length).collect();
                if command.name == "SANITIZE, OVERWRITE" && length > 8 {
                    // One pass of a pattern of four bytes.
                    cdb[7..9].copy_from_slice(&[0, 8]);
                    data[..4].copy_from_slice(&[1, 0, 0, 4]);
                }
                if command.name == "LOG SENSE" && length > 8 {
                    // The list of pages.
                    cdb[1..4].copy_from_slice(&[0, 0x40, 0]);
                }
                if command.name == "RECEIVE COPY STATUS(LID1)" {
                    cdb[2] &= 0x01;
                }
                let memory = Memory(RefCell::new(data));
                // A unit of its own: some commands end the readiness for others.
                let _ = (command.run)(&unit(), Cdb::new(&cdb), &memory);
            }
            let looked_at = LOOKED_AT.get();
            for (at, &usage) in command.usage.iter().enumerate().skip(1) {
                let action = match (command.service_action, at) {
                    (Some(_), 1) if command.opcode() != 0x7f => 0x1f,
                    (Some(_), 7..=9) if command.opcode() == 0x7f => 0xff,
                    _ => 0,
                };
                let usage = usage & !action;
                let ignored = without_effect(command.name, at);
                let missed = usage & !looked_at[at] & !ignored;
                assert_eq!(missed, 0, "{}: bits of byte {at} that nobody looks at", command.name);
                // A field of some bits is taken out of its byte; but no byte is looked at for nothing.
                let secret = looked_at[at] != 0 && usage == 0 && action == 0;
                assert!(!secret, "{}: byte {at} is looked at, which is not said", command.name);
            }
        }
    }
}
