//! Transfers: the kernel has the memory until it says that it is done, whoever gives up before.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tcmu::abi;
use tcmu::device::{Answered, Claim, Device, Work};
use tcmu::fileio::memory::{Lent, Memory};
use tcmu::fileio::queue::{Finished, Queue, Ticket};
use tcmu::fileio::{EndOfFile, Operation, Transfer};
use tcmu::mapping::Mapping;
use tcmu::ring::sim::{Config, Kernel, Request};
use tcmu::scsi::{DataBuffer, Reply, Status};

/// Memory in pieces, that says when it is given back.
struct Pieces {
    bytes: Arc<Vec<UnsafeCell<u8>>>,
    sizes: Vec<usize>,
    held: Arc<AtomicUsize>,
}

// SAFETY: the cells are looked at by `Shared` only while no transfer runs.
unsafe impl Send for Pieces {}

// SAFETY: the cells live as long as this, stay where they are, and may be written through a shared reference.
unsafe impl Memory for Pieces {
    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn pieces(&self, start: usize, each: &mut dyn FnMut(*mut u8, usize)) {
        let mut at = 0;
        for &size in &self.sizes {
            let from = start.clamp(at, at + size);
            each(self.bytes[from.min(self.bytes.len() - 1)].get(), at + size - from);
            at += size;
        }
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        self.held.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Default)]
struct Shared {
    bytes: Arc<Vec<UnsafeCell<u8>>>,
    held: Arc<AtomicUsize>,
}

impl Shared {
    // Shared with what the kernel holds, by one thread.
    #[allow(clippy::arc_with_non_send_sync)]
    fn new(bytes: &[u8]) -> Self {
        let bytes = Arc::new(bytes.iter().map(|&byte| UnsafeCell::new(byte)).collect());
        Self { bytes, held: Arc::default() }
    }

    fn lend(&self, sizes: &[usize]) -> Pieces {
        assert_eq!(sizes.iter().sum::<usize>(), self.bytes.len());
        self.held.fetch_add(1, Ordering::SeqCst);
        Pieces { bytes: self.bytes.clone(), sizes: sizes.to_vec(), held: self.held.clone() }
    }

    fn whole(&self) -> Pieces {
        self.lend(&[self.bytes.len()])
    }

    fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the tests look when the transfer is over, or at bytes that it does not write.
        self.bytes.iter().map(|cell| unsafe { *cell.get() }).collect()
    }
}

fn file(content: &[u8]) -> File {
    let file: File = rustix::fs::memfd_create("fileio", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
    file.write_all_at(content, 0).unwrap();
    file
}

/// A file whose data comes when it is written, and nothing ends before: transfers hang in the kernel.
///
/// With O_DIRECT it is taken for a file without page cache, and not asked for what is there at once.
fn pipe() -> (OwnedFd, File) {
    let (receiver, sender) = io::pipe().unwrap();
    rustix::fs::fcntl_setfl(&receiver, rustix::fs::OFlags::DIRECT).unwrap();
    (receiver.into(), File::from(OwnedFd::from(sender)))
}

/// What io_uring does with a pipe.
fn read_pipe<M: Memory>(receiver: &OwnedFd, memory: M) -> Transfer<M> {
    let mut transfer = Transfer::new(receiver.as_raw_fd(), Operation::Read, 0, memory);
    assert!(!transfer.attempt().unwrap());
    transfer
}

/// One with threads alone.
fn in_threads<M: Memory + 'static>() -> Queue<M> {
    Queue::new(false).unwrap()
}

/// None where io_uring is forbidden.
fn queue<M: Memory + 'static>() -> Option<Queue<M>> {
    match Queue::new(true) {
        Ok(queue) => Some(queue),
        Err(error) if std::env::var_os("CI").is_none() => {
            eprintln!("skipped: no io_uring: {error}");
            None
        }
        Err(error) => panic!("no io_uring: {error}"),
    }
}

