//! Frames that lie in a file, read and decompressed into memory that somebody lends, as one piece of work.
//!
//! Nothing of it needs the interpreter, and none of the stored bytes is seen by anybody else.

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use super::memory::{Memory, Walk};
use super::{Learnt, syscall, threads};
use crate::frames::{Decompressor, Frames};

/// Bytes between two frames in the file that are read with them, rather than by a call of their own.
const GAP: u64 = 8192;
/// Bytes that one call reads, but for a frame that is longer.
const MOST: u64 = 256 << 10;
/// Bytes to decompress that are worth a thread.
const LARGE: usize = 128 << 10;
/// Attempts after one that the page cache could not serve, before threads are trusted again not to wait.
const DOUBTS: usize = 16;
/// How many bytes are copied while one is decompressed.
const EFFORT: usize = 8;

/// Where a frame begins, and how many bytes there are from there on: what follows the frame is ignored.
pub type Place = (u64, usize);

/// Frames of a file.
pub struct Packed {
    frames: Frames,
    /// How many attempts are to come before threads are given anything without one: the page cache lacked something.
    doubts: AtomicUsize,
}

impl Packed {
    /// What these compress, stored somewhere.
    #[must_use]
    pub fn new(frames: Frames) -> Self {
        Self { frames, doubts: AtomicUsize::new(0) }
    }

    /// What they were compressed with.
    #[must_use]
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    fn is_in_memory(&self) -> bool {
        let less = |doubts: usize| doubts.checked_sub(1);
        self.doubts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_err()
    }

    fn is_not_in_memory(&self) {
        self.doubts.store(DOUBTS, Ordering::Relaxed);
    }
}

/// Frames to be read and decompressed, one behind the other.
pub struct Unpacking<M> {
    packed: Arc<Packed>,
    fd: RawFd,
    places: SmallVec<[Place; 1]>,
    /// Frames that are in the memory.
    done: usize,
    /// Bytes of the next unit that are left out.
    skip: usize,
    /// Bytes that are missing in the memory.
    left: usize,
    walk: Walk<M>,
    /// A thread does what could be done at once: it mostly computes.
    shared: bool,
}

/// The memory is not inside of the units, or does not need all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{length} bytes from byte {within} on are not what {count} units of {unit} bytes are for")]
pub struct Mismatch {
    length: usize,
    within: usize,
    count: usize,
    unit: usize,
}

/// A frame that is damaged, cut off or not of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("frame {number}, at byte {offset} of the file, is damaged")]
pub struct Damaged {
    /// Which one, from 0.
    pub number: usize,
    /// Where it should be.
    pub offset: u64,
}

impl<M> std::fmt::Debug for Unpacking<M> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "unpacking of {} frames, {} done", self.places.len(), self.done)
    }
}

impl<M: Memory> Unpacking<M> {
    /// What is to be read of the file behind `fd`. The first `within` bytes of the first unit are left out, and those of
    /// the last one that the memory has no room for.
    ///
    /// The descriptor has to stay open until the work is over; it must not be one with O_DIRECT.
    ///
    /// # Errors
    /// [`Mismatch`].
    pub fn new(
        packed: Arc<Packed>,
        fd: RawFd,
        places: impl IntoIterator<Item = Place>,
        within: usize,
        memory: M,
    ) -> Result<Self, Mismatch> {
        // Whatever somebody says: a frame of a unit needs no more, and this much memory is taken.
        let unit = packed.frames.unit();
        let longest = 2 * unit + 1024;
        let places: SmallVec<_> =
            places.into_iter().map(|(start, length)| (start, length.min(longest))).collect();
        let (length, count) = (memory.length(), places.len());
        check(length, within, count, unit)?;
        Ok(Self {
            packed,
            fd,
            places,
            done: 0,
            skip: within,
            left: length,
            walk: Walk::new(memory),
            shared: false,
        })
    }

    fn size(&self) -> usize {
        self.places.len() * self.packed.frames.unit()
    }

    pub(super) fn weight(&self) -> usize {
        self.size() * EFFORT
    }

    pub(super) fn lane(&self) -> threads::Lane {
        let width = if self.shared && self.size() < LARGE { threads::spare() } else { threads::WIDTH };
        threads::Lane { fd: self.fd, width }
    }

