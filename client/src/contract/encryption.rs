//! Who encrypts what a disk's connections carry.

use serde::{Deserialize, Serialize};

/// Who encrypts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encryption {
    /// Nobody.
    None,
    /// TLS, by the kernel (kTLS).
    Kernel,
    /// TLS, by a thread of this process.
    UserSpace,
}

impl Encryption {
    /// As the status tells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Kernel => "tls by the kernel",
            Self::UserSpace => "tls in user space",
        }
    }
}
