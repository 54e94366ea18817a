//! Fields of a command descriptor block.

use super::sense::Sense;

/// A CDB that is at least as long as its row of the command table says: the fields of that command can be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cdb<'a>(&'a [u8]);

impl<'a> Cdb<'a> {
    /// Wraps bytes of which `opcodes` has checked the length.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn byte(self, at: usize) -> u8 {
        looked_at(at, 0xff);
        self.0[at]
    }

    pub(super) fn bit(self, at: usize, bit: u8) -> bool {
        looked_at(at, 1 << bit);
        self.0[at] >> bit & 1 != 0
    }

    pub(super) fn u16(self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(super) fn u32(self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(super) fn u64(self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    fn array<const N: usize>(self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[at..at + N]);
        (at..at + N).for_each(|at| looked_at(at, 0xff));
        bytes
    }
}

#[cfg(test)]
thread_local! {
    /// The bits that were looked at since a test has cleared them.
    pub(super) static LOOKED_AT: std::cell::Cell<[u8; 32]> = const { std::cell::Cell::new([0; 32]) };
}

#[cfg(test)]
fn looked_at(byte: usize, bits: u8) {
    let mut all = LOOKED_AT.get();
    all[byte] |= bits;
    LOOKED_AT.set(all);
}

#[cfg(not(test))]
fn looked_at(_byte: usize, _bits: u8) {}

/// ILLEGAL REQUEST, INVALID FIELD IN CDB: the field that has its most significant bit there.
pub(super) fn invalid_field(byte: usize, bit: u8) -> Sense {
    Sense::INVALID_FIELD_IN_CDB.at_cdb(u16::try_from(byte).unwrap_or(u16::MAX), bit)
}
