//! How an attachment's connections are made, and made again.
//!
//! Reading path: [`slots`] (which connections there are, and who has to answer) → [`dial`] (one connection, up to the
//! transmission phase) → [`data_socket`] (what a queue gets). [`redial`] says how that is done again for as long as it takes, [`redial_thread`] does it, and `probe` asks
//! beside it whether the server lives; [`export_fit`] says whether what came back is the disk that was there.

pub mod data_socket;
pub mod dial;
pub mod export_fit;
mod probe;
pub mod redial;
pub mod redial_thread;
pub mod slots;
