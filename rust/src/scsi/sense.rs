//! Sense data (SPC-5 clause 4.4): the named triples, and their two formats on the wire.

use super::Reply;

/// Bytes that every sense buffer on the way to an initiator has (SAM-5 allows 252; Linux and TCMU keep 96).
pub const SENSE_BYTES: usize = 96;

/// A sense key (SPC-5 table 28).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum SenseKey {
    NoSense = 0x0,
    RecoveredError = 0x1,
    NotReady = 0x2,
    MediumError = 0x3,
    HardwareError = 0x4,
    IllegalRequest = 0x5,
    UnitAttention = 0x6,
    DataProtect = 0x7,
    BlankCheck = 0x8,
    VendorSpecific = 0x9,
    CopyAborted = 0xa,
    AbortedCommand = 0xb,
    VolumeOverflow = 0xd,
    Miscompare = 0xe,
    Completed = 0xf,
}

impl SenseKey {
    /// The key of this code; `None` for 0Ch, which is reserved, and above 0Fh.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x0 => Self::NoSense,
            0x1 => Self::RecoveredError,
            0x2 => Self::NotReady,
            0x3 => Self::MediumError,
            0x4 => Self::HardwareError,
            0x5 => Self::IllegalRequest,
            0x6 => Self::UnitAttention,
            0x7 => Self::DataProtect,
            0x8 => Self::BlankCheck,
            0x9 => Self::VendorSpecific,
            0xa => Self::CopyAborted,
            0xb => Self::AbortedCommand,
            0xd => Self::VolumeOverflow,
            0xe => Self::Miscompare,
            0xf => Self::Completed,
            _ => return None,
        })
    }
}

/// The first byte of a field in error, and its most significant bit where the field does not start the byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldPointer {
    /// The byte.
    pub byte: u16,
    /// The bit, 7 to 0.
    pub bit: Option<u8>,
}

/// What the three sense key specific bytes say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySpecific {
    /// With ILLEGAL REQUEST: the field of the CDB that is wrong.
    Cdb(FieldPointer),
    /// With ILLEGAL REQUEST: the field of the parameter data that is wrong.
    Parameter(FieldPointer),
    /// With NOT READY and NO SENSE: how much of an operation is done, in 65536ths.
    Progress(u16),
    /// With COPY ABORTED: the byte of the segment descriptor that is wrong.
    Segment {
        /// The byte.
        byte: u16,
    },
}

impl KeySpecific {
    fn encode(self) -> [u8; 3] {
        const SKSV: u8 = 0x80;
        const IN_CDB: u8 = 0x40;
        const SD: u8 = 0x20;
        const BIT_POINTER_VALID: u8 = 0x08;
        let (flags, value) = match self {
            Self::Cdb(FieldPointer { byte, bit }) => {
                (IN_CDB | bit.map_or(0, |bit| BIT_POINTER_VALID | (bit & 7)), byte)
            }
            Self::Parameter(FieldPointer { byte, bit }) => {
                (bit.map_or(0, |bit| BIT_POINTER_VALID | (bit & 7)), byte)
            }
            Self::Progress(progress) => (0, progress),
            Self::Segment { byte } => (SD, byte),
        };
        let [high, low] = value.to_be_bytes();
        [SKSV | flags, high, low]
    }
}

/// What a unit is to a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Role {
    Source,
    Destination,
}

/// How a command ended that a copy sent to one of its units, for the initiator of the copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forwarded {
    /// Whose it is.
    pub role: Role,
    /// Its status.
    pub status: u8,
    /// Its sense key, ASC and ASCQ; zeroes without sense data.
    pub triple: [u8; 3],
}

impl Forwarded {
    pub(super) fn new(role: Role, reply: &Reply) -> Self {
        let triple = reply.sense.map_or([0; 3], |sense| [sense.key as u8, sense.asc, sense.ascq]);
        Self { role, status: reply.status as u8, triple }
    }
}

/// Where a copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyFailure {
    /// The number of the segment, from 0 on.
    pub segment: u16,
    /// What one of its units answered.
    pub forwarded: Option<Forwarded>,
}

/// The format of sense data, which D_SENSE of the control mode page or DESC of REQUEST SENSE chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SenseFormat {
    /// Response code 70h.
    Fixed,
    /// Response code 72h.
    Descriptor,
}

/// Why a command did not end with GOOD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// The sense key.
    pub key: SenseKey,
    /// The additional sense code.
    pub asc: u8,
    /// Its qualifier.
    pub ascq: u8,
    /// The INFORMATION field: what it counts depends on the command (SBC-4: the first LBA in error; MISCOMPARE: the
    /// offset of the difference).
    pub information: Option<u64>,
    /// The sense key specific bytes.
    pub specific: Option<KeySpecific>,
    /// With COPY ABORTED: the segment, in COMMAND-SPECIFIC INFORMATION, and the sense data of a unit.
    pub copy: Option<CopyFailure>,
}

