//! kTLS: what this kernel can do, the hand-over of a connection's keys, and records that are not data.
//!
//! Owns: the two socket options (`TCP_ULP`, then `TLS_TX` and `TLS_RX`) and the one `recvmsg` that takes a control
//! record. Never: sees plaintext of the data path, or a key longer than it takes to pass it on.
//! Called by `stream.rs` (hand-over) and by the rings of both sides when a receive ends with EIO.
//! What a kernel can do is found by trying it on a connection with itself, once: versions say little (the module may be
//! missing, or a cipher switched off).
//! Source: `include/uapi/linux/tls.h`, `Documentation/networking/tls.rst`, Linux 7.3.
#![allow(unsafe_code)] // Socket options and control messages that no safe wrapper knows.

use std::io;
use std::mem::{size_of, size_of_val};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::OnceLock;
use std::time::Duration;

use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion};

/// Longest record that can be taken (`TLS_MAX_PAYLOAD_SIZE`), in bytes.
const RECORD_BYTES_MAX: usize = 16 << 10;
/// Nonces with this bit are the kernel's, those without were rustls's: see [`CryptoInfo::new`].
const KERNEL_NONCE_BIT: u8 = 0x80;

/// How much one key of AES-GCM may encrypt, in bytes: less than a fifth of the 2^24.5 full records after which RFC 8446,
/// section 5.5, wants another; so much less that records of any size, which waste a block or two each, are covered.
pub const KEY_BYTES_MAX: u64 = 64 << 30;

/// The keys were not taken; of the connection, which is in an unknown state, only the end is left.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// rustls does not give the keys out.
    #[error("the connection's keys cannot be had: {0}")]
    Secrets(#[from] rustls::Error),
    /// The kernel has no such cipher.
    #[error("the kernel has no place for keys of this kind")]
    Kind,
    /// The kernel refuses.
    #[error("the kernel does not take the connection's keys: {0}")]
    Refused(#[from] io::Error),
}

/// A record that is not data, and what it means for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlRecord {
    /// The peer sends no more; what was sent before has been received.
    CloseNotify,
    /// The peer gives up, for this reason (`AlertDescription`).
    Alert(u8),
    /// A handshake message of this type (4: a session ticket, 24: new keys), with which the kernel cannot go on.
    Handshake(u8),
    /// A record of another type.
    Other(u8),
}

impl std::fmt::Display for ControlRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CloseNotify => f.write_str("the peer ended the TLS session"),
            Self::Alert(description) => write!(f, "the peer gave the TLS session up (alert {description})"),
            Self::Handshake(message) => {
                write!(f, "the peer sent TLS handshake message {message}, which the kernel cannot take")
            }
            Self::Other(kind) => write!(f, "the peer sent a TLS record of type {kind}"),
        }
    }
}

/// A version of TLS, a cipher, and whether the kernel took keys for them.
type Trial = (u16, CipherKind, Result<(), String>);

/// Whether the kernel takes the records of such a connection; found out once. `Err` says why not.
///
/// # Errors
/// What the kernel said to a trial with made-up keys.
pub fn support(version: ProtocolVersion, cipher: CipherKind) -> Result<(), String> {
    static TRIALS: OnceLock<Vec<Trial>> = OnceLock::new();
    let trials = TRIALS.get_or_init(|| {
        let versions = [libc::TLS_1_3_VERSION, libc::TLS_1_2_VERSION];
        let kinds = versions.into_iter().flat_map(|version| CipherKind::ALL.map(|cipher| (version, cipher)));
        kinds.map(|(version, cipher)| (version, cipher, try_keys(version, cipher))).collect()
    });
    let wanted = kernel_version(version);
    let trial = trials.iter().find(|(version, tried, _)| Some(*version) == wanted && *tried == cipher);
    trial.map_or_else(|| Err("unknown version of TLS".to_owned()), |(_, _, outcome)| outcome.clone())
}

/// Puts the keys of a connection into the kernel: from then on the socket carries plaintext for its user. Nothing that was
/// received may be left in rustls, nor anything to be sent.
///
/// # Errors
/// [`HandOverError`]: the connection is of no use any more.
pub fn hand_over(
    socket: &TcpStream,
    version: ProtocolVersion,
    secrets: ExtractedSecrets,
) -> Result<(), HandOverError> {
    let version = kernel_version(version).ok_or(HandOverError::Kind)?;
    let (sequence, keys) = secrets.tx;
    let sending = CryptoInfo::new(version, sequence, &keys)?;
    let (sequence, keys) = secrets.rx;
    let receiving = CryptoInfo::new(version, sequence, &keys)?;
    enter_tls(socket)?;
    sending.set(socket, libc::TLS_TX)?;
    receiving.set(socket, libc::TLS_RX)?;
    Ok(())
}

