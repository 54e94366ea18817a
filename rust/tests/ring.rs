//! The ring against the simulated kernel: the story of every command, and of every entry that lies.

use std::sync::Arc;

use proptest::prelude::*;
use tcmu::abi;
use tcmu::mapping::Mapping;
use tcmu::ring::sim::{Completion, Config, Kernel, Request, Ticket};
use tcmu::ring::{CmdId, Command, Entry, Response, Ring, RingError};
use tcmu::scsi::DataBuffer;

const MAILBOX: usize = 128;

fn small() -> Config {
    Config { ring_size: 4096, data_size: 64 << 10, ..Config::default() }
}

fn pair(config: Config) -> (Kernel, Ring) {
    let kernel = Kernel::new(config.clone()).unwrap();
    let size = config.ring_size as usize + config.data_size;
    let mapping = Arc::new(Mapping::new(&kernel.memory(), size).unwrap());
    (kernel, Ring::attach(mapping).unwrap())
}

fn good(read_len: Option<u32>) -> Response {
    Response { status: 0, sense: Default::default(), read_len, keep_buf: false }
}

fn read(bytes: usize) -> Request {
    Request { cdb: vec![0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0], data_in: bytes, ..Request::default() }
}

fn write(data: Vec<u8>) -> Request {
    Request { cdb: vec![0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0], data_out: data, ..Request::default() }
}

fn fetch_command(ring: &mut Ring) -> Command {
    match ring.fetch().unwrap() {
        Some(Entry::Command(command)) => command,
        other => panic!("expected a command, not {other:?}"),
    }
}

fn answer(kernel: &mut Kernel, ring: &mut Ring) -> Vec<Completion> {
    assert!(ring.commit().unwrap());
    kernel.kick();
    kernel.process()
}

