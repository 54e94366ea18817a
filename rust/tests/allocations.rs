//! What a command costs in allocations: none in the ring, one in the device.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use tcmu::device::{Device, Work};
use tcmu::mapping::Mapping;
use tcmu::ring::sim::{Config, Kernel, Request};
use tcmu::ring::{Entry, Response, Ring};
use tcmu::scsi::{Capabilities, Geometry, Identity, LogicalUnit, StepResult};

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: the system's allocator does the work; counting touches no memory of its.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: passed on as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on as it came.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn counted<T>(call: impl FnOnce() -> T) -> (usize, T) {
    let before = COUNT.get();
    let result = call();
    (COUNT.get() - before, result)
}

const BATCH: usize = 32;
const BLOCK: usize = 4096;

fn read() -> Request {
    Request { cdb: vec![0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0], data_in: BLOCK, ..Request::default() }
}

fn kernel() -> (Kernel, Mapping) {
    let kernel = Kernel::new(Config::default()).unwrap();
    let size = kernel.mapping().size();
    let mapping = Mapping::new(&kernel.memory(), size).unwrap();
    (kernel, mapping)
}

#[test]
fn a_ring_allocates_nothing_for_a_command() {
    let (mut kernel, mapping) = kernel();
    let mut ring = Ring::attach(Arc::new(mapping)).unwrap();
    let mut ids = Vec::with_capacity(BATCH);
    // The first round warms up.
    for round in 0..5 {
        for _ in 0..BATCH {
            kernel.submit(read());
        }
        let (allocations, ()) = counted(|| {
            while let Some(Entry::Command(command)) = ring.fetch().unwrap() {
                ids.push(command.id);
            }
            for id in ids.drain(..) {
                let good = Response { status: 0, sense: Default::default(), read_len: None, keep_buf: false };
                ring.complete(id, good).unwrap();
            }
            assert!(ring.commit().unwrap());
        });
        kernel.kick();
        assert_eq!(kernel.process().len(), BATCH);
        assert!(round == 0 || allocations == 0, "{allocations} allocations in round {round}");
    }
}

#[test]
fn a_device_allocates_once_for_a_command_and_little_for_a_batch() {
    let (mut kernel, mapping) = kernel();
    let naa = [0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let identity = Identity::new("TCMU-RS", "Test disk", "0.1", "serial", naa).unwrap();
    let unit = LogicalUnit::new(identity, Geometry::new(512, 1 << 20), Capabilities::default()).unwrap();
    let event = kernel.consumer().try_clone_to_owned().unwrap();
    let device = Arc::new(Device::new(mapping, event, Some(Arc::new(unit))).unwrap());
    for round in 0..5 {
        for _ in 0..BATCH {
            kernel.submit(read());
        }
        let (allocations, ()) = counted(|| {
            for work in device.drain(2 * BATCH, false).unwrap() {
                let Work::Step(claim, _) = work else { panic!("expected a step") };
                claim.set_filled();
                assert!(claim.advance(StepResult::None).unwrap().is_none());
            }
            device.commit().unwrap();
        });
        assert_eq!(kernel.process().len(), BATCH);
        // The claim, which has an owner on either side of Python; and the list of the batch, which grows by doubling.
        assert!(round == 0 || allocations <= BATCH + 8, "{allocations} allocations in round {round}");
    }
    let counters = &device.counters;
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(load(&counters.doorbells), 5, "one doorbell for each batch");
}
