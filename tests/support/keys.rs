//! A keys file, and the commands that change it.

use std::path::PathBuf;

use tempfile::TempDir;

use super::program::{Outcome, Program, tokenway};

/// A keys file in a temporary folder.
pub struct KeysFile {
    pub path: PathBuf,
    pub folder: TempDir,
}

impl KeysFile {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("keys.toml");
        Self { path, folder }
    }

    pub fn command(&self, arguments: &str) -> Program {
        let keys = tokenway().arg("keys").args(arguments.split(' '));
        keys.env("TOKENWAY_KEYS_FILE", &self.path)
    }

    /// Runs `tokenway keys` with these arguments.
    pub async fn run(&self, arguments: &str) -> Outcome {
        self.command(arguments).run().await
    }

    /// Runs `tokenway keys` with these arguments, and returns the secret that it prints.
    pub async fn secret(&self, arguments: &str) -> String {
        let printed = self.run(arguments).await.expect_success();
        printed.trim_end().to_owned()
    }

    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.path).expect("the keys file")
    }
}
