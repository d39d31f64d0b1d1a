//! A key and certificates, created by Tokenway's own commands, for the paths that measure their cost.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use tokenway::certificates::TlsCommand;
use tokenway::keys::KeysCommand;

use super::path::Protection;
use crate::access::Access;
use crate::serve;

/// Value of each limit of the key. No run reaches it, but the server counts requests and tokens toward it.
const LIMIT: &str = "4000000000";

pub(super) struct Credentials {
    keys_file: PathBuf,
    key: Arc<str>,
    /// Folder with the certificates.
    tls: PathBuf,
}

/// The commands of `tokenway` that create keys and certificates.
#[derive(Parser)]
enum Cli {
    #[command(subcommand)]
    Keys(KeysCommand),
    #[command(subcommand)]
    Tls(TlsCommand),
}

impl Credentials {
    /// Creates a key with all limits, and certificates, in files in this folder.
    pub(super) fn create(folder: &Path) -> anyhow::Result<Self> {
        let (keys_file, tls) = (folder.join("keys.toml"), folder.join("tls"));
        let file = keys_file.to_string_lossy();
        let limits = ["--requests-per-minute", LIMIT, "--tokens-per-minute", LIMIT];
        let key = [
            "keys",
            "new",
            "perf",
            "--concurrent-requests",
            LIMIT,
            "--keys-file",
            &file,
        ];
        let key = run_command(&[&key[..], &limits].concat())?;
        run_command(&["tls", "self-signed", "--out", &tls.to_string_lossy()])?;
        Ok(Self {
            keys_file,
            key: key.trim().into(),
            tls,
        })
    }

    /// Returns the credentials of a server with this protection, and those of its clients.
    pub(super) fn of(&self, protection: Protection) -> (serve::Credentials, Access) {
        let keys_file = Some(self.keys_file.clone());
        let key = Some(Arc::clone(&self.key));
        match protection {
            Protection::None => (serve::Credentials::default(), Access::default()),
            Protection::Keys => {
                let (tls, authority) = (None, None);
                (
                    serve::Credentials { keys_file, tls },
                    Access { key, authority },
                )
            }
            Protection::KeysAndTls => {
                let authority = Some(self.tls.join("ca.pem").into());
                let tls = Some(self.tls.clone());
                (
                    serve::Credentials { keys_file, tls },
                    Access { key, authority },
                )
            }
        }
    }
}

/// Runs a command of `tokenway`. Returns its output.
fn run_command(arguments: &[&str]) -> anyhow::Result<String> {
    let arguments = ["tokenway"].iter().chain(arguments);
    Ok(match Cli::try_parse_from(arguments)? {
        Cli::Keys(command) => command.run()?.result,
        Cli::Tls(command) => command.run()?,
    })
}
