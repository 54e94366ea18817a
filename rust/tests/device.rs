//! A device and its claims: every command has one answer, whoever owes it and whatever is still looked at.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tcmu::abi;
use tcmu::device::{Answered, Claim, Device, DeviceError, Started, Work};
use tcmu::mapping::Mapping;
use tcmu::ring::RingError;
use tcmu::ring::sim::{Completion, Config, Kernel, Request, Ticket};
use tcmu::scsi::sense::Sense;
use tcmu::scsi::{
    Capabilities, DataBuffer, Geometry, Identity, LogicalUnit, Reply, Status, Step, StepResult, Verb,
};

const ALL: u16 = abi::MAILBOX_FLAG_CAP_OOOC
    | abi::MAILBOX_FLAG_CAP_READ_LEN
    | abi::MAILBOX_FLAG_CAP_TMR
    | abi::MAILBOX_FLAG_CAP_KEEP_BUF;
const NO_READ_LEN: u16 = ALL & !abi::MAILBOX_FLAG_CAP_READ_LEN;
const NO_KEEP_BUF: u16 = ALL & !abi::MAILBOX_FLAG_CAP_KEEP_BUF;
const SIZE: u64 = 1 << 20;

fn unit(capabilities: Capabilities) -> LogicalUnit {
    let naa = [0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let identity = Identity::new("TCMU-RS", "Test disk", "0.1", "serial", naa).unwrap();
    LogicalUnit::new(identity, Geometry::new(512, SIZE), capabilities).unwrap()
}

fn device_with(capabilities: u16, unit: Option<LogicalUnit>) -> (Kernel, Arc<Device>) {
    let config = Config { ring_size: 4096, data_size: 64 << 10, capabilities, ..Config::default() };
    let kernel = Kernel::new(config).unwrap();
    let mapping = Mapping::new(&kernel.memory(), 4096 + (64 << 10)).unwrap();
    let event = kernel.consumer().try_clone_to_owned().unwrap();
    (kernel, Arc::new(Device::new(mapping, event, unit.map(Arc::new)).unwrap()))
}

fn device(capabilities: u16) -> (Kernel, Arc<Device>) {
    let storage = Capabilities { write: true, flush: true, ..Capabilities::default() };
    device_with(capabilities, Some(unit(storage)))
}

fn read(blocks: u8) -> Request {
    let cdb = vec![0x28, 0, 0, 0, 0, 0, 0, 0, blocks, 0];
    Request { cdb, data_in: usize::from(blocks) * 512, ..Request::default() }
}

fn write(blocks: u8, flags: u8) -> Request {
    let cdb = vec![0x2a, flags, 0, 0, 0, 0, 0, 0, blocks, 0];
    Request { cdb, data_out: vec![0x77; usize::from(blocks) * 512], data_in: 0 }
}

fn one_step(device: &Arc<Device>) -> (Arc<Claim>, Step) {
    match device.drain(1, false).unwrap().pop() {
        Some(Work::Step(claim, step)) => (claim, step),
        other => panic!("expected a step, not {other:?}"),
    }
}

fn one_claim(device: &Arc<Device>) -> Arc<Claim> {
    match device.drain(1, true).unwrap().pop() {
        Some(Work::Command(claim)) => claim,
        other => panic!("expected a command, not {other:?}"),
    }
}

fn fill(claim: &Claim, value: u8) {
    claim.data_in().write(0, &vec![value; claim.data_in().len()]);
    claim.set_filled();
}

fn bytes(claim: &Claim) -> Vec<u8> {
    let mut bytes = vec![0; claim.data_in().len()];
    claim.data_in().read(0, &mut bytes);
    bytes
}

#[track_caller]
fn done(kernel: &mut Kernel) -> Completion {
    let mut done = kernel.process();
    assert_eq!(kernel.violations(), &[] as &[String]);
    assert_eq!(done.len(), 1, "{done:?}");
    done.remove(0)
}

fn sense_code(completion: &Completion) -> (u8, u8, u8) {
    (completion.sense[2] & 0xf, completion.sense[12], completion.sense[13])
}

fn is_readable(fd: i32) -> bool {
    // SAFETY: the descriptors of a device stay open as long as the device, which the caller holds.
    #[allow(unsafe_code)]
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

#[test]
fn a_read_is_a_step_and_an_answer() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(2));
    assert!(is_readable(device.event_fd().unwrap()));
    let (claim, step) = one_step(&device);
    assert!(!is_readable(device.event_fd().unwrap()), "the event was taken");
    assert_eq!((step.verb, step.offset.0, step.length), (Verb::Read, 0, 1024));
    fill(&claim, 5);
    assert_eq!(claim.advance(StepResult::None).unwrap(), None);
    assert!(claim.is_answered());
    assert!(kernel.process().is_empty(), "nothing is handed back before the commit");
    device.commit().unwrap();
    assert_eq!(done(&mut kernel).data_in, vec![5; 1024]);
    assert_eq!((device.in_flight(), device.counters.doorbells.load(Ordering::Relaxed)), (0, 1));
}

