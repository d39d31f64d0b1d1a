//! Processes exit with their documented exit codes, even while their devices compute.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::Setup;
use tokenway::output::Output;
use tokenway::request::{ChatMessage, TokenId};
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    BosPolicy, LoadError, LoadedModel, Loader, Model, ModelError, ModelFacts, TokenBytes,
};
use tokenway::server::ServerParts;
use tokenway::server::run::{OnHangup, RunError, serve_until_signalled};

/// A loader with a planted bug: the first model of this loader that is dropped panics. The scheduler's task drops it,
/// because the engine keeps only one model if several workers load the same.
struct FlawedLoader {
    loader: TestRunnerLoader,
    has_panicked: Arc<AtomicBool>,
}

struct FlawedModel {
    model: Arc<dyn Model>,
    has_panicked: Arc<AtomicBool>,
}

impl Loader for FlawedLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.loader.load(slots, progress)?;
        let has_panicked = Arc::clone(&self.has_panicked);
        let model = Arc::new(FlawedModel {
            model,
            has_panicked,
        });
        Ok(LoadedModel { model, runner })
    }

    fn name(&self) -> &'static str {
        "flawed"
    }
}

impl Model for FlawedModel {
    fn facts(&self) -> &ModelFacts {
        self.model.facts()
    }

    fn tokenize(&self, text: &str, bos: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        self.model.tokenize(text, bos)
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        self.model.token_bytes(ids)
    }

    fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        self.model.render_chat(messages)
    }
}

impl Drop for FlawedModel {
    fn drop(&mut self) {
        let is_first = !self.has_panicked.swap(true, Ordering::SeqCst);
        assert!(!is_first, "a planted bug");
    }
}

fn flawed_parts() -> ServerParts {
    let loader = FlawedLoader {
        loader: TestRunnerLoader::new(TestRunnerOptions::default()),
        has_panicked: Arc::default(),
    };
    let mut setup = Setup::runner("flawed", Arc::new(loader), 1);
    setup.engine().models[0].workers = 2;
    setup.drain(Duration::ZERO, Duration::ZERO).parts
}

#[tokio::test]
async fn a_server_whose_scheduler_panics_drains_and_fails() {
    let (out, err) = (
        Output::to_writer("out", std::io::sink()),
        Output::to_writer("err", std::io::sink()),
    );
    let (out, err) = (out.expect("a thread starts"), err.expect("a thread starts"));
    let on_hangup = OnHangup::NoEffect("a test");
    let ended = serve_until_signalled(flawed_parts(), on_hangup, &out, &err).await;
    let Err(RunError::Panicked(panicked)) = ended else {
        panic!("the server ended with {ended:?}");
    };
    assert_eq!(
        (panicked.task, &*panicked.message),
        ("scheduler", "a planted bug")
    );
}

#[cfg(feature = "llama-cpp")]
mod real_model {
    //! Tests with llama.cpp, which computes on its own threads while the process exits.

    use rustix::process::Signal;
    use serde_json::json;
    use tokenway::runner::llama::{LlamaLoader, LlamaOptions};

    use super::Arc;
    use crate::support::http::{Response, completion};
    use crate::support::program::{Program, tokenway};
    use crate::support::running_program::RunningProgram;
    use crate::support::{Setup, TestServer, model_path};

    /// Number of streams that run while the server exits.
    const STREAMS: usize = 4;

    /// Number of times that each kind of exit is tested. `scripts/test_long.sh` raises it.
    fn repetitions(default: usize) -> usize {
        let variable = std::env::var("TOKENWAY_TEST_EXITS");
        variable.map_or(default, |count| count.parse().expect("a number"))
    }

    fn model_arguments() -> [String; 4] {
        let path = model_path().display().to_string();
        ["--model-path", &path, "--slots", "4"].map(str::to_owned)
    }

    fn serve() -> Program {
        let free = "127.0.0.1:0";
        let listen = ["serve", "--http-listen", free, "--grpc-listen", free];
        let program = tokenway().args(listen).args(["--drain-grace", "0"]);
        program.args(model_arguments())
    }

    /// Reads the address of the HTTP API from the first line that the server prints.
    async fn http_address(server: &mut RunningProgram) -> String {
        let line = server.read_line().await;
        let url = line.split_whitespace().nth(1).expect("a URL");
        url.replace("http://", "")
    }

