//! EXTENDED COPY (LID1) and RECEIVE COPY RESULTS (LID1): blocks go from one unit to another, or within one, without
//! passing the initiator.
//!
//! A copy is a sequence of reads and writes, each a step for the unit that [`Step::unit`] names. All segments are checked
//! before the first step: what can be known to fail changes nothing. Whatever ends a copy later names the segment.
//!
//! The kernel does not say which initiator a command comes from. So results are kept by list identifier alone, the latest
//! one of each; and one initiator that uses an identifier another one uses is not refused, as it would have to be by
//! SPC-4 only if it were the same.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::cdb::{Cdb, invalid_field};
use super::lun::LunError;
use super::opcodes::{Outcome, Readiness};
use super::sense::{Forwarded, KeySpecific, Role, SenseFormat};
use super::task::{Stage, Task};
use super::transfer::Durability;
use super::{
    ByteOffset, DataBuffer, LogicalUnit, Next, Reply, Sense, Status, Step, StepBuffer, StepResult, Verb,
};

/// Units between which initiators may copy: who can send a command to one of them can read and write all others.
#[derive(Debug, Default)]
pub struct CopyDomain(Mutex<BTreeMap<[u8; 16], Weak<LogicalUnit>>>);

impl CopyDomain {
    /// Takes a unit in.
    ///
    /// # Errors
    /// [`LunError::Ambiguous`]: there is one with this name.
    pub fn join(self: &Arc<Self>, unit: &Arc<LogicalUnit>) -> Result<(), LunError> {
        let naa = *unit.identity().naa();
        let mut units = lock(&self.0);
        if units.get(&naa).is_some_and(|unit| unit.strong_count() > 0) {
            return Err(LunError::Ambiguous);
        }
        units.insert(naa, Arc::downgrade(unit));
        unit.set_copy_domain(self.clone());
        Ok(())
    }

    /// Lets a unit go: copies that are under way do not find it any more.
    pub fn leave(&self, unit: &LogicalUnit) {
        lock(&self.0).remove(unit.identity().naa());
    }

    fn find(&self, naa: &[u8; 16]) -> Option<Arc<LogicalUnit>> {
        lock(&self.0).get(naa)?.upgrade()
    }
}

pub(super) const MAX_CSCD_DESCRIPTORS: u16 = 16;
pub(super) const MAX_SEGMENT_DESCRIPTORS: u16 = 256;
pub(super) const MAX_DESCRIPTOR_BYTES: u32 = 8192;
/// All that a segment can say: 65535 blocks of 4096 bytes.
pub(super) const MAX_SEGMENT_BYTES: u32 = 0xffff * 4096;
/// Copies at a time: each has so much memory as it moves at once.
pub(super) const MAX_CONCURRENT: u8 = 16;
pub(super) const BLOCK_TO_BLOCK: u8 = 0x02;
pub(super) const IDENTIFICATION: u8 = 0xe4;

/// How much is read and written at once.
const CHUNK_BYTES: u64 = 1 << 20;
const HEADER: usize = 16;
const CSCD_BYTES: usize = 32;
const BLOCK_TO_BLOCK_BYTES: usize = 28;

/// The copies of a unit: those that run, and what became of the others.
#[derive(Debug, Default)]
pub(super) struct Copies {
    running: AtomicUsize,
    results: Mutex<BTreeMap<u8, Arc<Mutex<Progress>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    /// Forgets the results: a logical unit reset ends the claim to them.
    pub(super) fn reset(&self) {
        lock(&self.results).clear();
    }
}

#[derive(Debug, Default)]
struct Progress {
    segments: u16,
    bytes: u64,
    /// `None` while it runs; then the status and sense data of a failure, or nothing.
    end: Option<Option<(Status, Vec<u8>)>>,
}

/// One copy among those that run. Dropped before its end, it has failed: it was aborted.
#[derive(Debug)]
struct Running {
    unit: Arc<Copies>,
    progress: Arc<Mutex<Progress>>,
}

