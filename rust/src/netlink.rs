//! Devices come and go: the kernel's generic netlink family `TCM-USER`.
//!
//! Knows nothing of rings, commands, sysfs or Python. [`Socket::receive`] hands out what the kernel announced, and
//! [`Socket::reply`] answers, which is what lets the kernel's writer go on when replies are switched on.
//!
//! *Answer contract.* The kernel looks a reply up by device alone. A reply whose type is not the one it waits for
//! unlinks the waiter without waking it: a thread of the kernel hangs until reboot. So a reply is not made of numbers
//! here, it is the [`Question`] of the event, handed back: it knows its type, is neither `Clone` nor `Copy`, and is
//! used up. Answer at once or never: a question kept over a later event of the same device is a wrong type again.
//!
//! *Overflow contract.* When the receive buffer overflows, the kernel goes on dropping until the queue has been read
//! to its end, and tells so once, at the beginning. Therefore `receive` always reads to the end, and a scan of sysfs
//! after it misses nothing; one made earlier could. `NETLINK_BROADCAST_ERROR` is left off on purpose: with it a reader
//! that stands still would make everybody's devices fail to come up, also those that ask for no reply.
//!
//! *Two sockets.* Multicast events arrive on one, requests and their acknowledgements use the other, so that reading
//! an acknowledgement never steals an event. The kernel handles a request inside the sender's system call: the
//! acknowledgement is there when `send` returns, and nothing in this module waits for it.
//!
//! *Dependencies.* `netlink-sys`, because joining a group of a dynamic number takes a socket option that `rustix` does
//! not have; `netlink-packet-core` for the bounds of headers and attributes. `netlink-packet-generic` is not used: the
//! traits that it wants for a family are longer than the four bytes of header that it would read.

use std::ffi::OsString;
use std::io;
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::{Mutex, PoisonError};

use netlink_packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer, NlasIterator, parse_i32,
    parse_u8, parse_u16, parse_u32, parse_u64,
};
use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_GENERIC;
use rustix::io::Errno;
use rustix::net::sockopt;

/// Numbers of the interface: `TCM-USER` as in `include/uapi/linux/target_core_user.h`, the controller as in
/// `include/uapi/linux/genetlink.h`.
mod number {
    pub const FAMILY: &[u8] = b"TCM-USER\0";
    pub const GROUP: &[u8] = b"config\0";
    pub const VERSION: u8 = 2;

    pub const ADDED_DEVICE: u8 = 1;
    pub const REMOVED_DEVICE: u8 = 2;
    pub const RECONFIG_DEVICE: u8 = 3;
    pub const ADDED_DEVICE_DONE: u8 = 4;
    pub const REMOVED_DEVICE_DONE: u8 = 5;
    pub const RECONFIG_DEVICE_DONE: u8 = 6;
    pub const SET_FEATURES: u8 = 7;

    pub const DEVICE: u16 = 1;
    pub const MINOR: u16 = 2;
    pub const DEV_CFG: u16 = 4;
    pub const DEV_SIZE: u16 = 5;
    pub const WRITECACHE: u16 = 6;
    pub const CMD_STATUS: u16 = 7;
    pub const DEVICE_ID: u16 = 8;
    pub const SUPP_KERN_CMD_REPLY: u16 = 9;

    pub const GENL_HEADER_SIZE: usize = 4;
    pub const GENL_ID_CTRL: u16 = 16;
    pub const CTRL_VERSION: u8 = 2;
    /// Of the family of families, whose number and group never change.
    pub const CTRL_GROUP: u32 = 16;
    pub const CTRL_CMD_DELFAMILY: u8 = 2;
    pub const CTRL_CMD_GETFAMILY: u8 = 3;
    pub const CTRL_ATTR_FAMILY_ID: u16 = 1;
    pub const CTRL_ATTR_FAMILY_NAME: u16 = 2;
    pub const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
    pub const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
    pub const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
}

/// Receive buffer of the events. The kernel doubles it for its bookkeeping; an event costs it less than 1 KiB, so
/// this holds thousands of devices that come up while nobody reads.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Longer than any message: device name and configuration are limited to a few hundred bytes each.
const DATAGRAM: usize = 8 << 10;