/// What `struct tcp_info` of `include/uapi/linux/tcp.h` holds up to tcpi_bytes_received.
const TCP_INFO_BYTES: usize = 136;

/// Errors: `EOPNOTSUPP`: not a TCP socket.
fn tcp_info(socket: impl AsFd) -> io::Result<[u8; TCP_INFO_BYTES]> {
    let mut info = [0u8; TCP_INFO_BYTES];
    let mut length = info.len() as libc::socklen_t;
    let (fd, address) = (socket.as_fd().as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `length` bytes to `info`, which is that long and lives until the call has returned.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, address, &raw mut length) };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// How many bytes a connection has carried, in the direction that has carried more.
///
/// # Errors
/// `EOPNOTSUPP`: not a TCP socket.
pub fn bytes_carried(socket: impl AsFd) -> io::Result<u64> {
    // tcpi_bytes_acked, and tcpi_bytes_received behind it.
    const BYTES_ACKED_OFFSET_BYTES: usize = 120;
    let info = tcp_info(socket)?;
    let counter = |at: usize| info[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
    Ok(counter(BYTES_ACKED_OFFSET_BYTES).max(counter(BYTES_ACKED_OFFSET_BYTES + 8)))
}

/// Since the last acknowledgement, while something sent, or a probe of the peer's window, is not acknowledged; `None`: everything is.
/// What the peer has no room for was not sent.
///
/// # Errors
/// `EOPNOTSUPP`: not a TCP socket.
pub fn unacknowledged_for(socket: impl AsFd) -> io::Result<Option<Duration>> {
    // tcpi_unacked, in segments, and tcpi_last_ack_recv, in milliseconds.
    const PROBES_OFFSET_BYTES: usize = 3;
    const UNACKED_OFFSET_BYTES: usize = 24;
    // Each acknowledgement sets tcpi_probes back: a peer that is full and lives does not come to so many.
    const PROBES_MAX: u8 = 3;
    const LAST_ACK_RECV_OFFSET_BYTES: usize = 56;
    let info = tcp_info(socket)?;
    let field = |at: usize| info[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
    let since = Duration::from_millis(u64::from(field(LAST_ACK_RECV_OFFSET_BYTES)));
    let is_waiting = field(UNACKED_OFFSET_BYTES) > 0 || info[PROBES_OFFSET_BYTES] >= PROBES_MAX;
    Ok(is_waiting.then_some(since))
}

/// Takes the record because of which a receive on a kTLS socket has failed with EIO; does not wait. `None`: there is no
/// such record, so the error means something else.
pub fn take_control_record(socket: impl AsFd) -> Option<ControlRecord> {
    // One record with its type: `cmsghdr` and a byte, rounded up.
    let mut control = [0u64; 8];
    let mut record = vec![0u8; RECORD_BYTES_MAX];
    let mut vector = libc::iovec { iov_base: record.as_mut_ptr().cast(), iov_len: record.len() };
    // SAFETY: all zeroes is a valid `msghdr`: null pointers with zero lengths.
    let mut message = unsafe { std::mem::zeroed::<libc::msghdr>() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message names one vector and one control buffer, both live until the call has returned.
    let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let received = usize::try_from(received).ok()?;
    // SAFETY: the kernel has filled the message; the macro looks at its length before it gives a pointer.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: null, or a header inside `control`, which is aligned for it.
    let header = unsafe { header.as_ref() }?;
    if header.cmsg_level != libc::SOL_TLS || header.cmsg_type != libc::TLS_GET_RECORD_TYPE {
        return None;
    }
    // SAFETY: the header lies in `control`, with room for its data behind it.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: the kernel wrote the record's type there, one byte.
    let kind = unsafe { data.read() };
    Some(control_record(kind, &record[..received]))
}

fn control_record(kind: u8, body: &[u8]) -> ControlRecord {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    match (kind, body) {
        (ALERT, [_, 0, ..]) => ControlRecord::CloseNotify,
        (ALERT, [_, description, ..]) => ControlRecord::Alert(*description),
        (HANDSHAKE, [message, ..]) => ControlRecord::Handshake(*message),
        _ => ControlRecord::Other(kind),
    }
}

/// The ciphers that rustls and the kernel both know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherKind {
    /// AES-128-GCM.
    Aes128Gcm,
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    Chacha20Poly1305,
}

impl CipherKind {
    const ALL: [Self; 3] = [Self::Aes128Gcm, Self::Aes256Gcm, Self::Chacha20Poly1305];
}

/// What `TLS_TX` and `TLS_RX` take.
enum CryptoInfo {
    Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128),
    Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256),
    Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305),
}

