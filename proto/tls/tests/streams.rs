//! Whole connections over loopback: handshake, hand-over, and bytes both ways, by the kernel where it can and by a relay.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion};
use tls::certificates::{client_config, server_config};
use tls::kernel::{self, CipherKind, ControlRecord};
use tls::stream::{Carrier, Records, StreamError, TlsStream};
use tls::test_authority::{Authority, Issued};

/// No step of a healthy connection takes longer.
const LIMIT: Duration = Duration::from_secs(20);
const BOTH: [Records; 2] = [Records::Auto, Records::UserSpace];

/// An authority's certificate and a server's, on disk.
struct Files {
    issued: Issued,
    _dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { issued: Authority::new().issue(dir.path(), &[]), _dir: dir }
    }

    /// A client that speaks nothing but this version.
    fn client(&self, version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
        use rustls::pki_types::pem::PemObject as _;
        let mut roots = RootCertStore::empty();
        roots
            .add(rustls::pki_types::CertificateDer::from_pem_file(self.issued.authority()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.enable_secret_extraction = true;
        Arc::new(config)
    }
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Both sides of a handshake: the server's, then the client's.
fn handshake(
    files: &Files,
    config: Arc<ClientConfig>,
) -> (Result<TlsStream, StreamError>, Result<TlsStream, StreamError>) {
    let (near, far) = sockets();
    let server = Arc::new(server_config(&files.issued.pair(), None).unwrap());
    let deadline = Instant::now() + LIMIT;
    let server = std::thread::spawn(move || TlsStream::accept(far, server, deadline));
    let client = TlsStream::connect(near, config, "localhost".try_into().unwrap(), deadline);
    (server.join().unwrap(), client)
}

/// A carrier as a socket to read and write.
fn plain(carrier: Carrier) -> UnixStream {
    match carrier {
        Carrier::Kernel(socket) => UnixStream::from(std::os::fd::OwnedFd::from(socket)),
        Carrier::Relay(near_end) => UnixStream::from(near_end),
    }
}

fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|position| ((position * 31 + seed * 97) >> 3) as u8).collect()
}

#[test]
fn bytes_arrive_both_ways_whoever_does_the_records() {
    let files = Files::new();
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        for (server_records, client_records) in
            BOTH.into_iter().flat_map(|one| BOTH.map(|other| (one, other)))
        {
            let (server, client) = handshake(&files, files.client(version));
            let mut server = plain(server.unwrap().hand_over(server_records).unwrap());
            let mut client = plain(client.unwrap().hand_over(client_records).unwrap());
            let (there, back) = (pattern(3 << 20, 1), pattern(5 << 20, 2));
            std::thread::scope(|scope| {
                let mut writer = client.try_clone().unwrap();
                scope.spawn(move || writer.write_all(&pattern(3 << 20, 1)).unwrap());
                let mut writer = server.try_clone().unwrap();
                scope.spawn(move || writer.write_all(&pattern(5 << 20, 2)).unwrap());
                let mut received = vec![0; back.len()];
                client.read_exact(&mut received).unwrap();
                assert!(received == back, "{version:?} {server_records:?} {client_records:?}");
                let mut received = vec![0; there.len()];
                server.read_exact(&mut received).unwrap();
                assert!(received == there, "{version:?} {server_records:?} {client_records:?}");
            });
        }
    }
}

#[test]
fn plaintext_that_came_with_the_handshake_is_not_lost() {
    let files = Files::new();
    let (server, client) = handshake(&files, files.client(&rustls::version::TLS13));
    let (mut server, mut client) = (server.unwrap(), client.unwrap());
    let deadline = Instant::now() + LIMIT;
    server.write_all(b"one record of two messages", deadline).unwrap();
    let mut start = [0; 10];
    assert_eq!(client.read(&mut start, deadline).unwrap(), 10);
    // The rest was decrypted already: only a relay can go on with it.
    let mut client = plain(client.hand_over(Records::Auto).unwrap());
    let mut rest = [0; 16];
    client.read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b" of two messages");
    // The other side goes on as it likes.
    let mut server = plain(server.hand_over(Records::Auto).unwrap());
    client.write_all(b"and back").unwrap();
    let mut back = [0; 8];
    server.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"and back");
}

