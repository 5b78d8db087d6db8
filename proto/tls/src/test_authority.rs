//! An authority for tests: issues certificates and lays them out as the NBD tools expect them.
//!
//! Only with the feature `test-authority`, which no program of the product asks for. A folder that [`Authority::issue`]
//! makes has the names that libnbd, nbdkit and QEMU look for: `ca-cert.pem`, and `client-cert.pem`, `client-key.pem`,
//! `server-cert.pem`, `server-key.pem` (the same certificate for both uses).
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};

pub use rcgen;

use crate::certificates::Pair;

/// Number of the next authority.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Issues certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// A folder with a certificate, its key and the authority's certificate.
#[derive(Debug, Clone)]
pub struct Issued(PathBuf);

impl Authority {
    /// A new one, which nobody trusts yet.
    #[allow(clippy::new_without_default)] // Each is another one: that is no default.
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new([]).unwrap();
        // Two with one name would be taken for one whose signatures are wrong.
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("test authority {} {number}", std::process::id());
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = parameters.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(parameters, key), certificate }
    }

    /// Issues a certificate for this machine's loopback addresses and these URIs, into a folder.
    pub fn issue(&self, folder: &Path, uris: &[&str]) -> Issued {
        self.issue_with(folder, uris, |_| {})
    }

    /// The same, of a certificate whose time is over.
    pub fn issue_expired(&self, folder: &Path, uris: &[&str]) -> Issued {
        self.issue_with(folder, uris, |parameters| {
            parameters.not_before = date_time_ymd(2001, 1, 1);
            parameters.not_after = date_time_ymd(2002, 1, 1);
        })
    }

    /// The same, of a certificate that is changed before it is issued.
    pub fn issue_with(
        &self,
        folder: &Path,
        uris: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Issued {
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let mut parameters = CertificateParams::new(names).unwrap();
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        parameters.subject_alt_names.extend(uris);
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "test");
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut parameters);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap().pem();
        fs::create_dir_all(folder).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write("ca-cert.pem", &self.certificate);
        for role in ["client", "server"] {
            write(&format!("{role}-cert.pem"), &certificate);
            write(&format!("{role}-key.pem"), &key.serialize_pem());
        }
        Issued(folder.to_owned())
    }
}

impl Issued {
    /// The folder with the certificates and keys.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// The authority's certificate.
    pub fn authority(&self) -> PathBuf {
        self.0.join("ca-cert.pem")
    }

    /// The certificate and its key.
    pub fn pair(&self) -> Pair {
        Pair { certificate: self.0.join("server-cert.pem"), key: self.0.join("server-key.pem") }
    }
}
