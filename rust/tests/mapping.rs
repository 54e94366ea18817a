//! The mapping's bounds: no access leaves it, whatever it is asked for, and what is refused touches nothing.
//!
//! AddressSanitizer does not watch mapped memory. So the file behind these mappings is longer than they are: what a
//! stray access would change lies in the same page, and is looked at through the file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use tcmu::mapping::{Mapping, OutOfBounds};

const SIZE: usize = 104;
const PAGE: usize = 4096;
const CANARY: u8 = 0xc5;

fn memory() -> (File, Mapping) {
    let file = File::from(memfd_create("tcmu-mapping", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&[CANARY; PAGE], 0).unwrap();
    file.write_all_at(&[0; SIZE], 0).unwrap();
    let mapping = Mapping::new(&file, SIZE).unwrap();
    (file, mapping)
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[SIZE..].iter().all(|&byte| byte == CANARY), "something behind the mapping was written");
    bytes.truncate(SIZE);
    bytes
}

fn refused<T: std::fmt::Debug>(result: Result<T, OutOfBounds>, offset: usize, length: usize) {
    assert_eq!(result.unwrap_err(), OutOfBounds { offset, length, size: SIZE });
}

#[test]
fn the_last_byte_is_inside_and_the_next_is_not() {
    let (file, mapping) = memory();
    mapping.write(SIZE - 1, &[1]).unwrap();
    mapping.fill(SIZE - 2, 1, 2).unwrap();
    refused(mapping.write(SIZE, &[9]), SIZE, 1);
    refused(mapping.write(SIZE - 1, &[9; 2]), SIZE - 1, 2);
    refused(mapping.fill(SIZE - 1, 2, 9), SIZE - 1, 2);
    refused(mapping.read(SIZE - 1, &mut [0; 2]), SIZE - 1, 2);
    refused(mapping.pointer(SIZE - 1, 2), SIZE - 1, 2);
    let mut end = [0; 2];
    mapping.read(SIZE - 2, &mut end).unwrap();
    assert_eq!(end, [2, 1]);
    assert_eq!(contents(&file)[SIZE - 2..], [2, 1]);
}

#[test]
fn ends_that_overflow_are_outside() {
    let (file, mapping) = memory();
    for (offset, length) in [(usize::MAX, 1), (usize::MAX, usize::MAX), (8, usize::MAX), (usize::MAX - 7, 8)]
    {
        assert!(!mapping.contains(offset, length));
        refused(mapping.fill(offset, length, 9), offset, length);
        refused(mapping.pointer(offset, length), offset, length);
    }
    refused(mapping.read_u64(usize::MAX - 7), usize::MAX - 7, 8);
    refused(mapping.load_acquire(usize::MAX - 3), usize::MAX - 3, 4);
    assert_eq!(contents(&file), [0; SIZE]);
}

#[test]
fn nothing_fits_everywhere_up_to_the_end() {
    let (file, mapping) = memory();
    for offset in [0, 1, SIZE] {
        assert!(mapping.contains(offset, 0));
        mapping.write(offset, &[]).unwrap();
        mapping.read(offset, &mut []).unwrap();
        mapping.fill(offset, 0, 9).unwrap();
        mapping.pointer(offset, 0).unwrap();
    }
    assert!(!mapping.contains(SIZE + 1, 0));
    refused(mapping.write(SIZE + 1, &[]), SIZE + 1, 0);
    assert_eq!(contents(&file), [0; SIZE]);
}

#[test]
fn fields_are_aligned_and_end_inside() {
    let (file, mapping) = memory();
    for offset in 0..SIZE + 16 {
        let fits = |size: usize| offset % size == 0 && offset + size <= SIZE;
        assert_eq!(mapping.read_u8(offset).is_ok(), fits(1), "{offset}");
        assert_eq!(mapping.read_u16(offset).is_ok(), fits(2), "{offset}");
        assert_eq!(mapping.read_u32(offset).is_ok(), fits(4), "{offset}");
        assert_eq!(mapping.read_u64(offset).is_ok(), fits(8), "{offset}");
        assert_eq!(mapping.load_acquire(offset).is_ok(), fits(4), "{offset}");
        assert_eq!(mapping.write_u8(offset, 0).is_ok(), fits(1), "{offset}");
        assert_eq!(mapping.write_u16(offset, 0).is_ok(), fits(2), "{offset}");
        assert_eq!(mapping.write_u32(offset, 0).is_ok(), fits(4), "{offset}");
        assert_eq!(mapping.write_u64(offset, 0).is_ok(), fits(8), "{offset}");
        assert_eq!(mapping.store_release(offset, 0).is_ok(), fits(4), "{offset}");
    }
    assert_eq!(contents(&file), [0; SIZE]);
}

