//! Fuzz target of settings: the file of a server, and the standard input of a worker process.

use std::cell::LazyCell;
use std::collections::BTreeSet;

use clap::{Args, Command};

use super::check::default_settings;
use super::cluster::EngineDefaults;
use super::cluster::api_key::KeySource;
use super::commands::{ServeSettings, known_keys};
use super::engine;
use super::error::FileError;
use super::file::{KnownKeys, ParsedFile};
use super::model::ModelSettings;
use super::settings::{Settings, keys};
use super::show::render_settings;
use super::worker::AttachSettings;
use crate::certificates::ClientTls;

const PATH: &str = "tokenway.toml";

/// The parts that are the same for every file.
struct Base {
    server_keys: KnownKeys,
    server: Settings,
    worker_keys: KnownKeys,
    worker: Settings,
}

thread_local! {
    static BASE: LazyCell<Base> = const { LazyCell::new(Base::new) };
}

impl Base {
    fn new() -> Self {
        let worker = AttachSettings::augment_args(Command::new("settings"));
        let worker = worker.mut_args(|argument| argument.env(None::<&'static str>));
        let worker = worker.try_get_matches_from(["settings", "--engine", "unix:/worker.sock"]);
        let worker = worker.expect("the arguments are valid");
        Self {
            server_keys: known_keys(),
            server: default_settings::<ServeSettings>().expect("the defaults are valid"),
            worker_keys: KnownKeys {
                top: keys::<AttachSettings>().into_iter().collect(),
                model: BTreeSet::new(),
            },
            worker: Settings::from_matches::<AttachSettings>(&worker)
                .expect("the defaults are valid"),
        }
    }
}

/// A settings file. Every error has a place in the file. Settings that are accepted are the same after they were shown
/// as a file and read again.
pub(crate) fn settings(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        BASE.with(|base| {
            base.check_server(text);
            base.check_worker(text);
        });
    }
}

impl Base {
    fn check_server(&self, text: &str) {
        let parsed = ParsedFile::parse(PATH, text, &self.server_keys);
        check_errors(text, &parsed.errors);
        if !parsed.errors.is_empty() {
            return;
        }
        check_errors(text, parsed.file.cluster.errors());
        let read_key = |_: KeySource<'_>| Err("not read".to_owned());
        let defaults = EngineDefaults {
            listed: Vec::new(),
            tls: ClientTls::default(),
            read_key: &read_key,
            read_certificates: &|_| Ok(ClientTls::default()),
        };
        if let Err(errors) = parsed.file.cluster.cluster_spec(&defaults) {
            check_errors(text, &errors);
        }
        let mut settings = self.server.clone();
        if let Err(errors) = settings.add_file::<ServeSettings>(&parsed.file) {
            return check_errors(text, &errors);
        }
        for table in &parsed.file.models {
            if let Err(errors) = settings.for_model_table::<ModelSettings>(table) {
                return check_errors(text, &errors);
            }
        }
        let Ok(models) = engine::model_settings(&settings) else {
            return;
        };
        let shown = render_settings::<ServeSettings>(&settings, &models);
        let parsed = ParsedFile::parse(PATH, &shown, &self.server_keys);
        assert!(parsed.errors.is_empty(), "{:?} in\n{shown}", parsed.errors);
        for entry in &parsed.file.top.entries {
            assert_eq!(settings.values.get(&entry.key), Some(&entry.value));
        }
        assert_eq!(parsed.file.models.len(), settings.tables.len());
    }

    fn check_worker(&self, text: &str) {
        let parsed = ParsedFile::parse(PATH, text, &self.worker_keys);
        check_errors(text, &parsed.errors);
        if parsed.errors.is_empty()
            && let Err(errors) = self.worker.clone().add_file::<AttachSettings>(&parsed.file)
        {
            check_errors(text, &errors);
        }
    }
}

fn check_errors(text: &str, errors: &[FileError]) {
    for error in errors {
        let position = error.position.expect("an error of a file has a place");
        let line = text.split('\n').nth(position.line - 1);
        let line = line.unwrap_or_else(|| panic!("{error} is beyond the last line"));
        assert!(
            position.column <= line.chars().count() + 1,
            "{error} is beyond its line"
        );
        assert!(!error.problem.is_empty());
    }
}
