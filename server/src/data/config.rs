//! What the data side is started with.
//!
//! Made by `server/src/config.rs` from options; read by `data/server.rs` and the gate.

use std::path::PathBuf;
use std::sync::Arc;

use crate::backend::callback::CallbackOpener;
use crate::backend::device::Adoptable;
use crate::backend::file::CacheMode;
use crate::backend::lvm::Lvm;
use crate::data::address::DataAddress;
use crate::limits::Limits;
use crate::tls::ServerTls;
use crate::volume::Faults;

/// What the data side is started with.
#[derive(Debug, Clone)]
pub struct DataServerConfig {
    /// Addresses to listen on.
    pub listen: Vec<DataAddress>,
    /// Ring threads; 0 is one for each core.
    pub threads: usize,
    /// Where the backing files are.
    pub volumes_dir: PathBuf,
    /// Where is kept what has to survive this process, and not the machine; `None`: nowhere.
    pub runtime_dir: Option<PathBuf>,
    /// Whether they are read and written past the page cache.
    pub cache: CacheMode,
    /// Whether volumes can be opened by their plain name.
    pub export_by_name: bool,
    /// What may be adopted.
    pub adoptable: Arc<Adoptable>,
    /// The thin pool, if there is one.
    pub lvm: Option<Arc<Lvm>>,
    /// How connections are encrypted, if they are.
    pub tls: Arc<ServerTls>,
    /// For tests only.
    pub faults: Faults,
    /// For tests only: has the bytes of every volume that is opened, instead of its file or memory.
    pub opener: Option<CallbackOpener>,
    /// Bounds.
    pub limits: Limits,
}

impl Default for DataServerConfig {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            threads: 0,
            volumes_dir: PathBuf::new(),
            runtime_dir: None,
            cache: CacheMode::default(),
            export_by_name: false,
            adoptable: Arc::default(),
            lvm: None,
            tls: Arc::default(),
            faults: Faults::default(),
            opener: None,
            limits: Limits::default(),
        }
    }
}