#[test]
fn fields_have_their_bytes_in_host_order() {
    let (file, mapping) = memory();
    mapping.write_u8(1, 0x11).unwrap();
    mapping.write_u16(2, 0x2233).unwrap();
    mapping.write_u32(4, 0x4455_6677).unwrap();
    mapping.write_u64(8, 0x8899_aabb_ccdd_eeff).unwrap();
    mapping.store_release(16, 0x0102_0304).unwrap();
    let bytes = contents(&file);
    assert_eq!(bytes[..2], [0, 0x11]);
    assert_eq!(bytes[2..4], 0x2233u16.to_ne_bytes());
    assert_eq!(bytes[4..8], 0x4455_6677u32.to_ne_bytes());
    assert_eq!(bytes[8..16], 0x8899_aabb_ccdd_eeffu64.to_ne_bytes());
    assert_eq!(bytes[16..20], 0x0102_0304u32.to_ne_bytes());
    assert_eq!(
        (mapping.read_u8(1), mapping.read_u16(2), mapping.read_u32(4), mapping.read_u64(8)),
        (Ok(0x11), Ok(0x2233), Ok(0x4455_6677), Ok(0x8899_aabb_ccdd_eeff))
    );
    assert_eq!(mapping.load_acquire(16), Ok(0x0102_0304));
}

#[test]
fn two_mappings_of_one_file_see_each_other() {
    let (file, one) = memory();
    let other = Mapping::new(&file, SIZE).unwrap();
    drop(file);
    one.write(3, b"shared").unwrap();
    one.store_release(64, 7).unwrap();
    assert_eq!(other.load_acquire(64), Ok(7));
    let mut bytes = [0; 6];
    other.read(3, &mut bytes).unwrap();
    assert_eq!(&bytes, b"shared");
}

#[test]
fn an_empty_mapping_has_no_bytes() {
    let (file, _) = memory();
    // Whether the system maps nothing or a page that must not be touched.
    if let Ok(empty) = Mapping::new(&file, 0) {
        assert_eq!(empty.size(), 0);
        assert!(empty.read_u8(0).is_err() && empty.write_u8(0, 9).is_err());
        assert!(empty.write(0, &[]).is_ok());
    }
    assert_eq!(contents(&file), [0; SIZE]);
}

#[test]
fn what_cannot_be_mapped_is_an_error() {
    let (file, _) = memory();
    assert!(Mapping::new(&file, usize::MAX - PAGE).is_err());
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(Mapping::new(&reader, PAGE).is_err());
}

fn offset() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0..SIZE + 8, 1 => any::<usize>(), 1 => usize::MAX - SIZE..=usize::MAX]
}

#[derive(Debug, Clone)]
enum Access {
    Write(usize, Vec<u8>),
    Fill(usize, usize, u8),
    Read(usize, usize),
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        (offset(), prop::collection::vec(any::<u8>(), 0..SIZE + 8))
            .prop_map(|(at, data)| Access::Write(at, data)),
        (offset(), offset(), any::<u8>()).prop_map(|(at, length, value)| Access::Fill(at, length, value)),
        (offset(), 0..SIZE + 8).prop_map(|(at, length)| Access::Read(at, length)),
    ]
}

proptest! {
    /// A slice of a vector says what is inside, and what it holds.
    #[test]
    fn any_access_is_that_of_a_slice(accesses in prop::collection::vec(access(), 1..40)) {
        let (file, mapping) = memory();
        let mut model = vec![0u8; SIZE];
        for access in accesses {
            match access {
                Access::Write(at, data) => {
                    let target = at.checked_add(data.len()).and_then(|end| model.get_mut(at..end));
                    prop_assert_eq!(mapping.write(at, &data).is_ok(), target.is_some());
                    if let Some(target) = target {
                        target.copy_from_slice(&data);
                    }
                }
                Access::Fill(at, length, value) => {
                    let target = at.checked_add(length).and_then(|end| model.get_mut(at..end));
                    prop_assert_eq!(mapping.fill(at, length, value).is_ok(), target.is_some());
                    if let Some(target) = target {
                        target.fill(value);
                    }
                }
                Access::Read(at, length) => {
                    let mut bytes = vec![CANARY; length];
                    let source = at.checked_add(length).and_then(|end| model.get(at..end));
                    prop_assert_eq!(mapping.read(at, &mut bytes).is_ok(), source.is_some());
                    match source {
                        Some(source) => prop_assert_eq!(&bytes[..], source),
                        None => prop_assert!(bytes.iter().all(|&byte| byte == CANARY)),
                    }
                }
            }
        }
        prop_assert_eq!(contents(&file), model);
    }
}