#[test]
fn first_entries_are_where_the_kernel_puts_them() {
    let (mut kernel, mut ring) = pair(Config { ring_size: 1 << 20, ..Config::default() });
    kernel.submit(Request { cdb: vec![0x12, 0, 0, 0, 36, 0], data_in: 36, ..Request::default() });
    let mapping = kernel.mapping().clone();
    assert_eq!(mapping.read_u32(MAILBOX).unwrap(), 120 | abi::OP_CMD);
    assert_eq!(mapping.read_u64(MAILBOX + 24).unwrap(), 240);
    assert_eq!(mapping.read_u64(MAILBOX + 48).unwrap(), 1 << 20);
    assert_eq!(mapping.read_u64(MAILBOX + 56).unwrap(), 36);
    let command = fetch_command(&mut ring);
    assert_eq!(
        (command.id, &command.cdb[..], command.data.len()),
        (CmdId(1), &[0x12, 0, 0, 0, 36, 0][..], 36)
    );
    command.data.write(0, &[7; 36]);
    ring.complete(command.id, good(None)).unwrap();
    let done = answer(&mut kernel, &mut ring);
    assert_eq!((done[0].status, &done[0].data_in[..], done[0].residual), (0, &[7u8; 36][..], 0));
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn completions_may_overtake_each_other() {
    let (mut kernel, mut ring) = pair(small());
    let tickets: Vec<Ticket> = (0..3).map(|_| kernel.submit(read(512))).collect();
    let commands: Vec<Command> = (0..3).map(|_| fetch_command(&mut ring)).collect();
    for index in [2, 0, 1] {
        commands[index].data.write(0, &[index as u8; 512]);
        ring.complete(commands[index].id, good(None)).unwrap();
    }
    let done = answer(&mut kernel, &mut ring);
    let seen: Vec<(Ticket, u8)> =
        done.iter().map(|completion| (completion.ticket, completion.data_in[0])).collect();
    assert_eq!(seen, [(tickets[2], 2), (tickets[0], 0), (tickets[1], 1)]);
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn without_the_flag_answers_keep_the_order_of_the_ring() {
    let (mut kernel, mut ring) = pair(Config { capabilities: 0, ..small() });
    let tickets: Vec<Ticket> = (0..3).map(|_| kernel.submit(read(512))).collect();
    let commands: Vec<Command> = (0..3).map(|_| fetch_command(&mut ring)).collect();
    for (index, command) in commands.iter().enumerate() {
        command.data.write(0, &[index as u8; 512]);
    }
    ring.complete(commands[2].id, good(None)).unwrap();
    assert!(!ring.commit().unwrap(), "nothing may be handed back before the first is answered");
    ring.complete(commands[0].id, good(None)).unwrap();
    ring.complete(commands[1].id, good(None)).unwrap();
    let done = answer(&mut kernel, &mut ring);
    assert_eq!(done.iter().map(|completion| completion.ticket).collect::<Vec<_>>(), tickets);
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn an_id_is_answered_once() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(read(512));
    let command = fetch_command(&mut ring);
    command.data.write(0, &[0; 512]);
    ring.complete(command.id, good(None)).unwrap();
    assert_eq!(ring.complete(command.id, good(None)), Err(RingError::NotOutstanding(1)));
    assert_eq!(answer(&mut kernel, &mut ring).len(), 1);
    assert!(!ring.commit().unwrap());
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn read_len_makes_a_residual_and_zero_is_ignored_by_the_kernel() {
    for (read_len, delivered) in [(Some(100), 100), (Some(5000), 1024), (Some(0), 1024), (None, 1024)] {
        let (mut kernel, mut ring) = pair(small());
        kernel.submit(read(1024));
        let command = fetch_command(&mut ring);
        command.data.write(0, &[1; 1024]);
        ring.complete(command.id, good(read_len)).unwrap();
        let done = answer(&mut kernel, &mut ring);
        assert_eq!((done[0].data_in.len(), done[0].residual), (delivered, 1024 - delivered));
    }
}

#[test]
fn sense_data_arrives_and_no_iovec_shows_through() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(read(8192));
    let command = fetch_command(&mut ring);
    let sense = [0x72, 5, 0x24, 0, 0, 0, 0, 0];
    ring.complete(
        command.id,
        Response { status: 2, sense: sense[..].into(), read_len: None, keep_buf: false },
    )
    .unwrap();
    let done = answer(&mut kernel, &mut ring);
    assert_eq!(done[0].status, 2);
    assert_eq!(&done[0].sense[..8], &sense);
    assert_eq!(&done[0].sense[8..], &[0; 88]);
    assert!(done[0].data_in.is_empty());
}

#[test]
fn every_cdb_group_has_its_length() {
    let (mut kernel, mut ring) = pair(small());
    for (opcode, length) in
        [(0x12, 6), (0x28, 10), (0x42, 10), (0x60, 12), (0x88, 16), (0xa8, 12), (0xc0, 10), (0xff, 10)]
    {
        let mut cdb = vec![0x5a; 32];
        cdb[0] = opcode;
        kernel.submit(Request { cdb, ..Request::default() });
        let command = fetch_command(&mut ring);
        assert_eq!((command.cdb[0], command.cdb.len()), (opcode, length));
        ring.complete(command.id, good(None)).unwrap();
    }
    let mut variable = vec![0u8; 260];
    variable[0] = 0x7f;
    variable[7] = 252;
    variable[259] = 9;
    kernel.submit(Request { cdb: variable.clone(), ..Request::default() });
    assert_eq!(&fetch_command(&mut ring).cdb[..], &variable[..]);
}

/// The simulator cut a CDB that says it has 263 bytes down to the 260 that the target core lets through, which is a
/// corrupt entry to the ring: fuzzing ended a device by a command that never arrives.
#[test]
fn a_cdb_that_is_too_long_never_arrives() {
    let (mut kernel, mut ring) = pair(small());
    let mut cdb = vec![0xff; 263];
    cdb[0] = 0x7f;
    kernel.submit(Request { cdb, ..Request::default() });
    assert!(ring.fetch().unwrap().is_none());
    let done = kernel.process();
    assert_eq!((done[0].status, done[0].sense[2], done[0].sense[12]), (2, 5, 0x24));
}

#[test]
fn both_buffers_of_a_bidirectional_command() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(Request { cdb: vec![0x53; 10], data_out: vec![3; 6000], data_in: 5000 });
    let command = fetch_command(&mut ring);
    let mut out = vec![0; 6000];
    command.data.read(0, &mut out);
    assert_eq!(out, vec![3; 6000]);
    let data_in = command.bidi_in.as_ref().unwrap();
    assert_eq!(data_in.len(), 5000);
    data_in.write(0, &vec![4; 5000]);
    ring.complete(command.id, good(None)).unwrap();
    assert_eq!(answer(&mut kernel, &mut ring)[0].data_in, vec![4; 5000]);
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn fragmented_data_is_one_buffer() {
    let (mut kernel, mut ring) = pair(small());
    for _ in 0..6 {
        kernel.submit(read(4096));
    }
    let commands: Vec<Command> = (0..6).map(|_| fetch_command(&mut ring)).collect();
    for index in [1, 3, 5] {
        commands[index].data.write(0, &[0; 4096]);
        ring.complete(commands[index].id, good(None)).unwrap();
    }
    answer(&mut kernel, &mut ring);
    kernel.submit(write((0..24576u32).map(|i| (i / 7) as u8).collect()));
    let command = fetch_command(&mut ring);
    let base = 4096;
    let pieces: Vec<_> = command.data.pieces(0..usize::MAX).map(|p| (p.offset - base, p.length)).collect();
    assert_eq!(pieces, [(4096, 4096), (12288, 4096), (20480, 16384)]);
    let mut whole = vec![0; 24576];
    command.data.read(0, &mut whole);
    assert!(whole.iter().enumerate().all(|(i, &byte)| byte == (i / 7) as u8));
    let mut part = vec![0; 5000];
    command.data.read(3000, &mut part);
    assert_eq!(part, whole[3000..8000]);
}

/// Found by fuzzing: a command could expire again and again, and told the initiator each time.
#[test]
fn a_command_expires_once() {
    let (mut kernel, mut ring) = pair(small());
    let ticket = kernel.submit(read(512));
    let command = fetch_command(&mut ring);
    kernel.expire(ticket);
    kernel.expire(ticket);
    assert_eq!(kernel.process().len(), 1);
    ring.complete(command.id, good(None)).unwrap();
    assert!(answer(&mut kernel, &mut ring).is_empty(), "the late answer only frees the entry");
    assert_eq!((kernel.outstanding(), kernel.violations()), (0, &[] as &[String]));
}

#[test]
fn task_management_names_commands_and_needs_no_answer() {
    let (mut kernel, mut ring) = pair(small());
    let tickets: Vec<Ticket> = (0..2).map(|_| kernel.submit(read(512))).collect();
    let commands: Vec<Command> = (0..2).map(|_| fetch_command(&mut ring)).collect();
    kernel.abort(abi::tmr::LUN_RESET, &tickets);
    let Some(Entry::TaskManagement(tmr)) = ring.fetch().unwrap() else { panic!("no notification") };
    assert_eq!((tmr.kind, tmr.commands), (abi::tmr::LUN_RESET, vec![CmdId(2), CmdId(1)]));
    assert!(!ring.commit().unwrap(), "commands before it are still running");
    for command in &commands {
        command.data.write(0, &[0; 512]);
        ring.complete(command.id, good(None)).unwrap();
    }
    assert_eq!(answer(&mut kernel, &mut ring).len(), 2);
    kernel.abort(abi::tmr::ABORT_TASK, &[]);
    let Some(Entry::TaskManagement(tmr)) = ring.fetch().unwrap() else { panic!("no notification") };
    assert_eq!(tmr.commands, []);
    assert!(ring.commit().unwrap(), "its space has to be given back all the same");
    kernel.kick();
    assert_eq!(kernel.violations(), &[] as &[String]);
}

#[test]
fn a_kept_buffer_is_neither_reused_nor_answered_again() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(read(4096));
    let command = fetch_command(&mut ring);
    command.data.write(0, &[1; 4096]);
    ring.complete(command.id, Response { keep_buf: true, ..good(None) }).unwrap();
    assert_eq!(answer(&mut kernel, &mut ring)[0].data_in, vec![1; 4096]);
    kernel.submit(read(4096));
    let next = fetch_command(&mut ring);
    assert_eq!(next.id, CmdId(2));
    let mut kept = vec![0; 4096];
    command.data.read(0, &mut kept);
    assert_eq!(kept, vec![1; 4096]);
    assert_eq!(ring.complete(command.id, good(None)), Err(RingError::NotOutstanding(1)));
    assert!(kernel.free_kept(1) && !kernel.free_kept(1));
}

#[test]
fn entries_that_wait_before_we_attach_are_found() {
    let mut kernel = Kernel::new(small()).unwrap();
    kernel.submit(read(512));
    let mapping = Arc::new(Mapping::new(&kernel.memory(), 4096 + (64 << 10)).unwrap());
    let mut ring = Ring::attach(mapping).unwrap();
    assert!(ring.pending().unwrap());
    assert_eq!(fetch_command(&mut ring).id, CmdId(1));
    assert!(!ring.pending().unwrap());
}

#[test]
fn unknown_opcodes_are_flagged_and_skipped() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(read(512));
    kernel.mapping().write_u32(MAILBOX, 128 | 5).unwrap();
    assert!(ring.fetch().unwrap().is_none());
    assert_eq!(kernel.mapping().read_u8(MAILBOX + 7).unwrap(), abi::UFLAG_UNKNOWN_OP);
    assert!(ring.commit().unwrap());
}

