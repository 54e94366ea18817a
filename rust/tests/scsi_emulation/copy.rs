//! EXTENDED COPY and RECEIVE COPY RESULTS.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use tcmu::scsi::sense::{CopyFailure, Forwarded, KeySpecific, Role};
use tcmu::scsi::{
    Capabilities, CopyDomain, Geometry, LunError, Next, Reply, Sense, Status, StepBuffer, StepResult, Verb,
};

use crate::disk::{ALL, Buffer, Disk, NAA, assert_check, assert_good, assert_invalid_field, named};

const OTHER: [u8; 16] = [0x60, 0x01, 0x40, 0x5b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
const UNKNOWN: [u8; 16] = [0x60, 0x01, 0x40, 0x5c, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
const MIB: usize = 1 << 20;

/// An identification descriptor CSCD descriptor of a disk with blocks of 512 bytes.
pub fn cscd(naa: [u8; 16]) -> Vec<u8> {
    let mut descriptor = vec![0; 32];
    descriptor[0] = 0xe4;
    descriptor[4..8].copy_from_slice(&[0x01, 0x03, 0, 16]);
    descriptor[8..24].copy_from_slice(&naa);
    descriptor[30] = 0x02;
    descriptor
}

/// From the first CSCD to the last one that a test has: to itself, unless changed.
pub fn block_to_block(from: u64, to: u64, blocks: u16) -> Vec<u8> {
    let mut descriptor = vec![0x02, 0, 0, 0x18, 0, 0, 0, 0, 0, 0];
    descriptor.extend(blocks.to_be_bytes());
    descriptor.extend(from.to_be_bytes());
    descriptor.extend(to.to_be_bytes());
    descriptor
}

fn between(source: u8, destination: u8, mut descriptor: Vec<u8>) -> Vec<u8> {
    (descriptor[5], descriptor[7]) = (source, destination);
    descriptor
}

pub fn parameter_list(identifier: u8, usage: u8, cscds: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (cscds, segments) = (cscds.concat(), segments.concat());
    let mut list = vec![identifier, usage];
    list.extend((cscds.len() as u16).to_be_bytes());
    list.extend([0; 4]);
    list.extend((segments.len() as u32).to_be_bytes());
    list.extend([0; 4]);
    [list, cscds, segments].concat()
}

pub fn extended_copy(list: &[u8]) -> Vec<u8> {
    let length = (list.len() as u32).to_be_bytes();
    [&[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0], length.as_slice(), &[0, 0]].concat()
}

fn results(action: u8, identifier: u8) -> Vec<u8> {
    vec![0x84, action, identifier, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
}

fn copy(disk: &mut Disk, list: &[u8]) -> Reply {
    disk.write(&extended_copy(list), list)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 512 + at % 251 + 1) as u8).collect()
}

/// A disk with a pattern, beside another one that is empty.
fn pair(other: Geometry, capabilities: Capabilities) -> Disk {
    pair_of(8192, other, capabilities)
}

fn pair_of(blocks: u64, other: Geometry, capabilities: Capabilities) -> Disk {
    let mut disk = Disk::new(blocks, ALL);
    let length = disk.medium.len();
    disk.medium = pattern(length);
    let other = Disk::of(named(OTHER), other, capabilities);
    let domain = Arc::<CopyDomain>::default();
    domain.join(&disk.lu).unwrap();
    domain.join(&other.lu).unwrap();
    disk.neighbours.push(other);
    disk
}

#[test]
fn a_copy_within_a_unit() {
    let mut disk = Disk::new(8192, ALL);
    disk.medium[..3 * MIB / 2].copy_from_slice(&pattern(3 * MIB / 2));
    let list =
        parameter_list(7, 0, &[cscd(NAA)], &[block_to_block(0, 4096, 3072), block_to_block(1, 8191, 1)]);
    assert_good(copy(&mut disk, &list));
    assert_eq!(disk.medium[2 * MIB..][..3 * MIB / 2], pattern(3 * MIB / 2)[..]);
    assert_eq!(disk.medium[8191 * 512..], pattern(1024)[512..]);
    assert_eq!(disk.verbs(), [Verb::Read, Verb::Write].repeat(3));
    let bytes = 3 * MIB / 2 + 512;
    let mut expected = vec![0, 0, 0, 8, 1, 0, 2, 0];
    expected.extend((bytes as u32).to_be_bytes());
    assert_eq!(disk.read(&results(0, 7), 256), expected);
    assert_eq!(disk.read(&results(4, 7), 256), [0; 4], "there was no failure");
    disk.lu.reset();
    assert_invalid_field(disk.command(&results(0, 7)), 2, 7);
}

#[test]
fn a_copy_to_another_unit_and_back() {
    let mut disk = pair(Geometry::new(512, 4 << 20), Capabilities { native_fua: true, ..ALL });
    let cscds = [cscd(NAA), cscd(OTHER)];
    let list = parameter_list(0, 0x18, &cscds, &[between(0, 1, block_to_block(3, 5, 4000))]);
    assert_good(copy(&mut disk, &list));
    assert_eq!(disk.neighbours[0].medium[5 * 512..][..4000 * 512], disk.medium[3 * 512..][..4000 * 512]);
    assert!(disk.neighbours[0].medium[..5 * 512].iter().all(|&byte| byte == 0));
    let list = parameter_list(0, 0x18, &cscds, &[between(1, 0, block_to_block(0, 8000, 2))]);
    assert_good(copy(&mut disk, &list));
    assert!(disk.medium[8000 * 512..][..1024].iter().all(|&byte| byte == 0));
    assert_invalid_field(disk.command(&results(0, 0)), 2, 7);
}

#[test]
fn blocks_of_two_sizes() {
    let mut disk = pair(Geometry::new(4096, 4 << 20), ALL);
    let mut large = cscd(OTHER);
    large[30] = 0x10;
    let cscds = [cscd(NAA), large];
    let whole = parameter_list(0, 0x18, &cscds, &[between(0, 1, block_to_block(8, 2, 16))]);
    assert_good(copy(&mut disk, &whole));
    assert_eq!(disk.neighbours[0].medium[8192..][..8192], disk.medium[4096..][..8192]);
    let mut counted = between(0, 1, block_to_block(0, 0, 3));
    counted[1] = 0x02;
    assert_good(copy(&mut disk, &parameter_list(0, 0x18, &cscds, &[counted])));
    assert_eq!(disk.neighbours[0].medium[..12288], disk.medium[..12288]);
    let part = parameter_list(0, 0x18, &cscds, &[between(0, 1, block_to_block(0, 0, 15))]);
    assert_check(copy(&mut disk, &part), Sense::COPY_SEGMENT_GRANULARITY_VIOLATION);
}

#[test]
fn what_a_unit_without_a_write_cache_has_copied_is_durable() {
    for native_fua in [false, true] {
        let mut disk = pair(Geometry::new(512, 4 << 20), Capabilities { native_fua, ..ALL });
        disk.neighbours[0].lu.set_write_cache(false);
        let list =
            parameter_list(0, 0x18, &[cscd(NAA), cscd(OTHER)], &[between(0, 1, block_to_block(0, 0, 4000))]);
        assert_good(copy(&mut disk, &list));
        assert!(!disk.neighbours[0].volatile.contains(&true));
        let flushed = disk.steps.iter().any(|step| step.verb == Verb::Flush);
        assert_eq!(flushed, !native_fua);
    }
}

#[test]
fn what_is_copied_while_the_write_cache_is_turned_off_is_durable() {
    for native_fua in [false, true] {
        let mut disk = pair(Geometry::new(512, 4 << 20), Capabilities { native_fua, ..ALL });
        disk.neighbours[0].loses_cache = true;
        let list =
            parameter_list(0, 0x18, &[cscd(NAA), cscd(OTHER)], &[between(0, 1, block_to_block(0, 0, 4000))]);
        assert_good(copy(&mut disk, &list));
        assert!(!disk.neighbours[0].volatile.contains(&true));
    }
}

#[test]
fn nothing_is_copied_if_a_segment_cannot_be() {
    let mut disk = pair(Geometry::new(512, 1 << 20), Capabilities { write: false, ..ALL });
    let cscds = [cscd(NAA), cscd(OTHER), cscd(UNKNOWN)];
    let lba = Some(Forwarded { role: Role::Destination, status: 2, triple: [5, 0x21, 0] });
    let protected = Some(Forwarded { role: Role::Destination, status: 2, triple: [7, 0x27, 0] });
    for (second, sense, forwarded) in [
        (between(0, 2, block_to_block(0, 0, 1)), Sense::COPY_TARGET_DEVICE_NOT_REACHABLE, None),
        (between(0, 9, block_to_block(0, 0, 1)), Sense::COPY_TARGET_DEVICE_NOT_REACHABLE, None),
        (between(0, 0, block_to_block(0, 8191, 2)), Sense::COPY_ABORTED, lba),
        (between(0, 0, block_to_block(0, u64::MAX, 2)), Sense::COPY_ABORTED, lba),
        (between(0, 1, block_to_block(0, 0, 1)), Sense::COPY_ABORTED, protected),
    ] {
        let reply = copy(&mut disk, &parameter_list(1, 0, &cscds, &[block_to_block(0, 4096, 1), second]));
        assert_check(reply, sense);
        assert_eq!(reply.sense.unwrap().copy, Some(CopyFailure { segment: 1, forwarded }));
        assert_eq!(disk.verbs(), []);
        assert_eq!(disk.read(&results(0, 1), 256)[4..], [2, 0, 0, 0, 0, 0, 0, 0]);
        let details = disk.read(&results(4, 1), 256);
        assert_eq!((details[56], details[60] & 0x7f, details[62]), (2, 0x70, 0x0a));
        assert_invalid_field(disk.command(&results(0, 1)), 2, 7);
    }
}

#[test]
fn without_leave_there_are_no_other_units() {
    let mut disk = Disk::new(64, ALL);
    let list = parameter_list(0, 0x18, &[cscd(NAA), cscd(OTHER)], &[between(0, 1, block_to_block(0, 0, 1))]);
    assert_check(copy(&mut disk, &list), Sense::COPY_TARGET_DEVICE_NOT_REACHABLE);
    assert_eq!(disk.verbs(), []);
}

#[test]
fn a_domain_has_no_two_units_of_one_name() {
    let domain = Arc::<CopyDomain>::default();
    let (first, second) = (Disk::new(64, ALL), Disk::new(64, ALL));
    domain.join(&first.lu).unwrap();
    assert_eq!(domain.join(&second.lu), Err(LunError::Ambiguous));
    domain.leave(&first.lu);
    domain.join(&second.lu).unwrap();
}

#[test]
fn a_unit_that_has_left_is_not_reachable() {
    let mut disk = pair(Geometry::new(512, 4 << 20), ALL);
    let list = parameter_list(0, 0x18, &[cscd(NAA), cscd(OTHER)], &[between(0, 1, block_to_block(0, 0, 1))]);
    assert_good(copy(&mut disk, &list));
    disk.neighbours.clear();
    assert_check(copy(&mut disk, &list), Sense::COPY_TARGET_DEVICE_NOT_REACHABLE);
}

#[test]
fn a_failure_tells_where() {
    let medium_error = Reply::check(Sense::WRITE_ERROR);
    let mut disk = pair(Geometry::new(512, 4 << 20), ALL);
    let segments = [between(0, 1, block_to_block(0, 0, 8)), between(0, 1, block_to_block(0, 64, 4096))];
    let list = parameter_list(3, 0, &[cscd(NAA), cscd(OTHER)], &segments);
    // Read and write of the first segment, and of the first piece of the second.
    disk.failure = Some((5, medium_error));
    let reply = copy(&mut disk, &list);
    assert_check(reply, Sense::THIRD_PARTY_DEVICE_FAILURE);
    let sense = reply.sense.unwrap();
    let forwarded = Forwarded { role: Role::Destination, status: 2, triple: [3, 0x0c, 0] };
    assert_eq!(sense.copy, Some(CopyFailure { segment: 1, forwarded: Some(forwarded) }));
    assert_eq!(sense.information, Some(MIB as u64), "of two MiB");
    let (bytes, length) = disk.lu.encode_sense(&sense);
    assert_eq!(bytes[8..12], [0, 18, 0, 1]);
    assert_eq!((bytes[18], bytes[19], bytes[21], bytes[31]), (2, 0x70, 3, 0x0c));
    assert_eq!((length, usize::from(bytes[7]) + 8), (37, 37));
    let mut status = vec![0, 0, 0, 8, 2, 0, 1, 0];
    status.extend((MIB as u32 + 4096).to_be_bytes());
    assert_eq!(disk.read(&results(0, 3), 256), status);
    assert_eq!(disk.read(&results(4, 3), 256)[60..][..37], bytes[..37]);
    disk.lu.set_descriptor_sense(true);
    let (bytes, length) = disk.lu.encode_sense(&sense);
    assert_eq!(usize::from(bytes[7]) + 8, length);
    assert_eq!(bytes[20..32], [1, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(bytes[32..36], [0x0c, 20, 2, 2]);
}

#[test]
fn only_a_copy_that_has_written_nothing_is_sent_again() {
    let busy = Reply::status(Status::Busy);
    let list = parameter_list(0, 0x18, &[cscd(NAA)], &[block_to_block(0, 4096, 4096)]);
    let mut disk = Disk::new(8192, ALL);
    disk.failure = Some((0, busy));
    assert_eq!(copy(&mut disk, &list), busy);
    disk.failure = Some((1, busy));
    assert_check(copy(&mut disk, &list), Sense::THIRD_PARTY_DEVICE_FAILURE);
}

#[test]
fn a_copy_that_runs_tells_how_far_it_is_and_when_it_was_aborted() {
    let disk = Disk::new(8192, ALL);
    let list = parameter_list(9, 0, &[cscd(NAA)], &[block_to_block(0, 4096, 4096)]);
    let buffer = Buffer::from(list.clone());
    let status = |expected: [u8; 8]| {
        let buffer = Buffer::stale(12);
        let Next::Done(reply) = disk.lu.start(&results(0, 9), &buffer) else { panic!() };
        assert_good(reply);
        let mut bytes = [0; 8];
        tcmu::scsi::DataBuffer::read(&buffer, 4, &mut bytes);
        assert_eq!(bytes, expected);
    };
    let Next::Call(step, task) = disk.lu.start(&extended_copy(&list), &buffer) else { panic!() };
    assert_eq!((step.verb, step.buffer, step.unit), (Verb::Read, StepBuffer::Scratch, Some(NAA)));
    let Next::Call(step, task) = disk.lu.resume(task, &buffer, StepResult::Bytes(vec![1; MIB])) else {
        panic!()
    };
    assert_eq!(step.verb, Verb::Write);
    let Next::Call(_, task) = disk.lu.resume(task, &buffer, StepResult::None) else { panic!() };
    status([0, 0, 0, 0, 0, 0x10, 0, 0]);
    drop(task);
    status([2, 0, 0, 0, 0, 0x10, 0, 0]);
}

#[test]
fn many_copies_at_a_time_are_too_many() {
    let disk = Disk::new(8192, ALL);
    let list = parameter_list(0, 0x18, &[cscd(NAA)], &[block_to_block(0, 4096, 1)]);
    let start = || disk.lu.start(&extended_copy(&list), &Buffer::from(list.clone()));
    let mut running: Vec<Next> = (0..16).map(|_| start()).collect();
    assert!(running.iter().all(|next| matches!(next, Next::Call(..))));
    assert!(matches!(start(), Next::Done(Reply { status: Status::TaskSetFull, .. })));
    running.pop();
    assert!(matches!(start(), Next::Call(..)));
}

#[test]
fn lists_that_mean_nothing() {
    let good = parameter_list(1, 0, &[cscd(NAA)], &[block_to_block(0, 32, 1)]);
    let changed = |at: usize, value: u8| {
        let mut list = good.clone();
        list[at] = value;
        list
    };
    let parameter = Sense::INVALID_FIELD_IN_PARAMETER_LIST;
    let overlapping = parameter_list(1, 0, &[cscd(NAA)], &[block_to_block(0, 7, 8)]);
    let mut disk = Disk::new(64, ALL);
    assert_good(copy(&mut disk, &good));
    assert_good(copy(&mut disk, &[]));
    disk.steps.clear();
    for (list, sense, at) in [
        (changed(1, 0x08), parameter, 1),
        (changed(1, 0x20), parameter, 1),
        (changed(1, 0x18), parameter, 0),
        (changed(5, 1), parameter, 5),
        (changed(15, 1), Sense::INLINE_DATA_LENGTH_EXCEEDED, 12),
        (changed(3, 31), parameter, 2),
        (changed(16, 0xe0), Sense::UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE, 16),
        (changed(17, 0x20), parameter, 17),
        (changed(46, 0x10), parameter, 45),
        (changed(48, 0x03), Sense::UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE, 48),
        (changed(49, 0x04), parameter, 49),
        (changed(51, 0x17), parameter, 50),
        (changed(11, 27), parameter, 50),
        (overlapping, parameter, 68),
        (parameter_list(1, 0, &vec![cscd(NAA); 17], &[]), Sense::TOO_MANY_TARGET_DESCRIPTORS, 2),
        (
            parameter_list(1, 0, &[], &vec![block_to_block(0, 32, 1); 257]),
            Sense::TOO_MANY_SEGMENT_DESCRIPTORS,
            8,
        ),
    ] {
        let reply = copy(&mut disk, &list);
        assert_check(reply, sense);
        let Some(KeySpecific::Parameter(pointer)) = reply.sense.unwrap().specific else {
            panic!("{reply:?}")
        };
        assert_eq!(pointer.byte, at);
    }
    let too_long = parameter_list(1, 0, &vec![cscd(NAA); 17], &vec![block_to_block(0, 32, 1); 280]);
    assert_check(copy(&mut disk, &too_long), Sense::PARAMETER_LIST_LENGTH_ERROR);
    for length in [1, 15, 47, 75] {
        assert_check(copy(&mut disk, &good[..length]), Sense::PARAMETER_LIST_LENGTH_ERROR);
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn parameters_and_page_agree() {
    let mut disk = Disk::new(64, ALL);
    let parameters = disk.read(&results(3, 0), 256);
    assert_eq!(parameters.len(), 46);
    assert_eq!(parameters[..5], [0, 0, 0, 42, 1]);
    assert_eq!(parameters[43..], [2, 0x02, 0xe4]);
    assert_eq!(parameters[37], 9);
    let page = disk.read(&[0x12, 1, 0x8f, 4, 0, 0], 1024);
    assert_eq!(usize::from(u16::from_be_bytes([page[2], page[3]])) + 4, page.len());
    let mut rest = &page[4..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        let length = 4 + usize::from(u16::from_be_bytes([rest[2], rest[3]]));
        assert!(length.is_multiple_of(4));
        found.push((u16::from_be_bytes([rest[0], rest[1]]), &rest[4..length]));
        rest = &rest[length..];
    }
    assert_eq!(found.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [1, 4, 8, 12, 0x8001]);
    assert_eq!(found[1].1[4..12], parameters[8..16]);
    assert_eq!(found[4].1[8..12], parameters[16..20]);
    assert_eq!(disk.read(&[0x12, 0, 0, 0, 36, 0], 36)[5], 0x08, "3PC");
}

proptest! {
    #[test]
    fn any_list_has_an_answer(
        mut list in vec((0..3u8, 0..70u64, 0..70u64, 0..20u16), 0..5).prop_map(|segments| {
            let segments: Vec<_> = segments
                .into_iter()
                .map(|(to, from, lba, blocks)| between(0, to, block_to_block(from, lba, blocks)))
                .collect();
            parameter_list(1, 0, &[cscd(NAA), cscd(OTHER)], &segments)
        }),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        length in -3..3isize,
    ) {
        for (at, value) in changes {
            let at = at.index(list.len());
            list[at] = value;
        }
        let mut disk = pair_of(64, Geometry::new(512, 64 * 512), ALL);
        let announced = list.len().saturating_add_signed(length);
        let cdb = extended_copy(&vec![0; announced]);
        disk.run(&cdb, &Buffer::from(list));
    }
}