impl CryptoInfo {
    /// The keys for records from number `sequence` on.
    ///
    /// TLS 1.2 with GCM: each record carries eight bytes of its nonce. rustls takes `iv ^ sequence` for them, the kernel
    /// counts up from `iv`: for the kernel's first record that would be the nonce of rustls's first, under the same key. So
    /// the kernel's count begins elsewhere, half the space away from rustls's few records. The receiver takes what comes.
    fn new(version: u16, sequence: u64, keys: &ConnectionTrafficSecrets) -> Result<Self, HandOverError> {
        let rec_seq = sequence.to_be_bytes();
        let info = |cipher_type| libc::tls_crypto_info { version, cipher_type };
        let split = |iv: &[u8]| -> Result<([u8; 4], [u8; 8]), HandOverError> {
            let (salt, rest) = iv.split_first_chunk::<4>().ok_or(HandOverError::Kind)?;
            let mut rest: [u8; 8] = rest.try_into().map_err(|_| HandOverError::Kind)?;
            if version == libc::TLS_1_2_VERSION {
                rest[0] ^= KERNEL_NONCE_BIT;
            }
            Ok((*salt, rest))
        };
        match keys {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                let (salt, iv) = split(iv.as_ref())?;
                let (info, key) = (info(libc::TLS_CIPHER_AES_GCM_128), sized(key.as_ref())?);
                Ok(Self::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 { info, iv, key, salt, rec_seq }))
            }
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
                let (salt, iv) = split(iv.as_ref())?;
                let (info, key) = (info(libc::TLS_CIPHER_AES_GCM_256), sized(key.as_ref())?);
                Ok(Self::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 { info, iv, key, salt, rec_seq }))
            }
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                let (iv, key) = (sized(iv.as_ref())?, sized(key.as_ref())?);
                let info = info(libc::TLS_CIPHER_CHACHA20_POLY1305);
                let (salt, rec_seq) = ([], rec_seq);
                let keys = libc::tls12_crypto_info_chacha20_poly1305 { info, iv, key, salt, rec_seq };
                Ok(Self::Chacha20Poly1305(keys))
            }
            _ => Err(HandOverError::Kind),
        }
    }

    /// Made-up keys, for a trial.
    fn trial(version: u16, cipher: CipherKind) -> Self {
        let info = |cipher_type| libc::tls_crypto_info { version, cipher_type };
        match cipher {
            CipherKind::Aes128Gcm => Self::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv: [1; 8],
                key: [2; 16],
                salt: [3; 4],
                rec_seq: [0; 8],
            }),
            CipherKind::Aes256Gcm => Self::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv: [1; 8],
                key: [2; 32],
                salt: [3; 4],
                rec_seq: [0; 8],
            }),
            CipherKind::Chacha20Poly1305 => {
                Self::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                    info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
                    iv: [1; 12],
                    key: [2; 32],
                    salt: [],
                    rec_seq: [0; 8],
                })
            }
        }
    }

    fn set(&self, socket: &TcpStream, direction: libc::c_int) -> io::Result<()> {
        match self {
            Self::Aes128Gcm(keys) => set_option(socket, libc::SOL_TLS, direction, keys),
            Self::Aes256Gcm(keys) => set_option(socket, libc::SOL_TLS, direction, keys),
            Self::Chacha20Poly1305(keys) => set_option(socket, libc::SOL_TLS, direction, keys),
        }
    }
}

fn sized<const N: usize>(bytes: &[u8]) -> Result<[u8; N], HandOverError> {
    bytes.try_into().map_err(|_| HandOverError::Kind)
}

fn kernel_version(version: ProtocolVersion) -> Option<u16> {
    match version {
        ProtocolVersion::TLSv1_3 => Some(libc::TLS_1_3_VERSION),
        ProtocolVersion::TLSv1_2 => Some(libc::TLS_1_2_VERSION),
        _ => None,
    }
}