/// The netlink transport failed; no device is to blame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetlinkError {
    /// The family does not exist, or not any more: a socket of before stays deaf when the module comes back.
    #[error("the kernel has no netlink family TCM-USER: the module target_core_user is not loaded")]
    NoFamily,
    /// The family exists, but does not announce devices.
    #[error("the kernel's netlink family TCM-USER has no group `config`")]
    NoGroup,
    /// A system call failed, or the kernel refused a request (`EPERM`: `CAP_NET_ADMIN` is missing).
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What came back.
        source: io::Error,
    },
}

impl NetlinkError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    /// For requests: `ENOENT` speaks of the family, and of nothing else.
    fn refused(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match Errno::from_io_error(&source) {
            Some(Errno::NOENT) => Self::NoFamily,
            _ => Self::Io { doing, source },
        }
    }

    /// The error number that says it best.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::NoFamily | Self::NoGroup => Errno::NOENT,
            Self::Io { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
        }
    }
}

/// A message that was skipped, and why. None is expected from a kernel that we know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A length field points past the end, or into its own header.
    #[error("a length does not fit the message")]
    Length,
    /// A message of another netlink family.
    #[error("message type {0} is not that of the family")]
    Type(u16),
    /// A command that is not an event known here.
    #[error("unknown event {0}")]
    Event(u8),
    /// An attribute that the event needs is missing or has the wrong size.
    #[error("attribute {0} is missing or has the wrong size")]
    Attribute(u16),
    /// The sender is not the kernel.
    #[error("sent by netlink port {0}, not by the kernel")]
    Sender(u32),
}

/// What an attribute of a device is about to become. Failure leaves the kernel's value as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The configuration string, byte for byte as written.
    Config(OsString),
    /// The size in bytes.
    Size(u64),
    /// `emulate_write_cache`; the kernel does not restrict it to 0 and 1.
    WriteCache(u8),
}

/// What happens to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Its UIO device exists. Failure takes the device down; unmap and close it before you say so.
    Added,
    /// Its UIO device goes when this is answered. Until then the directory of its HBA in configfs must not be touched:
    /// whoever does waits for the answer.
    Removed,
    /// An attribute changes when this is answered.
    Reconfig(Change),
}

/// The kernel's wish for an answer to one event, to be handed to [`Socket::reply`].
///
/// Dropping it is right for a device that is not ours, and harmless when replies are off.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    done: u8,
    device_id: u32,
}

impl Question {
    fn new(kind: &Kind, device_id: u32) -> Self {
        let done = match kind {
            Kind::Added => number::ADDED_DEVICE_DONE,
            Kind::Removed => number::REMOVED_DEVICE_DONE,
            Kind::Reconfig(_) => number::RECONFIG_DEVICE_DONE,
        };
        Self { done, device_id }
    }

    /// The question of an ADDED event that got lost: nobody listened, or the buffer overflowed.
    ///
    /// Only for a device whose `enable` in configfs still reads 0 while its UIO device exists; its number is in
    /// `statistics/scsi_dev/indx`. At any other time the kernel may be waiting for a different answer.
    #[must_use]
    pub fn added(device_id: u32) -> Self {
        Self::new(&Kind::Added, device_id)
    }

    /// The kernel's number of the device, which is not the UIO minor.
    #[must_use]
    pub fn device_id(&self) -> u32 {
        self.device_id
    }
}

/// One announcement.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    /// What happens.
    pub kind: Kind,
    /// The name of the UIO device, `tcm-user/…`; before the change if its configuration changes.
    pub device: OsString,
    /// `/dev/uio<minor>`. Used again as soon as it is free: no identity of a device.
    pub minor: u32,
    /// The answer that the kernel may be waiting for.
    pub question: Question,
}

/// What was in the socket.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Events in the order they were sent.
    pub events: Vec<Event>,
    /// Messages that were skipped.
    pub malformed: Vec<Malformed>,
    /// More events were sent than the buffer held: scan sysfs for what was missed.
    pub overflow: bool,
    /// The module was unloaded, and with it every device.
    pub unloaded: bool,
}

/// A listener to the kernel's announcements, and the way to answer them.
#[derive(Debug)]
pub struct Socket {
    family: u16,
    events: netlink_sys::Socket,
    requests: Mutex<Requests>,
}