#[test]
fn what_needs_no_storage_is_answered_at_once() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(Request { cdb: vec![0; 6], ..Request::default() });
    kernel.submit(Request { cdb: vec![0x12, 0, 0, 0, 36, 0], data_in: 36, ..Request::default() });
    assert!(device.drain(8, false).unwrap().is_empty());
    assert_eq!(device.counters.emulated.load(Ordering::Relaxed), 2);
    device.commit().unwrap();
    assert_eq!(kernel.process().iter().map(|done| done.status).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(device.counters.doorbells.load(Ordering::Relaxed), 1, "one doorbell for the batch");
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn a_batch_has_a_limit() {
    let (mut kernel, device) = device(ALL);
    for _ in 0..5 {
        kernel.submit(read(1));
    }
    let first = device.drain(3, false).unwrap();
    assert_eq!((first.len(), device.pending().unwrap()), (3, true));
    let rest = device.drain(3, false).unwrap();
    assert_eq!((rest.len(), device.pending().unwrap()), (2, false));
}

#[test]
fn an_intercepted_command_may_go_back_to_the_emulation() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let claim = one_claim(&device);
    assert_eq!(claim.cdb(), &read(1).cdb[..]);
    let Started::Step(step) = claim.start().unwrap() else { panic!("a step is needed") };
    assert_eq!(step.verb, Verb::Read);
    fill(&claim, 1);
    assert_eq!(claim.advance(StepResult::None).unwrap(), None);
    device.commit().unwrap();
    assert_eq!(done(&mut kernel).status, 0);
}

#[test]
fn without_a_unit_no_command_is_known() {
    let (mut kernel, device) = device_with(ALL, None);
    kernel.submit(read(1));
    let claim = one_claim(&device);
    assert!(matches!(claim.start().unwrap(), Started::Answered));
    device.commit().unwrap();
    assert_eq!(sense_code(&done(&mut kernel)), (5, 0x20, 0));
}

#[test]
fn there_is_one_answer() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    fill(&claim, 1);
    assert_eq!(claim.answer(Reply::good(512)).unwrap(), Answered::Sent);
    assert_eq!(claim.answer(Reply::check(Sense::UNRECOVERED_READ)).unwrap(), Answered::Already);
    assert_eq!(claim.advance(StepResult::None).unwrap(), None, "a step that ends late changes nothing");
    drop(claim);
    device.commit().unwrap();
    assert_eq!(done(&mut kernel).status, 0);
    assert_eq!(device.in_flight(), 0);
}

#[test]
fn a_dropped_claim_answers_and_rings() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    let other = claim.clone();
    drop(claim);
    assert!(kernel.process().is_empty(), "somebody still holds it");
    drop(other);
    // No commit: nobody may be left to think of it.
    assert_eq!(sense_code(&done(&mut kernel)), (0xb, 0, 0));
}