    /// Starts streams, which then run until they are dropped.
    async fn start_streams(address: &str) -> Vec<Response> {
        let body =
            json!({"prompt": "Once", "max_tokens": 2_000, "ignore_eos": true, "stream": true});
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let mut stream = completion(&body).send_to(address).await;
            assert!(stream.read_line().await.is_some());
            streams.push(stream);
        }
        streams
    }

    async fn start_and_stream(program: Program) -> (RunningProgram, Vec<Response>) {
        let mut server = program.start();
        let address = http_address(&mut server).await;
        while !server.read_line().await.starts_with("ready ") {}
        let streams = start_streams(&address).await;
        (server, streams)
    }

    async fn wait_until_draining(server: &mut RunningProgram) {
        assert!(server.read_line().await.starts_with("draining "));
    }

    /// Asserts the exit code. A process that a signal ended has no exit code.
    async fn assert_exit_code(server: RunningProgram, code: i32, repetition: usize) {
        let status = server.wait_for_exit().await;
        assert_eq!(status.code(), Some(code), "exit {repetition}: {status}");
    }

    #[tokio::test]
    async fn a_second_signal_while_a_model_computes_exits_with_1() {
        for repetition in 0..repetitions(20) {
            let (mut server, mut streams) = start_and_stream(serve()).await;
            server.signal(Signal::TERM);
            wait_until_draining(&mut server).await;
            // Every stream has finished its prefill by now. An ordinary exit would crash about one time in ten.
            for _ in 0..7 {
                assert!(streams[STREAMS - 1].read_line().await.is_some());
            }
            // A different signal never counts as a repetition of the first signal.
            server.signal(Signal::INT);
            assert_exit_code(server, 1, repetition).await;
            drop(streams);
        }
    }

    #[tokio::test]
    async fn a_drain_that_cuts_off_running_streams_exits_with_0() {
        for repetition in 0..repetitions(5) {
            let (server, streams) = start_and_stream(serve().args(["--drain-timeout", "0"])).await;
            server.signal(Signal::TERM);
            assert_exit_code(server, 0, repetition).await;
            drop(streams);
        }
    }

    #[tokio::test]
    async fn a_second_signal_while_a_model_loads_never_crashes() {
        for repetition in 0..repetitions(5) {
            let mut server = serve().start();
            http_address(&mut server).await;
            assert!(server.read_line().await.starts_with("gRPC "));
            server.signal(Signal::TERM);
            // The model may just have been loaded, so the line `ready` may come first.
            while !server.read_line().await.starts_with("draining ") {}
            server.signal(Signal::INT);
            let status = server.wait_for_exit().await;
            // The drain may just have been completed, so the exit code is 0 or 1.
            assert!(
                matches!(status.code(), Some(0 | 1)),
                "exit {repetition}: {status}"
            );
        }
    }

    #[tokio::test]
    async fn a_failed_load_beside_a_loading_model_exits_with_1() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let broken = folder.path().join("broken.gguf");
        std::fs::write(&broken, "GGUF and no more").expect("a file");
        let settings = format!(
            "[[model]]\nname = \"whole\"\nrunner = \"llama\"\nmodel_path = {:?}\n\n\
             [[model]]\nname = \"broken\"\nrunner = \"llama\"\nmodel_path = {:?}\n",
            model_path(),
            broken
        );
        let file = folder.path().join("settings.toml");
        std::fs::write(&file, settings).expect("a file");
        let file = file.display().to_string();
        for repetition in 0..repetitions(5) {
            let free = "127.0.0.1:0";
            let arguments = ["serve", "--config", &file, "--drain-grace", "0"];
            let listen = ["--http-listen", free, "--grpc-listen", free];
            let outcome = tokenway().args(arguments).args(listen).run().await;
            assert_eq!(outcome.code, Some(1), "exit {repetition}: {outcome:?}");
            assert!(outcome.stderr.contains("'broken'"), "{outcome:?}");
        }
    }

    #[tokio::test]
    async fn a_worker_stopped_while_it_computes_exits_with_0() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let socket = format!("unix:{}", folder.path().join("workers.sock").display());
        let free = "127.0.0.1:0";
        for repetition in 0..repetitions(5) {
            let worker = tokenway().args(["worker", "--engine", &socket]);
            let worker = worker.args(model_arguments()).start();
            let listen = ["serve", "--http-listen", free, "--grpc-listen", free];
            let engine = tokenway().args(listen).args(["--runner", "attached"]);
            let engine = engine.args(["--model-name", "m", "--worker-listen", &socket]);
            // The engine becomes ready only after its worker.
            let (engine, streams) = start_and_stream(engine.args(["--drain-grace", "0"])).await;
            worker.signal(Signal::TERM);
            assert_exit_code(worker, 0, repetition).await;
            drop(streams);
            assert_eq!(engine.interrupt().await, Some(0));
        }
    }

    #[tokio::test]
    async fn dropping_a_server_while_its_model_computes_ends_its_device_thread() {
        let loader = Arc::new(LlamaLoader::new(LlamaOptions {
            model_path: model_path(),
            threads: 2,
            context_length: None,
            ..LlamaOptions::default()
        }));
        let device = Arc::downgrade(&loader);
        let server: TestServer = Setup::runner("smollm2", loader, STREAMS).start().await;
        let streams = start_streams(&server.http_address()).await;
        drop(server);
        // The device thread holds a reference to the loader until the thread ends.
        assert_eq!(device.strong_count(), 0);
        drop(streams);
    }
}
