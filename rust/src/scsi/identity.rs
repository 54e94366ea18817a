//! Who a logical unit says it is.

use super::lun::LunError;

/// What INQUIRY tells of the device: nothing of how or where it stores its data belongs here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    vendor: [u8; 8],
    product: [u8; 16],
    revision: [u8; 4],
    serial: String,
    naa: [u8; 16],
}

impl Identity {
    /// The longest serial number: it must fit into a designator of 255 bytes, after vendor and product.
    pub const MAX_SERIAL: usize = 128;

    /// Vendor (at most 8 characters), product (16), revision (4) and unit serial number, all printable ASCII, and an
    /// NAA IEEE Registered Extended designator (first four bits 6), which is the name that initiators go by: it must
    /// be unique and stay the same for the life of the data.
    ///
    /// # Errors
    /// [`LunError`] says which one is too long, empty or not printable, or that the designator is of another type.
    pub fn new(
        vendor: &str,
        product: &str,
        revision: &str,
        serial: &str,
        naa: [u8; 16],
    ) -> Result<Self, LunError> {
        printable("serial number", serial, Self::MAX_SERIAL)?;
        if serial.is_empty() {
            return Err(LunError::EmptySerial);
        }
        if naa[0] >> 4 != 6 {
            return Err(LunError::Designator { first: naa[0] });
        }
        Ok(Self {
            vendor: padded("vendor", vendor)?,
            product: padded("product", product)?,
            revision: padded("revision", revision)?,
            serial: serial.to_owned(),
            naa,
        })
    }

    /// The T10 vendor identification, padded with spaces.
    #[must_use]
    pub const fn vendor(&self) -> &[u8; 8] {
        &self.vendor
    }

    /// The product identification, padded with spaces.
    #[must_use]
    pub const fn product(&self) -> &[u8; 16] {
        &self.product
    }

    /// The product revision level, padded with spaces.
    #[must_use]
    pub const fn revision(&self) -> &[u8; 4] {
        &self.revision
    }

    /// The unit serial number.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The NAA designator.
    #[must_use]
    pub const fn naa(&self) -> &[u8; 16] {
        &self.naa
    }
}

fn printable(field: &'static str, text: &str, limit: usize) -> Result<(), LunError> {
    if !text.bytes().all(|byte| (0x20..=0x7e).contains(&byte)) {
        return Err(LunError::NotPrintable { field });
    }
    if text.len() > limit {
        return Err(LunError::TooLong { field, length: text.len(), limit });
    }
    Ok(())
}

fn padded<const N: usize>(field: &'static str, text: &str) -> Result<[u8; N], LunError> {
    printable(field, text, N)?;
    let mut bytes = [b' '; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    Ok(bytes)
}
