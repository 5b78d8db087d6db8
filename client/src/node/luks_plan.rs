//! Whether an encrypted volume gets a LUKS header, is opened with the one that it has, or neither.
//!
//! Owns: the decision, from what the server knows of the volume's content, what lies at the beginning of the disk, and what the kernel
//! has open. Never: does I/O, or remembers a step: a call that was cut off goes on where it was. What looks empty is not: so only the
//! server's word that nobody has ever written makes a volume blank, and the disk has to agree with it. There is no way to force it.
//!
//! ```text
//!   clear disk is open ─▶ (new: its ends erased) ─▶ content initialising here: written, unless the caller says so itself ─▶ done
//!   stale ─▶ closed ─┐
//!   there is none ───┴▶ content          header:   LUKS      zeros              something else
//!                         never written            refuse    initialising       refuse
//!                         initialising here        format    format             format
//!                           (no byte of a user's is in it)
//!                         initialising elsewhere   taken over, where the other has ended
//!                         written, or unknown      open      refuse             refuse
//!                       nothing may be written     open      refuse             refuse
//! ```

use crate::contract::content::Content;

/// What lies at the beginning of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// A LUKS header of either version.
    Luks,
    /// Zeros, and at the end of the disk as well.
    Zeros,
    /// Something else.
    Other,
}

/// The clear disk of the attachment, as the kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClearDisk {
    /// There is none.
    Absent,
    /// It lies on the attachment's disk.
    Open,
    /// It lies on a disk that is gone.
    Stale,
}

/// What is seen. `None` and `false`: not looked at, or not done, in this call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Nothing is to be written.
    pub is_read_only: bool,
    /// The caller has told one.
    pub has_passphrase: bool,
    /// The caller makes a file system, and says then that there is data.
    pub keeps_initialising: bool,
    /// As the kernel has it.
    pub clear_disk: ClearDisk,
    /// As the server tells.
    pub content: Option<Content>,
    /// As the disk has it.
    pub header: Option<Header>,
    /// The header is this call's.
    pub is_formatted: bool,
    /// Both ends of the new clear disk read as zeros.
    pub is_erased: bool,
}

/// Why an encrypted volume is neither made nor opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// None was told, and one is needed.
    #[error("the volume is encrypted, and no passphrase was given")]
    NoPassphrase,
    /// It was written to, and not by us.
    #[error("the volume is to be encrypted, was written to, and has no LUKS header")]
    NotLuks,
    /// Nobody wrote to it, and still something is there.
    #[error("the server says that the volume was never written to, but something is on its disk")]
    NotBlank,
    /// There is nothing to open, and nothing may be written.
    #[error("the volume is encrypted and has no LUKS header yet, and it is to be read only")]
    NothingToRead,
    /// Another attachment makes the header, and has not ended.
    #[error("another attachment is making the volume's LUKS header")]
    InitialisedElsewhere,
}

impl Refusal {
    /// What to do next, for people.
    pub fn next(self) -> &'static str {
        match self {
            Self::NoPassphrase => {
                "give it: volctl attach --passphrase-file FILE, or --passphrase-keyring KEY"
            }
            Self::NotLuks => {
                "look at it before anything is written: its header may be damaged, or an image without one was imported"
            }
            Self::NotBlank => "look at it before anything is written; this may be another disk",
            Self::NothingToRead => "attach it for writing once, which makes the header",
            Self::InitialisedElsewhere => "detach it there, then attach it again",
        }
    }
}

/// The next step of an attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take a clear disk away whose disk is gone.
    CloseStale,
    /// Ask the server what the content is.
    AskContent,
    /// Look at the disk.
    LookAtDisk,
    /// Tell the server that this attachment makes a header.
    SetInitialising,
    /// Make the header.
    Format,
    /// Have the kernel open it.
    Open,
    /// Have both ends of the new clear disk read as zeros: what was never written decrypts to noise, which may look like something.
    Erase,
    /// Tell the server that there is data from now on.
    SetWritten,
    /// It is open, and may be used.
    Done,
    /// It cannot be.
    Refuse(Refusal),
}

/// What an attach does next.
pub fn attach(view: &View) -> Step {
    match view.clear_disk {
        ClearDisk::Open => return once_open(view),
        // Also before anything is closed: who cannot open it changes nothing.
        _ if !view.has_passphrase => return Step::Refuse(Refusal::NoPassphrase),
        ClearDisk::Stale => return Step::CloseStale,
        ClearDisk::Absent => {}
    }
    if view.is_formatted {
        // Told before anything can be written through it: from then on nobody makes a header over this one.
        return match view.content {
            Some(Content::InitialisingHere) if !view.keeps_initialising => Step::SetWritten,
            _ => Step::Open,
        };
    }
    if view.is_read_only {
        return match view.header {
            None => Step::LookAtDisk,
            Some(Header::Luks) => Step::Open,
            Some(Header::Zeros) => Step::Refuse(Refusal::NothingToRead),
            Some(Header::Other) => Step::Refuse(Refusal::NotLuks),
        };
    }
    let Some(content) = view.content else { return Step::AskContent };
    let Some(header) = view.header else { return Step::LookAtDisk };
    match (content, header) {
        (Content::NeverWritten, Header::Zeros) | (Content::InitialisingElsewhere, _) => Step::SetInitialising,
        (Content::NeverWritten, Header::Luks | Header::Other) => Step::Refuse(Refusal::NotBlank),
        (Content::InitialisingHere, _) => Step::Format,
        (Content::Written | Content::Unknown, Header::Luks) => Step::Open,
        (Content::Written | Content::Unknown, Header::Zeros | Header::Other) => {
            Step::Refuse(Refusal::NotLuks)
        }
    }
}

