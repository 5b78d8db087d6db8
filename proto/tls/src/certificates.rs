//! The files an administrator names, and the rustls configurations made of them.
//!
//! Owns: reading PEM files and saying which of them is of no use and why. Never: keeps a key longer than the
//! configuration lives, or prints one. Called at start-up, at each reload (server) and at each dial (client).
//! TLS 1.3 and 1.2 only. No session is ever resumed and no ticket is sent: a ticket would be a record that a
//! socket in the kernel's hands cannot take for data.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::explain::{self, faults_of_server_certificate};

/// A file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// It cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// What was looked for is damaged.
    #[error("{}: the PEM of {what} is damaged: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Where it stops to make sense.
        reason: String,
    },
    /// It holds something else, or nothing in PEM form.
    #[error("{}: there is no {what} in this file, but {found}", path.display())]
    Missing {
        /// Which file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What there is, and what may be meant.
        found: String,
    },
    /// The key can be read by nobody who has not its passphrase.
    #[error(
        "{path}: the private key is encrypted, and nobody can be asked for its passphrase here: write it anew without \
         (openssl pkey -in {path} -out NEW.pem), readable by this program's user alone", path = .0.display()
    )]
    Encrypted(PathBuf),
    /// A certificate of an authority is malformed.
    #[error("{}: not a certificate of an authority: {source}", path.display())]
    Authority {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// The certificate is of another key.
    #[error(
        "{certificate}: this certificate is not for the private key in {key}: give the two that were made together (both of \
         `openssl x509 -noout -pubkey -in {certificate}` and `openssl pkey -pubout -in {key}` tell the public key)",
        certificate = certificate.display(), key = key.display()
    )]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
    },
    /// Certificate or key are malformed, or of a kind that is not supported.
    #[error("{} with the key in {}: {reason}", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// Client certificates cannot be checked against the authorities.
    #[error("client certificates cannot be checked: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// The ciphers and the protocol versions do not fit together.
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
}

/// A certificate (with the chain below its authority) and its key, both PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The certificate, followed by those of intermediate authorities.
    pub certificate: PathBuf,
    /// Its private key: PKCS #8, PKCS #1 or SEC 1, not encrypted.
    pub key: PathBuf,
}

impl Pair {
    fn load(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CertificateError> {
        let chain = certificates(&self.certificate)?;
        Ok((chain, private_key(&self.key)?))
    }

    fn unfit(&self, source: rustls::Error) -> CertificateError {
        let (certificate, key) = (self.certificate.clone(), self.key.clone());
        match source {
            rustls::Error::InconsistentKeys(_) => CertificateError::Mismatch { certificate, key },
            source => CertificateError::Pair { certificate, key, reason: explain::own_certificate(&source) },
        }
    }
}

/// A server's configuration. With `client_authority`, every client has to show a certificate of that authority.
///
/// # Errors
/// [`CertificateError`], by cause.
pub fn server_config(pair: &Pair, client_authority: Option<&Path>) -> Result<ServerConfig, CertificateError> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(CertificateError::Tls)?;
    let builder = match client_authority {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let (chain, key) = pair.load()?;
    let mut config = builder.with_single_cert(chain, key).map_err(|source| pair.unfit(source))?;
    config.enable_secret_extraction = true;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// A client's configuration: servers are believed if `authority` vouches for them, and shown `pair` if they ask.
///
/// # Errors
/// [`CertificateError`], by cause.
pub fn client_config(authority: &Path, pair: Option<&Pair>) -> Result<ClientConfig, CertificateError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(CertificateError::Tls)?
        .with_root_certificates(authorities(authority)?);
    let mut config = match pair {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let (chain, key) = pair.load()?;
            builder.with_client_auth_cert(chain, key).map_err(|source| pair.unfit(source))?
        }
    };
    config.enable_secret_extraction = true;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The names in a certificate's subject alternative names that are URIs. Of a malformed certificate: none.
pub fn uri_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let parsed = webpki::EndEntityCert::try_from(certificate);
    parsed.map_or_else(|_| Vec::new(), |parsed| parsed.valid_uri_names().map(str::to_owned).collect())
}

/// SHA-256 of a certificate, in hexadecimal, as `openssl x509 -fingerprint -sha256` says it without colons.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// What clients will find wrong with a server's certificate, whichever they are; a line for each, with what to change.
///
/// # Errors
/// [`CertificateError`]: the file cannot be used.
pub fn faults_of_server(pair: &Pair, now: UnixTime) -> Result<Vec<String>, CertificateError> {
    let chain = certificates(&pair.certificate)?;
    let faults = chain.first().map(|shown| faults_of_server_certificate(shown, now)).unwrap_or_default();
    let path = pair.certificate.display();
    Ok(faults.into_iter().map(|fault| format!("{path}: the certificate {fault}")).collect())
}

fn read(path: &Path) -> Result<Vec<u8>, CertificateError> {
    std::fs::read(path).map_err(|source| CertificateError::Unreadable { path: path.to_owned(), source })
}

fn damaged(path: &Path, what: &'static str, error: &pem::Error) -> CertificateError {
    CertificateError::Damaged { path: path.to_owned(), what, reason: error.to_string() }
}

