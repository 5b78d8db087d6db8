//! What all sides have to know of encrypted volumes.
//!
//! Owns: how much of a volume its LUKS header takes, what a passphrase may be, and how the message that carries one treats it: nothing of
//! it is shown, and its bytes are erased when it goes. What gRPC itself buffers of a message is out of reach.
//! Called by the server, which adds nothing to a size, and the clients, which do.

use std::fmt;

use zeroize::Zeroize as _;

use crate::v1::Passphrase;

/// What a LUKS2 header takes at the beginning of a volume, in bytes: where cryptsetup puts the data by default.
pub const LUKS_HEADER_BYTES: u64 = 16 << 20;
/// Bytes of a passphrase at most: more than anybody types, and less than a pipe holds at once.
pub const PASSPHRASE_BYTES_MAX: usize = 4096;

impl Passphrase {
    /// Of these bytes.
    pub fn new(value: Vec<u8>) -> Self {
        Self { value }
    }

    /// Why the bytes are no passphrase, for people.
    ///
    /// # Errors
    /// There are none, or more than [`PASSPHRASE_BYTES_MAX`].
    pub fn check(&self) -> Result<(), String> {
        match self.value.len() {
            0 => Err("the passphrase is empty".to_owned()),
            length if length > PASSPHRASE_BYTES_MAX => {
                Err(format!("the passphrase has {length} bytes; it may have {PASSPHRASE_BYTES_MAX}"))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Passphrase(…)")
    }
}

impl Drop for Passphrase {
    fn drop(&mut self) {
        self.value.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::AttachRequest;

    #[test]
    fn a_request_with_a_passphrase_shows_nothing_of_it() {
        let passphrase = Some(Passphrase::new(b"correct horse".to_vec()));
        let request = AttachRequest { target: "vol-1".to_owned(), passphrase, ..Default::default() };
        let shown = format!("{request:?}");
        assert!(shown.contains("vol-1") && shown.contains("Passphrase(…)"), "{shown}");
        assert!(!shown.contains("horse") && !shown.contains("104"), "{shown}");
    }

    #[test]
    fn a_passphrase_has_a_byte_at_least_and_a_bound() {
        let check = |length| Passphrase::new(vec![b'x'; length]).check();
        assert!(check(1).is_ok() && check(PASSPHRASE_BYTES_MAX).is_ok());
        assert!(check(0).is_err() && check(PASSPHRASE_BYTES_MAX + 1).is_err());
    }
}