impl Running {
    /// Begins a copy, unless too many run.
    fn begin(lu: &LogicalUnit, list: Option<u8>) -> Option<Self> {
        let unit = lu.copies().clone();
        if unit.running.fetch_add(1, Ordering::AcqRel) >= MAX_CONCURRENT.into() {
            unit.running.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        let progress = Arc::<Mutex<Progress>>::default();
        if let Some(list) = list {
            lock(&unit.results).insert(list, progress.clone());
        }
        Some(Self { unit, progress })
    }

    fn end(&self, failure: Option<(Status, Vec<u8>)>) {
        lock(&self.progress).end.get_or_insert(failure);
    }

    /// Ends the copy with this reply.
    fn fail(&self, reply: Reply) -> Reply {
        let sense = reply.sense.map_or_else(Vec::new, |sense| {
            let (bytes, length) = sense.encode(SenseFormat::Fixed);
            bytes[..length].to_vec()
        });
        self.end(Some((reply.status, sense)));
        reply
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(Some((Status::TaskAborted, Vec::new())));
        self.unit.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A copy source or destination: `None` is the unit that was asked.
type Party = Option<Arc<LogicalUnit>>;

/// What a CSCD descriptor stands for.
#[derive(Debug, Clone)]
enum Cscd {
    Unit(Party),
    /// Nothing that we know, or that allows copies.
    Unreachable,
    /// Not a disk.
    WrongType,
}

/// Bytes that go from one place to another.
#[derive(Debug)]
struct Segment {
    source: Party,
    destination: Party,
    from: u64,
    to: u64,
    length: u64,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Reading,
    Writing,
    Flushing,
}

/// An EXTENDED COPY: `done` bytes of segment `index` are copied, and one step of it is under way.
#[derive(Debug)]
pub(super) struct ExtendedCopy {
    segments: Vec<Segment>,
    index: usize,
    done: u64,
    phase: Phase,
    wrote: bool,
    /// Something of this segment was written into a cache.
    cached: bool,
    running: Running,
}

/// EXTENDED COPY (LID1), with segments from block device to block device and CSCDs named by an NAA designator: what
/// Linux, ESXi and sg_xcopy send.
pub(super) fn extended_copy(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const LIST_LENGTH: u16 = 10;
    let too_short = Sense::PARAMETER_LIST_LENGTH_ERROR.at_cdb(LIST_LENGTH, 7);
    let length = cdb.u32(LIST_LENGTH.into()) as usize;
    if length == 0 {
        return Ok(Next::Done(Reply::good(0)));
    }
    if length < HEADER || length > HEADER + MAX_DESCRIPTOR_BYTES as usize || length > buffer.len() {
        return Err(too_short);
    }
    let mut list = vec![0; length];
    buffer.read(0, &mut list);
    let (header, descriptors) = list.split_at(HEADER);
    let identifier = list_identifier(header)?;
    let (cscds, segments) = (u16_at(header, 2).into(), u32_at(header, 8) as usize);
    if u32_at(header, 12) != 0 {
        return Err(Sense::INLINE_DATA_LENGTH_EXCEEDED.at_parameter(12));
    }
    let (cscds, rest) = descriptors.split_at_checked(cscds).ok_or(too_short)?;
    let cscds = cscds_of(lu, cscds)?;
    let segments_at = descriptors.len() - rest.len() + HEADER;
    let segments = rest.get(..segments).ok_or(too_short)?;
    let segments = segment_descriptors(segments, segments_at)?;
    let plan = segments
        .into_iter()
        .enumerate()
        .map(|(number, (at, descriptor))| plan_segment(lu, &cscds, descriptor, at, number as u16))
        .collect::<Result<Vec<_>, _>>();
    if let Err(Refusal::Command(sense)) = plan {
        return Err(sense);
    }
    let Some(running) = Running::begin(lu, identifier) else {
        return Ok(Next::Done(Reply::status(Status::TaskSetFull)));
    };
    Ok(match plan {
        Ok(segments) => {
            let copy = ExtendedCopy {
                segments,
                index: 0,
                done: 0,
                phase: Phase::Reading,
                wrote: false,
                cached: false,
                running,
            };
            Box::new(copy).next(lu)
        }
        Err(Refusal::Command(sense) | Refusal::Copy(sense)) => Next::Done(running.fail(Reply::check(sense))),
    })
}

/// The list identifier, if results are to be kept under one.
fn list_identifier(header: &[u8]) -> Result<Option<u8>, Sense> {
    const PRIORITY: u8 = 0x07;
    const LIST_ID_USAGE: u8 = 0x18;
    const HOLD: u8 = 0x00;
    const DISCARD: u8 = 0x10;
    const NO_IDENTIFIER: u8 = 0x18;
    let invalid = |at: u16| Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at));
    if header[1] & !(PRIORITY | LIST_ID_USAGE) != 0 {
        return invalid(1);
    }
    if let Some(at) = header[4..8].iter().position(|&byte| byte != 0) {
        return invalid(4 + at as u16);
    }
    match header[1] & LIST_ID_USAGE {
        HOLD | DISCARD => Ok(Some(header[0])),
        NO_IDENTIFIER if header[0] == 0 => Ok(None),
        NO_IDENTIFIER => invalid(0),
        _ => invalid(1),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// The CSCD descriptors, which follow the header.
fn cscds_of(lu: &LogicalUnit, bytes: &[u8]) -> Result<Vec<Cscd>, Sense> {
    let (descriptors, rest) = bytes.as_chunks::<CSCD_BYTES>();
    if !rest.is_empty() {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(2));
    }
    if descriptors.len() > MAX_CSCD_DESCRIPTORS.into() {
        return Err(Sense::TOO_MANY_TARGET_DESCRIPTORS.at_parameter(2));
    }
    descriptors
        .iter()
        .enumerate()
        .map(|(number, descriptor)| cscd(lu, descriptor, (HEADER + number * CSCD_BYTES) as u16))
        .collect()
}

/// An identification descriptor CSCD descriptor. The LU ID TYPE is reserved in it; PAD means nothing where a segment is
/// of whole blocks on both sides.
fn cscd(lu: &LogicalUnit, descriptor: &[u8; CSCD_BYTES], at: u16) -> Result<Cscd, Sense> {
    const NUL: u8 = 0x20;
    const DISK: u8 = 0;
    const BINARY: u8 = 1;
    const LOGICAL_UNIT_NAA: u8 = 0x03;
    if descriptor[0] != IDENTIFICATION {
        return Err(Sense::UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE.at_parameter(at));
    }
    if descriptor[1] & NUL != 0 {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at + 1));
    }
    if descriptor[1] & 0x1f != DISK {
        return Ok(Cscd::WrongType);
    }
    let (code_set, kind) = (descriptor[4] & 0x0f, descriptor[5] & 0x3f);
    let Some(naa) = descriptor[8..].first_chunk::<16>() else { return Ok(Cscd::Unreachable) };
    if (code_set, kind, descriptor[7]) != (BINARY, LOGICAL_UNIT_NAA, 16) {
        return Ok(Cscd::Unreachable);
    }
    let party = if naa == lu.identity().naa() {
        None
    } else {
        match lu.copy_domain().and_then(|domain| domain.find(naa)) {
            Some(unit) => Some(unit),
            None => return Ok(Cscd::Unreachable),
        }
    };
    let block_size = unit_of(&party, lu).geometry().block_size;
    if u32_at(descriptor, 28) & 0x00ff_ffff != block_size {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at + 29));
    }
    Ok(Cscd::Unit(party))
}