/// What a file has, and what may be meant.
fn missing(path: &Path, what: &'static str, text: &[u8], command: &str) -> CertificateError {
    let text = String::from_utf8_lossy(text);
    let begin = |line: &str| Some(line.trim().strip_prefix("-----BEGIN ")?.strip_suffix("-----")?.to_owned());
    let kinds: Vec<String> = text.lines().filter_map(begin).collect();
    let found = match &kinds[..] {
        _ if text.trim().is_empty() => "nothing at all".to_owned(),
        [] => format!(
            "nothing in PEM form (text between BEGIN and END lines): if it is DER, `openssl {command} -inform der -in {path} -out \
             NEW.pem` makes PEM of it",
            path = path.display()
        ),
        kinds => format!("{}: are the names of the files exchanged?", kinds.join(", ")),
    };
    CertificateError::Missing { path: path.to_owned(), what, found }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let text = read(path)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| damaged(path, "a certificate", &error))?;
    if found.is_empty() { Err(missing(path, "certificate", &text, "x509")) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, CertificateError> {
    let text = read(path)?;
    // In PKCS #8's way, and in that of the forms before it.
    let is_encrypted = |text: &str| {
        text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") || text.contains("Proc-Type: 4,ENCRYPTED")
    };
    match PrivateKeyDer::from_pem_slice(&text) {
        Ok(key) => Ok(key),
        Err(_) if is_encrypted(&String::from_utf8_lossy(&text)) => {
            Err(CertificateError::Encrypted(path.to_owned()))
        }
        Err(pem::Error::NoItemsFound) => Err(missing(path, "private key", &text, "pkey")),
        Err(error) => Err(damaged(path, "a private key", &error)),
    }
}

fn authorities(path: &Path) -> Result<RootCertStore, CertificateError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| CertificateError::Authority { path: path.to_owned(), source })?;
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each file that people give by mistake.
    #[test]
    fn a_file_of_no_use_is_named_with_what_is_wrong_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
        write("empty", "\n");
        write("text", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n");
        write("der", "0\u{1}no PEM");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(["h".to_owned()]).unwrap().self_signed(&key).unwrap();
        write("cert", &certificate.pem());
        write("key", &key.serialize_pem());
        write("other-key", &rcgen::KeyPair::generate().unwrap().serialize_pem());
        let pkcs8 = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIHs\n-----END ENCRYPTED PRIVATE KEY-----\n";
        write("encrypted", pkcs8);
        let before = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nMIHs\n\
                      -----END EC PRIVATE KEY-----\n";
        write("encrypted-before", before);
        let pair = |certificate: &str, key: &str| Pair { certificate: at(certificate), key: at(key) };
        for (pair, told) in [
            (pair("absent", "key"), ["absent: cannot be read", "No such file"]),
            (pair("empty", "key"), ["empty: there is no certificate", "nothing at all"]),
            (pair("text", "key"), ["text: the PEM of a certificate is damaged", "base64"]),
            (pair("der", "key"), ["der: there is no certificate", "openssl x509 -inform der"]),
            (pair("key", "cert"), ["key: there is no certificate", "PRIVATE KEY: are the names"]),
            (pair("cert", "cert"), ["cert: there is no private key", "CERTIFICATE: are the names"]),
            (pair("cert", "der"), ["der: there is no private key", "openssl pkey -inform der"]),
            (pair("cert", "other-key"), ["cert: this certificate is not for the private key in", "-pubkey"]),
            (pair("cert", "encrypted"), ["encrypted: the private key is encrypted", "openssl pkey -in"]),
            (pair("cert", "encrypted-before"), ["the private key is encrypted", "openssl pkey -in"]),
        ] {
            for error in [
                server_config(&pair, None).unwrap_err(),
                client_config(&at("cert"), Some(&pair)).unwrap_err(),
            ] {
                let error = error.to_string();
                assert!(told.iter().all(|told| error.contains(told)), "{told:?}: {error}");
            }
        }
        assert!(client_config(&at("empty"), None).is_err());
    }

    /// Made by OpenSSL: a key with a passphrase, and a certificate without extensions, as `openssl x509 -req` issues it.
    #[test]
    fn what_openssl_makes_when_it_is_not_told_more_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        let openssl = |arguments: &str| {
            let made = std::process::Command::new("openssl")
                .args(arguments.split(' '))
                .current_dir(dir.path())
                .stdin(std::process::Stdio::null())
                .output();
            made.is_ok_and(|made| made.status.success())
        };
        let key = "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out";
        if !openssl(&format!("{key} key.pem")) {
            println!("SKIP no openssl");
            return;
        }
        assert!(openssl(&format!("{key} encrypted.pem -aes256 -pass pass:x")));
        assert!(openssl("req -new -subj /CN=localhost -key key.pem -out request.pem"));
        assert!(openssl("x509 -req -in request.pem -signkey key.pem -out cert.pem"));
        let pair = |key: &str| Pair { certificate: dir.path().join("cert.pem"), key: dir.path().join(key) };
        let encrypted = server_config(&pair("encrypted.pem"), None).unwrap_err();
        assert!(matches!(encrypted, CertificateError::Encrypted(_)), "{encrypted}");
        // Newer ones make it of version 3, still without a name.
        let told = match server_config(&pair("key.pem"), None) {
            Ok(_) => faults_of_server(&pair("key.pem"), UnixTime::now()).unwrap().join("; "),
            Err(error) => error.to_string(),
        };
        assert!(
            told.contains("cert.pem") && told.contains("issued with") && told.contains("subjectAltName"),
            "{told}"
        );
    }

    #[test]
    fn uri_names_are_read_and_others_passed_over() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(["host.example".to_owned()]).unwrap();
        let uri = rcgen::SanType::URI("volnode:volume/vol-1".try_into().unwrap());
        parameters.subject_alt_names.push(uri);
        let certificate = parameters.self_signed(&key).unwrap();
        assert_eq!(uri_names(certificate.der()), ["volnode:volume/vol-1"]);
        assert_eq!(uri_names(&CertificateDer::from(vec![1, 2, 3])), [""; 0]);
    }
}
