//! The files an administrator names, and the rustls configurations made of them.
//!
//! Owns: reading PEM files and saying which of them is of no use and why. Never: keeps a key longer than the
//! configuration lives, or prints one. Called at start-up, at each reload (server) and at each dial (client).
//! TLS 1.3 and 1.2 only. No session is ever resumed and no ticket is sent: a ticket would be a record that a
//! socket in the kernel's hands cannot take for data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// A file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// It cannot be read, or holds no such thing in PEM form.
    #[error("{}: {what}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Why it was not found.
        source: pem::Error,
    },
    /// It holds no certificate at all.
    #[error("{}: there is no certificate in this file", .0.display())]
    Empty(PathBuf),
    /// A certificate of an authority is malformed.
    #[error("{}: not a certificate of an authority: {source}", path.display())]
    Authority {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// Certificate and key do not belong together, or are of a kind that is not supported.
    #[error("{}: the certificate cannot be used with its key: {source}", path.display())]
    Pair {
        /// The certificate's file.
        path: PathBuf,
        /// What does not fit.
        source: rustls::Error,
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
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|source| CertificateError::File {
            path: self.key.clone(),
            what: "no private key",
            source,
        })?;
        Ok((chain, key))
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
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|source| CertificateError::Pair { path: pair.certificate.clone(), source })?;
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
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|source| CertificateError::Pair { path: pair.certificate.clone(), source })?
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

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let broken = |source| CertificateError::File { path: path.to_owned(), what: "no certificate", source };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(broken)?.collect::<Result<_, _>>().map_err(broken)?;
    if found.is_empty() { Err(CertificateError::Empty(path.to_owned())) } else { Ok(found) }
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

    #[test]
    fn a_file_of_no_use_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("empty"), "").unwrap();
        std::fs::write(at("text"), "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n").unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(["h".to_owned()]).unwrap().self_signed(&key).unwrap();
        std::fs::write(at("cert"), certificate.pem()).unwrap();
        std::fs::write(at("other-key"), rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let pair = |certificate: &str, key: &str| Pair { certificate: at(certificate), key: at(key) };
        for (pair, told) in [
            (pair("missing", "other-key"), "missing: no certificate"),
            (pair("empty", "other-key"), "empty: there is no certificate"),
            (pair("text", "other-key"), "text: no certificate"),
            (pair("cert", "cert"), "cert: no private key"),
            (pair("cert", "other-key"), "cert: the certificate cannot be used with its key"),
        ] {
            let error = server_config(&pair, None).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
        assert!(client_config(&at("empty"), None).is_err());
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
