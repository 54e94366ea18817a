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
        self.0[at]
    }

    pub(super) fn bit(self, at: usize, bit: u8) -> bool {
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
        bytes
    }
}

/// ILLEGAL REQUEST, INVALID FIELD IN CDB: the field that has its most significant bit there.
pub(super) fn invalid_field(byte: usize, bit: u8) -> Sense {
    Sense::INVALID_FIELD_IN_CDB.at_cdb(u16::try_from(byte).unwrap_or(u16::MAX), bit)
}
