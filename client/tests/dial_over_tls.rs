//! Dialling NBD servers of other people over TLS: nbdkit, and one that has none.
//!
//! What comes of it is a socket on which READs and WRITEs travel in plain, whether the kernel does the records or a relay.
//! Where nbdkit is missing this says `SKIP why`; where the lab runs the tests that is a failure.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};

use client::contract::Encryption;
use client::device::connect::data_socket::DataSocket;
use client::device::connect::dial::{DialError, Dialled, OPEN_TIMEOUT, attempts};
use client::tls_spec::{CertificateAndKey, ClientFiles, TlsSpec};
use proto::nbd::transmission::{
    Command as NbdCommand, CommandFlags, Request, SIMPLE_REPLY_BYTES, SimpleReply,
};
use rustls::ProtocolVersion;
use tls::kernel::{self, CipherKind};
use tls::test_authority::{Authority, Issued};

/// An nbdkit that serves 16 MiB of memory over TLS, to clients with a certificate.
struct Nbdkit {
    child: Child,
    address: String,
}

impl Nbdkit {
    /// `None`, with the reason said, where there is none.
    fn start(files: &Issued) -> Option<Self> {
        if Command::new("nbdkit").arg("--version").output().is_err() {
            assert!(std::env::var_os("VOLNODE_LAB").is_none(), "the lab installs nbdkit, yet it is missing");
            println!("SKIP nbdkit is not installed");
            return None;
        }
        // It is given a socket that listens already, as systemd does it (sd_listen_fds(3)): no port has to be guessed, and
        // nobody else gets it.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let certificates = format!("--tls-certificates={}", files.folder().display());
        let child = Command::new("sh")
            .args([
                "-c",
                "LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit \"$@\" 3<&0 </dev/null",
                "sh",
                "-f",
                "--tls=require",
            ])
            .args([&certificates, "--tls-verify-peer", "memory", "16M"])
            // Its TLS is as it was made, whatever this machine's policy.
            .env("GNUTLS_SYSTEM_PRIORITY_FILE", "/dev/null")
            .stdin(OwnedFd::from(listener))
            .spawn()
            .unwrap();
        Some(Self { child, address })
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The first attempt at this address.
fn dial(address: &String, export_name: &str, spec: &TlsSpec) -> Result<Dialled, DialError> {
    attempts(std::slice::from_ref(address), export_name, Some(spec), OPEN_TIMEOUT)?.next().unwrap()
}

fn spec(client: &Issued, server_name: &str, user_space_only: bool) -> TlsSpec {
    let pair = client.pair();
    let pair = Some(CertificateAndKey { cert: pair.certificate, key: pair.key });
    let files = ClientFiles { ca: client.authority(), pair };
    TlsSpec { files, server_name: server_name.to_owned(), user_space_only, key_bytes_max: u64::MAX }
}

/// A WRITE and a READ of it, on a socket as the data path has it.
fn write_and_read_back(socket: &DataSocket, bytes: &[u8]) -> Vec<u8> {
    let request = |command, cookie| {
        let length_bytes = bytes.len() as u64;
        Request { flags: CommandFlags::NONE, command, cookie, offset_bytes: 4096, length_bytes }.encode()
    };
    // A `DataSocket` itself only receives through a ring.
    let mut stream = socket2::Socket::from(socket.as_fd().try_clone_to_owned().unwrap());
    socket.write_all(&[&request(NbdCommand::Write, 1)[..], bytes].concat()).unwrap();
    expect_reply(&mut stream, 1);
    socket.write_all(&request(NbdCommand::Read, 2)).unwrap();
    expect_reply(&mut stream, 2);
    let mut read = vec![0; bytes.len()];
    stream.read_exact(&mut read).unwrap();
    read
}

fn expect_reply(stream: &mut socket2::Socket, cookie: u64) {
    let mut header = [0; SIMPLE_REPLY_BYTES];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(SimpleReply::decode(&header).unwrap(), SimpleReply { error: 0, cookie });
}

#[test]
fn reads_and_writes_travel_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.issue(&dir.path().join("server"), &[]);
    let Some(nbdkit) = Nbdkit::start(&files) else { return };
    let client = authority.issue(&dir.path().join("client"), &[]);
    let kernel_can = kernel::support(ProtocolVersion::TLSv1_3, CipherKind::Aes256Gcm).is_ok();
    for user_space_only in [false, true] {
        let spec = spec(&client, "127.0.0.1", user_space_only);
        let dialled = dial(&nbdkit.address, "", &spec).unwrap();
        assert_eq!(dialled.export.size_bytes, 16 << 20);
        let by_kernel = kernel_can && !user_space_only;
        let expected = if by_kernel { Encryption::Kernel } else { Encryption::UserSpace };
        assert_eq!(dialled.socket.encryption(), expected);
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        assert!(write_and_read_back(&dialled.socket, &bytes) == bytes, "{expected:?}");
    }
}

#[test]
fn servers_and_clients_that_are_not_believed_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.issue(&dir.path().join("server"), &[]);
    let Some(nbdkit) = Nbdkit::start(&files) else { return };
    let dial = |spec: &TlsSpec| dial(&nbdkit.address, "", spec).unwrap_err();
    let client = authority.issue(&dir.path().join("client"), &[]);
    let other_name = dial(&spec(&client, "other.example", false));
    assert!(matches!(other_name, DialError::Tls { .. }), "{other_name}");
    assert!(other_name.to_string().contains("subjectAltName=DNS:other.example as well"), "{other_name}");
    let stranger = Authority::new().issue(&dir.path().join("stranger"), &[]);
    let unknown_server = dial(&spec(&stranger, "127.0.0.1", false));
    assert!(matches!(unknown_server, DialError::Tls { .. }), "{unknown_server}");
    assert!(unknown_server.to_string().contains("issued by none of the authorities"), "{unknown_server}");
    // The server learns of a bad client's certificate after the client's handshake: then the export does not open.
    let mut unknown_client = spec(&stranger, "127.0.0.1", false);
    unknown_client.files.ca = files.authority();
    let error = dial(&unknown_client);
    assert!(matches!(error, DialError::Tls { .. } | DialError::Io { .. }), "{error}");
    let missing = dial(&TlsSpec {
        files: ClientFiles { ca: Path::new("/nowhere/ca.pem").to_owned(), pair: None },
        server_name: "127.0.0.1".into(),
        user_space_only: false,
        key_bytes_max: u64::MAX,
    });
    assert!(missing.to_string().contains("/nowhere/ca.pem"), "{missing}");
}

#[test]
fn a_server_without_tls_does_not_learn_the_export_s_name() {
    let dir = tempfile::tempdir().unwrap();
    let client = Authority::new().issue(dir.path(), &[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut greeting = b"NBDMAGICIHAVEOPT".to_vec();
        greeting.extend([0, 3]);
        peer.write_all(&greeting).unwrap();
        let mut said = vec![0; 4 + 16];
        peer.read_exact(&mut said).unwrap();
        // As whoever sits between may say it: no TLS here, go on in plain.
        let mut refusal = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        refusal.extend_from_slice(&5u32.to_be_bytes());
        refusal.extend_from_slice(&0x8000_0001_u32.to_be_bytes());
        refusal.extend_from_slice(&[0; 4]);
        peer.write_all(&refusal).unwrap();
        peer.read_to_end(&mut said).unwrap();
        said
    });
    let refused = dial(&address, "a-secret-name", &spec(&client, "127.0.0.1", false)).unwrap_err();
    assert!(refused.to_string().contains("does not start TLS"), "{refused}");
    let said = server.join().unwrap();
    assert!(!said.windows(6).any(|bytes| bytes == b"secret"), "{said:?}");
}