fn wait<M: Memory + 'static>(queue: &mut Queue<M>) -> Finished<M> {
    let mut finished = wait_some(queue);
    assert_eq!(finished.len(), 1);
    finished.remove(0)
}

fn wait_some<M: Memory + 'static>(queue: &mut Queue<M>) -> Vec<Finished<M>> {
    for _ in 0..10 {
        let finished = queue.finish().unwrap();
        if !finished.is_empty() {
            return finished;
        }
        // SAFETY: the queue has it open.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(queue.fd()) };
        let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        rustix::event::poll(
            &mut [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)],
            Some(&second),
        )
        .unwrap();
    }
    panic!("nothing is over");
}

fn number(result: &io::Result<()>) -> Option<i32> {
    result.as_ref().err().and_then(io::Error::raw_os_error)
}

#[test]
fn pieces_are_filled_in_order_wherever_it_is_done() {
    let content: Vec<u8> = (0..20_000u32).map(|number| (number % 251) as u8).collect();
    let file = file(&content);
    for start in [0, 1, 4095, 4096] {
        let sizes = [1, 0, 4096, 3, 5000];
        for way in 0..4 {
            let memory = Shared::new(&[0; 9100]);
            let mut transfer = Transfer::new(file.as_raw_fd(), Operation::Read, start, memory.lend(&sizes));
            match way {
                0 => {
                    if !transfer.attempt().unwrap() {
                        transfer.block().unwrap();
                    }
                    drop(transfer);
                }
                1 => {
                    transfer.block().unwrap();
                    drop(transfer);
                }
                _ => {
                    let found = if way == 2 { queue() } else { Some(in_threads()) };
                    let Some(mut queue) = found else { continue };
                    let ticket = queue.start(transfer);
                    let finished = wait(&mut queue);
                    assert_eq!(finished.ticket, ticket);
                    finished.result.unwrap();
                }
            }
            assert_eq!(memory.bytes(), content[start as usize..][..9100]);
            assert_eq!(memory.held(), 0);
        }
    }
}

#[test]
fn more_pieces_than_a_system_call_takes() {
    let file = file(&[]);
    let content: Vec<u8> = (0..6000u32).map(|number| (number % 253) as u8).collect();
    let memory = Shared::new(&content);
    let sizes = vec![2; 3000];
    Transfer::new(file.as_raw_fd(), Operation::Write { durable: false }, 7, memory.lend(&sizes))
        .block()
        .unwrap();
    let mut queue = in_threads();
    let write =
        Transfer::new(file.as_raw_fd(), Operation::Write { durable: true }, 6007, memory.lend(&sizes));
    queue.start(write);
    wait(&mut queue).result.unwrap();
    let mut found = vec![0; 12_000];
    file.read_exact_at(&mut found, 7).unwrap();
    assert_eq!(found, [content.clone(), content].concat());
}

#[test]
fn the_end_of_the_file_is_an_error_and_not_a_success() {
    let file = file(&[1; 5000]);
    let memory = Shared::new(&[9; 4096]);
    let make = || Transfer::new(file.as_raw_fd(), Operation::Read, 4096, memory.whole());
    let mut errors = vec![make().block().unwrap_err()];
    let mut queue = in_threads();
    queue.start(make());
    errors.push(wait(&mut queue).result.unwrap_err());
    for error in errors {
        assert_eq!(error.downcast::<EndOfFile>().unwrap(), EndOfFile(5000));
    }
    assert_eq!(memory.held(), 0);
}