impl Socket {
    /// Finds the family, joins its group. What the kernel announces from now on will be received.
    ///
    /// # Errors
    /// [`NetlinkError::NoFamily`] if the module is not loaded.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut requests =
            Requests { socket: socket().map_err(NetlinkError::io("open a netlink socket"))?, sequence: 0 };
        let (family, group) = requests.resolve()?;
        let events = socket().map_err(NetlinkError::io("open a netlink socket"))?;
        // The forced size needs CAP_NET_ADMIN; the other is cut to net.core.rmem_max without an error.
        sockopt::set_socket_recv_buffer_size_force(&events, RECEIVE_BUFFER)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(&events, RECEIVE_BUFFER))
            .map_err(|errno| NetlinkError::io("enlarge the netlink receive buffer")(errno.into()))?;
        events
            .add_membership(group)
            .and_then(|()| events.add_membership(number::CTRL_GROUP))
            .map_err(NetlinkError::io("join the netlink group of TCM-USER"))?;
        Ok(Self { family, events, requests: Mutex::new(requests) })
    }

    /// Takes everything that has arrived, without waiting. The descriptor is readable when there is something.
    ///
    /// # Errors
    /// [`NetlinkError::NoFamily`] if the module was unloaded; what `recvfrom(2)` says, if no event was received before.
    pub fn receive(&self) -> Result<Received, NetlinkError> {
        let mut received = Received::default();
        let mut datagram = Vec::with_capacity(DATAGRAM);
        loop {
            datagram.clear();
            match self.events.recv_from(&mut datagram, 0) {
                Ok((_, sender)) if sender.port_number() != 0 => {
                    received.malformed.push(Malformed::Sender(sender.port_number()));
                }
                Ok(_) => parse(&datagram, self.family, &mut received),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) if received.unloaded => return Err(NetlinkError::NoFamily),
                    Some(Errno::AGAIN) => return Ok(received),
                    Some(Errno::NOBUFS) => received.overflow = true,
                    Some(Errno::INTR) => {}
                    _ if received.events.is_empty() => {
                        return Err(NetlinkError::io("receive from TCM-USER")(error));
                    }
                    // The kernel may be waiting for answers to these; an error that lasts comes back next time.
                    _ => return Ok(received),
                },
            }
        }
    }

    /// Answers an event: success, or the error that the kernel's writer is to see.
    ///
    /// Says whether the kernel was waiting for it. It was not if replies are off for the device, or if another process
    /// has answered; neither is a fault.
    ///
    /// # Errors
    /// [`NetlinkError::Io`] when the request could not be sent or was refused.
    pub fn reply(&self, question: Question, outcome: Result<(), Errno>) -> Result<bool, NetlinkError> {
        // Zero or negative by construction: a positive status would be taken for the byte count of a write.
        let status = outcome.map_or_else(|errno| -errno.raw_os_error(), |()| 0);
        let attributes = [
            DefaultNla::new(number::CMD_STATUS, status.to_ne_bytes().to_vec()),
            DefaultNla::new(number::DEVICE_ID, question.device_id.to_ne_bytes().to_vec()),
        ];
        match self.request(question.done, &attributes) {
            Ok(_) => Ok(true),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => Ok(false),
            Err(error) => Err(NetlinkError::refused("answer an event of TCM-USER")(error)),
        }
    }

    /// Tells the kernel whether events are answered on this machine.
    ///
    /// Applies to devices that are enabled from now on, of all processes, and outlives this one.
    ///
    /// # Errors
    /// [`NetlinkError::Io`] when the request could not be sent or was refused.
    pub fn set_features(&self, reply_supported: bool) -> Result<(), NetlinkError> {
        let attributes = [DefaultNla::new(number::SUPP_KERN_CMD_REPLY, vec![reply_supported.into()])];
        self.request(number::SET_FEATURES, &attributes)
            .map(drop)
            .map_err(NetlinkError::refused("set the features of TCM-USER"))
    }

    fn request(&self, command: u8, attributes: &[DefaultNla]) -> io::Result<Vec<u8>> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.ask(self.family, [command, number::VERSION], attributes)
    }
}

