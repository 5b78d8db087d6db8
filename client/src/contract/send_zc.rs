//! Whether large WRITEs leave from the requests' own pages (SEND_ZC): what was asked for, and what became of it.

use serde::{Deserialize, Serialize};

/// Whether large WRITEs are to leave from the requests' own pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SendZcMode {
    /// Where that was measured to cost less: from [`super::SEND_ZC_BYTES_MIN`] on.
    #[default]
    Auto,
    /// Whatever has pages of its own on the way.
    On,
    /// None does.
    Off,
}

impl SendZcMode {
    /// As volctl and the messages name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    /// The least bytes of a WRITE that is to leave so; `None`: none is.
    pub const fn bytes_min(self) -> Option<u32> {
        match self {
            Self::Auto => Some(super::SEND_ZC_BYTES_MIN),
            Self::On => Some(0),
            Self::Off => None,
        }
    }
}

impl std::fmt::Display for SendZcMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