macro_rules! triples {
    ($($name:ident = $key:ident, $asc:literal, $ascq:literal;)*) => {
        $(
            #[doc = concat!(stringify!($key), ", ASC ", stringify!($asc), ", ASCQ ", stringify!($ascq), ".")]
            pub const $name: Self = Self::new(SenseKey::$key, $asc, $ascq);
        )*
    };
}

impl Sense {
    triples! {
        NO_SENSE = NoSense, 0x00, 0x00;
        LOGICAL_UNIT_NOT_READY_BECOMING_READY = NotReady, 0x04, 0x01;
        LOGICAL_UNIT_NOT_READY_INITIALIZING_COMMAND_REQUIRED = NotReady, 0x04, 0x02;
        LOGICAL_UNIT_NOT_READY_MANUAL_INTERVENTION_REQUIRED = NotReady, 0x04, 0x03;
        LOGICAL_UNIT_NOT_READY_FORMAT_IN_PROGRESS = NotReady, 0x04, 0x04;
        LOGICAL_UNIT_NOT_READY_SANITIZE_IN_PROGRESS = NotReady, 0x04, 0x1b;
        MEDIUM_NOT_PRESENT = NotReady, 0x3a, 0x00;
        WRITE_ERROR = MediumError, 0x0c, 0x00;
        UNRECOVERED_READ = MediumError, 0x11, 0x00;
        FORMAT_COMMAND_FAILED = MediumError, 0x31, 0x01;
        SANITIZE_COMMAND_FAILED = MediumError, 0x31, 0x03;
        INTERNAL_TARGET_FAILURE = HardwareError, 0x44, 0x00;
        COPY_ABORTED = CopyAborted, 0x00, 0x00;
        THIRD_PARTY_DEVICE_FAILURE = CopyAborted, 0x0d, 0x01;
        COPY_TARGET_DEVICE_NOT_REACHABLE = CopyAborted, 0x0d, 0x02;
        INCORRECT_COPY_TARGET_DEVICE_TYPE = CopyAborted, 0x0d, 0x03;
        COPY_SEGMENT_GRANULARITY_VIOLATION = CopyAborted, 0x26, 0x0d;
        PARAMETER_LIST_LENGTH_ERROR = IllegalRequest, 0x1a, 0x00;
        INVALID_OPCODE = IllegalRequest, 0x20, 0x00;
        LBA_OUT_OF_RANGE = IllegalRequest, 0x21, 0x00;
        INVALID_FIELD_IN_INFORMATION_UNIT = IllegalRequest, 0x0e, 0x03;
        INVALID_FIELD_IN_CDB = IllegalRequest, 0x24, 0x00;
        INVALID_FIELD_IN_PARAMETER_LIST = IllegalRequest, 0x26, 0x00;
        TOO_MANY_TARGET_DESCRIPTORS = IllegalRequest, 0x26, 0x06;
        UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE = IllegalRequest, 0x26, 0x07;
        TOO_MANY_SEGMENT_DESCRIPTORS = IllegalRequest, 0x26, 0x08;
        UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE = IllegalRequest, 0x26, 0x09;
        INLINE_DATA_LENGTH_EXCEEDED = IllegalRequest, 0x26, 0x0b;
        MEDIUM_REMOVAL_PREVENTED = IllegalRequest, 0x53, 0x02;
        SAVING_PARAMETERS_NOT_SUPPORTED = IllegalRequest, 0x39, 0x00;
        POWER_ON = UnitAttention, 0x29, 0x01;
        DEVICE_INTERNAL_RESET = UnitAttention, 0x29, 0x04;
        MODE_PARAMETERS_CHANGED = UnitAttention, 0x2a, 0x01;
        CAPACITY_DATA_HAS_CHANGED = UnitAttention, 0x2a, 0x09;
        WRITE_PROTECTED = DataProtect, 0x27, 0x00;
        SOFTWARE_WRITE_PROTECTED = DataProtect, 0x27, 0x02;
        SPACE_ALLOCATION_FAILED = DataProtect, 0x27, 0x07;
        ABORTED_COMMAND = AbortedCommand, 0x00, 0x00;
        MISCOMPARE = Miscompare, 0x1d, 0x00;
    }

