//! Certificates and keys that people have, and what volctl tells of them.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tls::certificates::{Pair, server_config};
use tls::stream::TlsStream;
use tls::test_authority::rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};
use tls::test_authority::{Authority, Issued};

const DEADLINE: Duration = Duration::from_secs(60);

type Change = fn(&mut CertificateParams);

/// The port of a server with this certificate that gets as far as TLS does; it lives as long as the test.
fn server(pair: &Pair, client_authority: Option<&Path>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = Arc::new(server_config(pair, client_authority).unwrap());
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            // Kept open for a while: what the client has sent meanwhile would reset the connection, and the alert with it.
            let other_end = socket.try_clone().unwrap();
            let accepted = TlsStream::accept(socket, Arc::clone(&config), Instant::now() + DEADLINE);
            let drain = move || std::io::copy(&mut &other_end, &mut std::io::sink());
            std::thread::spawn(move || drop((drain(), accepted)));
        }
    });
    port
}

/// What `volctl list` says, with its exit code.
fn list(host: &str, port: u16, ca: &Path, pair: Option<&Pair>) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volctl"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VOLNODE_")) {
        command.env_remove(name);
    }
    command.args(["list", "--server", &format!("https://{host}:{port}"), "--tls-ca"]).arg(ca);
    if let Some(pair) = pair {
        command.arg("--tls-cert").arg(&pair.certificate).arg("--tls-key").arg(&pair.key);
    }
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[track_caller]
fn assert_told(told: &(Option<i32>, String), exit_code: i32, words: &[&str]) {
    assert_eq!(told.0, Some(exit_code), "{}", told.1);
    assert!(words.iter().all(|words| told.1.contains(words)), "{words:?}: {}", told.1);
}

#[test]
fn a_server_with_a_certificate_that_is_not_good_is_told_with_what_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let cases: [(&str, Change, &[&str]); 4] = [
        (
            "expired",
            |made| made.not_after = date_time_ymd(2002, 1, 1),
            &["expired", "days ago: have it issued anew"],
        ),
        (
            "early",
            |made| made.not_before = date_time_ymd(2999, 1, 1),
            &["becomes valid only in", "set the clocks"],
        ),
        (
            "nameless",
            |made| made.subject_alt_names.clear(),
            &["(CN) does not count", "subjectAltName=DNS:localhost"],
        ),
        (
            "other",
            |made| {
                made.subject_alt_names = CertificateParams::new(["nas".to_owned()]).unwrap().subject_alt_names
            },
            &["is for nas, and not for localhost", "subjectAltName=DNS:localhost"],
        ),
    ];
    for (name, change, words) in cases {
        let files = authority.issue_with(&dir.path().join(name), &[], change);
        let told = list("localhost", server(&files.pair(), None), &files.authority(), None);
        assert_told(&told, 6, words);
        assert_told(&told, 6, &["answers, but TLS does not start", "docs/tls.md"]);
    }
    let files = authority.issue(&dir.path().join("good"), &[]);
    let stranger = Authority::new().issue(&dir.path().join("stranger"), &[]);
    let told = list("localhost", server(&files.pair(), None), &stranger.authority(), None);
    assert_told(&told, 6, &["issued by none of the authorities that are trusted here", "--tls-ca"]);
}

/// As `openssl req -x509` makes them.
#[test]
fn an_authority_that_is_its_own_server_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut parameters = CertificateParams::new(["localhost".to_owned()]).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pair = Pair { certificate: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
    std::fs::write(&pair.certificate, parameters.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(&pair.key, key.serialize_pem()).unwrap();
    let told = list("localhost", server(&pair, None), &pair.certificate, None);
    assert_told(&told, 6, &["is an authority's (CA:TRUE)", "basicConstraints=CA:FALSE"]);
}

#[test]
fn what_the_server_says_of_our_certificate_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.issue(&dir.path().join("server"), &[]);
    let port = server(&files.pair(), Some(&files.authority()));
    let told =
        |pair: Option<&Issued>| list("localhost", port, &files.authority(), pair.map(Issued::pair).as_ref());
    assert_told(&told(None), 6, &["asks for a certificate", "--tls-cert and --tls-key"]);
    let stranger = Authority::new().issue(&dir.path().join("stranger"), &[]);
    assert_told(&told(Some(&stranger)), 6, &["does not trust the authority that issued our certificate"]);
    let expired = authority.issue_expired(&dir.path().join("expired"), &[]);
    assert_told(&told(Some(&expired)), 6, &["our certificate has expired"]);
}

#[test]
fn files_of_no_use_are_wrong_usage_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let files = authority.issue(&dir.path().join("server"), &[]);
    let (ca, pair) = (files.authority(), files.pair());
    // Nobody has to be there for that.
    let told = |ca: &Path, pair: &Pair| list("localhost", 9, ca, Some(pair));
    assert_told(
        &told(&dir.path().join("absent.pem"), &pair),
        2,
        &["absent.pem: cannot be read: No such file"],
    );
    assert_told(&told(&pair.key, &pair), 2, &["there is no certificate in this file, but PRIVATE KEY"]);
    let other = authority.issue(&dir.path().join("other"), &[]).pair();
    let mixed = Pair { certificate: pair.certificate.clone(), key: other.key };
    assert_told(
        &told(&ca, &mixed),
        2,
        &["this certificate is not for the private key in", "other/server-key.pem"],
    );
    let key = dir.path().join("encrypted.pem");
    std::fs::write(
        &key,
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIHs\n-----END ENCRYPTED PRIVATE KEY-----\n",
    )
    .unwrap();
    let encrypted = Pair { certificate: pair.certificate, key };
    assert_told(
        &told(&ca, &encrypted),
        2,
        &["encrypted.pem: the private key is encrypted", "openssl pkey -in"],
    );
}
