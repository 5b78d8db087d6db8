//! Mount options, as StorageClasses and kubelet give them: which are taken, and in what form the kernel gets them.
//!
//! Owns: the list of what is allowed for each file system; all else is refused by name. Never: does I/O. An option that names another
//! device or file, lets programs become root, or keeps a file system from being whole after a crash is on no list.
//! What has a value goes to the kernel as a key and a value of its own (fsconfig), so no comma in it means anything: kubelet gives
//! `context="system_u:object_r:container_file_t:s0:c1,c2"`.
//! Source: Documentation/admin-guide/ext4.rst, xfs.rst, Linux 7.3; mount_setattr(2).

use rustix::mount::MountAttrFlags;

/// The kernel takes no longer value, in bytes: `fsconfig` copies 256 with the final zero.
const VALUE_BYTES_MAX: usize = 255;
/// How much of an option a message shows, in characters.
const SHOWN_CHARACTERS_MAX: usize = 100;
/// Labels of SELinux; their value may have commas, in quotes and without.
const SELINUX: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// A file system that volumes are made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// The default.
    Ext4,
    /// XFS.
    Xfs,
}

impl FsType {
    /// As a StorageClass names it; empty is the default.
    ///
    /// # Errors
    /// The message for whoever wrote it.
    pub fn parse(name: &str) -> Result<Self, OptionError> {
        match name {
            "" | "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            other => Err(OptionError::FsType(shorten(other))),
        }
    }

    /// The kernel's and blkid's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    fn allowed(self) -> &'static [Allowed] {
        match self {
            Self::Ext4 => EXT4,
            Self::Xfs => XFS,
        }
    }
}

/// Why an option is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// No file system that volumes are made with.
    #[error("file system {0:?} is not supported; choose ext4 or xfs")]
    FsType(String),
    /// On no list.
    #[error("mount option {option:?} is not allowed for {fs_type}; take it out of mountOptions")]
    NotAllowed {
        /// Its key as given, cut. What is behind the `=` may be confidential.
        option: String,
        /// The file system.
        fs_type: &'static str,
    },
    /// The option is on the list, and its value cannot be.
    #[error("mount option {option:?} needs as its value {wanted}; correct it in mountOptions")]
    Value {
        /// Its key as given, cut.
        option: String,
        /// What would be right, for people.
        wanted: &'static str,
    },
}

/// What the value of an option may be.
#[derive(Debug, Clone, Copy)]
enum Value {
    /// There is none.
    Flag,
    Number,
    /// A number with k, m or g perhaps.
    Size,
    OneOf(&'static [&'static str], &'static str),
}