    /// Sense without details.
    #[must_use]
    pub const fn new(key: SenseKey, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq, information: None, specific: None, copy: None }
    }

    /// The same with an INFORMATION field.
    #[must_use]
    pub const fn with_information(mut self, information: u64) -> Self {
        self.information = Some(information);
        self
    }

    /// The same, pointing at a byte of the CDB and a bit of it.
    #[must_use]
    pub const fn at_cdb(mut self, byte: u16, bit: u8) -> Self {
        self.specific = Some(KeySpecific::Cdb(FieldPointer { byte, bit: Some(bit) }));
        self
    }

    /// The same, pointing at a byte of the parameter list.
    #[must_use]
    pub const fn at_parameter(mut self, byte: u16) -> Self {
        self.specific = Some(KeySpecific::Parameter(FieldPointer { byte, bit: None }));
        self
    }

    /// The same with a progress indication.
    #[must_use]
    pub const fn with_progress(mut self, progress: u16) -> Self {
        self.specific = Some(KeySpecific::Progress(progress));
        self
    }

    /// The same, of a copy that has ended in this segment.
    #[must_use]
    pub const fn in_segment(mut self, segment: u16, forwarded: Option<Forwarded>) -> Self {
        self.copy = Some(CopyFailure { segment, forwarded });
        self
    }

    /// The bytes on the wire and how many of them there are; the rest is zero.
    ///
    /// INFORMATION has 32 bits in the fixed format: a larger value is left out, with VALID clear, as SPC-5 asks.
    #[must_use]
    pub fn encode(&self, format: SenseFormat) -> ([u8; SENSE_BYTES], usize) {
        let mut bytes = [0; SENSE_BYTES];
        let length = match format {
            SenseFormat::Fixed => self.encode_fixed(&mut bytes),
            SenseFormat::Descriptor => self.encode_descriptors(&mut bytes),
        };
        (bytes, length)
    }

    fn encode_fixed(&self, bytes: &mut [u8; SENSE_BYTES]) -> usize {
        const LENGTH: usize = 18;
        bytes[0] = 0x70;
        if let Some(information) = self.information.and_then(|value| u32::try_from(value).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        bytes[2] = self.key as u8;
        bytes[12] = self.asc;
        bytes[13] = self.ascq;
        if let Some(specific) = self.specific {
            bytes[15..18].copy_from_slice(&specific.encode());
        }
        let mut length = LENGTH;
        if let Some(copy) = self.copy {
            // COMMAND-SPECIFIC INFORMATION: where status and sense data of source and destination begin, the segment.
            bytes[10..12].copy_from_slice(&copy.segment.to_be_bytes());
            if let Some(forwarded) = copy.forwarded {
                let pointer = if forwarded.role == Role::Source { 8 } else { 9 };
                bytes[pointer] = LENGTH as u8;
                length += forwarded.encode(&mut bytes[LENGTH..]);
            }
        }
        bytes[7] = length as u8 - 8;
        length
    }

    fn encode_descriptors(&self, bytes: &mut [u8; SENSE_BYTES]) -> usize {
        bytes[..4].copy_from_slice(&[0x72, self.key as u8, self.asc, self.ascq]);
        let mut length = 8;
        if let Some(information) = self.information {
            bytes[length..length + 4].copy_from_slice(&[0x00, 0x0a, 0x80, 0]);
            bytes[length + 4..length + 12].copy_from_slice(&information.to_be_bytes());
            length += 12;
        }
        if let Some(specific) = self.specific {
            bytes[length..length + 2].copy_from_slice(&[0x02, 0x06]);
            bytes[length + 4..length + 7].copy_from_slice(&specific.encode());
            length += 8;
        }
        if let Some(copy) = self.copy {
            bytes[length..length + 2].copy_from_slice(&[0x01, 0x0a]);
            bytes[length + 10..length + 12].copy_from_slice(&copy.segment.to_be_bytes());
            length += 12;
            if let Some(forwarded) = copy.forwarded {
                // A forwarded sense data descriptor; its fourth byte is the status.
                let source = if forwarded.role == Role::Source { 1 } else { 2 };
                let size = forwarded.encode(&mut bytes[length + 3..]);
                bytes[length..length + 3].copy_from_slice(&[0x0c, size as u8 + 1, source]);
                length += size + 3;
            }
        }
        bytes[7] = length as u8 - 8;
        length
    }
}

impl Forwarded {
    /// Writes the status and, in fixed format, the sense data if there was any; returns how much that is.
    fn encode(&self, bytes: &mut [u8]) -> usize {
        const LENGTH: usize = 18;
        let [key, asc, ascq] = self.triple;
        bytes[0] = self.status;
        if self.triple == [0; 3] {
            return 1;
        }
        let sense = &mut bytes[1..=LENGTH];
        (sense[0], sense[2], sense[7]) = (0x70, key, LENGTH as u8 - 8);
        (sense[12], sense[13]) = (asc, ascq);
        1 + LENGTH
    }
}
