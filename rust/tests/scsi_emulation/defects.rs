//! READ DEFECT DATA.

use crate::disk::{ALL, Disk};

#[test]
fn the_lists_are_empty() {
    let mut disk = Disk::new(8, ALL);
    let ten = [0x37, 0, 0x1d, 0, 0, 0, 0, 0, 32, 0];
    assert_eq!(disk.read(&ten, 32), [0, 0x1d, 0, 0]);
    let twelve = [0xb7, 0x1d, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    assert_eq!(disk.read(&twelve, 32), [0, 0x1d, 0, 0, 0, 0, 0, 0]);
}
