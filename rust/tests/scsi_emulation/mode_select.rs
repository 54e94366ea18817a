//! MODE SELECT.

use proptest::prelude::*;
use tcmu::scsi::sense::KeySpecific;
use tcmu::scsi::{Capabilities, Reply, Sense, Verb};

use crate::disk::{ALL, Buffer, Disk, assert_check, assert_good, assert_invalid_field};

const PF: u8 = 0x10;

fn select_6(disk: &mut Disk, list: &[u8]) -> Reply {
    disk.write(&[0x15, PF, 0, 0, list.len() as u8, 0], list)
}

fn select_10(disk: &mut Disk, list: &[u8]) -> Reply {
    disk.write(&[0x55, PF, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], list)
}

/// A page as MODE SENSE(6) has it, without header and descriptor.
fn page(disk: &mut Disk, code: u8) -> Vec<u8> {
    disk.read(&[0x1a, 0x08, code, 0, 255, 0], 255)[4..].to_vec()
}

#[track_caller]
fn assert_invalid_parameter(reply: Reply, byte: u16) {
    assert_check(reply, Sense::INVALID_FIELD_IN_PARAMETER_LIST);
    let Some(KeySpecific::Parameter(pointer)) = reply.sense.unwrap().specific else { panic!("{reply:?}") };
    assert_eq!(pointer.byte, byte);
}

#[test]
fn what_was_sensed_can_be_selected() {
    let mut disk = Disk::new(16, ALL);
    for subpage in [0x00, 0xff] {
        for dbd in [0x00, 0x08] {
            let six = disk.read(&[0x1a, dbd, 0x3f, subpage, 255, 0], 255);
            assert_good(select_6(&mut disk, &six));
            for llbaa in [0x00, 0x10] {
                let ten = disk.read(&[0x5a, dbd | llbaa, 0x3f, subpage, 0, 0, 0, 1, 0, 0], 256);
                assert_good(select_10(&mut disk, &ten));
            }
            assert_eq!(disk.read(&[0x1a, dbd, 0x3f, subpage, 255, 0], 255), six);
        }
    }
    assert_eq!(disk.verbs(), []);
}

#[test]
fn the_write_cache_is_switched() {
    let mut disk = Disk::new(16, ALL);
    let mut caching = page(&mut disk, 0x08);
    caching[2] = 0;
    assert_good(select_6(&mut disk, &[[0; 4].as_slice(), &caching].concat()));
    assert!(!disk.lu.has_write_cache());
    assert_eq!(disk.verbs(), [Verb::Flush], "what the cache holds");
    assert_eq!(page(&mut disk, 0x08), caching);
    caching[2] = 0x04;
    assert_good(select_10(&mut disk, &[[0; 8].as_slice(), &caching].concat()));
    assert!(disk.lu.has_write_cache());
    assert_eq!(disk.verbs(), []);
    let mut disk = Disk::new(16, Capabilities { flush: false, ..ALL });
    assert_invalid_parameter(select_6(&mut disk, &[[0; 4].as_slice(), &caching].concat()), 6);
}

#[test]
fn the_sense_format_and_write_protection_are_switched() {
    let mut disk = Disk::new(16, ALL);
    let mut control = page(&mut disk, 0x0a);
    control[2] |= 0x04;
    control[4] |= 0x08;
    assert_good(select_6(&mut disk, &[[0; 4].as_slice(), &control].concat()));
    assert!(disk.lu.has_descriptor_sense());
    assert_eq!(page(&mut disk, 0x0a), control);
    assert_check(disk.write(&[0x0a, 0, 0, 0, 1, 0], &[0; 512]), Sense::SOFTWARE_WRITE_PROTECTED);
    assert_eq!(disk.read(&[0x1a, 0x08, 0x0a, 0, 255, 0], 255)[2], 0x90, "WP");
    assert_eq!(page(&mut disk, 0x80 | 0x0a)[4], 0, "the default");
    control[2] &= !0x04;
    control[4] = 0;
    assert_good(select_6(&mut disk, &[[0; 4].as_slice(), &control].concat()));
    assert!(!disk.lu.has_descriptor_sense());
    assert_good(disk.write(&[0x0a, 0, 0, 0, 1, 0], &[0; 512]));
}

#[test]
fn what_is_not_changeable_is_refused_and_nothing_is_done() {
    let mut disk = Disk::new(16, ALL);
    let mut list = vec![0; 4];
    list.extend(page(&mut disk, 0x08));
    list[6] = 0;
    let at = list.len() as u16;
    list.extend(page(&mut disk, 0x0a));
    list[usize::from(at) + 3] ^= 0x20;
    assert_invalid_parameter(select_6(&mut disk, &list), at + 3);
    assert!(disk.lu.has_write_cache(), "the page before was right, but the list is not");
    let extra = |list: &[u8]| [&[0; 4], list].concat();
    assert_invalid_parameter(select_6(&mut disk, &extra(&[0x02, 0x0e])), 4);
    assert_invalid_parameter(select_6(&mut disk, &extra(&[0x88, 0x12])), 4);
    assert_invalid_parameter(select_6(&mut disk, &extra(&[0x08, 0x11])), 5);
    assert_invalid_parameter(select_6(&mut disk, &extra(&[0x4a, 0x01, 0, 0x1b])), 6);
    assert_invalid_parameter(select_6(&mut disk, &[0, 1, 0, 0]), 1);
    assert_invalid_parameter(select_6(&mut disk, &[0, 0, 0, 7, 0, 0, 0, 0]), 3);
    assert_invalid_parameter(select_6(&mut disk, &[0, 0, 0, 8, 0, 0, 0, 17, 0, 0, 2, 0]), 7);
    assert_invalid_parameter(select_6(&mut disk, &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 16, 0]), 10);
    assert_good(select_6(&mut disk, &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 2, 0]));
    for list in [&[0; 3][..], &[0, 0, 0, 8], &[0, 0, 0, 0, 0x08], &[0, 0, 0, 0, 0x08, 0x12, 0]] {
        assert_check(select_6(&mut disk, list), Sense::PARAMETER_LIST_LENGTH_ERROR);
    }
    assert_invalid_field(disk.write(&[0x15, PF | 1, 0, 0, 4, 0], &[0; 4]), 1, 0);
    assert_invalid_field(disk.write(&[0x15, 0, 0, 0, 4, 0], &[0; 4]), 1, 4);
    assert_good(disk.command(&[0x15, PF, 0, 0, 0, 0]));
}

proptest! {
    #[test]
    fn any_list_has_an_answer(
        list in prop::collection::vec(prop_oneof![
            3 => Just(0), 1 => Just(0x08), 1 => Just(0x0a), 1 => Just(0x12), 1 => any::<u8>(),
        ], 0..80),
        length: u8,
        ten: bool,
    ) {
        let mut disk = Disk::new(16, ALL);
        let cdb = if ten {
            vec![0x55, PF, 0, 0, 0, 0, 0, 0, length, 0]
        } else {
            vec![0x15, PF, 0, 0, length, 0]
        };
        disk.run(&cdb, &Buffer::from(list));
    }
}
