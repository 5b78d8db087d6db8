//! Connections to the storage server and the node daemon, and what to do when there is none.
//!
//! A connection is made before the first call, so that "nobody is there" is told apart from a call that failed.

use std::error::Error;
use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use client::api_channel::{self, ChannelError};
use client::causes::with_sources;
use client::node::supervisor::FORCE_DETACH_MAX;
use client::tls_spec::ClientFiles;
use proto::v1::management_client::ManagementClient;
use proto::v1::node_client::NodeClient;
use tonic::transport::{self, Channel, Endpoint};
use tonic::{Response, Status};

use crate::exit_code::ExitCode;
use crate::failure::Failure;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Longer than the longest call of the node daemon (a detach: stopping the device, then the server).
const CALL_DEADLINE: Duration = Duration::from_secs(420);
const _: () = assert!(FORCE_DETACH_MAX.as_secs() < CALL_DEADLINE.as_secs());

/// Where the storage server's management API is, and with which files TLS is spoken to it.
#[derive(Debug)]
pub(crate) struct ServerAddress {
    /// `unix:/path`, `http://host[:port]` or `https://host[:port]`
    pub(crate) uri: String,
    /// For `https://`.
    pub(crate) tls_files: Option<ClientFiles>,
}

/// The storage server at this address.
pub(crate) async fn server(address: &ServerAddress) -> Result<ManagementClient<Channel>, Failure> {
    let uri = &api_channel::with_port(&address.uri);
    let connected = api_channel::connect(uri, address.tls_files.as_ref()).await;
    connected.map(ManagementClient::new).map_err(|error| match error {
        ChannelError::Uri(_) => {
            let next =
                "write --server unix:/path, http://host[:port] or https://host[:port] (or set VOLNODE_SERVER)";
            Failure::new(ExitCode::Usage, error.to_string(), next)
        }
        ChannelError::NoAuthority(_) => Failure::new(
            ExitCode::Usage,
            error.to_string(),
            "give the file with --tls-ca (or VOLNODE_TLS_CA)",
        ),
        ChannelError::Certificates(error) => Failure::new(
            ExitCode::Usage,
            with_sources(&error),
            "give other files with --tls-ca, --tls-cert and --tls-key (or VOLNODE_TLS_…), or mend these",
        ),
        ChannelError::Connect(error) if is_of_tls(&error) => Failure::new(
            ExitCode::Unreachable,
            format!("the storage server at {uri} answers, but TLS does not start: {}", root_cause(&error)),
            "mend what it says; docs/tls.md shows how certificates are made",
        ),
        ChannelError::Connect(error) if io_error_kind(&error) == Some(io::ErrorKind::PermissionDenied) => {
            Failure::new(
                ExitCode::MachineCannot,
                format!("cannot reach the storage server at {uri}: {}", root_cause(&error)),
                "run volctl as root (sudo volctl ...), or as a member of the socket's group",
            )
        }
        ChannelError::Connect(error) => Failure::new(
            ExitCode::Unreachable,
            format!("cannot reach the storage server at {uri}: {}", root_cause(&error)),
            "check that volserver runs and listens there; another address is given with --server (or VOLNODE_SERVER), such as \
             http://127.0.0.1:10810 for a server up to 0.1.0",
        ),
    })
}

/// The node daemon behind this socket.
pub(crate) async fn node(socket: &Path) -> Result<NodeClient<Channel>, Failure> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
    let endpoint = endpoint.map_err(|error| Failure::other(format!("--socket: {error}")))?;
    let connected = endpoint.connect_timeout(CONNECT_DEADLINE).connect().await;
    connected.map(NodeClient::new).map_err(|error| {
        let what = format!("cannot reach the node daemon at {}: {}", socket.display(), root_cause(&error));
        match io_error_kind(&error) {
            Some(io::ErrorKind::PermissionDenied) => {
                Failure::new(ExitCode::MachineCannot, what, "run volctl as root (sudo volctl ...)")
            }
            _ => Failure::new(
                ExitCode::Unreachable,
                what,
                "start it: `volclient serve`, as root; another socket is given with --socket (or VOLNODE_SOCKET)",
            ),
        }
    })
}

/// Waits for an answer, but not for ever.
pub(crate) async fn call<T>(answer: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Failure> {
    next(answer).await.map(Response::into_inner)
}

/// The same for the next message of a stream.
pub(crate) async fn next<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Failure> {
    Ok(in_time(answer).await??)
}

/// The same with the status itself.
pub(crate) async fn in_time<T>(
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<Result<T, Status>, Failure> {
    tokio::time::timeout(CALL_DEADLINE, answer).await.map_err(|_| {
        Failure::new(
            ExitCode::TimedOut,
            format!("no answer within {} s", CALL_DEADLINE.as_secs()),
            "see the log of the program that did not answer; the call may be repeated",
        )
    })
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| <dyn Error>::source(*error))
}

fn io_error_kind(error: &transport::Error) -> Option<io::ErrorKind> {
    causes(error).find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind)
}

fn root_cause(error: &transport::Error) -> String {
    api_channel::innermost_cause(error)
}

/// Whether the two sides do not believe each other, or what answers speaks no TLS.
fn is_of_tls(error: &transport::Error) -> bool {
    let io_errors = causes(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    io_errors.filter_map(io::Error::get_ref).any(|inner| inner.is::<rustls::Error>())
}
