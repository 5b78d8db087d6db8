//! Identity of the plugin, and kubelet's registration; `node` has the Node service.
//!
//! Owns: what is answered. Never: logs a request; of a call its name and its outcome are logged. What is not answered here is
//! UNIMPLEMENTED, and declared nowhere. Called by: `serve`, `node`.

use std::time::{Duration, Instant};

use proto::csi::registration::registration_server::Registration;
use proto::csi::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use proto::csi::v1;
use proto::v1::management_client::ManagementClient;
use proto::v1::node_client::NodeClient;
use proto::v1::{GetNodeInfoRequest, GetNodeInfoResponse, GetServerInfoRequest};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

/// The driver's name, by which StorageClasses and kubelet know it.
pub const DRIVER_NAME: &str = "csi.volnode.io";
/// What the node daemon may take to say who it is; it does so without a look at any disk.
const NODE_INFO_DEADLINE: Duration = Duration::from_secs(2);
/// The same of the storage server.
const SERVER_INFO_DEADLINE: Duration = Duration::from_secs(2);
/// The kind of plugin, in kubelet's words.
const PLUGIN_TYPE: &str = "CSIPlugin";
/// Kubelet's interface to CSI drivers; it looks at the first number.
const SUPPORTED_VERSION: &str = "1.0.0";
/// How much of what kubelet says is logged, in characters.
const SAID_CHARACTERS_MAX: usize = 500;

/// Identity, over the API of this machine's node daemon.
#[derive(Debug, Clone)]
pub struct Plugin {
    node: NodeClient<Channel>,
    is_node: bool,
    /// For the controller.
    server: Option<ManagementClient<Channel>>,
    capabilities: Vec<v1::PluginCapability>,
}

impl Plugin {
    /// Over a channel to the node daemon, which need not be there yet; without `is_node` it is not asked whether it is.
    pub fn new(node: Channel, is_node: bool) -> Self {
        Self { node: NodeClient::new(node), is_node, server: None, capabilities: Vec::new() }
    }

    /// With the controller beside it, which needs the server behind this channel and has these capabilities.
    pub fn with_controller(self, server: Channel, capabilities: Vec<v1::PluginCapability>) -> Self {
        Self { server: Some(ManagementClient::new(server)), capabilities, ..self }
    }

    /// Whether all that is needed answers.
    async fn is_ready(&self) -> bool {
        (!self.is_node || self.node_info().await.is_ok()) && self.server_answers().await
    }

    async fn server_answers(&self) -> bool {
        let Some(mut server) = self.server.clone() else { return true };
        let asked = server.get_server_info(GetServerInfoRequest {});
        tokio::time::timeout(SERVER_INFO_DEADLINE, asked).await.is_ok_and(|answer| answer.is_ok())
    }

    async fn node_info(&self) -> Result<GetNodeInfoResponse, Status> {
        let mut node = self.node.clone();
        let asked = node.get_node_info(GetNodeInfoRequest {});
        match tokio::time::timeout(NODE_INFO_DEADLINE, asked).await {
            Ok(Ok(info)) => Ok(info.into_inner()),
            Ok(Err(status)) => Err(Status::unavailable(format!(
                "the node daemon cannot be asked: {}; start it: `volclient serve`, as root, or give another --socket",
                status.message()
            ))),
            Err(_) => Err(Status::unavailable(format!(
                "the node daemon has not answered for {} s; see its log",
                NODE_INFO_DEADLINE.as_secs()
            ))),
        }
    }
}

/// Logs a call by its name and outcome.
pub(super) async fn logged<T>(
    call: &'static str,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<Response<T>, Status> {
    let started = Instant::now();
    let answer = answer.await;
    let ms = started.elapsed().as_millis() as u64;
    match &answer {
        Ok(_) => tracing::debug!(call, ms, "answered"),
        Err(status) => tracing::warn!(call, ms, code = ?status.code(), why = status.message(), "refused"),
    }
    answer.map(Response::new)
}

#[tonic::async_trait]
impl v1::identity_server::Identity for Plugin {
    async fn get_plugin_info(
        &self,
        _: Request<v1::GetPluginInfoRequest>,
    ) -> Result<Response<v1::GetPluginInfoResponse>, Status> {
        logged("GetPluginInfo", async {
            Ok(v1::GetPluginInfoResponse {
                name: DRIVER_NAME.to_owned(),
                vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
                manifest: Default::default(),
            })
        })
        .await
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<v1::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<v1::GetPluginCapabilitiesResponse>, Status> {
        logged("GetPluginCapabilities", async {
            // The controller's.
            Ok(v1::GetPluginCapabilitiesResponse { capabilities: self.capabilities.clone() })
        })
        .await
    }

    /// Ready: the node daemon answers, and with a controller the storage server. While they do not the plugin is well, and cannot do
    /// anything.
    async fn probe(&self, _: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeResponse>, Status> {
        logged("Probe", async { Ok(v1::ProbeResponse { ready: Some(self.is_ready().await) }) }).await
    }
}

/// What kubelet asks a plugin that it finds.
#[derive(Debug, Clone)]
pub struct Registrar {
    /// Where kubelet reaches the plugin: a path of the host.
    pub endpoint: String,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        logged("GetInfo", async {
            Ok(PluginInfo {
                r#type: PLUGIN_TYPE.to_owned(),
                name: DRIVER_NAME.to_owned(),
                endpoint: self.endpoint.clone(),
                supported_versions: vec![SUPPORTED_VERSION.to_owned()],
            })
        })
        .await
    }

    /// Kubelet tries again by itself, as long as the socket is there.
    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        if plugin_registered {
            tracing::info!("kubelet has registered the plugin");
        } else {
            let error: String = error.chars().take(SAID_CHARACTERS_MAX).collect();
            tracing::error!(error, "kubelet cannot register the plugin, and tries again");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