    /// Says that a thread is to do it without an attempt, if that is a good idea. It is if the page cache has had all that
    /// was wanted lately: what waits for storage would keep others from computing.
    pub(super) fn share(&mut self) -> bool {
        self.shared = self.packed.is_in_memory();
        self.shared
    }

    /// Does it, if that takes neither storage nor long. Returns whether it is over.
    ///
    /// # Errors
    /// What the system says; [`Damaged`].
    pub fn attempt(&mut self) -> io::Result<bool> {
        if self.size() >= LARGE {
            return Ok(false);
        }
        let over = self.run(false)?;
        if !over {
            self.packed.is_not_in_memory();
        }
        Ok(over)
    }

    /// Does all that [`Unpacking::attempt`] has left, and waits for it.
    ///
    /// # Errors
    /// What the system says; [`Damaged`].
    pub fn block(&mut self) -> io::Result<()> {
        if self.shared {
            if self.run(false)? {
                return Ok(());
            }
            self.packed.is_not_in_memory();
        }
        self.run(true).map(|over| debug_assert!(over, "without RWF_NOWAIT the kernel waits"))
    }

    fn run(&mut self, wait: bool) -> io::Result<bool> {
        let packed = self.packed.clone();
        let mut decompressor = packed.frames.decompressor()?;
        let mut stored = mem::take(&mut decompressor.stored);
        let over = self.unpack(&mut decompressor, &mut stored, wait);
        decompressor.stored = stored;
        packed.frames.keep(decompressor);
        over
    }

    fn unpack(
        &mut self,
        decompressor: &mut Decompressor,
        stored: &mut Vec<u8>,
        wait: bool,
    ) -> io::Result<bool> {
        while self.done < self.places.len() {
            let (start, length, count) = self.span();
            if stored.len() < length {
                stored.resize(length, 0);
            }
            let Some(length) = self.fill(&mut stored[..length], start, wait)? else { return Ok(false) };
            for _ in 0..count {
                let (offset, size) = self.places[self.done];
                let from = ((offset - start) as usize).min(length);
                let frame = &stored[from..length.min(from + size)];
                let unit = decompressor
                    .unit(frame)
                    .ok_or_else(|| io::Error::other(Damaged { number: self.done, offset }))?;
                let part = &unit[self.skip..unit.len().min(self.skip + self.left)];
                self.walk.write(part);
                self.left -= part.len();
                self.skip = 0;
                self.done += 1;
            }
        }
        self.walk.memory().filled();
        Ok(true)
    }

    /// The next frames that lie together in the file: where, in how many bytes, and how many they are.
    fn span(&self) -> (u64, usize, usize) {
        let (start, length) = self.places[self.done];
        let mut end = start.saturating_add(length as u64);
        let mut count = 1;
        for &(place, length) in &self.places[self.done + 1..] {
            let stop = place.saturating_add(length as u64).max(end);
            if place < start || place > end.saturating_add(GAP) || stop - start > MOST {
                break;
            }
            (end, count) = (stop, count + 1);
        }
        (start, (end - start) as usize, count)
    }

    /// Reads; returns how many bytes there are up to the end of the file. `None`: not all of it is there at once.
    fn fill(&self, into: &mut [u8], start: u64, wait: bool) -> io::Result<Option<usize>> {
        let mut flags = if wait { 0 } else { Learnt::flags(self.fd) };
        let mut done = 0;
        while done < into.len() {
            match syscall::read(self.fd, &mut into[done..], start + done as u64, flags) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => return Ok(None),
                    Some(libc::EOPNOTSUPP | libc::EINVAL) if flags != 0 => {
                        if !Learnt::refused(self.fd, false) {
                            return Ok(None);
                        }
                        flags = 0;
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(Some(done))
    }
}

/// Whether so many bytes from `within` on begin in the first of the units, and end in the last one.
///
/// # Errors
/// [`Mismatch`].
pub fn check(length: usize, within: usize, count: usize, unit: usize) -> Result<(), Mismatch> {
    let (total, end) = (count * unit, within.saturating_add(length));
    if within >= unit || end > total || end + unit <= total {
        return Err(Mismatch { length, within, count, unit });
    }
    Ok(())
}