type Allowed = (&'static str, Value);

const EXT4: &[Allowed] = &[
    ("acl", Value::Flag),
    ("noacl", Value::Flag),
    ("user_xattr", Value::Flag),
    ("discard", Value::Flag),
    ("nodiscard", Value::Flag),
    ("delalloc", Value::Flag),
    ("nodelalloc", Value::Flag),
    ("auto_da_alloc", Value::Flag),
    ("dioread_lock", Value::Flag),
    ("dioread_nolock", Value::Flag),
    ("journal_checksum", Value::Flag),
    ("noinit_itable", Value::Flag),
    ("init_itable", Value::Number),
    ("commit", Value::Number),
    ("stripe", Value::Number),
    ("inode_readahead_blks", Value::Number),
    ("max_batch_time", Value::Number),
    ("min_batch_time", Value::Number),
    ("usrquota", Value::Flag),
    ("grpquota", Value::Flag),
    ("prjquota", Value::Flag),
    // "panic" would end the machine.
    (ERRORS, Value::OneOf(&["remount-ro", "continue"], "remount-ro or continue")),
    ("data", Value::OneOf(&["ordered", "journal"], "ordered or journal")),
];

const XFS: &[Allowed] = &[
    ("discard", Value::Flag),
    ("nodiscard", Value::Flag),
    ("inode32", Value::Flag),
    ("inode64", Value::Flag),
    ("largeio", Value::Flag),
    ("nolargeio", Value::Flag),
    ("swalloc", Value::Flag),
    ("filestreams", Value::Flag),
    ("wsync", Value::Flag),
    ("noalign", Value::Flag),
    // It is always set.
    (NOUUID, Value::Flag),
    ("allocsize", Value::Size),
    ("logbsize", Value::Size),
    ("logbufs", Value::Number),
    ("sunit", Value::Number),
    ("swidth", Value::Number),
    ("uquota", Value::Flag),
    ("gquota", Value::Flag),
    ("pquota", Value::Flag),
    ("usrquota", Value::Flag),
    ("grpquota", Value::Flag),
    ("prjquota", Value::Flag),
];

/// A clone has the UUID of what it is a clone of, and both may be used on one machine.
const NOUUID: &str = "nouuid";

/// What an ext4 does once it is found damaged. Without it its superblock decides, which whoever writes to the device writes.
const ERRORS: &str = "errors";

/// Of every file system, about the whole of it.
const SUPERBLOCK_FLAGS: [&str; 4] = ["sync", "dirsync", "lazytime", "nolazytime"];

/// What a file system is mounted with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Which file system the options are for.
    pub fs_type: FsType,
    /// Of the mount.
    pub attributes: MountAttrFlags,
    /// Of the file system: keys, with values where they have one. Each key once.
    pub parameters: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Reads the flags of a volume capability; each may hold several options. Of two values for one key the last counts, as
    /// it does for mount(8).
    ///
    /// # Errors
    /// [`OptionError`], with the first option that is refused.
    pub fn parse(fs_type: FsType, flags: &[String]) -> Result<Self, OptionError> {
        let mut options = Self { fs_type, attributes: MountAttrFlags::empty(), parameters: Vec::new() };
        for option in flags.iter().flat_map(|flag| split(flag)) {
            options.add(&option)?;
        }
        match fs_type {
            FsType::Xfs => options.set(NOUUID, None),
            FsType::Ext4 if options.parameters.iter().any(|(key, _)| key == ERRORS) => {}
            FsType::Ext4 => options.set(ERRORS, Some("remount-ro".to_owned())),
        }
        Ok(options)
    }

    /// Whether nothing may be written through the mount.
    pub fn is_read_only(&self) -> bool {
        self.attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    fn set(&mut self, key: &str, value: Option<String>) {
        self.parameters.retain(|(known, _)| known != key);
        self.parameters.push((key.to_owned(), value));
    }

    fn add(&mut self, option: &str) -> Result<(), OptionError> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        if value.is_none() && self.add_attribute(key) {
            return Ok(());
        }
        if value.is_none() && SUPERBLOCK_FLAGS.contains(&key) {
            self.set(key, None);
            return Ok(());
        }
        if SELINUX.contains(&key) {
            self.set(key, Some(label(key, value.unwrap_or_default())?));
            return Ok(());
        }
        let Some((_, kind)) = self.fs_type.allowed().iter().find(|(allowed, _)| *allowed == key) else {
            return Err(OptionError::NotAllowed { option: shorten(key), fs_type: self.fs_type.name() });
        };
        check_value(key, value, *kind)?;
        self.set(key, value.map(str::to_owned));
        Ok(())
    }

    /// Whether it is an attribute of the mount.
    fn add_attribute(&mut self, key: &str) -> bool {
        let atime = |options: &mut Self, mode| {
            options.attributes.remove(MountAttrFlags::MOUNT_ATTR__ATIME);
            options.attributes.insert(mode);
        };
        match key {
            // Nothing else than what there is without them.
            "defaults" | "async" | "exec" | "diratime" => {}
            "rw" => self.attributes.remove(MountAttrFlags::MOUNT_ATTR_RDONLY),
            "ro" => self.attributes.insert(MountAttrFlags::MOUNT_ATTR_RDONLY),
            "nosuid" => self.attributes.insert(MountAttrFlags::MOUNT_ATTR_NOSUID),
            "nodev" => self.attributes.insert(MountAttrFlags::MOUNT_ATTR_NODEV),
            "noexec" => self.attributes.insert(MountAttrFlags::MOUNT_ATTR_NOEXEC),
            "nodiratime" => self.attributes.insert(MountAttrFlags::MOUNT_ATTR_NODIRATIME),
            "nosymfollow" => self.attributes.insert(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
            "relatime" => atime(self, MountAttrFlags::MOUNT_ATTR_RELATIME),
            "noatime" => atime(self, MountAttrFlags::MOUNT_ATTR_NOATIME),
            "strictatime" => atime(self, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
            _ => return false,
        }
        true
    }
}

fn check_value(key: &str, value: Option<&str>, kind: Value) -> Result<(), OptionError> {
    let is_number =
        |text: &str| (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let (is_right, wanted) = match (kind, value) {
        (Value::Flag, value) => (value.is_none(), "nothing at all"),
        (Value::Number, value) => (value.is_some_and(is_number), "a number"),
        (Value::Size, value) => {
            let digits =
                value.map(|value| value.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G']).unwrap_or(value));
            (digits.is_some_and(is_number), "a size such as 64k")
        }
        (Value::OneOf(values, wanted), value) => (value.is_some_and(|value| values.contains(&value)), wanted),
    };
    if is_right { Ok(()) } else { Err(OptionError::Value { option: shorten(key), wanted }) }
}

/// A label of SELinux, without its quotes.
fn label(key: &str, value: &str) -> Result<String, OptionError> {
    let inner = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value);
    let is_of_label = |letter: char| letter.is_ascii_alphanumeric() || "_.-:,".contains(letter);
    let is_label = (1..=VALUE_BYTES_MAX).contains(&inner.len()) && inner.chars().all(is_of_label);
    if is_label {
        return Ok(inner.to_owned());
    }
    Err(OptionError::Value { option: shorten(key), wanted: "a label of SELinux, of 255 bytes at most" })
}

/// Splits at commas, but not within quotes, nor before a further category of a label that has none.
fn split(flag: &str) -> Vec<String> {
    let (mut options, mut is_quoted) = (vec![String::new()], false);
    for letter in flag.chars() {
        is_quoted ^= letter == '"';
        if letter == ',' && !is_quoted {
            options.push(String::new());
        } else if let Some(last) = options.last_mut() {
            last.push(letter);
        }
    }
    let mut whole: Vec<String> = Vec::new();
    for option in options.into_iter().filter(|option| !option.is_empty()) {
        match whole.last_mut().filter(|before| is_category(&option) && is_open_label(before)) {
            Some(before) => {
                before.push(',');
                before.push_str(&option);
            }
            None => whole.push(option),
        }
    }
    whole
}

/// `c2`, or a range such as `c2.c7`.
fn is_category(option: &str) -> bool {
    let mut ends = option.splitn(2, '.');
    ends.all(|end| {
        let digits = end.strip_prefix('c').unwrap_or_default();
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn is_open_label(option: &str) -> bool {
    let label = option.split_once('=').filter(|(key, _)| SELINUX.contains(key));
    label.is_some_and(|(_, value)| !value.starts_with('"'))
}

/// For messages: short, and without what a terminal would obey (they are shown with escapes besides).
fn shorten(option: &str) -> String {
    option.chars().take(SHOWN_CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fs_type: FsType, flags: &[&str]) -> Result<MountOptions, OptionError> {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        MountOptions::parse(fs_type, &flags)
    }

    fn parameters(fs_type: FsType, flags: &[&str]) -> Vec<(String, Option<String>)> {
        parse(fs_type, flags).unwrap().parameters
    }

    fn with_value(key: &str, value: &str) -> (String, Option<String>) {
        (key.to_owned(), Some(value.to_owned()))
    }

    #[test]
    fn a_label_of_selinux_keeps_its_commas_and_loses_its_quotes() {
        let value = "system_u:object_r:container_file_t:s0:c1,c2";
        let expected = vec![with_value("context", value), with_value("errors", "remount-ro")];
        for flag in [format!("context=\"{value}\""), format!("context={value}")] {
            assert_eq!(parameters(FsType::Ext4, &[&flag]), expected, "{flag}");
            let with_others = format!("noatime,{flag},lazytime");
            let options = parse(FsType::Ext4, &[&with_others]).unwrap();
            assert_eq!(
                options.parameters[..2],
                [with_value("context", value), ("lazytime".to_owned(), None)]
            );
            assert_eq!(options.attributes, MountAttrFlags::MOUNT_ATTR_NOATIME);
        }
        let range = "context=u:r:t:s0:c1.c3,c7.c9";
        assert_eq!(parameters(FsType::Xfs, &[range])[0], with_value("context", "u:r:t:s0:c1.c3,c7.c9"));
    }

    #[test]
    fn a_label_smuggles_nothing_in() {
        for wrong in
            ["context=", "context", "context=\"a", "context=a b", "context=\"a\"b\"", "fscontext=\"a,\u{1}\""]
        {
            let error = parse(FsType::Ext4, &[wrong]).unwrap_err();
            assert!(matches!(error, OptionError::Value { .. }), "{wrong}: {error}");
        }
        let long = format!("context={}", "x".repeat(VALUE_BYTES_MAX + 1));
        assert!(matches!(parse(FsType::Ext4, &[&long]), Err(OptionError::Value { .. })));
        // What follows a label is an option of its own, unless it is a category.
        for wrong in ["context=u:r:t:s0,suid", "context=\"u:r:t:s0\",c2", "c2", "commit=5,c2"] {
            let error = parse(FsType::Ext4, &[wrong]).unwrap_err();
            assert!(matches!(error, OptionError::NotAllowed { .. }), "{wrong}: {error}");
        }
    }

    #[test]
    fn what_harms_is_refused_by_name() {
        let harmful = [
            "suid",
            "dev",
            "loop",
            "loop=/dev/loop0",
            "offset=4096",
            "sizelimit=1",
            "journal_path=/dev/sda",
            "journal_dev=0x801",
            "logdev=/dev/sda",
            "rtdev=/dev/sda",
            "noload",
            "norecovery",
            "nobarrier",
            "barrier=0",
            "data_err=abort",
            "remount",
            "bind",
            "rbind",
            "move",
            "user",
            "users",
            "owner",
            "x-mount.mkdir",
            "source=/dev/sda",
            "subtype=a",
            "mand",
            "test_dummy_encryption",
            "resuid=0",
            "sb=8193",
            "uid=0",
            "",
            "=",
            "=a",
            " noatime",
            "NOATIME",
            "no\u{0}atime",
        ];
        for option in harmful.into_iter().filter(|option| !option.is_empty()) {
            for fs_type in [FsType::Ext4, FsType::Xfs] {
                let error = parse(fs_type, &["noatime", option]).unwrap_err();
                let OptionError::NotAllowed { option: named, .. } = &error else {
                    panic!("{option}: {error}")
                };
                // The value of an option may be confidential.
                assert_eq!(named, option.split('=').next().unwrap());
            }
        }
        for wrong in [
            "errors=panic",
            "errors",
            "data=writeback",
            "commit=",
            "commit=-1",
            "commit=5s",
            "commit",
            "discard=1",
        ] {
            let error = parse(FsType::Ext4, &[wrong]).unwrap_err();
            let key = wrong.split('=').next().unwrap();
            assert!(matches!(&error, OptionError::Value { option, .. } if option == key), "{wrong}: {error}");
        }
        // Of one file system only.
        assert!(parse(FsType::Xfs, &["data=ordered"]).is_err() && parse(FsType::Ext4, &["inode64"]).is_err());
        let long = parse(FsType::Ext4, &[&"x".repeat(10_000)]).unwrap_err().to_string();
        assert!(long.len() < 300, "{}", long.len());
    }

    #[test]
    fn xfs_is_always_mounted_without_a_look_at_its_uuid() {
        for flags in [&[][..], &["nouuid"], &["nouuid,noatime", "nouuid"]] {
            assert_eq!(parameters(FsType::Xfs, flags), [(NOUUID.to_owned(), None)]);
        }
        assert!(parse(FsType::Ext4, &["nouuid"]).is_err());
    }

    #[test]
    fn the_last_of_two_that_contradict_counts() {
        let options =
            parse(FsType::Ext4, &["ro", "noatime", "commit=5", "rw", "strictatime", "commit=60"]).unwrap();
        assert_eq!(options.attributes, MountAttrFlags::MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.parameters, [with_value("commit", "60"), with_value("errors", "remount-ro")]);
        assert!(!options.is_read_only() && parse(FsType::Ext4, &["rw,ro"]).unwrap().is_read_only());
    }

    #[test]
    fn what_an_ext4_does_when_it_is_damaged_is_not_its_own_to_say() {
        let remount = [with_value("errors", "remount-ro")];
        for flags in [&[][..], &["noatime"], &["errors=continue,errors=remount-ro"]] {
            assert_eq!(parameters(FsType::Ext4, flags), remount);
        }
        assert_eq!(parameters(FsType::Ext4, &["errors=continue"]), [with_value("errors", "continue")]);
        assert!(parse(FsType::Ext4, &["errors=panic"]).is_err());
    }

    #[test]
    fn a_file_system_is_one_of_two() {
        assert_eq!([FsType::parse("").unwrap(), FsType::parse("ext4").unwrap()], [FsType::Ext4; 2]);
        assert_eq!(FsType::parse("xfs").unwrap().name(), "xfs");
        for wrong in ["ext3", "btrfs", "EXT4", " ext4", "ext4 ", "ext4,xfs", "../ext4"] {
            assert_eq!(FsType::parse(wrong).unwrap_err(), OptionError::FsType(wrong.to_owned()));
        }
    }
}