#[test]
fn a_unix_socket_s_records_go_to_a_relay() {
    let files = Files::new();
    let (near, far) = UnixStream::pair().unwrap();
    let [near, far] = [near, far].map(|end| TcpStream::from(std::os::fd::OwnedFd::from(end)));
    let config = Arc::new(server_config(&files.issued.pair(), None).unwrap());
    let deadline = Instant::now() + LIMIT;
    let server = std::thread::spawn(move || TlsStream::accept(far, config, deadline));
    let client = files.client(&rustls::version::TLS13);
    let client = TlsStream::connect(near, client, "localhost".try_into().unwrap(), deadline).unwrap();
    let server = server.join().unwrap().unwrap().hand_over(Records::Auto).unwrap();
    let client = client.hand_over(Records::Auto).unwrap();
    assert!(matches!((&server, &client), (Carrier::Relay(_), Carrier::Relay(_))));
    let (mut server, mut client) = (plain(server), plain(client));
    client.write_all(b"by a file's name").unwrap();
    let mut received = [0; 16];
    server.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"by a file's name");
}

#[test]
fn the_end_of_a_relay_comes_after_its_last_byte() {
    let files = Files::new();
    let (server, client) = handshake(&files, files.client(&rustls::version::TLS13));
    let mut server = plain(server.unwrap().hand_over(Records::UserSpace).unwrap());
    let mut client = plain(client.unwrap().hand_over(Records::UserSpace).unwrap());
    let sender = std::thread::spawn(move || {
        server.write_all(&pattern(1 << 20, 3)).unwrap();
        // Closed with everything still on its way.
    });
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    assert!(received == pattern(1 << 20, 3));
    sender.join().unwrap();
}

#[test]
fn a_record_that_is_not_data_is_named() {
    if let Err(why) = kernel::support(ProtocolVersion::TLSv1_3, CipherKind::Aes256Gcm) {
        assert!(std::env::var_os("VOLNODE_KTLS").is_none(), "promised here: {why}");
        println!("SKIP {why}");
        return;
    }
    let files = Files::new();
    let (server, client) = handshake(&files, files.client(&rustls::version::TLS13));
    let Carrier::Kernel(mut server) = server.unwrap().hand_over(Records::Auto).unwrap() else {
        panic!("the kernel can")
    };
    let mut client = plain(client.unwrap().hand_over(Records::UserSpace).unwrap());
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Both).unwrap();
    let mut words = [0; 10];
    server.read_exact(&mut words).unwrap();
    // A receive without room for the record's type ends with an error, and keeps the record.
    let error = server.read(&mut words).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(kernel::take_control_record(&server), Some(ControlRecord::CloseNotify));
    assert_eq!(kernel::take_control_record(&server), None, "it was taken");
}

#[test]
fn the_keys_are_the_kernels_where_it_can() {
    let files = Files::new();
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        // AES-256-GCM is what rustls prefers, on both sides.
        let is_supported = kernel::support(version.version, CipherKind::Aes256Gcm).is_ok();
        let (server, _client) = handshake(&files, files.client(version));
        let carrier = server.unwrap().hand_over(Records::Auto).unwrap();
        assert_eq!(matches!(carrier, Carrier::Kernel(_)), is_supported, "{version:?}");
    }
}

#[test]
fn a_peer_without_tls_and_one_that_says_nothing_are_refused_in_time() {
    let files = Files::new();
    let server = Arc::new(server_config(&files.issued.pair(), None).unwrap());
    let (mut near, far) = sockets();
    near.write_all(b"IHAVEOPT\0\0\0\x07 and more").unwrap();
    let refused = TlsStream::accept(far, Arc::clone(&server), Instant::now() + LIMIT);
    assert!(matches!(refused, Err(StreamError::NotTls)), "{refused:?}");

    let (mut near, far) = sockets();
    // The header of a record that never comes.
    near.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    let began = Instant::now();
    let late = TlsStream::accept(far, server, began + Duration::from_millis(300));
    let Err(StreamError::Io(error)) = late else { panic!("{late:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(began.elapsed() < LIMIT);
}

#[test]
fn a_server_of_another_authority_or_name_is_not_believed() {
    let (files, others) = (Files::new(), Files::new());
    let config = Arc::new(client_config(&others.issued.authority(), None).unwrap());
    let (server, client) = handshake(&files, config);
    assert!(matches!(client, Err(StreamError::Tls(_))), "{client:?}");
    assert!(server.is_err(), "the alert has told the server");

    let (near, far) = sockets();
    let deadline = Instant::now() + LIMIT;
    let config = Arc::new(server_config(&files.issued.pair(), None).unwrap());
    let server = std::thread::spawn(move || TlsStream::accept(far, config, deadline));
    let config = Arc::new(client_config(&files.issued.authority(), None).unwrap());
    let client = TlsStream::connect(near, config, "other.example".try_into().unwrap(), deadline);
    assert!(matches!(client, Err(StreamError::Tls(_))), "{client:?}");
    assert!(server.join().unwrap().is_err());
}
