//! The settings of the commands that run a server.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::engine::{self, EngineSettings};
use super::error::ConfigError;
use super::file::{KnownKeys, table_key};
use super::grpc::GrpcSettings;
use super::http::HttpSettings;
use super::model::ModelSettings;
use super::server::ServerSettings;
use super::settings::{DeclaredSettings, Settings, keys};
use super::values::ParsedText;
use crate::cluster::EngineAddress;
use crate::server::{ServerParts, Source};

/// The settings of a command that runs a server.
pub(super) trait ServerCommand: DeclaredSettings {
    /// Builds the parts of the server from these settings. `models` has the settings of each model of an engine. This
    /// method adds the defaults that depend on a model's runner to `models`.
    fn server_parts(
        self,
        settings: &Settings,
        models: &mut [Settings],
    ) -> Result<ServerParts, ConfigError>;
}

/// The settings of `tokenway serve`.
#[derive(Args, Serialize, Deserialize)]
pub(super) struct ServeSettings {
    #[command(flatten)]
    #[serde(flatten)]
    engine: EngineSettings,
    #[command(flatten)]
    #[serde(flatten)]
    http: HttpSettings,
    #[command(flatten)]
    #[serde(flatten)]
    grpc: GrpcSettings,
    #[command(flatten)]
    #[serde(flatten)]
    server: ServerSettings,
}

/// The settings of `tokenway engine`.
#[derive(Args, Serialize, Deserialize)]
pub(super) struct EngineCommandSettings {
    #[command(flatten)]
    #[serde(flatten)]
    engine: EngineSettings,
    #[command(flatten)]
    #[serde(flatten)]
    grpc: GrpcSettings,
    #[command(flatten)]
    #[serde(flatten)]
    server: ServerSettings,
}

/// The settings of `tokenway gateway`.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Engines")]
pub(super) struct GatewaySettings {
    /// Address of an engine: `http://host:port` or `unix:/path` for the gRPC API of a Tokenway engine,
    /// `openai+http://host:port/v1` (or `openai+https://…`) for an OpenAI-compatible server, `vllm+grpc://host:port` for
    /// vLLM's gRPC API. Separate several engines with commas, or repeat the flag. Required, here or in the settings
    /// file
    #[arg(
        long,
        env = "TOKENWAY_ENGINE",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    engine: Vec<ParsedText<EngineAddress>>,
    #[command(flatten)]
    #[serde(flatten)]
    http: HttpSettings,
    #[command(flatten)]
    #[serde(flatten)]
    grpc: GrpcSettings,
    #[command(flatten)]
    #[serde(flatten)]
    server: ServerSettings,
}

impl ServerCommand for ServeSettings {
    fn server_parts(
        self,
        settings: &Settings,
        models: &mut [Settings],
    ) -> Result<ServerParts, ConfigError> {
        let source = Source::Engine(self.engine.engine_parts(models, settings)?);
        self.server
            .server_parts(source, Some(self.http), Some(self.grpc), settings)
    }
}

impl ServerCommand for EngineCommandSettings {
    fn server_parts(
        self,
        settings: &Settings,
        models: &mut [Settings],
    ) -> Result<ServerParts, ConfigError> {
        let source = Source::Engine(self.engine.engine_parts(models, settings)?);
        self.server
            .server_parts(source, None, Some(self.grpc), settings)
    }
}

impl ServerCommand for GatewaySettings {
    fn server_parts(
        self,
        settings: &Settings,
        _models: &mut [Settings],
    ) -> Result<ServerParts, ConfigError> {
        if self.engine.is_empty() {
            let name = settings.name("engine");
            let problem = format!(
                "{name} is required for a gateway: give http://host:port, unix:/path, openai+http://host:port/v1 or \
                 vllm+grpc://host:port"
            );
            return Err(settings.error("engine", problem));
        }
        let engines = self.engine.into_iter().map(|engine| engine.value);
        let source = Source::Remote(engines.collect());
        let parts = self
            .server
            .server_parts(source, Some(self.http), Some(self.grpc), settings)?;
        parts
            .check_engines()
            .map_err(|problem| settings.error("engine", problem))?;
        Ok(parts)
    }
}

/// Builds the parts of a server from its settings. Also returns the settings of its models, with all defaults.
pub(super) fn resolve_server<S: ServerCommand>(
    settings: &Settings,
) -> Result<(ServerParts, Vec<Settings>), ConfigError> {
    let has_models = keys::<S>().contains(&"runner".to_owned());
    let mut models = match has_models {
        true => engine::model_settings(settings)?,
        false => Vec::new(),
    };
    let parts = settings.get::<S>()?.server_parts(settings, &mut models)?;
    Ok((parts, models))
}

/// Returns all keys that a settings file may contain. `serve`, `engine` and `gateway` accept the same file.
pub(super) fn known_keys() -> KnownKeys {
    let commands = [keys::<ServeSettings>(), keys::<GatewaySettings>()];
    let model = keys::<ModelSettings>().into_iter();
    KnownKeys {
        top: commands.into_iter().flatten().collect(),
        model: model.map(|key| table_key(&key).to_owned()).collect(),
    }
}
