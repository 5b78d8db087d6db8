//! With what TLS is spoken to a server: the files, and the name that its certificate has to bear.
//!
//! Owns: what is written into a device's spec, and the rustls configuration made of it. The files are read at each use, so
//! that renewed certificates are taken without a restart; nothing secret is in the spec itself.
//! Used by the node daemon and volctl (`api_channel.rs`) and by the device processes (`device/connect/dial.rs`).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tls::certificates::{CertificateError, Pair, client_config};

/// The files of one side: who is believed, and who we are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientFiles {
    /// The authority whose servers are believed (PEM).
    pub ca: PathBuf,
    /// Our own certificate and key (PEM), for servers that ask for one.
    #[serde(default)]
    pub pair: Option<CertificateAndKey>,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateAndKey {
    /// The certificate, with the chain below its authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl ClientFiles {
    /// What the options `--tls-ca`, `--tls-cert` and `--tls-key` name, by absolute paths: a device process has another
    /// working directory. `None`: there is no authority. The command line sees to it that certificate and key come together.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn named(
        ca: Option<PathBuf>,
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
    ) -> io::Result<Option<Self>> {
        let [ca, cert, key] = [ca, cert, key].map(|path| path.map(std::path::absolute).transpose());
        let pair = cert?.zip(key?).map(|(cert, key)| CertificateAndKey { cert, key });
        Ok(ca?.map(|ca| Self { ca, pair }))
    }

    /// Where the files are: as they were named, and where symbolic links lead from there.
    pub fn paths(&self) -> Vec<PathBuf> {
        let named = [
            Some(&self.ca),
            self.pair.as_ref().map(|pair| &pair.cert),
            self.pair.as_ref().map(|pair| &pair.key),
        ];
        let named = named.into_iter().flatten();
        named.flat_map(|path| [Some(path.clone()), std::fs::canonicalize(path).ok()]).flatten().collect()
    }

    /// Reads the files.
    ///
    /// # Errors
    /// [`CertificateError`]: which of them is of no use, and why.
    pub fn load(&self) -> Result<ClientConfig, CertificateError> {
        let pair = self.pair.as_ref();
        let pair = pair.map(|pair| Pair { certificate: pair.cert.clone(), key: pair.key.clone() });
        client_config(&self.ca, pair.as_ref())
    }
}

/// How TLS is spoken to one server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsSpec {
    /// With these files.
    #[serde(flatten)]
    pub files: ClientFiles,
    /// The name, or IP address, that the server's certificate has to bear.
    pub server_name: String,
    /// The kernel may not encrypt, even if it could.
    #[serde(default)]
    pub user_space_only: bool,
    /// How much the kernel may encrypt under one key, in bytes; then the connection is made anew.
    #[serde(default = "key_bytes_max")]
    pub key_bytes_max: u64,
}

fn key_bytes_max() -> u64 {
    tls::kernel::KEY_BYTES_MAX
}

/// TLS cannot be spoken with what the spec says.
#[derive(Debug, thiserror::Error)]
pub enum TlsSpecError {
    /// A file cannot be used.
    #[error(transparent)]
    Certificates(#[from] CertificateError),
    /// Not the name of a server.
    #[error("{0:?} is not a name that a server's certificate can bear")]
    ServerName(String),
}

impl TlsSpec {
    /// What rustls needs to dial.
    ///
    /// # Errors
    /// [`TlsSpecError`], by cause.
    pub fn load(&self) -> Result<(Arc<ClientConfig>, ServerName<'static>), TlsSpecError> {
        let name = ServerName::try_from(self.server_name.clone());
        let name = name.map_err(|_| TlsSpecError::ServerName(self.server_name.clone()))?;
        Ok((Arc::new(self.files.load()?), name))
    }
}
