//! What the core costs per command, in nanoseconds, with no Python: `cargo bench`.
//!
//! Each row is the median of the rounds with the lowest and the highest. Results are checked in every round. The
//! simulator runs outside of the measured time, unless it is what is measured.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tcmu::device::{Claim, Device, Work};
use tcmu::mapping::Mapping;
use tcmu::ring::sim::{Config, Kernel, Request};
use tcmu::ring::{Buffer, Command, Entry, Response, Ring};
use tcmu::scsi::{Capabilities, DataBuffer, Geometry, Identity, LogicalUnit, Step, StepResult};

const DEPTH: usize = 32;
const BATCHES: usize = 400;
const ROUNDS: usize = 15;

fn config() -> Config {
    Config { checks: false, ..Config::default() }
}

fn map(kernel: &Kernel) -> Mapping {
    Mapping::new(&kernel.memory(), kernel.mapping().size()).unwrap()
}

fn test_unit_ready() -> Request {
    Request { cdb: vec![0; 6], ..Request::default() }
}

fn inquiry() -> Request {
    Request { cdb: vec![0x12, 0, 0, 0, 96, 0], data_in: 96, ..Request::default() }
}

fn read() -> Request {
    Request { cdb: vec![0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0], data_in: 4096, ..Request::default() }
}