#[test]
fn mailboxes_that_lie_are_refused() {
    let lies: [(usize, u32, &str); 6] = [
        (0, 3, "version"),
        (4, 8, "cannot start"),
        (8, 0, "cannot be"),
        (8, 4093, "cannot be"),
        (8, u32::MAX - 7, "the mapping"),
        (64, 4096, "tail"),
    ];
    for (offset, value, complaint) in lies {
        let kernel = Kernel::new(small()).unwrap();
        kernel.mapping().write_u32(offset, value).unwrap();
        let error = Ring::attach(kernel.mapping().clone()).unwrap_err();
        assert!(error.to_string().contains(complaint), "{error}");
    }
}

#[test]
fn entries_that_lie_end_the_ring() {
    let lies: [(&str, usize, u64, &str); 12] = [
        ("length zero", MAILBOX, abi::OP_CMD as u64, "entry of 0 bytes"),
        ("length past the head", MAILBOX, 4000 | abi::OP_CMD as u64, "entry of 4000 bytes"),
        ("too short for a command", MAILBOX, 64 | abi::OP_CMD as u64, "command entry of 64"),
        ("padding in the middle", MAILBOX, 128 | abi::OP_PAD as u64, "padding"),
        ("too short for a notification", MAILBOX, 24 | abi::OP_TMR as u64, "management entry of 24"),
        ("id zero", MAILBOX + 4, 0, "id 0"),
        ("too many iovecs", MAILBOX + 8, 6, "iovecs"),
        ("iovec counts that overflow together", MAILBOX + 8, u64::MAX, "iovecs"),
        ("a CDB in the mailbox", MAILBOX + 24, 0, "outside of its entry"),
        ("a CDB at the end of the world", MAILBOX + 24, u64::MAX, "outside of its entry"),
        ("an iovec in the ring", MAILBOX + 48, 128, "outside of the data area"),
        ("an iovec that wraps around", MAILBOX + 56, u64::MAX, "outside of the data area"),
    ];
    for (story, offset, value, complaint) in lies {
        let (mut kernel, mut ring) = pair(small());
        kernel.submit(read(512));
        if offset == MAILBOX || offset == MAILBOX + 4 {
            kernel.mapping().write_u16(offset, value as u16).unwrap();
            if offset == MAILBOX {
                kernel.mapping().write_u32(offset, value as u32).unwrap();
            }
        } else {
            kernel.mapping().write_u64(offset, value).unwrap();
        }
        let error = ring.fetch().expect_err(story);
        assert!(error.to_string().contains(complaint), "{story}: {error}");
        assert_eq!(ring.fetch().unwrap_err(), RingError::Dead, "{story}");
        assert_eq!(ring.commit(), Err(RingError::Dead), "{story}");
    }
}

