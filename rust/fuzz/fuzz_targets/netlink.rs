//! The parser of what the kernel announces: any datagram, any family number.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tcmu::netlink::{Received, parse};

fuzz_target!(|input: (u16, &[u8])| {
    let (family, datagram) = input;
    let mut received = Received::default();
    parse(datagram, family, &mut received);
    // A netlink header has 16 bytes; what is left at the end may be one message that does not fit.
    assert!(received.events.len() + received.malformed.len() <= datagram.len() / 16 + 1);
    assert!(!received.overflow, "that is not for a datagram to say");
});