fn unit_of<'a>(party: &'a Party, lu: &'a LogicalUnit) -> &'a LogicalUnit {
    party.as_deref().unwrap_or(lu)
}

/// The segment descriptors with their places in the parameter list; `at` is that of the first one.
fn segment_descriptors(
    mut bytes: &[u8],
    mut at: usize,
) -> Result<Vec<(usize, &[u8; BLOCK_TO_BLOCK_BYTES])>, Sense> {
    let mut descriptors = Vec::new();
    while let Some(&kind) = bytes.first() {
        if descriptors.len() == usize::from(MAX_SEGMENT_DESCRIPTORS) {
            return Err(Sense::TOO_MANY_SEGMENT_DESCRIPTORS.at_parameter(8));
        }
        if kind != BLOCK_TO_BLOCK {
            return Err(Sense::UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE.at_parameter(at as u16));
        }
        let descriptor = bytes
            .first_chunk()
            .filter(|descriptor| usize::from(u16_at(*descriptor, 2)) == BLOCK_TO_BLOCK_BYTES - 4)
            .ok_or(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter(at as u16 + 2))?;
        descriptors.push((at, descriptor));
        bytes = &bytes[BLOCK_TO_BLOCK_BYTES..];
        at += BLOCK_TO_BLOCK_BYTES;
    }
    Ok(descriptors)
}

/// Why a segment cannot be copied.
enum Refusal {
    /// Its descriptor means nothing: the command is none.
    Command(Sense),
    /// A unit cannot take part: the copy has failed.
    Copy(Sense),
}