#[test]
fn a_head_that_lies_ends_the_ring() {
    for head in [4, 3968, 4096, u32::MAX] {
        let (mut kernel, mut ring) = pair(small());
        kernel.submit(read(512));
        kernel.mapping().write_u32(12, head).unwrap();
        assert!(ring.fetch().is_err(), "head {head}");
    }
}

/// The head was checked for its range only. One that moved back made `fetch` go around the ring to it, through entries
/// of the past: a write that had long been answered was carried out again, with the bytes of somebody else.
#[test]
fn a_head_that_goes_back_ends_the_ring() {
    let (mut kernel, mut ring) = pair(small());
    for _ in 0..40 {
        kernel.submit(write(vec![1; 512]));
        let command = fetch_command(&mut ring);
        ring.complete(command.id, good(None)).unwrap();
        answer(&mut kernel, &mut ring);
    }
    kernel.submit(read(512));
    fetch_command(&mut ring);
    let head = kernel.mapping().read_u32(12).unwrap();
    kernel.mapping().write_u32(12, head - 128).unwrap();
    assert!(ring.fetch().unwrap_err().to_string().contains("went back"));
}

#[test]
fn the_simulator_sees_what_the_kernel_does_not() {
    let (mut kernel, mut ring) = pair(small());
    kernel.submit(read(512));
    let command = fetch_command(&mut ring);
    ring.complete(command.id, good(None)).unwrap();
    answer(&mut kernel, &mut ring);
    assert!(kernel.violations()[0].contains("never written"), "{:?}", kernel.violations());

    let (mut kernel, _) = pair(small());
    kernel.submit(read(512));
    kernel.mapping().write_u32(64, 8).unwrap();
    kernel.kick();
    assert!(kernel.violations()[0].contains("not where an entry starts"), "{:?}", kernel.violations());

    let (mut kernel, mut ring) = pair(small());
    kernel.submit(read(512));
    let command = fetch_command(&mut ring);
    ring.complete(command.id, good(None)).unwrap();
    ring.commit().unwrap();
    kernel.mapping().write_u16(MAILBOX + 4, 999).unwrap();
    kernel.kick();
    assert!(kernel.violations()[0].contains("999"), "{:?}", kernel.violations());
    assert!(kernel.is_broken());
}

