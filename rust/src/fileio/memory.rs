//! Memory that is lent for a transfer.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};
use smallvec::SmallVec;

use crate::device::Claim;
use crate::scsi::DataBuffer;

/// Memory that a transfer reads or writes, while others may look at it too.
///
/// # Safety
///
/// From its making until it is dropped, each piece that [`Memory::pieces`] names must be valid for reads of its length,
/// and for writes if it is used for [`Operation::Read`](super::Operation::Read); it must stay where it is, and no Rust
/// reference to it may exist. The pieces add up to [`Memory::length`].
///
/// The other half of the contract is the user's: the value is dropped only when no system call, and no request in a
/// kernel's queue, has the addresses any more.
pub unsafe trait Memory: Send {
    /// Bytes.
    fn length(&self) -> usize;

    /// Calls `each` with the pieces from byte `start` on, in order.
    fn pieces(&self, start: usize, each: &mut dyn FnMut(*mut u8, usize));

    /// Every byte was written by a transfer.
    fn filled(&self) {}
}

/// A range of a command's data, counted in its lease: it is not given to another command until this is dropped, whether
/// the command is answered or not.
pub struct Lent {
    claim: Arc<Claim>,
    data_in: bool,
    start: usize,
    length: usize,
}

impl Lent {
    /// Lends `length` bytes from `start` of the Data-In or the Data-Out of a command. `None`: it is answered.
    #[must_use]
    pub fn new(claim: Arc<Claim>, data_in: bool, start: usize, length: usize) -> Option<Self> {
        // Made only if it is lent: whatever is made gives back.
        claim.lend().then(|| Self { claim, data_in, start, length })
    }

    fn buffer(&self) -> &crate::ring::Buffer {
        if self.data_in { self.claim.data_in() } else { self.claim.data() }
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, length, .. } = self;
        write!(formatter, "{length} bytes from {start} of command {}", self.claim.id().0)
    }
}

// SAFETY:
// - valid: the pieces are inside the mapping (`Buffer::new` and `pointer` check), which is writable, and which the claim
//   keeps mapped;
// - it stays where it is: a mapping does not move, and the kernel gives these blocks to no other command while the
//   lease counts this view (`ring::lease`), answered or not;
// - no Rust reference into a mapping ever exists (`mapping`).
unsafe impl Memory for Lent {
    fn length(&self) -> usize {
        self.length
    }

    fn pieces(&self, start: usize, each: &mut dyn FnMut(*mut u8, usize)) {
        let buffer = self.buffer();
        for extent in buffer.pieces(self.start + start..self.start + self.length) {
            if let Ok(pointer) = buffer.mapping().pointer(extent.offset, extent.length) {
                each(pointer, extent.length);
            }
        }
    }

    fn filled(&self) {
        if self.data_in && self.start == 0 && self.length == self.claim.data_in().len() {
            self.claim.set_filled();
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.claim.give_back();
    }
}

// SAFETY: there is no piece.
unsafe impl Memory for () {
    fn length(&self) -> usize {
        0
    }

    fn pieces(&self, _start: usize, _each: &mut dyn FnMut(*mut u8, usize)) {}
}

/// A place in lent memory, which stays where it is as long as this lives: for code that moves the bytes itself.
pub struct Walk<M> {
    pieces: SmallVec<[(*mut u8, usize); 4]>,
    piece: usize,
    at: usize,
    memory: M,
}

// SAFETY: the pointers are into memory that `memory` keeps valid and in place; that may go to another thread, and what
// it lends is no thread's own.
unsafe impl<M: Memory> Send for Walk<M> {}

impl<M: Memory> Walk<M> {
    /// Begins at the first byte. Who calls [`Walk::write`] needs memory that is valid for writes.
    #[must_use]
    pub fn new(memory: M) -> Self {
        let mut pieces = SmallVec::new();
        memory.pieces(0, &mut |pointer, length| pieces.push((pointer, length)));
        Self { pieces, piece: 0, at: 0, memory }
    }

    /// What is walked over.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Copies the next bytes out; fewer, if there are no more.
    pub fn read(&mut self, into: &mut [u8]) {
        self.advance(into.len(), |from, range| {
            let into = &mut into[range];
            // SAFETY: both sides are valid for the length of `into` (`advance`), which nothing else has while it is ours.
            unsafe { ptr::copy_nonoverlapping(from.cast_const(), into.as_mut_ptr(), into.len()) };
        });
    }

    /// Copies the next bytes in; fewer, if there is no more room.
    pub fn write(&mut self, from: &[u8]) {
        self.advance(from.len(), |into, range| {
            let from = &from[range];
            // SAFETY: as in `read`, the other way; the memory is for writing.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        });
    }

    fn advance(&mut self, length: usize, mut copy: impl FnMut(*mut u8, Range<usize>)) {
        let mut done = 0;
        while done < length
            && let Some(&(pointer, size)) = self.pieces.get(self.piece)
        {
            let part = (size - self.at).min(length - done);
            // SAFETY:
            // - `at` is at most `size`, and the piece is valid for `size` bytes: that is `Memory`'s promise;
            // - it stays so as long as this lives, and has the memory.
            copy(unsafe { pointer.add(self.at) }, done..done + part);
            done += part;
            self.at += part;
            if self.at == size {
                self.piece += 1;
                self.at = 0;
            }
        }
    }
}

/// Memory that begins and ends at pages, to go between a file opened with O_DIRECT and memory that does not.
#[derive(Debug)]
pub(super) struct Bounce {
    map: MmapRaw,
    length: usize,
}

impl Bounce {
    /// Zeroed memory.
    pub(super) fn new(length: usize) -> io::Result<Self> {
        Ok(Self { map: MmapMut::map_anon(length)?.into(), length })
    }

    /// Copies all of `memory` here.
    pub(super) fn fill_from(&self, memory: &impl Memory) {
        self.each(memory, |ours, theirs, length| {
            // SAFETY: both valid for `length` bytes: see `each`. Apart: this mapping is nobody else's.
            unsafe { ptr::copy_nonoverlapping(theirs.cast_const(), ours, length) };
        });
    }

    /// Copies all of this to `memory`.
    pub(super) fn copy_to(&self, memory: &impl Memory) {
        self.each(memory, |ours, theirs, length| {
            // SAFETY: as in `fill_from`, and `memory` is for writing: it is a read's.
            unsafe { ptr::copy_nonoverlapping(ours.cast_const(), theirs, length) };
        });
    }

    fn each(&self, memory: &impl Memory, mut copy: impl FnMut(*mut u8, *mut u8, usize)) {
        let mut at = 0;
        memory.pieces(0, &mut |pointer, length| {
            assert!(length <= self.length - at, "the pieces are more than the memory's length");
            // SAFETY: `at + length` is inside of the mapping, as was just checked.
            copy(unsafe { self.map.as_mut_ptr().add(at) }, pointer, length);
            at += length;
        });
    }

    /// The one piece from `start` on.
    pub(super) fn pieces(&self, start: usize, each: &mut dyn FnMut(*mut u8, usize)) {
        assert!(start <= self.length);
        // SAFETY: inside of the mapping, as was just checked.
        each(unsafe { self.map.as_mut_ptr().add(start) }, self.length - start);
    }
}
