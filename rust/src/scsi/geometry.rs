//! What the storage below a logical unit looks like, and what it can do.

use super::lun::LunError;

/// Sizes and limits. Fields named `…_blocks` count logical blocks, the others bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// The logical block: 512, 1024, 2048 or 4096.
    pub block_size: u32,
    /// The medium when the unit was made, a multiple of `block_size`; [`LogicalUnit::size`] is the present size.
    ///
    /// [`LogicalUnit::size`]: super::LogicalUnit::size
    pub size: u64,
    /// What the storage below writes without reading first: a power of two, not below `block_size`.
    pub physical_block_size: u32,
    /// Transfers should be multiples of this; 0 does not say. Whole physical blocks, or Linux complains in its log.
    pub optimal_transfer_granularity_blocks: u16,
    /// Transfers are fastest up to here; 0 does not say. Whole physical blocks, for the same reason.
    pub optimal_transfer_blocks: u32,
    /// The longest READ or WRITE: longer ones are refused.
    pub max_transfer_blocks: u32,
    /// The most blocks that COMPARE AND WRITE compares.
    pub max_compare_blocks: u8,
    /// The most blocks that a [`Verb::Write`] stores whole or not at all, whatever happens; 0 if the handler makes no
    /// such promise, and then there is no WRITE ATOMIC.
    ///
    /// [`Verb::Write`]: super::Verb::Write
    pub max_atomic_write_blocks: u32,
    /// What can be discarded: [`Verb::Discard`] starts and ends on multiples of this (after `discard_alignment`), or
    /// ends with the medium. A multiple of `block_size`.
    ///
    /// [`Verb::Discard`]: super::Verb::Discard
    pub discard_granularity: u64,
    /// Where the first granule starts; less than `discard_granularity`.
    pub discard_alignment: u64,
    /// What one UNMAP may ask for, all its ranges together.
    pub max_discard_blocks: u32,
    /// How many ranges one UNMAP may have.
    pub max_discard_descriptors: u32,
    /// The longest WRITE SAME.
    pub max_write_same_blocks: u64,
    /// Whether seeking costs time.
    pub rotational: bool,
    /// Whether initiators may eject the medium, and load it again.
    pub removable: bool,
}

impl Geometry {
    /// A medium of `size` bytes with usual limits: transfers of up to 16 MiB, UNMAP of up to 2²⁰ blocks in 256
    /// ranges, WRITE SAME of up to 256 MiB, no seek time, every block to be discarded by itself.
    #[must_use]
    pub fn new(block_size: u32, size: u64) -> Self {
        let blocks = |bytes: u32| bytes / block_size.max(1);
        Self {
            block_size,
            size,
            physical_block_size: block_size,
            optimal_transfer_granularity_blocks: 0,
            optimal_transfer_blocks: 0,
            max_transfer_blocks: blocks(16 << 20),
            max_compare_blocks: u8::MAX,
            max_atomic_write_blocks: 0,
            discard_granularity: block_size.into(),
            discard_alignment: 0,
            max_discard_blocks: 1 << 20,
            max_discard_descriptors: 256,
            max_write_same_blocks: blocks(256 << 20).into(),
            rotational: false,
            removable: false,
        }
    }

    /// Blocks of a medium of `size` bytes.
    pub(super) fn blocks_of(&self, size: u64) -> Result<u64, LunError> {
        let block_size = u64::from(self.block_size);
        if size == 0 || !size.is_multiple_of(block_size) || i64::try_from(size).is_err() {
            return Err(LunError::Size { size, block_size: self.block_size });
        }
        Ok(size / block_size)
    }

    pub(super) fn check(&self) -> Result<(), LunError> {
        if !matches!(self.block_size, 512 | 1024 | 2048 | 4096) {
            return Err(LunError::BlockSize(self.block_size));
        }
        let block_size = u64::from(self.block_size);
        self.blocks_of(self.size)?;
        let physical = self.physical_block_size;
        if !physical.is_power_of_two() || physical < self.block_size || physical / self.block_size > 1 << 15 {
            return Err(LunError::PhysicalBlockSize { physical, block_size: self.block_size });
        }
        let limits = [self.max_transfer_blocks, self.max_discard_blocks, self.max_discard_descriptors];
        if limits.contains(&0) || self.max_write_same_blocks == 0 {
            return Err(LunError::ZeroLimit);
        }
        let per_physical = physical / self.block_size;
        for blocks in [self.optimal_transfer_granularity_blocks.into(), self.optimal_transfer_blocks] {
            if blocks > self.max_transfer_blocks || !blocks.is_multiple_of(per_physical) {
                return Err(LunError::OptimalTransfer { blocks, max: self.max_transfer_blocks });
            }
        }
        let granularity = self.discard_granularity;
        if granularity == 0
            || !granularity.is_multiple_of(block_size)
            || granularity / block_size > u64::from(self.max_discard_blocks)
            || !self.discard_alignment.is_multiple_of(block_size)
            || self.discard_alignment >= granularity
        {
            return Err(LunError::Discard { granularity, alignment: self.discard_alignment });
        }
        Ok(())
    }

    /// The same with the limits of single commands below the one of all transfers.
    pub(super) fn normalized(mut self) -> Self {
        let limit = u8::try_from(self.max_transfer_blocks).unwrap_or(u8::MAX);
        self.max_compare_blocks = self.max_compare_blocks.min(limit);
        self.max_atomic_write_blocks = self.max_atomic_write_blocks.min(self.max_transfer_blocks);
        self
    }

    /// log2 of logical blocks per physical block.
    pub(super) fn physical_exponent(&self) -> u8 {
        (self.physical_block_size / self.block_size).trailing_zeros() as u8
    }

    pub(super) fn discard_granularity_blocks(&self) -> u64 {
        self.discard_granularity / u64::from(self.block_size)
    }

    pub(super) fn discard_alignment_blocks(&self) -> u64 {
        self.discard_alignment / u64::from(self.block_size)
    }
}

/// What the handler below can do; everything else is emulated or refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Writing; without it the unit is write protected.
    pub write: bool,
    /// There is a volatile cache below, and [`Verb::Flush`] empties it. Without it each write that returned is
    /// taken for durable, and no write cache is reported.
    ///
    /// [`Verb::Flush`]: super::Verb::Flush
    pub flush: bool,
    /// A single write can be made durable ([`Step::fua`]). Means nothing without `flush`.
    ///
    /// [`Step::fua`]: super::Step::fua
    pub native_fua: bool,
    /// [`Verb::Discard`]: the unit is thinly provisioned.
    ///
    /// [`Verb::Discard`]: super::Verb::Discard
    pub discard: bool,
    /// What was discarded reads as zeroes (LBPRZ). Means nothing without `discard`.
    pub discard_zeroes: bool,
    /// [`Verb::WriteZeroes`]; without it, zeroes are written as data.
    ///
    /// [`Verb::WriteZeroes`]: super::Verb::WriteZeroes
    pub write_zeroes: bool,
    /// [`Verb::Extents`]; without it every block is said to be mapped.
    ///
    /// [`Verb::Extents`]: super::Verb::Extents
    pub extents: bool,
}

impl Capabilities {
    /// The same without the flags that mean nothing.
    pub(super) const fn normalized(mut self) -> Self {
        self.native_fua &= self.flush;
        self.discard_zeroes &= self.discard;
        self
    }
}