#[test]
fn answers_come_from_any_thread() {
    let (mut kernel, device) = device(ALL);
    let tickets: Vec<Ticket> = (0..8).map(|_| kernel.submit(read(1))).collect();
    let work = device.drain(8, false).unwrap();
    std::thread::scope(|scope| {
        for item in work {
            let device = &device;
            scope.spawn(move || {
                let Work::Step(claim, _) = item else { panic!("expected a step") };
                fill(&claim, claim.id().0 as u8);
                claim.answer(Reply::good(512)).unwrap();
                device.commit().unwrap();
            });
        }
    });
    let mut seen = kernel.process();
    seen.sort_by_key(|completion| completion.ticket);
    for (index, completion) in seen.iter().enumerate() {
        assert_eq!((completion.ticket, completion.data_in[0]), (tickets[index], index as u8 + 1));
    }
    assert_eq!((seen.len(), kernel.violations()), (8, &[] as &[String]));
}

#[test]
fn no_view_of_an_answered_command() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    assert!(claim.lend());
    claim.give_back();
    fill(&claim, 1);
    claim.answer(Reply::good(512)).unwrap();
    assert!(!claim.lend());
    assert!(device.reap().unwrap().is_empty());
    done(&mut kernel);
}

#[test]
fn a_view_that_is_left_keeps_the_buffer() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    assert!(claim.lend() && claim.lend());
    fill(&claim, 3);
    assert_eq!(claim.answer(Reply::good(512)).unwrap(), Answered::Kept { views: 2 });
    device.commit().unwrap();
    assert_eq!(done(&mut kernel).data_in, vec![3; 512], "the initiator does not wait");
    let wake = device.wake_fd().unwrap();
    claim.give_back();
    assert!(!is_readable(wake) && device.reap().unwrap().is_empty());
    assert_eq!((bytes(&claim), kernel.kept()), (vec![3; 512], vec![1]));
    claim.give_back();
    assert!(is_readable(wake));
    assert_eq!(device.reap().unwrap(), [1]);
    assert!(!is_readable(wake));
    assert!(kernel.free_kept(1));
}

#[test]
fn where_buffers_cannot_be_kept_the_answer_waits_for_the_views() {
    let (mut kernel, device) = device(NO_KEEP_BUF);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    assert!(claim.lend());
    fill(&claim, 3);
    assert_eq!(claim.answer(Reply::good(512)).unwrap(), Answered::Held { views: 1 });
    device.commit().unwrap();
    assert!(kernel.process().is_empty());
    assert_eq!(device.in_flight(), 1);
    // Nobody has asked for the descriptor yet: what was released before is not lost.
    claim.give_back();
    device.wake_fd().unwrap();
    assert!(device.reap().unwrap().is_empty(), "there is nothing to free");
    assert_eq!(done(&mut kernel).data_in, vec![3; 512]);
}

/// Fuzzing found it: a command was answered with a view left, the view went away, and `reap` said that the buffer could
/// be freed, all before the commit. The kernel knew nothing of a kept buffer and refused; nobody asked again, and the
/// blocks and the id were lost for the life of the device.
#[test]
fn a_kept_buffer_is_not_freed_before_the_kernel_keeps_it() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    assert!(claim.lend());
    fill(&claim, 3);
    assert_eq!(claim.answer(Reply::good(512)).unwrap(), Answered::Kept { views: 1 });
    claim.give_back();
    assert_eq!(device.reap().unwrap(), [1]);
    assert_eq!(done(&mut kernel).data_in, vec![3; 512]);
    assert!(kernel.free_kept(1));
}

