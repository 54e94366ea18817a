//! Frames of zstd (RFC 8878) that hold units of one size, such as the clusters of an image: many in one call.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zstd_safe::{CCtx, CParameter, DCtx};

/// Bytes of room for what is stored that are kept with a decompressor.
const KEPT: usize = 1 << 20;

/// What compresses and decompresses; usable from several threads at once.
///
/// Each frame holds one unit, and says how long it is; with a checksum over its content. Contexts are kept, for a new
/// one costs as much as a small unit.
pub struct Frames {
    unit: usize,
    level: i32,
    compressors: Mutex<Vec<CCtx<'static>>>,
    decompressors: Mutex<Vec<Decompressor>>,
}

/// What decompresses one frame after the other.
pub struct Decompressor {
    context: DCtx<'static>,
    unit: Vec<u8>,
    /// Room for what is stored; whoever uses it finds what others have left.
    pub stored: Vec<u8>,
}

impl Decompressor {
    /// The unit that a frame holds. What lies behind the frame is ignored; its checksum is verified if it has one.
    ///
    /// `None`: it is damaged, cut off or not of a unit.
    pub fn unit(&mut self, frame: &[u8]) -> Option<&[u8]> {
        let length = zstd_safe::find_frame_compressed_size(frame);
        let done =
            length.and_then(|length| self.context.decompress(self.unit.as_mut_slice(), &frame[..length]));
        (done == Ok(self.unit.len())).then_some(&*self.unit)
    }
}

/// What became of a unit: bytes of its frame, 0 if all of it is zero, and their CRC-32.
pub type Frame = (usize, u32);

fn lock<T>(kept: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Frames {
    /// For units of so many bytes.
    #[must_use]
    pub fn new(unit: usize, level: i32) -> Self {
        Self { unit, level, compressors: Mutex::default(), decompressors: Mutex::default() }
    }

    /// Bytes of a unit.
    pub fn unit(&self) -> usize {
        self.unit
    }

    /// Compresses units, the last of which may be shorter, and appends their frames to `into`.
    ///
    /// What cannot be compressed becomes a frame of raw blocks: it is a little longer than the unit, but has a checksum.
    ///
    /// # Errors
    ///
    /// zstd's, by name: the level, or no memory.
    pub fn compress(&self, units: &[u8], into: &mut Vec<u8>) -> Result<Vec<Frame>, &'static str> {
        let kept = lock(&self.compressors).pop();
        let mut context = match kept {
            Some(context) => context,
            None => self.compressor()?,
        };
        let room = zstd_safe::compress_bound(self.unit);
        let mut frames = Vec::with_capacity(units.len().div_ceil(self.unit));
        for unit in units.chunks(self.unit) {
            if is_zero(unit) {
                frames.push((0, 0));
                continue;
            }
            let start = into.len();
            into.resize(start + room, 0);
            let length = context.compress2(&mut into[start..], unit).map_err(zstd_safe::get_error_name)?;
            into.truncate(start + length);
            frames.push((length, crc32fast::hash(&into[start..])));
        }
        lock(&self.compressors).push(context);
        Ok(frames)
    }

    fn compressor(&self) -> Result<CCtx<'static>, &'static str> {
        let mut context = CCtx::try_create().ok_or("no memory for a compressor")?;
        for parameter in [CParameter::CompressionLevel(self.level), CParameter::ChecksumFlag(true)] {
            context.set_parameter(parameter).map_err(zstd_safe::get_error_name)?;
        }
        Ok(context)
    }

    /// Decompresses frames, each of a whole unit, one after the other.
    ///
    /// What lies behind a frame in its part of the memory is ignored. Checksums are verified where frames have them.
    ///
    /// # Errors
    ///
    /// How many were right before one that is damaged, cut off or not of a unit.
    pub fn decompress<'a>(
        &self,
        frames: impl IntoIterator<Item = &'a [u8]>,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), usize> {
        let mut decompressor = self.decompressor().map_err(|_| 0usize)?;
        let mut found = Ok(());
        for (number, frame) in frames.into_iter().enumerate() {
            let Some(unit) = decompressor.unit(frame) else {
                found = Err(number);
                break;
            };
            each(unit);
        }
        self.keep(decompressor);
        found
    }

    /// A decompressor, to be given back by [`Frames::keep`].
    ///
    /// # Errors
    /// ENOMEM.
    pub fn decompressor(&self) -> io::Result<Decompressor> {
        if let Some(kept) = lock(&self.decompressors).pop() {
            return Ok(kept);
        }
        let context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Decompressor { context, unit: vec![0; self.unit], stored: Vec::new() })
    }

    /// Keeps a decompressor for others.
    pub fn keep(&self, mut decompressor: Decompressor) {
        if decompressor.stored.capacity() > KEPT {
            decompressor.stored = Vec::new();
        }
        lock(&self.decompressors).push(decompressor);
    }
}