impl AsFd for Socket {
    /// The descriptor of the events: readable when [`Socket::receive`] has something to say.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

fn socket() -> io::Result<netlink_sys::Socket> {
    let mut socket = netlink_sys::Socket::new(NETLINK_GENERIC)?;
    socket.set_non_blocking(true)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// The socket for requests; one at a time.
#[derive(Debug)]
struct Requests {
    socket: netlink_sys::Socket,
    sequence: u32,
}

impl Requests {
    /// The number of the family and that of its group.
    fn resolve(&mut self) -> Result<(u16, u32), NetlinkError> {
        let name = [DefaultNla::new(number::CTRL_ATTR_FAMILY_NAME, number::FAMILY.to_vec())];
        let answer = self
            .ask(number::GENL_ID_CTRL, [number::CTRL_CMD_GETFAMILY, number::CTRL_VERSION], &name)
            .map_err(NetlinkError::refused("ask for the netlink family TCM-USER"))?;
        let id = attribute(&answer, number::CTRL_ATTR_FAMILY_ID);
        let family = id.and_then(|id| parse_u16(&id).ok()).ok_or(NetlinkError::NoFamily)?;
        Ok((family, find_group(&answer).ok_or(NetlinkError::NoGroup)?))
    }

    /// Sends a request and returns the attributes of the answer, if there is more than an acknowledgement.
    fn ask(&mut self, family: u16, header: [u8; 2], attributes: &[DefaultNla]) -> io::Result<Vec<u8>> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = encode(family, NLM_F_REQUEST | NLM_F_ACK, self.sequence, header, attributes);
        self.socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::new();
        let mut datagram = Vec::with_capacity(DATAGRAM);
        loop {
            datagram.clear();
            let (_, sender) = self.socket.recv_from(&mut datagram, 0)?;
            if sender.port_number() != 0 {
                continue;
            }
            for message in messages(&datagram) {
                let message = message.map_err(io::Error::other)?;
                // Not ours: left over from a request whose acknowledgement could not be read.
                if message.sequence_number() != self.sequence {
                    continue;
                }
                let payload = message.payload();
                if message.message_type() == NLMSG_ERROR {
                    let status = payload.get(..4).and_then(|status| parse_i32(status).ok());
                    return match status {
                        Some(0) => Ok(answer),
                        Some(status) => Err(io::Error::from_raw_os_error(status.wrapping_neg())),
                        None => Err(io::Error::other(Malformed::Length)),
                    };
                }
                answer = payload.get(number::GENL_HEADER_SIZE..).unwrap_or_default().to_vec();
            }
        }
    }
}

/// Reads the messages of one datagram into `received`.
///
/// `family` is the message type of the family's events; what the family of families says is understood too.
/// Attributes that are not known are ignored; a message that cannot be understood is recorded and skipped.
pub fn parse(datagram: &[u8], family: u16, received: &mut Received) {
    for message in messages(datagram) {
        let event = message.and_then(|message| match message.message_type() {
            kind if kind == family => parse_event(message.payload()).map(Some),
            number::GENL_ID_CTRL => {
                received.unloaded |= is_end_of_family(message.payload());
                Ok(None)
            }
            kind => Err(Malformed::Type(kind)),
        });
        match event {
            Ok(event) => received.events.extend(event),
            Err(error) => received.malformed.push(error),
        }
    }
}

/// Whether the family of families announces that ours is gone; it speaks of all others as well.
fn is_end_of_family(payload: &[u8]) -> bool {
    payload.split_at_checked(number::GENL_HEADER_SIZE).is_some_and(|(header, attributes)| {
        header[0] == number::CTRL_CMD_DELFAMILY
            && attribute(attributes, number::CTRL_ATTR_FAMILY_NAME).as_deref() == Some(number::FAMILY)
    })
}

/// The messages of a datagram, up to the first that does not fit it.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<NetlinkBuffer<&[u8]>, Malformed>> {
    let mut rest = datagram;
    iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let message = NetlinkBuffer::new_checked(rest).map_err(|_| Malformed::Length);
        rest = match &message {
            Ok(message) => rest.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default(),
            Err(_) => &[],
        };
        Some(message)
    })
}

