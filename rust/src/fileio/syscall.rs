//! The system calls, as plain functions.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;

use super::memory::Memory;
use super::{Operation, Transfer, Vectors};

fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether the descriptor goes around the page cache.
pub(super) fn is_direct(fd: RawFd) -> io::Result<bool> {
    // SAFETY: reads a number; any `fd` will do.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 { Err(io::Error::last_os_error()) } else { Ok(flags & libc::O_DIRECT != 0) }
}

/// Whether the file is in memory, and nowhere else: one of tmpfs.
///
/// Only those have seals. That is asked because the answer takes no file system to give: `fstatfs(2)` waits for a FUSE
/// server, which may be a thread of this very process that waits for ours.
pub(super) fn is_memory(fd: RawFd) -> bool {
    // SAFETY: reads a number; any `fd` will do.
    unsafe { libc::fcntl(fd, libc::F_GET_SEALS) >= 0 }
}

/// Whether a file that is opened with O_DIRECT knows `RWF_NOWAIT`: asked with a transfer that no storage does.
pub(super) fn tries_direct(fd: RawFd) -> bool {
    let mut byte = 0u8;
    let vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: one vector, which points to one byte that nobody else uses.
    let result = unsafe { libc::preadv2(fd, &raw const vector, 1, 1, libc::RWF_NOWAIT) };
    // The flag is looked at first, and then that one byte is not a block.
    result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP)
}

/// `preadv2(2)` or `pwritev2(2)` of what `vectors` has.
pub(super) fn vectored<M: Memory>(
    transfer: &Transfer<M>,
    vectors: &Vectors,
    flags: libc::c_int,
) -> io::Result<usize> {
    let call = if transfer.operation == Operation::Read { libc::preadv2 } else { libc::pwritev2 };
    let offset =
        libc::off_t::try_from(transfer.position()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // At most `MAX_PIECES`.
    let count = vectors.0.len() as libc::c_int;
    // SAFETY:
    // - the vectors are `count` initialised ones;
    // - what they point to is valid for the call, for writes if it is a read, and no Rust reference points there: that
    //   is `Memory`'s promise, and the transfer, which has the memory, is borrowed for the call.
    check(unsafe { call(transfer.fd, vectors.0.as_ptr(), count, offset, flags) })
}

/// `preadv2(2)` into memory of ours. Fewer bytes than that has room for: the file ends, or not all of it is there at once.
pub(super) fn read(fd: RawFd, into: &mut [u8], offset: u64, flags: libc::c_int) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let vector = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: one vector, of memory that is borrowed for the call and nobody else's meanwhile.
    check(unsafe { libc::preadv2(fd, &raw const vector, 1, offset, flags) })
}

/// `fdatasync(2)`.
pub(super) fn sync(fd: RawFd) -> io::Result<usize> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fdatasync(fd) } as libc::ssize_t)
}

/// `fallocate(2)`.
pub(super) fn allocate(fd: RawFd, mode: i32, offset: u64, length: u64) -> io::Result<usize> {
    let number = |value| libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let (offset, length) = (number(offset)?, number(length)?);
    // SAFETY: no memory is involved.
    check(unsafe { libc::fallocate(fd, mode, offset, length) } as libc::ssize_t)
}
