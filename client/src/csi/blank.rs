//! Whether a file system is made on a volume, taken as it is, or neither.
//!
//! Owns: the decision, from what the server knows of the volume's content, what blkid finds, and whether both ends are zeros. Never:
//! does I/O; `probe` does. What looks empty is not: a disk that is not there yet, a key that is not open yet, and a broken
//! superblock all look so. So only the server's word that nobody has ever written makes a volume blank, and what is found has to
//! agree with it. There is no way to force it.
//!
//! ```text
//!                   content:   never written        initialised by this attachment   written, or by another, or unknown
//!   blkid finds
//!   nothing                    make, if both ends   make                             refuse
//!                              are zeros
//!   what is asked for          refuse               take                             take, if written or unknown
//!   the same, and its mkfs     refuse               make again                       refuse
//!   did not get to its end
//!   anything else              refuse               refuse                           refuse
//! ```

use super::mount_options::FsType;
use crate::contract::content::Content;

/// What blkid finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing that it knows, and the device could be read.
    Nothing,
    /// A file system of this name.
    FileSystem(String),
    /// What a mkfs that was killed leaves of a file system of this name.
    Unfinished(String),
    /// Something else of this name: a partition table, LUKS, a member of a RAID.
    Other(String),
    /// Several things at once, or no end of the search: why.
    Unclear(String),
}

/// What both ends of the device hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// Zeros alone.
    Zeros,
    /// Something else.
    Data,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// A file system is made.
    Make,
    /// What a killed mkfs left is erased, and a file system is made.
    MakeAgain,
    /// There is one; it is checked and mounted.
    Take,
    /// Neither: why.
    Refuse(Refusal),
}

/// Why a volume is neither given a file system nor mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Of another kind than is asked for.
    #[error(
        "the volume holds {found}, and {asked} is asked for; set csi.storage.k8s.io/fstype to what it holds, or use another volume"
    )]
    OtherType {
        /// What blkid finds.
        found: String,
        /// What the class says.
        asked: &'static str,
    },
    /// It was written to, and no file system is found.
    #[error(
        "the volume was written to, and no file system is found on it; it may be damaged or a raw block volume: look at it before anything is written"
    )]
    NothingFound,
    /// Nobody wrote to it, and still something is there.
    #[error(
        "the server says that the volume was never written to, but {found} is found on it; this may be another disk: nothing was written"
    )]
    NotBlank {
        /// What is there.
        found: String,
    },
    /// It is not clear what is there.
    #[error("it is not clear what the volume holds: {0}; nothing was written")]
    Unclear(String),
    /// Another attachment makes a file system.
    #[error("another attachment is making a file system on the volume; detach that one, and repeat the call")]
    InitialisedElsewhere,
    /// Nothing there, and the server cannot say whether it was written to.
    #[error(
        "no file system is found, and the server does not say whether the volume was ever written to; upgrade volserver, or make the file system by hand"
    )]
    ContentUnknown,
}

/// Decides; see the table above.
pub fn decide(content: Content, found: &Found, ends: Ends, asked: FsType) -> Decision {
    let refuse = Decision::Refuse;
    if content == Content::InitialisingElsewhere {
        return refuse(Refusal::InitialisedElsewhere);
    }
    match (found, content) {
        (Found::Unclear(why), _) => refuse(Refusal::Unclear(why.clone())),
        (Found::Unfinished(name), Content::InitialisingHere) if name == asked.name() => Decision::MakeAgain,
        (Found::Unfinished(name), Content::Written | Content::Unknown) => refuse(Refusal::Unclear(format!(
            "an {name} that was never finished, on a volume that was written to"
        ))),
        (Found::Nothing, Content::NeverWritten) => match ends {
            Ends::Zeros => Decision::Make,
            Ends::Data => refuse(Refusal::NotBlank { found: "data".to_owned() }),
        },
        (Found::FileSystem(name) | Found::Unfinished(name) | Found::Other(name), Content::NeverWritten) => {
            refuse(Refusal::NotBlank { found: name.clone() })
        }
        (Found::Nothing, Content::InitialisingHere) => Decision::Make,
        (Found::Nothing, Content::Unknown) => refuse(Refusal::ContentUnknown),
        (Found::Nothing, _) => refuse(Refusal::NothingFound),
        (Found::FileSystem(name), _) if name == asked.name() => Decision::Take,
        (Found::FileSystem(name) | Found::Unfinished(name) | Found::Other(name), _) => {
            refuse(Refusal::OtherType { found: name.clone(), asked: asked.name() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENTS: [Content; 5] = [
        Content::NeverWritten,
        Content::InitialisingHere,
        Content::InitialisingElsewhere,
        Content::Written,
        Content::Unknown,
    ];

    fn findings() -> [Found; 7] {
        [
            Found::Nothing,
            Found::FileSystem("ext4".to_owned()),
            Found::FileSystem("xfs".to_owned()),
            Found::Other("crypto_LUKS".to_owned()),
            Found::Unclear("several".to_owned()),
            Found::Unfinished("ext4".to_owned()),
            Found::Unfinished("xfs".to_owned()),
        ]
    }

    /// One letter a finding, in their order: make, make again, take or refuse; for ext4.
    fn row(content: Content, ends: Ends) -> String {
        let letter = |found: &Found| match decide(content, found, ends, FsType::Ext4) {
            Decision::Make => 'M',
            Decision::MakeAgain => 'A',
            Decision::Take => 'T',
            Decision::Refuse(_) => '-',
        };
        findings().iter().map(letter).collect()
    }

    #[test]
    fn a_file_system_is_made_on_what_is_blank_and_taken_where_it_may_be() {
        let rows = |ends| CONTENTS.map(|content| row(content, ends));
        assert_eq!(rows(Ends::Zeros), ["M------", "MT---A-", "-------", "-T-----", "-T-----"]);
        // Half a file system of ours may lie at the ends.
        assert_eq!(rows(Ends::Data), ["-------", "MT---A-", "-------", "-T-----", "-T-----"]);
    }

    #[test]
    fn what_is_asked_for_changes_nothing_but_what_is_taken() {
        for content in CONTENTS {
            for found in findings() {
                let ext4 = decide(content, &found, Ends::Zeros, FsType::Ext4);
                let xfs = decide(content, &found, Ends::Zeros, FsType::Xfs);
                assert_eq!(ext4 == Decision::Make, xfs == Decision::Make, "{content:?} {found:?}");
                assert!(ext4 != Decision::Take || xfs != Decision::Take, "{content:?} {found:?}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_is_there_and_what_to_do() {
        let refusal = |content, found: Found| match decide(content, &found, Ends::Data, FsType::Ext4) {
            Decision::Refuse(refusal) => refusal.to_string(),
            other => panic!("{other:?}"),
        };
        let xfs = refusal(Content::Written, Found::FileSystem("xfs".to_owned()));
        assert!(xfs.contains("holds xfs, and ext4 is asked for; set csi.storage.k8s.io/fstype"), "{xfs}");
        let blank = refusal(Content::NeverWritten, Found::Nothing);
        assert!(blank.contains("never written to, but data is found"), "{blank}");
        assert!(refusal(Content::Unknown, Found::Nothing).contains("upgrade volserver"));
        assert!(refusal(Content::Written, Found::Nothing).contains("look at it"));
    }
}
