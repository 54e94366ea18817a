//! The ring alone: a mailbox and a ring in which any byte may be anything, at any time.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tcmu::mapping::Mapping;
use tcmu::ring::sim::{Config, Kernel, Request, Ticket};
use tcmu::ring::{Command, Entry, Response, Ring, RingError};
use tcmu::scsi::DataBuffer;

const RING: usize = 4096;
const DATA: usize = 32 << 10;

#[derive(Debug, Arbitrary)]
enum Action<'a> {
    /// Bytes anywhere in mailbox and ring.
    Bytes(u16, &'a [u8]),
    /// A word in its place.
    Word(u16, u32),
    /// A head that may be right.
    Head(u16),
    Submit {
        cdb: [u8; 8],
        data_out: u16,
        data_in: u16,
    },
    Abort(u8),
    Fetch,
    Complete {
        which: u8,
        status: u8,
        sense: &'a [u8],
        read_len: Option<u32>,
        keep_buf: bool,
    },
    /// An answer to a command that may not be there.
    Answer(u16),
    Commit,
    Kick,
    Attach,
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    capabilities: u8,
    actions: Vec<Action<'a>>,
}

/// Touches every byte that the command says is its own.
fn use_data(command: &Command) {
    for buffer in [Some(&command.data), command.bidi_in.as_ref()].into_iter().flatten() {
        let pieces: usize = buffer.pieces(0..usize::MAX).map(|piece| piece.length).sum();
        assert_eq!(pieces, buffer.len());
        // Iovecs may name the same bytes again and again.
        if buffer.len() <= 4 * DATA {
            let mut bytes = vec![0; buffer.len()];
            buffer.read(0, &mut bytes);
            buffer.write(0, &bytes);
            buffer.zero(1..buffer.len());
            for piece in buffer.pieces(0..usize::MAX) {
                assert!(piece.offset >= RING && piece.offset + piece.length <= RING + DATA);
            }
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    let config = Config {
        ring_size: RING as u32,
        data_size: DATA,
        capabilities: input.capabilities.into(),
        checks: false,
        ..Config::default()
    };
    let mut kernel = Kernel::new(config).unwrap();
    let attach = |kernel: &Kernel| Mapping::new(&kernel.memory(), RING + DATA).map(Arc::new).unwrap();
    let mapping = attach(&kernel);
    let mut ring = Ring::attach(mapping.clone()).unwrap();
    let mut running: Vec<Command> = Vec::new();
    let mut trusted = true;
    let mut submitted = 0;
    for action in input.actions {
        match action {
            Action::Bytes(offset, bytes) => {
                let offset = usize::from(offset) % RING;
                mapping.write(offset, &bytes[..bytes.len().min(RING - offset)]).unwrap();
                trusted = false;
            }
            Action::Word(offset, value) => {
                mapping.write_u32(usize::from(offset) * 4 % RING, value).unwrap();
                trusted = false;
            }
            Action::Head(head) => {
                mapping.write_u32(12, u32::from(head) * 8).unwrap();
                trusted = false;
            }
            Action::Submit { cdb, data_out, data_in } => {
                let data_out = vec![1; usize::from(data_out) % DATA];
                let data_in = usize::from(data_in) % DATA;
                kernel.submit(Request { cdb: cdb.to_vec(), data_out, data_in });
                submitted += 1;
            }
            Action::Abort(ticket) => kernel.abort(1, &[Ticket(ticket.into())]),
            Action::Fetch => match ring.fetch() {
                Ok(Some(Entry::Command(command))) => {
                    use_data(&command);
                    running.push(command);
                    assert_eq!(ring.in_flight(), running.len());
                }
                Ok(_) => {}
                Err(error) => {
                    assert!(!trusted, "{error}");
                    assert_eq!(ring.fetch().unwrap_err(), RingError::Dead);
                }
            },
            Action::Complete { which, status, sense, read_len, keep_buf } if !running.is_empty() => {
                let command = running.swap_remove(usize::from(which) % running.len());
                let response = Response { status, sense: sense.into(), read_len, keep_buf };
                match ring.complete(command.id, response) {
                    Ok(()) => {}
                    Err(error) => assert!(ring.is_dead(), "{error}"),
                }
            }
            Action::Complete { .. } => {}
            Action::Answer(id) => {
                let response =
                    Response { status: 0, sense: Default::default(), read_len: None, keep_buf: false };
                if ring.complete(tcmu::ring::CmdId(id), response).is_ok() {
                    let before = running.len();
                    running.retain(|command| command.id.0 != id);
                    assert_eq!(running.len() + 1, before, "answered what was not outstanding");
                }
            }
            Action::Commit => {
                let _ = ring.commit();
            }
            Action::Kick if trusted => {
                kernel.kick();
                kernel.process();
            }
            // The simulator trusts its own ring, which is not its own any more.
            Action::Kick => {}
            Action::Attach if !trusted => {
                if let Ok(again) = Ring::attach(attach(&kernel)) {
                    ring = again;
                    running.clear();
                }
            }
            Action::Attach => {}
        }
    }
    if trusted {
        assert!(running.len() <= submitted);
        assert_eq!(kernel.violations(), &[] as &[String]);
    }
});