#[test]
fn space_and_durability() {
    let mut queue = in_threads();
    let file = file(&[1; 8192]);
    // FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    let punch = Operation::Allocate { mode: 3, length: 4096 };
    queue.start(Transfer::new(file.as_raw_fd(), punch, 4096, ()));
    wait(&mut queue).result.unwrap();
    queue.start(Transfer::new(file.as_raw_fd(), Operation::Sync, 0, ()));
    wait(&mut queue).result.unwrap();
    let mut found = [9; 8192];
    file.read_exact_at(&mut found, 0).unwrap();
    assert_eq!((found[4095], found[4096], found[8191]), (1, 0, 0));
    queue.start(Transfer::new(-1, Operation::Sync, 0, ()));
    assert_eq!(number(&wait(&mut queue).result), Some(libc::EBADF));
}

#[test]
fn a_cancelled_transfer_has_its_memory_until_it_is_over() {
    let Some(mut queue) = queue() else { return };
    let (receiver, _sender) = pipe();
    let memory = Shared::new(&[0; 64]);
    let ticket = queue.start(read_pipe(&receiver, memory.whole()));
    assert!(queue.finish().unwrap().is_empty());
    queue.cancel(ticket);
    queue.cancel(ticket);
    assert_eq!(memory.held(), 1);
    let finished = loop {
        if let Some(finished) = queue.finish().unwrap().pop() {
            break finished;
        }
        // One that comes while a worker of the kernel takes the transfer up finds nothing to end.
        queue.cancel(ticket);
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    assert_eq!((finished.ticket, number(&finished.result)), (ticket, Some(libc::ECANCELED)));
    drop(finished);
    assert_eq!((memory.held(), queue.outstanding()), (0, 0));
    // Nobody's any more: harmless.
    queue.cancel(ticket);
    queue.submit().unwrap();
}

#[test]
fn a_queue_that_is_dropped_waits_for_the_kernel() {
    let (receiver, _sender) = pipe();
    let memory = Shared::new(&[0; 64]);
    {
        let Some(mut queue) = queue() else { return };
        queue.start(read_pipe(&receiver, memory.whole()));
        queue.submit().unwrap();
        // This one has not begun.
        queue.start(read_pipe(&receiver, memory.whole()));
        assert_eq!(memory.held(), 2);
    }
    assert_eq!(memory.held(), 0);
}

#[test]
fn more_transfers_than_the_kernel_takes_at_once() {
    const MANY: usize = 1000;
    let Some(mut queue) = queue() else { return };
    let (receiver, mut sender) = pipe();
    let memory = Shared::new(&[0; 1]);
    let mut tickets: Vec<Ticket> =
        (0..MANY).map(|_| queue.start(read_pipe(&receiver, memory.whole()))).collect();
    // The last ones are called off before they begin.
    for ticket in tickets.drain(MANY - 10..) {
        queue.submit().unwrap();
        queue.cancel(ticket);
    }
    sender.write_all(&[1; MANY - 10]).unwrap();
    let mut over = Vec::new();
    while over.len() < MANY {
        over.extend(wait_some(&mut queue).iter().map(|finished| number(&finished.result)));
    }
    assert_eq!(over.iter().filter(|result| **result == Some(libc::ECANCELED)).count(), 10);
    assert_eq!((memory.held(), queue.outstanding()), (0, 0));
}

// Commands.

const BLOCK: usize = 4096;

fn device(capabilities: u16) -> (Kernel, Arc<Device>) {
    let config = Config { ring_size: 4096, data_size: 4 * BLOCK, capabilities, ..Config::default() };
    let kernel = Kernel::new(config).unwrap();
    let mapping = Mapping::new(&kernel.memory(), 4096 + 4 * BLOCK).unwrap();
    let event = kernel.consumer().try_clone_to_owned().unwrap();
    (kernel, Arc::new(Device::new(mapping, event, None).unwrap()))
}

fn next(kernel: &mut Kernel, device: &Arc<Device>) -> Arc<Claim> {
    kernel.submit(Request {
        cdb: vec![0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0],
        data_in: BLOCK,
        ..Request::default()
    });
    match device.drain(1, true).unwrap().pop() {
        Some(Work::Command(claim)) => claim,
        other => panic!("expected a command, not {other:?}"),
    }
}

fn lent(claim: &Arc<Claim>) -> Lent {
    Lent::new(claim.clone(), true, 0, BLOCK).unwrap()
}

fn read_into(claim: &Arc<Claim>, fd: RawFd) -> Transfer<Lent> {
    Transfer::new(fd, Operation::Read, 0, lent(claim))
}

/// Two ways to be over, one descriptor to wait for.
#[test]
fn threads_and_io_uring_beside_each_other() {
    let Some(mut queue) = queue() else { return };
    let (receiver, mut sender) = pipe();
    let file = file(&[3; 64]);
    let memory = [Shared::new(&[0; 64]), Shared::new(&[0; 64])];
    let from_pipe = queue.start(read_pipe(&receiver, memory[0].whole()));
    let from_file = queue.start(Transfer::new(file.as_raw_fd(), Operation::Read, 0, memory[1].whole()));
    assert_eq!(queue.outstanding(), 2);
    let finished = wait(&mut queue);
    assert_eq!((finished.ticket, queue.outstanding()), (from_file, 1));
    sender.write_all(&[4; 64]).unwrap();
    assert_eq!(wait(&mut queue).ticket, from_pipe);
    drop(finished);
    assert_eq!((memory[0].bytes(), memory[1].bytes()), (vec![4; 64], vec![3; 64]));
    assert_eq!((memory[0].held(), memory[1].held(), queue.outstanding()), (0, 0, 0));
}

#[test]
fn what_no_thread_has_begun_is_given_back() {
    let mut queue = in_threads();
    let file = file(&[3; 64]);
    let memory = Shared::new(&[0; 64]);
    let ticket = queue.start(Transfer::new(file.as_raw_fd(), Operation::Read, 0, memory.whole()));
    queue.cancel(ticket);
    queue.cancel(ticket);
    let finished = wait(&mut queue);
    assert_eq!((finished.ticket, number(&finished.result)), (ticket, Some(libc::ECANCELED)));
    drop(finished);
    assert_eq!((memory.held(), memory.bytes(), queue.outstanding()), (0, vec![0; 64], 0));
    // Nobody's any more: harmless.
    queue.cancel(ticket);
    assert!(queue.finish().unwrap().is_empty());
    queue.start(Transfer::new(file.as_raw_fd(), Operation::Read, 0, memory.whole()));
    drop(queue);
    assert_eq!(memory.held(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Write { file: usize, length: usize },
    Cancel(usize),
    Finish,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3usize, 1..200usize).prop_map(|(file, length)| Step::Write { file, length }),
        1 => (0..40usize).prop_map(Step::Cancel),
        2 => Just(Step::Finish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Writes to some files in threads, at the same place: each is over once, and what is found in a file is what was
    /// started last among those that were not called off.
    #[test]
    fn writes_to_a_file_are_done_in_their_order(steps in prop::collection::vec(step(), 1..60)) {
        let files: Vec<File> = (0..3).map(|_| file(&[0; 200])).collect();
        let mut expected = [[0u8; 200]; 3];
        let mut queue = in_threads();
        let mut open: Vec<(Ticket, usize, u8, Shared)> = Vec::new();
        let mut done: Vec<(usize, u8, usize)> = Vec::new();
        let mut order = Vec::new();
        let mut settle = |finished: Vec<Finished<Pieces>>, open: &mut Vec<(Ticket, usize, u8, Shared)>| {
            for each in finished {
                let at = open.iter().position(|(ticket, ..)| *ticket == each.ticket).expect("over twice");
                let (_, file, byte, memory) = open.remove(at);
                match &each.result {
                    Ok(()) => done.push((file, byte, memory.bytes().len())),
                    Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ECANCELED)),
                }
                drop(each);
                assert_eq!(memory.held(), 0);
            }
        };
        for (byte, step) in (1u8..).zip(steps) {
            match step {
                Step::Write { file, length } => {
                    let memory = Shared::new(&vec![byte; length]);
                    let write = Operation::Write { durable: false };
                    let transfer = Transfer::new(files[file].as_raw_fd(), write, 0, memory.whole());
                    open.push((queue.start(transfer), file, byte, memory));
                    order.push((file, byte, length));
                }
                Step::Cancel(at) => {
                    if let Some((ticket, ..)) = open.get(at) {
                        queue.cancel(*ticket);
                    }
                }
                Step::Finish => settle(queue.finish().unwrap(), &mut open),
            }
        }
        while !open.is_empty() {
            settle(wait_some(&mut queue), &mut open);
        }
        prop_assert_eq!(queue.outstanding(), 0);
        order.retain(|each| done.contains(each));
        for (file, byte, length) in order {
            expected[file][..length].fill(byte);
        }
        for (file, expected) in files.iter().zip(expected) {
            let mut found = [9; 200];
            file.read_exact_at(&mut found, 0).unwrap();
            prop_assert_eq!(found, expected);
        }
    }
}

/// Whatever becomes of its command, memory that the kernel may still write to is not given to another one.
#[test]
fn an_answer_does_not_take_the_memory_from_a_transfer() {
    let all = abi::MAILBOX_FLAG_CAP_OOOC | abi::MAILBOX_FLAG_CAP_READ_LEN | abi::MAILBOX_FLAG_CAP_KEEP_BUF;
    for capabilities in [all, all & !abi::MAILBOX_FLAG_CAP_KEEP_BUF] {
        let keeps = capabilities == all;
        let Some(mut queue) = queue() else { return };
        let (receiver, mut sender) = pipe();
        let (mut kernel, device) = device(capabilities);
        let claim = next(&mut kernel, &device);
        queue.start(read_pipe(&receiver, lent(&claim)));
        queue.submit().unwrap();

        let answered = claim.answer(Reply::good(0)).unwrap();
        let expected = if keeps { Answered::Kept { views: 1 } } else { Answered::Held { views: 1 } };
        assert_eq!(answered, expected);
        assert!(Lent::new(claim.clone(), true, 0, BLOCK).is_none());
        drop(claim);
        device.commit().unwrap();
        assert_eq!(kernel.process().len(), usize::from(keeps));
        // Every other block goes round, and none of them is the transfer's.
        let mut others = Vec::new();
        for round in 0..3u8 {
            let claim = next(&mut kernel, &device);
            claim.set_filled();
            claim.data_in().write(0, &[round; BLOCK]);
            others.push(claim);
        }
        assert!(device.reap().unwrap().is_empty());
        sender.write_all(&[0xee; BLOCK]).unwrap();
        let finished = wait(&mut queue);
        finished.result.unwrap();
        drop(finished.work);
        for (round, claim) in others.into_iter().enumerate() {
            let mut found = vec![0; BLOCK];
            claim.data_in().read(0, &mut found);
            assert_eq!(found, vec![round as u8; BLOCK]);
            claim.answer(Reply::good(BLOCK)).unwrap();
        }
        let kept = device.reap().unwrap();
        assert_eq!(kept.len(), usize::from(keeps));
        device.commit().unwrap();
        kernel.process();
        for id in kept {
            assert!(kernel.free_kept(id));
        }
        assert_eq!((kernel.outstanding(), kernel.violations()), (0, &[][..]));
    }
}

/// A device that is closed leaves the memory mapped.
#[test]
fn a_transfer_outlives_its_device() {
    let Some(mut queue) = queue() else { return };
    let (receiver, mut sender) = pipe();
    let (mut kernel, device) = device(abi::MAILBOX_FLAG_CAP_OOOC);
    let claim = next(&mut kernel, &device);
    queue.start(read_pipe(&receiver, lent(&claim)));
    queue.submit().unwrap();
    device.close();
    drop((claim, device, kernel));
    sender.write_all(&[0xee; BLOCK]).unwrap();
    wait(&mut queue).result.unwrap();
}

#[test]
fn only_a_whole_transfer_counts_as_filled() {
    let (mut kernel, device) = device(abi::MAILBOX_FLAG_CAP_OOOC);
    let short = file(&[7; BLOCK - 1]);
    let claim = next(&mut kernel, &device);
    read_into(&claim, short.as_raw_fd()).block().unwrap_err();
    assert!(!claim.is_filled());
    let mut part = Transfer::new(
        short.as_raw_fd(),
        Operation::Read,
        0,
        Lent::new(claim.clone(), true, 0, BLOCK - 1).unwrap(),
    );
    part.block().unwrap();
    assert!(!claim.is_filled());
    short.write_all_at(&[7], BLOCK as u64 - 1).unwrap();
    read_into(&claim, short.as_raw_fd()).block().unwrap();
    assert!(claim.is_filled());
    claim.answer(Reply::status(Status::Good)).unwrap();
}

#[derive(Debug, Clone)]
enum Action {
    Start,
    Feed,
    Cancel(usize),
    Submit,
    Finish,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => Just(Action::Start),
        2 => Just(Action::Feed),
        1 => (0..8usize).prop_map(Action::Cancel),
        1 => Just(Action::Submit),
        2 => Just(Action::Finish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Starts, data, cancellations and looks in any order: every transfer is over once, with all its bytes or an error,
    /// and has its memory exactly as long.
    #[test]
    fn every_transfer_is_over_once(actions in prop::collection::vec(action(), 1..60)) {
        let Some(mut queue) = queue() else { return Ok(()) };
        let mut open: Vec<(Ticket, Shared, File, bool)> = Vec::new();
        let mut receivers = Vec::new();
        let settle = |finished: Vec<Finished<Pieces>>, open: &mut Vec<(Ticket, Shared, File, bool)>| {
            for done in finished {
                let at = open.iter().position(|(ticket, ..)| *ticket == done.ticket).expect("over twice");
                let (_, memory, _, fed) = open.remove(at);
                assert_eq!(memory.held(), 1);
                match &done.result {
                    Ok(()) => assert!(fed && memory.bytes() == [5; 16]),
                    Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ECANCELED)),
                }
                drop(done);
                assert_eq!(memory.held(), 0);
            }
        };
        for action in actions {
            match action {
                Action::Start => {
                    let (receiver, sender) = pipe();
                    let memory = Shared::new(&[0; 16]);
                    let transfer = read_pipe(&receiver, memory.lend(&[3, 13]));
                    open.push((queue.start(transfer), memory, sender, false));
                    receivers.push(receiver);
                }
                Action::Feed => {
                    if let Some((_, _, sender, fed)) = open.iter_mut().find(|(.., fed)| !fed) {
                        // In two parts: a short transfer goes on.
                        sender.write_all(&[5; 7]).unwrap();
                        sender.write_all(&[5; 9]).unwrap();
                        *fed = true;
                    }
                }
                Action::Cancel(at) => {
                    if let Some((ticket, ..)) = open.get(at) {
                        queue.cancel(*ticket);
                    }
                }
                Action::Submit => queue.submit().unwrap(),
                Action::Finish => settle(queue.finish().unwrap(), &mut open),
            }
            for (_, memory, ..) in &open {
                prop_assert_eq!(memory.held(), 1);
            }
        }
        // Again and again: one that comes while a worker of the kernel takes the transfer up finds nothing to end. That
        // is no harm for files, where a transfer ends by itself.
        for _ in 0..1000 {
            if open.is_empty() {
                break;
            }
            for (ticket, ..) in &open {
                queue.cancel(*ticket);
            }
            queue.submit().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
            settle(queue.finish().unwrap(), &mut open);
        }
        prop_assert_eq!(open.len(), 0);
        prop_assert_eq!(queue.outstanding(), 0);
    }
}
