//! The format of an image file: what it looks like, whether that may be believed, and whether it names other files.
//!
//! I/O-free: judges bytes that others have read. An image is not trusted. What a raw disk begins with is its user's to write, so that
//! nothing is taken for qcow2 because of its content alone: the file's name has to say so as well, or whoever imports it. The other
//! way round, what looks like another format is not taken for raw unless somebody says so.
//! Source: QEMU's docs/interop/qcow2.rst; VMware Virtual Disk Format 5.0; \[MS-VHDX\]; VirtualBox's VDICore.h.

use std::fmt;

/// How much of a file's beginning has to be looked at, in bytes.
pub const LOOK_BYTES: usize = 1 << 20;

const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
const VMDK_MAGIC: &[u8] = b"KDMV";
const VMDK_DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";
const VHDX_MAGIC: &[u8] = b"vhdxfile";
const VDI_SIGNATURE_AT: usize = 64;
const VDI_SIGNATURE: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
/// qcow2, version 3: the data is in another file.
const QCOW2_EXTERNAL_DATA: u64 = 1 << 2;
const QCOW2_EXTENSION_DATA_FILE: u32 = 0x4441_5441;
/// Extension of a qcow2's header: the backing file's format.
pub const QCOW2_EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// How an image is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes.
    Raw,
    /// QEMU's, version 2 or 3.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// Hyper-V's.
    Vhdx,
    /// VirtualBox's.
    Vdi,
}

impl Format {
    /// As QEMU calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }

    /// What a file's name says, by its ending.
    pub fn of_name(name: &str) -> Option<Self> {
        let (_, ending) = name.rsplit_once('.')?;
        let formats = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhdx, Self::Vdi];
        formats.into_iter().find(|format| format.as_str().eq_ignore_ascii_case(ending))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a file begins like, as far as an importer has to care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Nothing,
    Image(Format),
    /// Known, and not to be had here.
    Other(&'static str),
    /// By which program it is undone.
    Compressed(&'static str),
}

/// Why a file's format is not settled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Somebody has to say which it is.
    #[error("the file begins like {look}, and its name does not say so")]
    Ambiguous {
        /// What it begins like.
        look: &'static str,
    },
    /// The file's name says something that its content does not.
    #[error("the file is named like {named}, and does not begin like one")]
    Misnamed {
        /// By its ending.
        named: Format,
    },
    /// The file is not what it is said to be.
    #[error("the file is no {said}: it does not begin like one")]
    NotThat {
        /// By whoever imports it.
        said: Format,
    },
    /// It is packed.
    #[error("the file begins like one that {program} has compressed")]
    Compressed {
        /// `xz`, for example.
        program: &'static str,
    },
}

/// Settles the format of a file by its beginning ([`LOOK_BYTES`], or all of a shorter one), its name, and what was said.
///
/// # Errors
/// [`FormatError`], by cause.
pub fn settle(begin: &[u8], name: &str, said: Option<Format>) -> Result<Format, FormatError> {
    let (look, named) = (look_at(begin), Format::of_name(name));
    match (said, look) {
        (Some(Format::Raw), _) => Ok(Format::Raw),
        (Some(said), Look::Image(format)) if said == format => Ok(said),
        (Some(said), _) => Err(FormatError::NotThat { said }),
        (None, Look::Image(format)) if named == Some(format) => Ok(format),
        (None, Look::Image(format)) => Err(FormatError::Ambiguous { look: format.as_str() }),
        (None, Look::Other(look)) => Err(FormatError::Ambiguous { look }),
        (None, Look::Compressed(program)) => Err(FormatError::Compressed { program }),
        (None, Look::Nothing) => match named {
            None | Some(Format::Raw) => Ok(Format::Raw),
            Some(named) => Err(FormatError::Misnamed { named }),
        },
    }
}

fn look_at(begin: &[u8]) -> Look {
    let packed: [(&[u8], &str); 4] = [
        (&[0x1f, 0x8b, 8], "gzip"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (b"BZh", "bzip2"),
    ];
    if let Some((_, program)) = packed.into_iter().find(|(magic, _)| begin.starts_with(magic)) {
        return Look::Compressed(program);
    }
    if begin.starts_with(QCOW2_MAGIC) {
        return match number(begin, 4) {
            Some(2 | 3) => Look::Image(Format::Qcow2),
            _ => Look::Other("qcow, the format before qcow2"),
        };
    }
    if begin.starts_with(VMDK_MAGIC) || begin.trim_ascii_start().starts_with(VMDK_DESCRIPTOR) {
        return Look::Image(Format::Vmdk);
    }
    if begin.starts_with(VHDX_MAGIC) {
        return Look::Image(Format::Vhdx);
    }
    if begin.get(VDI_SIGNATURE_AT..VDI_SIGNATURE_AT + 4) == Some(&VDI_SIGNATURE) {
        return Look::Image(Format::Vdi);
    }
    let others: [(&[u8], &str); 4] = [
        (b"conectix", "vhd"),
        (b"QED\0", "qed"),
        (b"COWD", "an old vmdk"),
        (b"WithoutFreeSpace", "parallels"),
    ];
    let other = others.into_iter().find(|(magic, _)| begin.starts_with(magic));
    other.map_or(Look::Nothing, |(_, name)| Look::Other(name))
}

/// Why an image needs more than its own file, or cannot be read without a secret. `None`: it stands for itself.
///
/// What is too odd to be judged is a reason as well. `is_difference`: a backing file is none, because nobody will look for it.
pub fn names_other_files(begin: &[u8], format: Format, is_difference: bool) -> Option<String> {
    match format {
        Format::Qcow2 => qcow2_names(begin, is_difference),
        Format::Vmdk => vmdk_names(begin),
        // Of these QEMU reads no differencing images.
        Format::Raw | Format::Vhdx | Format::Vdi => None,
    }
}

fn qcow2_names(begin: &[u8], is_difference: bool) -> Option<String> {
    let odd = || Some("its header is cut off".to_owned());
    let (Some(version), Some(backing)) = (number(begin, 4), long(begin, 8)) else { return odd() };
    if backing != 0 && !is_difference {
        let length = number(begin, 16).unwrap_or_default() as usize;
        let name = usize::try_from(backing).ok().and_then(|at| begin.get(at..at.checked_add(length)?));
        let name = name.map(String::from_utf8_lossy).unwrap_or_default();
        return Some(format!("it names a backing file, {name:?}"));
    }
    let extensions_at = match version {
        2 => 72,
        _ => {
            let (Some(features), Some(header_bytes)) = (long(begin, 72), number(begin, 100)) else {
                return odd();
            };
            if features & QCOW2_EXTERNAL_DATA != 0 {
                return Some("its data is in another file".to_owned());
            }
            header_bytes as usize
        }
    };
    let mut at = extensions_at;
    loop {
        let (Some(kind), Some(length)) = (number(begin, at), number(begin, at.checked_add(4)?)) else {
            return odd();
        };
        match kind {
            0 => return None,
            QCOW2_EXTENSION_DATA_FILE => return Some("it names a file for its data".to_owned()),
            QCOW2_EXTENSION_BACKING_FORMAT if !is_difference => {
                return Some("it tells the format of a backing file".to_owned());
            }
            _ => at = (length as usize).checked_next_multiple_of(8)?.checked_add(at)?.checked_add(8)?,
        }
    }
}

fn vmdk_names(begin: &[u8]) -> Option<String> {
    if !begin.starts_with(VMDK_MAGIC) {
        return Some("it is a descriptor, whose data is in other files".to_owned());
    }
    let sectors = |at: usize| Some(u64::from_le_bytes(begin.get(at..at + 8)?.try_into().ok()?));
    let odd = || Some("its header makes no sense".to_owned());
    let (Some(capacity), Some(at), Some(length)) = (sectors(12), sectors(28), sectors(36)) else {
        return odd();
    };
    if capacity == 0 {
        return Some("it has no data of its own".to_owned());
    }
    if at == 0 {
        return None;
    }
    let start = at.checked_mul(512).and_then(|at| usize::try_from(at).ok());
    let length = length.checked_mul(512).and_then(|length| usize::try_from(length).ok());
    let descriptor =
        start.zip(length).and_then(|(start, length)| begin.get(start..start.checked_add(length)?));
    let Some(descriptor) = descriptor else { return odd() };
    let text = String::from_utf8_lossy(descriptor);
    if text.contains("parentFileNameHint") {
        return Some("it names a parent".to_owned());
    }
    let extents =
        text.lines().filter(|line| ["RW ", "RDONLY ", "NOACCESS "].iter().any(|word| line.starts_with(word)));
    // Its own is one.
    if extents.count() > 1 { Some("its data is in several files".to_owned()) } else { None }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[..4].copy_from_slice(QCOW2_MAGIC);
        bytes[7] = 3;
        bytes[103] = 104;
        change(&mut bytes);
        bytes
    }

    fn vmdk(descriptor: &str) -> Vec<u8> {
        let mut bytes = vec![0; 2048];
        bytes[..4].copy_from_slice(VMDK_MAGIC);
        (bytes[12], bytes[28], bytes[36]) = (8, 1, 2);
        bytes[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
        bytes
    }

    #[test]
    fn a_raw_disk_is_never_taken_for_something_else() {
        let disguised = qcow2(|_| {});
        for name in ["disk.img", "disk", "disk.raw", "disk.vmdk"] {
            let told = settle(&disguised, name, None);
            assert_eq!(told, Err(FormatError::Ambiguous { look: "qcow2" }), "{name}");
            assert_eq!(settle(&disguised, name, Some(Format::Raw)), Ok(Format::Raw));
            assert_eq!(settle(&disguised, name, Some(Format::Qcow2)), Ok(Format::Qcow2));
        }
        assert_eq!(settle(&disguised, "disk.QCOW2", None), Ok(Format::Qcow2));
        let said = settle(&disguised, "disk.qcow2", Some(Format::Vmdk));
        assert_eq!(said, Err(FormatError::NotThat { said: Format::Vmdk }));
    }

    #[test]
    fn what_looks_like_nothing_is_raw_unless_its_name_says_otherwise() {
        assert_eq!(settle(&[0; 1024], "disk.img", None), Ok(Format::Raw));
        assert_eq!(settle(b"", "empty", None), Ok(Format::Raw));
        let named = settle(&[0; 1024], "disk.qcow2", None);
        assert_eq!(named, Err(FormatError::Misnamed { named: Format::Qcow2 }));
        assert_eq!(settle(&[0; 1024], "disk.qcow2", Some(Format::Raw)), Ok(Format::Raw));
    }

    #[test]
    fn every_known_beginning_is_told() {
        let vdi = [&[0; VDI_SIGNATURE_AT][..], &VDI_SIGNATURE].concat();
        let descriptor = [b"\n# Disk DescriptorFile\nversion=1\n".to_vec(), vec![0; 600]].concat();
        for (bytes, look) in [
            (VHDX_MAGIC.to_vec(), Look::Image(Format::Vhdx)),
            (vdi, Look::Image(Format::Vdi)),
            (vmdk(""), Look::Image(Format::Vmdk)),
            (descriptor, Look::Image(Format::Vmdk)),
            (b"QFI\xfb\0\0\0\x01".to_vec(), Look::Other("qcow, the format before qcow2")),
            (b"conectix".to_vec(), Look::Other("vhd")),
            (vec![0x1f, 0x8b, 8, 0], Look::Compressed("gzip")),
            (b"\xfd7zXZ\0rest".to_vec(), Look::Compressed("xz")),
            (vec![7; 100], Look::Nothing),
        ] {
            assert_eq!(look_at(&bytes), look, "{bytes:?}");
        }
    }

    #[test]
    fn images_that_name_other_files_are_found() {
        let judged = |bytes: &[u8]| names_other_files(bytes, Format::Qcow2, false);
        assert_eq!(judged(&qcow2(|_| {})), None);
        let backed = qcow2(|bytes| {
            (bytes[14], bytes[15], bytes[19]) = (2, 0, 11);
            bytes[512..523].copy_from_slice(b"/etc/shadow");
        });
        assert!(judged(&backed).unwrap().contains("/etc/shadow"));
        let of_difference = |bytes: &[u8]| names_other_files(bytes, Format::Qcow2, true);
        assert_eq!(of_difference(&backed), None, "which is not looked for");
        let external = qcow2(|bytes| (bytes[15], bytes[79]) = (1, 4));
        assert!(of_difference(&external).unwrap().contains("another file"));
        assert!(judged(&qcow2(|bytes| bytes[15] = 1)).unwrap().contains("backing file"));
        assert!(judged(&qcow2(|bytes| bytes[79] = 4)).unwrap().contains("another file"));
        let extension = |kind: u32| {
            qcow2(|bytes| {
                // Behind another one, of an odd length.
                bytes[104..108].copy_from_slice(&7u32.to_be_bytes());
                bytes[111] = 5;
                bytes[120..124].copy_from_slice(&kind.to_be_bytes());
            })
        };
        assert!(judged(&extension(QCOW2_EXTENSION_DATA_FILE)).unwrap().contains("for its data"));
        assert!(judged(&extension(QCOW2_EXTENSION_BACKING_FORMAT)).is_some());
        assert_eq!(judged(&extension(0)), None);
        let endless = qcow2(|bytes| bytes[104..112].fill(0xff));
        assert!(judged(&endless).is_some(), "an extension that leads out of the header");
        assert!(judged(&qcow2(|bytes| bytes.truncate(60))).is_some());
        assert!(judged(&qcow2(|bytes| bytes.truncate(10))).is_some());
    }

    #[test]
    fn a_vmdk_stands_for_itself_if_it_is_one_file_without_a_parent() {
        let judged = |bytes: &[u8]| names_other_files(bytes, Format::Vmdk, false);
        assert_eq!(judged(&vmdk("RW 8 SPARSE \"a.vmdk\"\n")), None);
        assert!(judged(&vmdk("RW 8 SPARSE \"a.vmdk\"\nRW 8 FLAT \"/etc/shadow\" 0\n")).is_some());
        assert!(judged(&vmdk("parentFileNameHint=\"/etc/shadow\"\n")).is_some());
        assert!(judged(b"# Disk DescriptorFile\nRW 8 FLAT \"/etc/shadow\" 0\n").is_some());
        let mut without_capacity = vmdk("");
        without_capacity[12] = 0;
        assert!(judged(&without_capacity).is_some());
        let mut far = vmdk("");
        far[28..36].fill(0xff);
        assert!(judged(&far).is_some());
        assert!(judged(b"KDMV").is_some());
    }
}