fn plan_segment(
    lu: &LogicalUnit,
    cscds: &[Cscd],
    descriptor: &[u8; BLOCK_TO_BLOCK_BYTES],
    at: usize,
    number: u16,
) -> Result<Segment, Refusal> {
    const DC: u8 = 0x02;
    const CAT: u8 = 0x01;
    const SOURCE: usize = 4;
    const DESTINATION: usize = 6;
    const BLOCKS: usize = 10;
    const SOURCE_LBA: usize = 12;
    const DESTINATION_LBA: usize = 20;
    let invalid = |field: usize| {
        Refusal::Command(Sense::INVALID_FIELD_IN_PARAMETER_LIST.at_parameter((at + field) as u16))
    };
    if descriptor[1] & !(DC | CAT) != 0 {
        return Err(invalid(1));
    }
    let party = |field: usize| {
        let wrong = match cscds.get(usize::from(u16_at(descriptor, field))) {
            Some(Cscd::Unit(party)) => return Ok(party.clone()),
            Some(Cscd::WrongType) => Sense::INCORRECT_COPY_TARGET_DEVICE_TYPE,
            Some(Cscd::Unreachable) | None => Sense::COPY_TARGET_DEVICE_NOT_REACHABLE,
        };
        Err(Refusal::Copy(in_segment(wrong, number, field as u16)))
    };
    let (source, destination) = (party(SOURCE)?, party(DESTINATION)?);
    let source_block = u64::from(unit_of(&source, lu).geometry().block_size);
    let destination_block = u64::from(unit_of(&destination, lu).geometry().block_size);
    let counted = if descriptor[1] & DC != 0 { destination_block } else { source_block };
    let length = u64::from(u16_at(descriptor, BLOCKS)) * counted;
    if !length.is_multiple_of(source_block) || !length.is_multiple_of(destination_block) {
        let sense = in_segment(Sense::COPY_SEGMENT_GRANULARITY_VIOLATION, number, BLOCKS as u16);
        return Err(Refusal::Copy(sense));
    }
    let place = |party: &Party, role, lba: u64, block: u64| {
        check_party(unit_of(party, lu), role, lba.saturating_mul(block), length).map_err(|sense| {
            let forwarded = Forwarded::new(role, &Reply::check(sense));
            Refusal::Copy(Sense::COPY_ABORTED.in_segment(number, Some(forwarded)).with_information(length))
        })
    };
    let from = place(&source, Role::Source, u64_at(descriptor, SOURCE_LBA), source_block)?;
    let to = place(&destination, Role::Destination, u64_at(descriptor, DESTINATION_LBA), destination_block)?;
    // In pieces, from the front: what is read would be what was just written.
    let same = unit_of(&source, lu).identity().naa() == unit_of(&destination, lu).identity().naa();
    if same && from < to + length && to < from + length {
        return Err(invalid(DESTINATION_LBA));
    }
    Ok(Segment { source, destination, from, to, length })
}

fn in_segment(sense: Sense, number: u16, byte: u16) -> Sense {
    let mut sense = sense.in_segment(number, None);
    sense.specific = Some(KeySpecific::Segment { byte });
    sense
}

/// Whether a unit can take part with `length` bytes from `offset` on, as for a command that it is sent; returns `offset`.
fn check_party(unit: &LogicalUnit, role: Role, offset: u64, length: u64) -> Result<u64, Sense> {
    if let (Role::Destination, Some(sense)) = (role, unit.is_write_protected()) {
        return Err(sense);
    }
    unit.check_ready(Readiness::Medium)?;
    match offset.checked_add(length) {
        Some(end) if end <= unit.size() => Ok(offset),
        _ => Err(Sense::LBA_OUT_OF_RANGE),
    }
}

impl ExtendedCopy {
    /// The step that was under way has succeeded.
    pub(super) fn advance(mut self: Box<Self>, lu: &LogicalUnit, result: StepResult) -> Next {
        let segment = &self.segments[self.index];
        match (self.phase, result) {
            (Phase::Reading, StepResult::Bytes(bytes)) => {
                let destination = unit_of(&segment.destination, lu);
                let (at, length) = (segment.to + self.done, bytes.len() as u64);
                if let Err(sense) = check_party(destination, Role::Destination, at, length) {
                    self.phase = Phase::Writing;
                    return Next::Done(self.failed(Reply::check(sense)));
                }
                let durability = destination.durability(false);
                self.cached |= durability != Durability::Native;
                let step = Step {
                    verb: Verb::Write,
                    offset: ByteOffset(at),
                    length,
                    buffer: StepBuffer::Owned(bytes),
                    fua: durability == Durability::Native,
                    unit: Some(*destination.identity().naa()),
                };
                self.phase = Phase::Writing;
                self.wrote = true;
                return Next::Call(step, Task(Stage::Copy(self)));
            }
            (Phase::Reading, _) => {
                return Next::Done(self.failed(Reply::check(Sense::INTERNAL_TARGET_FAILURE)));
            }
            (Phase::Writing, _) => {
                let length = (segment.length - self.done).min(CHUNK_BYTES);
                self.done += length;
                lock(&self.running.progress).bytes += length;
                if self.done == segment.length {
                    let destination = unit_of(&segment.destination, lu);
                    if self.cached && destination.is_write_through() {
                        let step = Step { unit: Some(*destination.identity().naa()), ..Step::FLUSH };
                        self.phase = Phase::Flushing;
                        return Next::Call(step, Task(Stage::Copy(self)));
                    }
                    self.finish_segment();
                }
            }
            (Phase::Flushing, _) => self.finish_segment(),
        }
        self.next(lu)
    }