fn device(kernel: &Kernel) -> Arc<Device> {
    let naa = [0x60, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    let identity = Identity::new("TCMU-RS", "Bench disk", "0.1", "serial", naa).unwrap();
    let capabilities = Capabilities { write: true, ..Capabilities::default() };
    let unit = LogicalUnit::new(identity, Geometry::new(512, 1 << 30), capabilities).unwrap();
    let event = kernel.consumer().try_clone_to_owned().unwrap();
    Arc::new(Device::new(map(kernel), event, Some(Arc::new(unit))).unwrap())
}

/// Runs `round`, which says how long `DEPTH * BATCHES` commands took, and prints the cost of one.
fn report(what: &str, mut round: impl FnMut() -> Duration) {
    round();
    let mut costs: Vec<f64> =
        (0..ROUNDS).map(|_| round().as_secs_f64() * 1e9 / (DEPTH * BATCHES) as f64).collect();
    costs.sort_by(f64::total_cmp);
    println!("{what:<44} {:8.1} {:8.1} {:8.1}", costs[ROUNDS / 2], costs[0], costs[ROUNDS - 1]);
}

fn submit(kernel: &mut Kernel, request: impl Fn() -> Request) {
    kernel.plug();
    for _ in 0..DEPTH {
        kernel.submit(request());
    }
    kernel.unplug();
}

fn finish(kernel: &mut Kernel) {
    let done = kernel.process();
    assert_eq!(done.len(), DEPTH);
    assert!(done.iter().all(|completion| completion.status == 0));
    assert_eq!(kernel.violations(), &[] as &[String]);
}

fn fetch(ring: &mut Ring) -> Vec<Command> {
    let mut commands = Vec::with_capacity(DEPTH);
    while let Some(entry) = ring.fetch().unwrap() {
        let Entry::Command(command) = entry else { panic!("expected a command") };
        commands.push(command);
    }
    commands
}

fn answer(ring: &mut Ring, commands: &[Command]) {
    for command in commands {
        let response = Response { status: 0, sense: SmallVec::new(), read_len: None, keep_buf: false };
        ring.complete(command.id, response).unwrap();
    }
    ring.commit().unwrap();
}

/// The ring alone: decode and answer, each measured by itself.
fn ring() {
    let mut kernel = Kernel::new(config()).unwrap();
    let mut ring = Ring::attach(Arc::new(map(&kernel))).unwrap();
    for (what, request) in
        [("of a READ(10), one iovec", read as fn() -> Request), ("without data", test_unit_ready)]
    {
        for decode in [true, false] {
            let name = if decode { "decode" } else { "answer and commit" };
            report(&format!("ring: {name} {what}"), || {
                let mut total = Duration::ZERO;
                for _ in 0..BATCHES {
                    submit(&mut kernel, request);
                    let start = Instant::now();
                    let commands = black_box(fetch(&mut ring));
                    let decoded = start.elapsed();
                    assert_eq!(commands.len(), DEPTH);
                    let start = Instant::now();
                    answer(&mut ring, &commands);
                    let answered = start.elapsed();
                    drop(commands);
                    total += if decode { decoded } else { answered };
                    kernel.kick();
                    finish(&mut kernel);
                }
                total
            });
        }
    }
}

/// A device: drain with emulation, answer, commit with its doorbell.
fn devices() {
    for (what, request) in [("TEST UNIT READY", test_unit_ready as fn() -> Request), ("INQUIRY", inquiry)] {
        let mut kernel = Kernel::new(config()).unwrap();
        let device = device(&kernel);
        report(&format!("device: emulated {what}, doorbell included"), || {
            let mut total = Duration::ZERO;
            for _ in 0..BATCHES {
                submit(&mut kernel, request);
                let start = Instant::now();
                assert!(device.drain(DEPTH, false).unwrap().is_empty());
                device.commit().unwrap();
                total += start.elapsed();
                finish(&mut kernel);
            }
            total
        });
    }
    let mut kernel = Kernel::new(config()).unwrap();
    let device = device(&kernel);
    let drain = || -> Vec<(Arc<Claim>, Step)> {
        let work = device.drain(DEPTH, false).unwrap();
        work.into_iter()
            .map(|item| match item {
                Work::Step(claim, step) => (claim, step),
                other => panic!("expected a step, not {other:?}"),
            })
            .collect()
    };
    report("device: drain of a READ(10) to its step", || {
        let mut total = Duration::ZERO;
        for _ in 0..BATCHES {
            submit(&mut kernel, read);
            let start = Instant::now();
            let work = black_box(drain());
            total += start.elapsed();
            work.iter().for_each(|(claim, _)| assert_eq!(claim.advance(StepResult::None).unwrap(), None));
            device.commit().unwrap();
            finish(&mut kernel);
        }
        total
    });
    report("device: answer of a READ(10), doorbell included", || {
        let mut total = Duration::ZERO;
        for _ in 0..BATCHES {
            submit(&mut kernel, read);
            let work = drain();
            let start = Instant::now();
            work.iter().for_each(|(claim, _)| assert_eq!(claim.advance(StepResult::None).unwrap(), None));
            drop(work);
            device.commit().unwrap();
            total += start.elapsed();
            finish(&mut kernel);
        }
        total
    });
}

/// What the simulator itself costs, which is in every figure of the Python benches.
fn simulator() {
    let mut kernel = Kernel::new(config()).unwrap();
    let mut ring = Ring::attach(Arc::new(map(&kernel))).unwrap();
    let data = vec![1u8; 4096];
    let write = || Request {
        cdb: vec![0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0],
        data_out: data.clone(),
        ..Request::default()
    };
    let requests: [(&str, &dyn Fn() -> Request); 3] =
        [("without data", &test_unit_ready), ("4 KiB of Data-In", &read), ("4 KiB of Data-Out", &write)];
    for (what, request) in requests {
        report(&format!("simulator: submit and process, {what}"), || {
            let mut total = Duration::ZERO;
            for _ in 0..BATCHES {
                let start = Instant::now();
                submit(&mut kernel, request);
                total += start.elapsed();
                let commands = fetch(&mut ring);
                answer(&mut ring, &commands);
                let start = Instant::now();
                kernel.kick();
                finish(&mut kernel);
                total += start.elapsed();
            }
            total
        });
    }
}

/// Copies between the data area and memory of our own.
fn copies() {
    let kernel = Kernel::new(config()).unwrap();
    let mapping = Arc::new(map(&kernel));
    let offset = config().ring_size as usize;
    let whole = SmallVec::from_elem(tcmu::ring::Extent { offset, length: 4096 }, 1);
    let buffer = Buffer::new(mapping, whole).unwrap();
    let mut bytes = vec![7u8; 4096];
    report("buffer: copy of 4 KiB in and out", || {
        let start = Instant::now();
        for _ in 0..DEPTH * BATCHES {
            buffer.write(0, black_box(&bytes));
            buffer.read(0, black_box(&mut bytes));
        }
        start.elapsed()
    });
    assert_eq!(bytes, vec![7; 4096]);
}

fn main() {
    println!(
        "{:<44} {:>8} {:>8} {:>8}",
        format!("ns per command, batches of {DEPTH}"),
        "median",
        "lowest",
        "highest"
    );
    ring();
    devices();
    simulator();
    copies();
}
