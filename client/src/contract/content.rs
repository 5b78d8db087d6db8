//! What the server knows of a volume's content, as one attachment sees it.
//!
//! Owns: that alone. What follows from it for a file system is in `csi/blank.rs`, and for a LUKS header in `node/luks_plan.rs`.

use proto::v1;

/// What the server knows of a volume's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nobody has ever written to it.
    NeverWritten,
    /// This attachment is making a file system or a LUKS header, or was when its process was killed: no byte of a user's is in it.
    InitialisingHere,
    /// Another attachment is.
    InitialisingElsewhere,
    /// It may hold data.
    Written,
    /// The server does not say.
    Unknown,
}

impl Content {
    /// As the server tells an attachment.
    pub fn seen_from(volume: &v1::Volume, attachment_id: &str) -> Self {
        match volume.content() {
            v1::VolumeContent::NeverWritten => Self::NeverWritten,
            v1::VolumeContent::Initialising if volume.initialising_attachment_id == attachment_id => {
                Self::InitialisingHere
            }
            v1::VolumeContent::Initialising => Self::InitialisingElsewhere,
            v1::VolumeContent::Written => Self::Written,
            v1::VolumeContent::Unspecified => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_initialises_is_told_apart() {
        let volume = |content: v1::VolumeContent, by: &str| v1::Volume {
            content: content.into(),
            initialising_attachment_id: by.to_owned(),
            ..Default::default()
        };
        use v1::VolumeContent::{Initialising, NeverWritten, Unspecified, Written};
        for (content, by, expected) in [
            (NeverWritten, "", Content::NeverWritten),
            (Initialising, "a", Content::InitialisingHere),
            (Initialising, "b", Content::InitialisingElsewhere),
            (Initialising, "", Content::InitialisingElsewhere),
            (Written, "", Content::Written),
            (Unspecified, "", Content::Unknown),
        ] {
            assert_eq!(Content::seen_from(&volume(content, by), "a"), expected);
        }
    }
}