fn parse_event(payload: &[u8]) -> Result<Event, Malformed> {
    let (header, attributes) = payload.split_at_checked(number::GENL_HEADER_SIZE).ok_or(Malformed::Length)?;
    let command = header[0];
    let (mut device, mut minor, mut device_id, mut change) = (None, None, None, None);
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.map_err(|_| Malformed::Length)?;
        let value = attribute.value();
        let wrong_size = |_| Malformed::Attribute(attribute.kind());
        match attribute.kind() {
            number::DEVICE => device = Some(string(value)),
            number::MINOR => minor = Some(parse_u32(value).map_err(wrong_size)?),
            number::DEVICE_ID => device_id = Some(parse_u32(value).map_err(wrong_size)?),
            number::DEV_CFG => change = Some(Change::Config(string(value))),
            number::DEV_SIZE => change = Some(Change::Size(parse_u64(value).map_err(wrong_size)?)),
            number::WRITECACHE => change = Some(Change::WriteCache(parse_u8(value).map_err(wrong_size)?)),
            _ => {}
        }
    }
    let kind = match command {
        number::ADDED_DEVICE => Kind::Added,
        number::REMOVED_DEVICE => Kind::Removed,
        // A change of something that a newer kernel has is named by the first attribute that could have told it.
        number::RECONFIG_DEVICE => Kind::Reconfig(change.ok_or(Malformed::Attribute(number::DEV_CFG))?),
        _ => return Err(Malformed::Event(command)),
    };
    let device_id = device_id.ok_or(Malformed::Attribute(number::DEVICE_ID))?;
    Ok(Event {
        question: Question::new(&kind, device_id),
        kind,
        device: device.ok_or(Malformed::Attribute(number::DEVICE))?,
        minor: minor.ok_or(Malformed::Attribute(number::MINOR))?,
    })
}

/// A string attribute without the NUL that ends it.
fn string(value: &[u8]) -> OsString {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    OsString::from_vec(value[..end].to_vec())
}

/// The value of one attribute among others.
fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let found = NlasIterator::new(attributes).flatten().find(|attribute| attribute.kind() == kind)?;
    Some(found.value().to_vec())
}

/// The number of the group among the attributes of the family.
fn find_group(family: &[u8]) -> Option<u32> {
    let groups = attribute(family, number::CTRL_ATTR_MCAST_GROUPS)?;
    let group = NlasIterator::new(groups.as_slice()).flatten().find(|group| {
        attribute(group.value(), number::CTRL_ATTR_MCAST_GRP_NAME).as_deref() == Some(number::GROUP)
    })?;
    parse_u32(&attribute(group.value(), number::CTRL_ATTR_MCAST_GRP_ID)?).ok()
}