    fn finish_segment(&mut self) {
        self.index += 1;
        self.done = 0;
        self.cached = false;
        lock(&self.running.progress).segments += 1;
    }

    /// Reads what is to be copied next.
    fn next(mut self: Box<Self>, lu: &LogicalUnit) -> Next {
        while self.segments.get(self.index).is_some_and(|segment| segment.length == 0) {
            self.finish_segment();
        }
        let Some(segment) = self.segments.get(self.index) else {
            self.running.end(None);
            return Next::Done(Reply::good(0));
        };
        self.phase = Phase::Reading;
        let source = unit_of(&segment.source, lu);
        let (at, length) = (segment.from + self.done, (segment.length - self.done).min(CHUNK_BYTES));
        if let Err(sense) = check_party(source, Role::Source, at, length) {
            return Next::Done(self.failed(Reply::check(sense)));
        }
        let step = Step { unit: Some(*source.identity().naa()), ..Step::scratch(at, length) };
        Next::Call(step, Task(Stage::Copy(self)))
    }

    /// The step has ended with `reply`: so does the copy, saying where. A status that makes the initiator send the command
    /// again passes only while nothing was written, for the copy may not be the same a second time.
    pub(super) fn failed(&self, reply: Reply) -> Reply {
        let again = matches!(reply.status, Status::Busy | Status::TaskSetFull);
        if again && !self.wrote {
            return self.running.fail(reply);
        }
        let role = if matches!(self.phase, Phase::Reading) { Role::Source } else { Role::Destination };
        let residue = self.segments[self.index].length - self.done;
        // An answer without a unit's own sense is of one that is gone.
        let sense = match reply.sense {
            Some(Sense::COPY_TARGET_DEVICE_NOT_REACHABLE) => {
                Sense::COPY_TARGET_DEVICE_NOT_REACHABLE.in_segment(self.index as u16, None)
            }
            _ => {
                let forwarded = Forwarded::new(role, &reply);
                Sense::THIRD_PARTY_DEVICE_FAILURE.in_segment(self.index as u16, Some(forwarded))
            }
        };
        self.running.fail(Reply::check(sense.with_information(residue)))
    }
}

/// RECEIVE COPY STATUS (LID1): how far the copy with a list identifier is, or how it ended.
pub(super) fn copy_status(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const IN_PROGRESS: u8 = 0;
    const COMPLETED: u8 = 1;
    const COMPLETED_WITH_ERRORS: u8 = 2;
    const BYTES: u8 = 0;
    const KIBIBYTES: u8 = 1;
    let progress = lock(&lu.copies().results).get(&cdb.byte(2)).cloned().ok_or(invalid_field(2, 7))?;
    let progress = lock(&progress);
    let status = match progress.end {
        None => IN_PROGRESS,
        Some(None) => COMPLETED,
        Some(Some(_)) => COMPLETED_WITH_ERRORS,
    };
    let (units, count) = match u32::try_from(progress.bytes) {
        Ok(bytes) => (BYTES, bytes),
        Err(_) => (KIBIBYTES, u32::try_from(progress.bytes >> 10).unwrap_or(u32::MAX)),
    };
    let [high, low] = progress.segments.to_be_bytes();
    let mut data = vec![0, 0, 0, 8, status, high, low, units];
    data.extend(count.to_be_bytes());
    Ok(Reply::data(buffer, cdb.u32(10), &data))
}

