//! Which blocks of the data area are in use.

use smallvec::SmallVec;

/// Blocks of one command, in order.
pub(super) type Taken = SmallVec<[usize; 4]>;

/// A set of blocks, of which the lowest free ones are taken; in part of them, which grows when it is full.
#[derive(Debug)]
pub(super) struct Blocks {
    /// A bit for each, set if it is in use.
    words: Vec<u64>,
    count: usize,
    /// Blocks behind this one were never used.
    threshold: usize,
    used: usize,
    /// No block of a word before this one is free.
    full: usize,
}

impl Blocks {
    pub(super) fn new(count: usize) -> Self {
        Self { words: vec![0; count.div_ceil(64)], count, threshold: 0, used: 0, full: 0 }
    }

    /// How many there are.
    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// Takes the lowest free blocks; the part in use grows by `needed` if they are not there.
    pub(super) fn take(&mut self, needed: usize) -> Option<Taken> {
        if self.threshold - self.used < needed {
            self.threshold = (self.threshold + needed).min(self.count);
            if self.threshold - self.used < needed {
                return None;
            }
        }
        let mut taken = Taken::with_capacity(needed);
        let mut word = self.full;
        while taken.len() < needed {
            let free = self.words[word].trailing_ones() as usize;
            if free == 64 {
                word += 1;
                continue;
            }
            self.words[word] |= 1 << free;
            taken.push(word * 64 + free);
        }
        // Blocks behind the threshold are free, so the lowest free ones are before it.
        debug_assert!(taken.last().is_none_or(|&last| last < self.threshold));
        if needed > 0 {
            self.full = word;
        }
        self.used += needed;
        Some(taken)
    }

    pub(super) fn free(&mut self, taken: &[usize]) {
        for &block in taken {
            self.words[block / 64] &= !(1 << (block % 64));
            self.full = self.full.min(block / 64);
        }
        self.used -= taken.len();
    }

    pub(super) fn free_all(&mut self) {
        self.words.fill(0);
        (self.used, self.full) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_lowest_free_blocks_are_taken(steps in prop::collection::vec((0..9usize, any::<prop::sample::Index>()), 1..200)) {
            let mut blocks = Blocks::new(150);
            let mut model = std::collections::BTreeSet::new();
            let mut threshold = 0;
            let mut held: Vec<Taken> = Vec::new();
            for (needed, which) in steps {
                if needed == 0 && !held.is_empty() {
                    let taken = held.swap_remove(which.index(held.len()));
                    blocks.free(&taken);
                    model.retain(|block| !taken.contains(block));
                    continue;
                }
                if threshold - model.len() < needed {
                    threshold = (threshold + needed).min(150);
                }
                let free: Vec<usize> = (0..threshold).filter(|block| !model.contains(block)).take(needed).collect();
                let expected = (free.len() == needed).then_some(free);
                let taken = blocks.take(needed);
                prop_assert_eq!(taken.as_ref().map(|taken| taken.to_vec()), expected);
                if let Some(taken) = taken {
                    model.extend(taken.iter().copied());
                    held.push(taken);
                }
            }
        }
    }
}