fn once_open(view: &View) -> Step {
    if view.is_formatted && !view.is_erased {
        return Step::Erase;
    }
    if view.is_read_only || view.keeps_initialising {
        return Step::Done;
    }
    match view.content {
        None => Step::AskContent,
        Some(Content::InitialisingHere) => Step::SetWritten,
        // It would not be open.
        Some(Content::NeverWritten | Content::InitialisingElsewhere) => Step::Done,
        Some(Content::Written | Content::Unknown) => Step::Done,
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
    const HEADERS: [Header; 3] = [Header::Luks, Header::Zeros, Header::Other];

    fn view() -> View {
        View {
            is_read_only: false,
            has_passphrase: true,
            keeps_initialising: false,
            clear_disk: ClearDisk::Absent,
            content: None,
            header: None,
            is_formatted: false,
            is_erased: false,
        }
    }

    /// Carries steps out on a world that does what it is told; the steps, and where it ends.
    fn steps(mut view: View, content: Content, header: Header) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut is = content;
        loop {
            let step = attach(&view);
            steps.push(step);
            assert!(steps.len() < 12, "{steps:?}");
            match step {
                Step::Done | Step::Refuse(_) => return steps,
                Step::CloseStale => view.clear_disk = ClearDisk::Absent,
                Step::AskContent => view.content = Some(is),
                Step::LookAtDisk => view.header = Some(header),
                Step::SetInitialising => {
                    is = Content::InitialisingHere;
                    view.content = Some(is);
                }
                Step::Format => (view.is_formatted, view.header) = (true, Some(Header::Luks)),
                Step::Open => view.clear_disk = ClearDisk::Open,
                Step::Erase => view.is_erased = true,
                Step::SetWritten => {
                    is = Content::Written;
                    view.content = Some(is);
                }
            }
        }
    }

    #[test]
    fn a_header_is_made_where_nobody_wrote_and_nowhere_else() {
        for content in CONTENTS {
            for header in HEADERS {
                let steps = steps(view(), content, header);
                let makes = match content {
                    Content::NeverWritten => header == Header::Zeros,
                    Content::InitialisingHere | Content::InitialisingElsewhere => true,
                    Content::Written | Content::Unknown => false,
                };
                assert_eq!(steps.contains(&Step::Format), makes, "{content:?} {header:?}");
                let opens = makes || (header == Header::Luks && content != Content::NeverWritten);
                assert_eq!(steps.last() == Some(&Step::Done), opens, "{content:?} {header:?} {steps:?}");
                if makes {
                    let at = |step: Step| steps.iter().position(|other| *other == step);
                    assert!(at(Step::Format) < at(Step::SetWritten) && at(Step::Open) < at(Step::Erase));
                    assert!(
                        at(Step::SetWritten) < at(Step::Open),
                        "no header is made over one that was written through"
                    );
                }
            }
        }
    }

    #[test]
    fn who_only_reads_changes_nothing() {
        for content in CONTENTS {
            for header in HEADERS {
                let steps = steps(View { is_read_only: true, ..view() }, content, header);
                for step in [Step::Format, Step::Erase, Step::SetInitialising, Step::SetWritten] {
                    assert!(!steps.contains(&step), "{content:?} {header:?} {steps:?}");
                }
                assert_eq!(steps.last() == Some(&Step::Done), header == Header::Luks);
            }
        }
    }

    #[test]
    fn without_a_passphrase_only_what_is_open_is_had() {
        let none = View { has_passphrase: false, ..view() };
        let refused = Step::Refuse(Refusal::NoPassphrase);
        assert_eq!(attach(&none), refused);
        assert_eq!(attach(&View { clear_disk: ClearDisk::Stale, ..none }), refused);
        let open = View { clear_disk: ClearDisk::Open, ..none };
        assert_eq!(steps(open, Content::Written, Header::Luks), [Step::AskContent, Step::Done]);
    }

    #[test]
    fn a_call_that_was_cut_off_goes_on() {
        // Behind the open: the header is told of.
        let open = View { clear_disk: ClearDisk::Open, ..view() };
        let told = steps(open, Content::InitialisingHere, Header::Luks);
        assert_eq!(told, [Step::AskContent, Step::SetWritten, Step::Done]);
        // Before it: whose passphrase the header has nobody knows, and nobody's bytes are behind it.
        assert!(steps(view(), Content::InitialisingHere, Header::Luks).contains(&Step::Format));
        // Of a disk that went away below it.
        let stale = View { clear_disk: ClearDisk::Stale, ..view() };
        assert_eq!(
            steps(stale, Content::Written, Header::Luks),
            [Step::CloseStale, Step::AskContent, Step::LookAtDisk, Step::Open, Step::Done]
        );
    }

    #[test]
    fn a_caller_that_makes_a_file_system_says_itself_that_there_is_data() {
        let keeps = View { keeps_initialising: true, ..view() };
        let made = steps(keeps, Content::NeverWritten, Header::Zeros);
        assert!(made.contains(&Step::Erase) && !made.contains(&Step::SetWritten), "{made:?}");
        // Its file system may be on the way.
        let again =
            steps(View { clear_disk: ClearDisk::Open, ..keeps }, Content::InitialisingHere, Header::Luks);
        assert_eq!(again, [Step::Done]);
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        for refusal in [
            Refusal::NoPassphrase,
            Refusal::NotLuks,
            Refusal::NotBlank,
            Refusal::NothingToRead,
            Refusal::InitialisedElsewhere,
        ] {
            assert!(!refusal.next().is_empty() && !refusal.to_string().is_empty());
        }
    }
}
