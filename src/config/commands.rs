//! The settings of the commands that run a server.

use clap::Args;
use serde::{Deserialize, Serialize};

use super::cluster;
use super::engine::{self, EngineSettings};
use super::error::ConfigError;
use super::file::{KnownKeys, table_key};
use super::grpc::GrpcSettings;
use super::http::HttpSettings;
use super::model::ModelSettings;
use super::runner::use_downloaded;
use super::server::ServerSettings;
use super::settings::{DeclaredSettings, Settings, keys};
use super::tls::EngineTlsSettings;
use super::values::ParsedText;
use crate::cluster::{ClusterSpec, EngineAddress, PlacementPolicy};
use crate::server::run::ModelFiles;
use crate::server::{ServerParts, Source};

/// Key of a setting that a reload applies together with the engines and routes.
pub(super) const PREFIX_INDEX_BLOCKS_KEY: &str = "prefix_index_blocks";

/// The settings of a command that runs a server.
pub(super) trait ServerCommand: DeclaredSettings + 'static {
    /// True if a running server of this command can apply a changed settings file.
    const RELOADS_SETTINGS: bool = false;

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
    /// Address of an engine: `http://host:port` (or `grpc://host:port`), `https://host:port` (TLS) or `unix:/path` for
    /// the gRPC API of a Tokenway engine, `openai+http://host:port/v1` (or `openai+https://…`) for an OpenAI-compatible
    /// server, `vllm+grpc://host:port` for vLLM's gRPC API. Separate several engines with commas, or repeat the flag.
    /// Required, here or in the settings file, where `[[engine]]` tables can give engines names and keys
    #[arg(
        long,
        env = "TOKENWAY_ENGINE",
        value_delimiter = ',',
        value_name = "ADDRESS"
    )]
    engine: Vec<ParsedText<EngineAddress>>,
    /// Maximum number of prompt blocks whose hashes the gateway keeps for cache-aware placement. A request goes to the
    /// engine that can reuse most of its prompt, unless that engine's additional load is larger than the reuse. A block
    /// is at most 512 bytes of text or 128 token ids, and takes about 40 bytes. 0: requests are placed by load alone
    #[arg(
        long,
        env = "TOKENWAY_PREFIX_INDEX_BLOCKS",
        value_name = "N",
        default_value = "65536"
    )]
    prefix_index_blocks: u32,
    #[command(flatten)]
    #[serde(flatten)]
    tls: EngineTlsSettings,
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
    const RELOADS_SETTINGS: bool = true;

    fn server_parts(
        self,
        settings: &Settings,
        _models: &mut [Settings],
    ) -> Result<ServerParts, ConfigError> {
        let listed = self.engine.into_iter().map(|engine| engine.value);
        let spec = ClusterSpec {
            placement: PlacementPolicy::remembering(self.prefix_index_blocks),
            ..cluster::cluster_spec(settings, listed.collect(), self.tls.client_tls(settings)?)?
        };
        let source = Source::Remote(spec);
        let parts = self
            .server
            .server_parts(source, Some(self.http), Some(self.grpc), settings)?;
        cluster::check_conflicts(settings, &parts.engine_conflicts())?;
        Ok(parts)
    }
}

/// Builds the parts of a server from its settings. Also returns the settings of its models, with all defaults. `files`
/// has the file of each downloaded model.
pub(super) fn resolve_server<S: ServerCommand>(
    settings: &Settings,
    files: &ModelFiles,
) -> Result<(ServerParts, Vec<Settings>), ConfigError> {
    let has_models = keys::<S>().contains(&"runner".to_owned());
    let mut models = match has_models {
        true => engine::model_settings(settings)?,
        false => Vec::new(),
    };
    for model in &mut models {
        use_downloaded(model, files);
    }
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