/// The same story a second time: with answers in strict order, the commit did not help. The one that keeps a buffer
/// waits behind a slower command, and its buffer was said to be free before the kernel had heard of it.
#[test]
fn in_strict_order_answers_wait_for_the_views_too() {
    let (mut kernel, device) = device(ALL & !abi::MAILBOX_FLAG_CAP_OOOC);
    kernel.submit(read(1));
    kernel.submit(read(1));
    let (first, _) = one_step(&device);
    let (second, _) = one_step(&device);
    assert!(second.lend());
    fill(&second, 2);
    assert_eq!(second.answer(Reply::good(512)).unwrap(), Answered::Held { views: 1 });
    second.give_back();
    assert!(device.reap().unwrap().is_empty());
    fill(&first, 1);
    first.answer(Reply::good(512)).unwrap();
    device.commit().unwrap();
    assert_eq!(kernel.process().iter().map(|done| done.data_in[0]).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((kernel.kept(), kernel.violations()), (vec![], &[] as &[String]));
}

#[test]
fn data_in_that_is_not_valid_is_not_delivered() {
    for (capabilities, delivered) in [(ALL, 100), (NO_READ_LEN, 1024)] {
        let (mut kernel, device) = device_with(capabilities, None);
        kernel.submit(read(2));
        let claim = one_claim(&device);
        claim.data_in().write(0, &[7; 100]);
        claim.answer(Reply::good(100)).unwrap();
        device.commit().unwrap();
        let data = done(&mut kernel).data_in;
        assert_eq!((data.len(), &data[..100]), (delivered, &[7; 100][..]));
        assert!(
            data[100..].iter().all(|&byte| byte == 0),
            "the rest is zeroes, and not what was there before"
        );
    }
}

/// The kernel ignores a `read_len` of 0, and hands the whole buffer over.
#[test]
fn no_data_in_at_all_is_zeroes() {
    let (mut kernel, device) = device_with(ALL, None);
    kernel.submit(read(1));
    one_claim(&device).answer(Reply::good(0)).unwrap();
    device.commit().unwrap();
    assert_eq!(done(&mut kernel).data_in, vec![0; 512]);
}

/// With every status but CHECK CONDITION the kernel copies the buffer to where the initiator can see it.
#[test]
fn a_status_without_sense_zeroes_the_buffer() {
    for status in [Status::Busy, Status::TaskSetFull, Status::TaskAborted, Status::ReservationConflict] {
        let (mut kernel, device) = device(ALL);
        kernel.submit(read(1));
        let (claim, _) = one_step(&device);
        claim.answer(Reply::status(status)).unwrap();
        assert_eq!(bytes(&claim), vec![0; 512]);
        device.commit().unwrap();
        assert_eq!(done(&mut kernel).status, status as u8);
    }
}

#[test]
fn the_second_buffer_of_a_bidirectional_command_is_the_one_that_is_zeroed() {
    let (mut kernel, device) = device_with(ALL, None);
    kernel.submit(Request { cdb: vec![0x53; 10], data_out: vec![9; 600], data_in: 700 });
    let claim = one_claim(&device);
    assert_eq!((claim.data().len(), claim.data_in().len()), (600, 700));
    claim.data_in().write(0, &[8; 10]);
    claim.answer(Reply::good(10)).unwrap();
    let mut out = vec![0; 600];
    claim.data().read(0, &mut out);
    assert_eq!(out, vec![9; 600]);
    device.commit().unwrap();
    let data = done(&mut kernel).data_in;
    assert_eq!((&data[..10], &data[10..]), (&[8; 10][..], &[0; 690][..]));
}

/// Fuzzing found it: sent with data both ways, READ CAPACITY put its answer into the Data-Out, and the initiator got as
/// many bytes of what its Data-In had held before.
#[test]
fn emulated_data_goes_its_own_way_in_a_bidirectional_command() {
    let (mut kernel, device) = device(ALL);
    let mut cdb = vec![0x25];
    cdb.resize(10, 0);
    kernel.submit(Request { cdb, data_out: vec![9; 512], data_in: 64 });
    kernel.submit(Request { data_out: vec![9; 4096], ..read(2) });
    kernel.submit(Request { data_in: 64, ..write(1, 0) });
    let mut work = device.drain(8, false).unwrap();
    let Some(Work::Step(claim, step)) = work.pop() else { panic!("expected a step") };
    assert_eq!((step.verb, claim.data().len()), (Verb::Write, 512));
    assert_eq!(claim.advance(StepResult::None).unwrap(), None);
    let Some(Work::Step(claim, step)) = work.pop() else { panic!("expected a step") };
    assert_eq!((step.verb, claim.data_in().len()), (Verb::Read, 1024));
    fill(&claim, 4);
    assert_eq!(claim.advance(StepResult::None).unwrap(), None);
    device.commit().unwrap();
    let done = kernel.process();
    assert_eq!(kernel.violations(), &[] as &[String]);
    assert_eq!(done[0].data_in[..8], [0, 0, 7, 255, 0, 0, 2, 0]);
    assert_eq!((&done[0].data_in[8..], &done[1].data_in[..]), (&[0; 56][..], &[0; 64][..]));
    assert_eq!(done[2].data_in, vec![4; 1024]);
}

/// The kernel ignores the length for Data-Out, and takes 0 for none.
#[test]
fn an_initiator_that_reads_by_a_write_gets_one_byte() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(Request { data_out: Vec::new(), data_in: 1024, ..write(2, 0) });
    let (claim, _) = one_step(&device);
    claim.advance(StepResult::None).unwrap();
    device.commit().unwrap();
    assert_eq!(kernel.process().remove(0).data_in.len(), 1);
}