/// A whole generic netlink message; `header` is command and version.
fn encode(family: u16, flags: u16, sequence: u32, header: [u8; 2], attributes: &[DefaultNla]) -> Vec<u8> {
    const HEADERS: usize = 16 + number::GENL_HEADER_SIZE;
    let mut bytes = vec![0; HEADERS + attributes.buffer_len()];
    let length = u32::try_from(bytes.len()).expect("our own attributes are short");
    let mut message = NetlinkBuffer::new(&mut bytes);
    message.set_length(length);
    message.set_message_type(family);
    message.set_flags(flags);
    message.set_sequence_number(sequence);
    let (genl_header, rest) = message.payload_mut().split_at_mut(number::GENL_HEADER_SIZE);
    genl_header[..header.len()].copy_from_slice(&header);
    attributes.emit(rest);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FAMILY: u16 = 32;

    /// What the kernel sends for an event, attributes in its order.
    fn encode_event(event: &Event) -> Vec<u8> {
        let text = |kind, text: &OsString| DefaultNla::new(kind, [text.clone().into_vec(), vec![0]].concat());
        let mut attributes = vec![
            text(number::DEVICE, &event.device),
            DefaultNla::new(number::MINOR, event.minor.to_ne_bytes().to_vec()),
            DefaultNla::new(number::DEVICE_ID, event.question.device_id.to_ne_bytes().to_vec()),
        ];
        let command = match &event.kind {
            Kind::Added => number::ADDED_DEVICE,
            Kind::Removed => number::REMOVED_DEVICE,
            Kind::Reconfig(change) => {
                attributes.push(match change {
                    Change::Config(config) => text(number::DEV_CFG, config),
                    Change::Size(size) => DefaultNla::new(number::DEV_SIZE, size.to_ne_bytes().to_vec()),
                    Change::WriteCache(on) => DefaultNla::new(number::WRITECACHE, vec![*on]),
                });
                number::RECONFIG_DEVICE
            }
        };
        encode(FAMILY, 0, 0, [command, number::VERSION], &attributes)
    }

    fn parsed(datagram: &[u8]) -> Received {
        let mut received = Received::default();
        parse(datagram, FAMILY, &mut received);
        received
    }

    fn event(kind: Kind, device: OsString, minor: u32, device_id: u32) -> Event {
        Event { question: Question::new(&kind, device_id), kind, device, minor }
    }

    fn only(event: Event) -> Received {
        Received { events: vec![event], ..Received::default() }
    }

    /// As captured from Linux 6.1 (little-endian): `tcm-user/0/n1/foo/1`, minor 0, device 1.
    #[rustfmt::skip]
    const CAPTURED: &[u8] = &[
        0x3c, 0, 0, 0,  32, 0,  0, 0,  0, 0, 0, 0,  0, 0, 0, 0, // length, type, flags, sequence, port
        1, 2, 0, 0, // ADDED_DEVICE, version 2
        0x18, 0, 1, 0, b't', b'c', b'm', b'-', b'u', b's', b'e', b'r', b'/', b'0', b'/', b'n',
        b'1', b'/', b'f', b'o', b'o', b'/', b'1', 0,
        8, 0, 2, 0,  0, 0, 0, 0, // minor
        8, 0, 8, 0,  1, 0, 0, 0, // device id
    ];

    #[test]
    #[cfg(target_endian = "little")]
    fn bytes_of_a_real_kernel() {
        let added = || event(Kind::Added, "tcm-user/0/n1/foo/1".into(), 0, 1);
        assert_eq!(CAPTURED.len(), 60);
        assert_eq!(parsed(CAPTURED), only(added()));
        assert_eq!(encode_event(&added()), CAPTURED);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn bytes_of_a_reply() {
        let attributes = [
            DefaultNla::new(number::CMD_STATUS, (-5i32).to_ne_bytes().to_vec()),
            DefaultNla::new(number::DEVICE_ID, 7u32.to_ne_bytes().to_vec()),
        ];
        let done = Question::added(7).done;
        #[rustfmt::skip]
        let expected = [
            36, 0, 0, 0,  32, 0,  5, 0,  9, 0, 0, 0,  0, 0, 0, 0, // REQUEST | ACK, sequence 9
            4, 2, 0, 0, // ADDED_DEVICE_DONE
            8, 0, 7, 0,  0xfb, 0xff, 0xff, 0xff, // status
            8, 0, 8, 0,  7, 0, 0, 0, // device id
        ];
        assert_eq!(
            encode(FAMILY, NLM_F_REQUEST | NLM_F_ACK, 9, [done, number::VERSION], &attributes),
            expected
        );
    }

    #[test]
    fn each_event_has_its_own_answer() {
        let done = |kind: &Kind| Question::new(kind, 1).done;
        assert_eq!(done(&Kind::Added), 4);
        assert_eq!(done(&Kind::Removed), 5);
        assert_eq!(done(&Kind::Reconfig(Change::Size(0))), 6);
    }

    #[test]
    fn unknown_attributes_are_ignored() {
        let added = event(Kind::Added, "tcm-user/0/n".into(), 3, 4);
        let mut bytes = encode_event(&added);
        let unknown = DefaultNla::new(77, vec![1, 2, 3]);
        let mut attribute = vec![0; unknown.buffer_len()];
        unknown.emit(&mut attribute);
        bytes.extend(attribute);
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        assert_eq!(parsed(&bytes), only(added));
    }

    #[test]
    fn a_bad_message_does_not_hide_the_next() {
        let removed = || event(Kind::Removed, "tcm-user/0/n".into(), 3, 4);
        let nameless = encode(FAMILY, 0, 0, [number::ADDED_DEVICE, 2], &[]);
        let foreign = encode(FAMILY + 1, 0, 0, [number::ADDED_DEVICE, 2], &[]);
        let newer = encode(FAMILY, 0, 0, [99, 2], &[]);
        let short = DefaultNla::new(number::MINOR, vec![1, 2]);
        let short = encode(FAMILY, 0, 0, [number::ADDED_DEVICE, 2], &[short]);
        let datagram = [nameless, foreign, newer, short, encode_event(&removed())].concat();
        let malformed = vec![
            Malformed::Attribute(number::DEVICE_ID),
            Malformed::Type(FAMILY + 1),
            Malformed::Event(99),
            Malformed::Attribute(number::MINOR),
        ];
        assert_eq!(parsed(&datagram), Received { malformed, ..only(removed()) });
    }

    #[test]
    fn every_truncation_is_recorded() {
        let whole = encode_event(&event(Kind::Added, "tcm-user/0/n1/foo/1".into(), 0, 1));
        for length in 1..whole.len() {
            let received = parsed(&whole[..length]);
            assert_eq!(received, Received { malformed: vec![Malformed::Length], ..Received::default() });
        }
        assert_eq!(parsed(&[]), Received::default());
    }

    #[test]
    fn the_end_of_the_family_is_told() {
        let told = |command, family: &[u8]| {
            let name = [DefaultNla::new(number::CTRL_ATTR_FAMILY_NAME, family.to_vec())];
            parsed(&encode(number::GENL_ID_CTRL, 0, 0, [command, number::CTRL_VERSION], &name))
        };
        let nothing = Received::default;
        assert_eq!(
            told(number::CTRL_CMD_DELFAMILY, number::FAMILY),
            Received { unloaded: true, ..nothing() }
        );
        assert_eq!(told(number::CTRL_CMD_DELFAMILY, b"nl80211\0"), nothing());
        assert_eq!(told(1, number::FAMILY), nothing());
        assert_eq!(parsed(&encode(number::GENL_ID_CTRL, 0, 0, [2, 2], &[])[..18]).malformed.len(), 1);
    }

    #[test]
    fn the_group_is_found_by_name() {
        let nested = |kind, attributes: &[DefaultNla]| {
            let mut value = vec![0; attributes.buffer_len()];
            attributes.emit(&mut value);
            DefaultNla::new(kind, value)
        };
        let group = |name: &[u8], id: u32| {
            nested(
                1,
                &[
                    DefaultNla::new(number::CTRL_ATTR_MCAST_GRP_NAME, name.to_vec()),
                    DefaultNla::new(number::CTRL_ATTR_MCAST_GRP_ID, id.to_ne_bytes().to_vec()),
                ],
            )
        };
        let groups = nested(number::CTRL_ATTR_MCAST_GROUPS, &[group(b"other\0", 8), group(b"config\0", 40)]);
        let family = nested(0, &[DefaultNla::new(number::CTRL_ATTR_FAMILY_ID, vec![32, 0]), groups]);
        let mut answer = vec![0; family.buffer_len()];
        family.emit(&mut answer);
        assert_eq!(find_group(&answer[4..]), Some(40));
        assert_eq!(find_group(&[]), None);
    }

    /// Runs everywhere: without the module the error must say what is missing.
    #[test]
    fn opening_works_or_names_the_module() {
        match Socket::open() {
            Ok(socket) => assert_eq!(socket.receive().unwrap(), Received::default()),
            Err(NetlinkError::NoFamily) => {
                assert!(NetlinkError::NoFamily.to_string().contains("target_core_user"));
                assert_eq!(NetlinkError::NoFamily.errno(), Errno::NOENT);
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn any_text() -> impl Strategy<Value = OsString> {
        prop::collection::vec(1..=255u8, 0..300).prop_map(OsString::from_vec)
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let kind = prop_oneof![
            Just(Kind::Added),
            Just(Kind::Removed),
            any_text().prop_map(|config| Kind::Reconfig(Change::Config(config))),
            any::<u64>().prop_map(|size| Kind::Reconfig(Change::Size(size))),
            any::<u8>().prop_map(|on| Kind::Reconfig(Change::WriteCache(on))),
        ];
        (kind, any_text(), any::<u32>(), any::<u32>())
            .prop_map(|(kind, device, minor, device_id)| event(kind, device, minor, device_id))
    }

    proptest! {
        #[test]
        fn events_survive_the_wire(events in prop::collection::vec(any_event(), 0..4)) {
            let datagram = events.iter().map(encode_event).collect::<Vec<_>>().concat();
            prop_assert_eq!(parsed(&datagram), Received { events, ..Received::default() });
        }

        #[test]
        fn arbitrary_bytes_are_harmless(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let received = parsed(&bytes);
            prop_assert!(received.events.len() + received.malformed.len() <= bytes.len() / 16 + 1);
        }

        /// Nearer to the truth than random bytes: real messages with a few bytes changed.
        #[test]
        fn damaged_events_are_harmless(
            events in prop::collection::vec(any_event(), 1..3),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut datagram = events.iter().map(encode_event).collect::<Vec<_>>().concat();
            for (at, byte) in damage {
                let at = at.index(datagram.len());
                datagram[at] = byte;
            }
            parsed(&datagram);
            find_group(&datagram);
        }
    }
}