/// Whether there is no bit in it.
fn is_zero(unit: &[u8]) -> bool {
    let (words, rest) = unit.as_chunks();
    rest.iter().all(|byte| *byte == 0) && words.iter().all(|word| u128::from_ne_bytes(*word) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units() -> Vec<u8> {
        let words = (0..1024u32).flat_map(|word| (word / 7 * word).to_le_bytes());
        let mut state = 0x9E37_79B9u32;
        let noise = (0..4096).map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_le_bytes()[1]
        });
        words.chain([0; 4096]).chain(noise).collect()
    }

    fn split<'a>(stored: &'a [u8], frames: &[Frame]) -> Vec<&'a [u8]> {
        let mut at = 0;
        let mut parts = Vec::new();
        for (length, crc) in frames.iter().filter(|frame| frame.0 > 0) {
            // As in an image, where the length is known in sectors: what is behind is not the frame's.
            parts.push(&stored[at..(at + length + 300).min(stored.len())]);
            assert_eq!(crc32fast::hash(&stored[at..at + length]), *crc);
            at += length;
        }
        parts
    }

    #[test]
    fn what_was_compressed_comes_back() {
        let frames = Frames::new(4096, 1);
        let (units, mut stored) = (units(), b"before".to_vec());
        let made = frames.compress(&units, &mut stored).unwrap();
        assert_eq!(made[1], (0, 0));
        assert!(made[0].0 < 4096 && made[2].0 > 4096);
        let mut found = Vec::new();
        frames.decompress(split(&stored[6..], &made), |unit| found.extend_from_slice(unit)).unwrap();
        assert_eq!(found, [&units[..4096], &units[8192..]].concat());
    }

    #[test]
    fn damage_is_found_everywhere() {
        let frames = Frames::new(4096, 1);
        let mut stored = Vec::new();
        let made = frames.compress(&units(), &mut stored).unwrap();
        for at in 0..made[0].0 {
            let mut damaged = stored.clone();
            damaged[at] ^= 0x10;
            // A bit that means nothing may be wrong, but no data.
            let mut found = Vec::new();
            let result = frames.decompress([&damaged[..made[0].0]], |unit| found.extend_from_slice(unit));
            assert!(result == Err(0) || found == units()[..4096], "byte {at}");
        }
        let cut = &stored[..made[0].0 - 1];
        assert_eq!(frames.decompress([cut], |_| ()), Err(0));
        assert_eq!(frames.decompress([&[][..]], |_| ()), Err(0));
    }

    #[test]
    fn a_frame_of_something_longer_or_shorter_is_damage() {
        let mut stored = Vec::new();
        Frames::new(8192, 1).compress(&units()[..8192], &mut stored).unwrap();
        for unit in [4096, 16384] {
            assert_eq!(Frames::new(unit, 1).decompress([&stored[..]], |_| ()), Err(0));
        }
    }
}