#[derive(Debug, Clone)]
enum Action {
    Submit { data_in: usize, data_out: usize, cdb: usize },
    Fetch,
    Complete(prop::sample::Index),
    Commit,
    Abort(prop::sample::Index),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0usize..9000, 0usize..9000, 0usize..4, any::<bool>(), any::<bool>()).prop_map(|(i, o, cdb, r, w)| {
            Action::Submit { data_in: if r { i } else { 0 }, data_out: if w { o } else { 0 }, cdb }
        }),
        4 => Just(Action::Fetch),
        4 => any::<prop::sample::Index>().prop_map(Action::Complete),
        2 => Just(Action::Commit),
        1 => any::<prop::sample::Index>().prop_map(Action::Abort),
    ]
}

fn fill_of(id: u64) -> u8 {
    (id % 251) as u8
}

proptest! {
    /// Whatever the order of things: every command is answered once, with its own data, and no rule is broken.
    #[test]
    fn any_history_is_served(
        actions in prop::collection::vec(action(), 1..200),
        capabilities in 0u16..16,
        ring_pages in 1u32..3,
    ) {
        let (mut kernel, mut ring) = pair(Config { ring_size: ring_pages * 4096, capabilities, ..small() });
        let mut sent: Vec<(Ticket, usize, Vec<u8>)> = Vec::new();
        let mut running: Vec<Command> = Vec::new();
        let mut done: Vec<Completion> = Vec::new();
        let drain = |kernel: &mut Kernel, ring: &mut Ring, running: &mut Vec<Command>, done: &mut Vec<Completion>| {
            while let Some(entry) = ring.fetch().unwrap() {
                if let Entry::Command(command) = entry { running.push(command) }
            }
            while let Some(command) = running.pop() { finish(ring, command) }
            ring.commit().unwrap();
            kernel.kick();
            done.append(&mut kernel.process());
        };
        for action in actions {
            match action {
                Action::Submit { data_in, data_out, cdb } => {
                    let tag = sent.len() as u64;
                    let cdb = [vec![0x12; 6], vec![0x28; 10], vec![0xa8; 12], vec![0x88; 16]][cdb].clone();
                    let payload = vec![fill_of(tag); data_out];
                    let request = Request { cdb, data_out: payload.clone(), data_in };
                    let ticket = kernel.submit(request);
                    let expected = if data_out > 0 && data_in > 0 || data_out == 0 { data_in } else { 0 };
                    sent.push((ticket, expected, payload));
                }
                Action::Fetch => {
                    if let Some(Entry::Command(command)) = ring.fetch().unwrap() { running.push(command) }
                }
                Action::Complete(index) if !running.is_empty() => {
                    let command = running.swap_remove(index.index(running.len()));
                    finish(&mut ring, command);
                }
                Action::Commit => {
                    if ring.commit().unwrap() { kernel.kick() }
                    done.append(&mut kernel.process());
                }
                Action::Abort(index) if !sent.is_empty() => {
                    kernel.abort(abi::tmr::ABORT_TASK, &[sent[index.index(sent.len())].0]);
                }
                Action::Complete(_) | Action::Abort(_) => {}
            }
        }
        while kernel.outstanding() > 0 {
            drain(&mut kernel, &mut ring, &mut running, &mut done);
        }
        prop_assert_eq!(kernel.violations(), &[] as &[String]);
        prop_assert_eq!(done.len(), sent.len());
        for completion in done {
            let (_, expected, _) = &sent[completion.ticket.0 as usize];
            prop_assert_eq!(completion.status, 0);
            prop_assert_eq!(completion.data_in.len(), *expected);
            if let Some(first) = completion.data_in.first() {
                prop_assert!(completion.data_in.iter().all(|byte| byte == first));
            }
        }
    }

    /// Arbitrary bytes in mailbox and ring: an error at the worst, and nothing outside of the mapping.
    #[test]
    fn any_bytes_are_survived(
        patches in prop::collection::vec((0usize..4096, any::<u64>(), 0usize..4), 1..12),
        submits in 1usize..6,
    ) {
        let (mut kernel, mut ring) = pair(small());
        for _ in 0..submits {
            kernel.submit(read(1000));
        }
        for (offset, value, size) in patches {
            let bytes = value.to_ne_bytes();
            let length = [1, 2, 4, 8][size].min(4096 - offset);
            kernel.mapping().write(offset, &bytes[..length]).unwrap();
        }
        if let Ok(mut again) = Ring::attach(kernel.mapping().clone()) {
            while let Ok(Some(_)) = again.fetch() {}
        }
        for _ in 0..64 {
            match ring.fetch() {
                Ok(Some(Entry::Command(command))) => {
                    command.data.zero(0..usize::MAX);
                    let _ = ring.complete(command.id, good(None));
                    let _ = ring.commit();
                }
                Ok(Some(_)) => {}
                _ => break,
            }
        }
    }
}

/// Data-In is filled with one byte; Data-Out must hold one byte all through.
fn finish(ring: &mut Ring, command: Command) {
    let input = command.bidi_in.as_ref().unwrap_or(&command.data);
    if command.bidi_in.is_some() {
        let mut out = vec![0; command.data.len()];
        command.data.read(0, &mut out);
        assert!(out.iter().all(|&byte| byte == out[0]));
        input.write(0, &vec![out[0]; input.len()]);
    } else {
        input.write(0, &vec![fill_of(u64::from(command.id.0)); input.len()]);
    }
    ring.complete(command.id, good(None)).unwrap();
}