fn enter_tls(socket: &TcpStream) -> io::Result<()> {
    set_option(socket, libc::SOL_TCP, libc::TCP_ULP, b"tls")
}

fn set_option<T>(socket: &TcpStream, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let (address, length) = (std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the value is plain data of this length, borrowed for the call; the kernel copies it.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, address, length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives a connection with ourselves made-up keys.
fn try_keys(version: u16, cipher: CipherKind) -> Result<(), String> {
    let connect = || -> io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        Ok((near, listener.accept()?.0))
    };
    let (near, _far) = connect().map_err(|error| format!("no connection for a trial: {error}"))?;
    enter_tls(&near).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => "this kernel has no kTLS (module tls)".to_owned(),
        _ => format!("kTLS cannot be switched on: {error}"),
    })?;
    let keys = CryptoInfo::trial(version, cipher);
    let set = keys.set(&near, libc::TLS_TX).and_then(|()| keys.set(&near, libc::TLS_RX));
    set.map_err(|error| format!("this kernel's kTLS lacks {cipher:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_records_are_told_apart() {
        assert_eq!(control_record(21, &[1, 0]), ControlRecord::CloseNotify);
        assert_eq!(control_record(21, &[2, 42]), ControlRecord::Alert(42));
        assert_eq!(control_record(22, &[24, 0, 0, 1, 0]), ControlRecord::Handshake(24));
        assert_eq!(control_record(21, &[]), ControlRecord::Other(21));
    }

    #[test]
    fn what_a_connection_carried_is_counted_both_ways() {
        use std::io::{Read as _, Write as _};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        assert!(bytes_carried(&near).unwrap() < 100);
        near.write_all(&[7; 10_000]).unwrap();
        far.read_exact(&mut [0; 10_000]).unwrap();
        assert!((10_000..10_100).contains(&bytes_carried(&far).unwrap()));
        // Its acknowledgement may still be on its way to the sender, but not behind an answer.
        far.write_all(b"x").unwrap();
        near.read_exact(&mut [0]).unwrap();
        assert!((10_000..10_100).contains(&bytes_carried(&near).unwrap()));
        assert!(bytes_carried(std::os::unix::net::UnixStream::pair().unwrap().0).is_err());
    }

    /// A peer that reads nothing acknowledges what it has room for, and the probes of its window after that.
    #[test]
    fn what_a_full_peer_has_no_room_for_is_not_unacknowledged() {
        use std::io::Write as _;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _far = listener.accept().unwrap().0;
        assert_eq!(unacknowledged_for(&near).unwrap(), None);
        near.set_nonblocking(true).unwrap();
        let bytes = vec![7; 1 << 20];
        while near.write(&bytes).is_ok() {}
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while unacknowledged_for(&near).unwrap().is_some() {
            assert!(std::time::Instant::now() < deadline, "its machine acknowledges nothing");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(unacknowledged_for(std::os::unix::net::UnixStream::pair().unwrap().0).is_err());
    }

    #[test]
    fn a_plain_socket_has_no_control_record() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(take_control_record(&near), None);
    }

    #[test]
    fn a_kernel_nonce_is_never_one_of_rustls() {
        let keys = ConnectionTrafficSecrets::Aes128Gcm {
            key: rustls::crypto::cipher::AeadKey::from([7; 32]),
            iv: rustls::crypto::cipher::Iv::copy(&[9; 12]),
        };
        // A key of 32 bytes is none of AES-128.
        assert!(matches!(CryptoInfo::new(libc::TLS_1_2_VERSION, 1, &keys), Err(HandOverError::Kind)));
        let keys = ConnectionTrafficSecrets::Aes256Gcm {
            key: rustls::crypto::cipher::AeadKey::from([7; 32]),
            iv: rustls::crypto::cipher::Iv::copy(&[9; 12]),
        };
        let Ok(CryptoInfo::Aes256Gcm(old)) = CryptoInfo::new(libc::TLS_1_2_VERSION, 1, &keys) else {
            panic!()
        };
        assert_eq!(old.iv, [0x89, 9, 9, 9, 9, 9, 9, 9]);
        // TLS 1.3 has no explicit nonce: the number of the record makes the difference there.
        let Ok(CryptoInfo::Aes256Gcm(new)) = CryptoInfo::new(libc::TLS_1_3_VERSION, 1, &keys) else {
            panic!()
        };
        assert_eq!((new.iv, new.rec_seq[7]), ([9; 8], 1));
    }
}
