//! Asks a vLLM server for the names and the context length of its model, which costs it no tokens.

use futures_util::future::join;
use vllm_proto::control_client::ControlClient;
use vllm_proto::{GetModelInfoRequest, GetServerInfoRequest, ModelInfo, ServerInfo};

use super::request::UNSUPPORTED_FIELDS;
use crate::cluster::remote::connections::EngineChannel;
use crate::cluster::remote::watch_health::{ListedModels, ModelSource};
use crate::proto::v1;

/// The model of a vLLM server.
pub(super) struct VllmModel {
    control: ControlClient<EngineChannel>,
    /// Name of the engine, for the log.
    engine: String,
}

impl VllmModel {
    pub(super) fn new(channel: EngineChannel, engine: &str) -> Self {
        Self {
            control: ControlClient::new(channel),
            engine: engine.to_owned(),
        }
    }
}

impl ModelSource for VllmModel {
    async fn list(&mut self) -> ListedModels {
        let mut other_call = self.control.clone();
        let (model, server) = join(
            self.control.get_model_info(GetModelInfoRequest {}),
            other_call.get_server_info(GetServerInfoRequest {}),
        )
        .await;
        match (model, server) {
            (Ok(model), Ok(server)) => {
                let model = model_message(model.into_inner(), &server.into_inner());
                ListedModels::Models(vec![model])
            }
            (Err(status), _) | (_, Err(status)) => {
                let (engine, code) = (&self.engine, status.code());
                tracing::warn!(
                    engine,
                    ?code,
                    "cannot read an engine's model from its service vllm.Control; check that the address is the \
                     --grpc-port of `vllm serve`"
                );
                ListedModels::Unknown
            }
        }
    }
}

fn model_message(model: ModelInfo, server: &ServerInfo) -> v1::Model {
    v1::Model {
        name: model.served_model_name,
        aliases: model.served_model_aliases,
        context_length: server.max_model_len,
        runner: "vllm".to_owned(),
        unsupported: UNSUPPORTED_FIELDS.map(str::to_owned).to_vec(),
        ..v1::Model::default()
    }
}