/// The last step of a WRITE with FUA is a flush, which has no data: its answer zeroed the Data-Out, a pass over the
/// memory for every such write.
#[test]
fn data_out_is_left_alone() {
    for flags in [0, 8] {
        let (mut kernel, device) = device(ALL);
        kernel.submit(write(1, flags));
        let (claim, step) = one_step(&device);
        assert_eq!(step.verb, Verb::Write);
        let flush = claim.advance(StepResult::None).unwrap();
        if flags != 0 {
            assert_eq!(flush.unwrap().verb, Verb::Flush);
            assert_eq!(claim.advance(StepResult::None).unwrap(), None);
        }
        assert_eq!(bytes(&claim), vec![0x77; 512]);
        device.commit().unwrap();
        assert_eq!(done(&mut kernel).status, 0);
    }
}

#[test]
fn data_in_is_zeroed_once_before_a_partial_use() {
    let (mut kernel, device) = device_with(ALL, None);
    kernel.submit(read(1));
    let claim = one_claim(&device);
    assert!(!claim.is_filled());
    claim.zero_unless_filled();
    assert!(claim.is_filled());
    claim.data_in().write(5, &[1]);
    claim.zero_unless_filled();
    claim.answer(Reply::good(512)).unwrap();
    device.commit().unwrap();
    let data = done(&mut kernel).data_in;
    assert_eq!((data[4], data[5], data[511]), (0, 1, 0));
}

#[test]
fn aborts_reach_the_layer_above_and_still_want_an_answer() {
    let (mut kernel, device) = device(ALL);
    let ticket = kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    kernel.abort(abi::tmr::ABORT_TASK, &[ticket]);
    match device.drain(8, false).unwrap().pop() {
        Some(Work::TaskManagement(tmr)) => assert_eq!(tmr.commands, [claim.id()]),
        other => panic!("expected a notification, not {other:?}"),
    }
    claim.answer(Reply::status(Status::TaskAborted)).unwrap();
    device.commit().unwrap();
    assert_eq!(done(&mut kernel).status, 0x40);
}

#[test]
fn a_closed_device_takes_no_answers() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    assert!(claim.lend());
    device.close();
    device.close();
    let dead = |error: DeviceError| assert!(matches!(error, DeviceError::Ring(RingError::Dead)), "{error}");
    dead(device.drain(8, false).unwrap_err());
    dead(device.commit().unwrap_err());
    dead(device.pending().unwrap_err());
    dead(device.event_fd().unwrap_err());
    dead(device.reap().unwrap_err());
    dead(claim.advance(StepResult::None).unwrap_err());
    assert_eq!(claim.answer(Reply::good(0)).unwrap(), Answered::Already, "that was the answer");
    // The memory stays as long as somebody looks at it.
    fill(&claim, 1);
    claim.give_back();
    drop(claim);
    assert!(kernel.process().is_empty());
}

#[test]
fn a_corrupt_ring_ends_the_device() {
    let (mut kernel, device) = device(ALL);
    kernel.submit(read(1));
    kernel.submit(read(1));
    let (claim, _) = one_step(&device);
    kernel.mapping().write_u64(128 + 128 + 24, u64::MAX).unwrap();
    let error = device.drain(8, false).unwrap_err();
    assert!(matches!(error, DeviceError::Ring(RingError::Corrupt { .. })), "{error}");
    assert!(claim.answer(Reply::good(0)).is_err());
}

#[test]
fn a_descriptor_that_ends_is_a_device_that_is_gone() {
    let (kernel, device) = device(ALL);
    drop(kernel);
    assert!(matches!(device.drain(8, false).unwrap_err(), DeviceError::Removed));
}