/// RECEIVE COPY RESULTS, OPERATING PARAMETERS.
pub(super) fn operating_parameters(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const SNLID: u8 = 0x01;
    const DESCRIPTORS: [u8; 2] = [BLOCK_TO_BLOCK, IDENTIFICATION];
    let mut data = vec![0; 44];
    data[4] = SNLID;
    data[8..10].copy_from_slice(&MAX_CSCD_DESCRIPTORS.to_be_bytes());
    data[10..12].copy_from_slice(&MAX_SEGMENT_DESCRIPTORS.to_be_bytes());
    data[12..16].copy_from_slice(&MAX_DESCRIPTOR_BYTES.to_be_bytes());
    data[16..20].copy_from_slice(&MAX_SEGMENT_BYTES.to_be_bytes());
    data[34..36].copy_from_slice(&u16::from(MAX_CONCURRENT).to_be_bytes());
    data[36] = MAX_CONCURRENT;
    data[37] = lu.geometry().block_size.trailing_zeros() as u8;
    data[43] = DESCRIPTORS.len() as u8;
    data.extend(DESCRIPTORS);
    let length = data.len() as u32 - 4;
    data[..4].copy_from_slice(&length.to_be_bytes());
    Ok(Reply::data(buffer, cdb.u32(10), &data))
}

/// RECEIVE COPY FAILURE DETAILS (LID1): status and sense data of a copy that has failed; told once.
pub(super) fn failed_segment_details(lu: &LogicalUnit, cdb: Cdb<'_>, buffer: &dyn DataBuffer) -> Outcome {
    const HEADER: usize = 60;
    let mut results = lock(&lu.copies().results);
    let found = results.get(&cdb.byte(2)).cloned();
    let failure = found.and_then(|progress| lock(&progress).end.clone().flatten());
    let Some((status, sense)) = failure else {
        // Nothing is available.
        return Ok(Reply::data(buffer, cdb.u32(10), &[0; 4]));
    };
    let mut data = vec![0; HEADER];
    data[56] = status as u8;
    data[58..60].copy_from_slice(&(sense.len() as u16).to_be_bytes());
    data.extend(sense);
    let length = data.len() as u32 - 4;
    data[..4].copy_from_slice(&length.to_be_bytes());
    // Not lost on those who only ask how much there is.
    if cdb.u32(10) as usize >= data.len() && buffer.len() >= data.len() {
        results.remove(&cdb.byte(2));
    }
    Ok(Reply::data(buffer, cdb.u32(10), &data))
}

/// The body of the Third-Party Copy page (SPC-4, third-party copy descriptors).
pub(super) fn third_party_copy_page(lu: &LogicalUnit) -> Vec<u8> {
    const SUPPORTED_COMMANDS: u16 = 0x0001;
    const PARAMETER_DATA: u16 = 0x0004;
    const SUPPORTED_DESCRIPTORS: u16 = 0x0008;
    const SUPPORTED_CSCD_IDS: u16 = 0x000c;
    const GENERAL_COPY_OPERATIONS: u16 = 0x8001;
    let mut limits = vec![0; 28];
    limits[4..6].copy_from_slice(&MAX_CSCD_DESCRIPTORS.to_be_bytes());
    limits[6..8].copy_from_slice(&MAX_SEGMENT_DESCRIPTORS.to_be_bytes());
    limits[8..12].copy_from_slice(&MAX_DESCRIPTOR_BYTES.to_be_bytes());
    let mut general = vec![0; 32];
    general[..4].copy_from_slice(&u32::from(MAX_CONCURRENT).to_be_bytes());
    general[4..8].copy_from_slice(&u32::from(MAX_CONCURRENT).to_be_bytes());
    general[8..12].copy_from_slice(&MAX_SEGMENT_BYTES.to_be_bytes());
    general[12] = lu.geometry().block_size.trailing_zeros() as u8;
    let descriptors = [
        // Operation codes, each with its service actions.
        (SUPPORTED_COMMANDS, vec![8, 0x83, 1, 0x00, 0x84, 3, 0x00, 0x03, 0x04]),
        (PARAMETER_DATA, limits),
        (SUPPORTED_DESCRIPTORS, vec![2, BLOCK_TO_BLOCK, IDENTIFICATION]),
        // Only those of the list.
        (SUPPORTED_CSCD_IDS, vec![0, 0]),
        (GENERAL_COPY_OPERATIONS, general),
    ];
    let mut page = Vec::new();
    for (kind, mut body) in descriptors {
        body.resize(body.len().next_multiple_of(4), 0);
        page.extend(kind.to_be_bytes());
        page.extend((body.len() as u16).to_be_bytes());
        page.extend(body);
    }
    page
}
