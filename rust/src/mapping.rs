//! The memory shared with the kernel: every pointer of the core lives here, and nowhere else.
//!
//! Two rules, because another party writes this memory while we look at it:
//!
//! 1. No reference or slice into the mapping is ever made. Bytes are copied out and in through raw pointers, single
//!    fields by volatile or atomic access.
//! 2. Each access is checked against the mapping's length first, whatever the caller has checked before.
//!
//! What this layer does not promise: that a page of the data area exists. The kernel maps data pages as commands
//! use them, so bytes outside the buffers of outstanding commands raise SIGBUS; `ring` keeps inside them.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// An access outside the mapping, refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes at offset {offset:#x} are not inside the mapping of {size:#x} bytes, or not aligned")]
pub struct OutOfBounds {
    /// Where the access was to start.
    pub offset: usize,
    /// How many bytes it was to touch.
    pub length: usize,
    /// Bytes of the mapping.
    pub size: usize,
}

/// A shared, writable mapping of a UIO device or of a memory file.
#[derive(Debug)]
pub struct Mapping {
    map: MmapRaw,
}

macro_rules! volatile {
    ($read:ident, $write:ident, $type:ty) => {
        /// Reads a naturally aligned field once.
        ///
        /// # Errors
        /// [`OutOfBounds`] also when `offset` is not aligned to the field's size.
        pub fn $read(&self, offset: usize) -> Result<$type, OutOfBounds> {
            let field = self.field(offset, size_of::<$type>())?.cast::<$type>();
            // SAFETY:
            // - valid and in bounds: `field` checked offset and size against the live mapping;
            // - aligned: `field` checked the offset, and a mapping starts at a page;
            // - not aliased by a Rust reference: none into the mapping ever exists;
            // - any bit pattern is a valid integer, and volatile forbids the compiler a second read.
            Ok(unsafe { ptr::read_volatile(field) })
        }

        /// Writes a naturally aligned field.
        ///
        /// # Errors
        /// [`OutOfBounds`] also when `offset` is not aligned to the field's size.
        pub fn $write(&self, offset: usize, value: $type) -> Result<(), OutOfBounds> {
            let field = self.field(offset, size_of::<$type>())?.cast::<$type>();
            // SAFETY: as for the read; the mapping is writable.
            unsafe { ptr::write_volatile(field, value) };
            Ok(())
        }
    };
}

impl Mapping {
    /// Maps `size` bytes of `file` from its start, shared and writable.
    ///
    /// A UIO device wants exactly the size in `maps/map0/size`.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub fn new(file: &impl AsRawFd, size: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(size).map_raw(file.as_raw_fd())?;
        Ok(Self { map })
    }

    /// A page of nobody's, to put in the place of a mapping that shall go.
    ///
    /// # Errors
    /// What `mmap(2)` says.
    pub fn anonymous() -> io::Result<Self> {
        let map = MmapOptions::new().len(4096).map_anon()?.into();
        Ok(Self { map })
    }

    /// Bytes of the mapping.
    #[must_use]
    pub fn size(&self) -> usize {
        self.map.len()
    }

    /// Whether `length` bytes from `offset` lie inside.
    #[must_use]
    pub fn contains(&self, offset: usize, length: usize) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.size())
    }

    fn range(&self, offset: usize, length: usize) -> Result<*mut u8, OutOfBounds> {
        if !self.contains(offset, length) {
            return Err(OutOfBounds { offset, length, size: self.size() });
        }
        // SAFETY:
        // - in bounds: offset <= size was just checked, one past the end included;
        // - the allocation is the live mapping that `self` owns.
        Ok(unsafe { self.map.as_mut_ptr().add(offset) })
    }

    fn field(&self, offset: usize, size: usize) -> Result<*mut u8, OutOfBounds> {
        if !offset.is_multiple_of(size) {
            return Err(OutOfBounds { offset, length: size, size: self.size() });
        }
        self.range(offset, size)
    }

    volatile!(read_u8, write_u8, u8);
    volatile!(read_u16, write_u16, u16);
    volatile!(read_u32, write_u32, u32);
    volatile!(read_u64, write_u64, u64);

    /// Loads a field that the other party stores with release: what it wrote before is seen after.
    ///
    /// # Errors
    /// [`OutOfBounds`] also when `offset` is not aligned.
    pub fn load_acquire(&self, offset: usize) -> Result<u32, OutOfBounds> {
        Ok(self.atomic(offset)?.load(Ordering::Acquire))
    }

    /// Stores a field that the other party loads with acquire: what we wrote before is seen by it.
    ///
    /// # Errors
    /// [`OutOfBounds`] also when `offset` is not aligned.
    pub fn store_release(&self, offset: usize, value: u32) -> Result<(), OutOfBounds> {
        self.atomic(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    fn atomic(&self, offset: usize) -> Result<&AtomicU32, OutOfBounds> {
        let field = self.field(offset, size_of::<u32>())?.cast::<u32>();
        // SAFETY:
        // - valid, aligned and in bounds: checked by `field`;
        // - lives long enough: the reference borrows `self`, which owns the mapping;
        // - the other party writes this word atomically too (an aligned 32-bit store).
        Ok(unsafe { AtomicU32::from_ptr(field) })
    }

    /// Copies bytes out of the mapping.
    ///
    /// # Errors
    /// [`OutOfBounds`]; nothing was copied then.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.range(offset, into.len())?;
        // SAFETY:
        // - both sides valid for `into.len()` bytes: checked, and a slice;
        // - no overlap: `into` is Rust memory, and no Rust reference points into the mapping;
        // - bytes that the other party changes meanwhile arrive torn, which is its own loss.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes into the mapping.
    ///
    /// # Errors
    /// [`OutOfBounds`]; nothing was copied then.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        let into = self.range(offset, from.len())?;
        // SAFETY: as for `read`, the other way; the mapping is writable.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        Ok(())
    }

    /// Sets `length` bytes to `value`.
    ///
    /// # Errors
    /// [`OutOfBounds`]; nothing was written then.
    pub fn fill(&self, offset: usize, length: usize, value: u8) -> Result<(), OutOfBounds> {
        let into = self.range(offset, length)?;
        // SAFETY: valid for `length` bytes, checked; no Rust reference points there.
        unsafe { ptr::write_bytes(into, value, length) };
        Ok(())
    }

    /// Where `length` bytes at `offset` are, for somebody who lends them on (the buffer protocol of Python).
    ///
    /// Whoever uses the pointer keeps the mapping alive meanwhile, and keeps rule 1.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn pointer(&self, offset: usize, length: usize) -> Result<*mut u8, OutOfBounds> {
        self.range(offset, length)
    }
}
