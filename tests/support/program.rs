//! Programs that the tests start: `tokenway`, the examples, and clients in Python, Node, curl and Chromium.

use std::ffi::{OsStr, OsString};
use std::io::{PipeReader, pipe};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::running_program::RunningProgram;

/// A program that has not been started.
pub struct Program(Command);

/// Exit code and output of a finished program.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Returns an example of this crate, as `cargo run --example NAME` runs it.
pub fn example(name: &str) -> Program {
    let binaries = Path::new(env!("CARGO_BIN_EXE_tokenway"))
        .parent()
        .expect("the binary is in a folder");
    let binary = binaries.join("examples").join(name);
    assert!(
        binary.is_file(),
        "{} is missing: build it with `cargo build --examples`, or run all tests",
        binary.display()
    );
    Program::new(&binary)
}

/// Returns the program `tokenway`, with an empty environment.
pub fn tokenway() -> Program {
    let mut program = Program::new(Path::new(env!("CARGO_BIN_EXE_tokenway")));
    program.0.env_clear();
    program
}

/// Returns a Python script, in the virtual environment of the examples and tests. `script` is its path in the
/// repository.
pub fn python(script: &str) -> Program {
    python_of("TOKENWAY_TEST_PYTHON", ".venv", script)
}

/// Returns a Python script in the virtual environment of lm-eval, which is separate because it is large.
pub fn lm_eval(script: &str) -> Program {
    python_of("TOKENWAY_TEST_LM_EVAL_PYTHON", ".venv-lm-eval", script)
}

/// Returns llama.cpp's own server with this model file. Its first line of output is its URL.
pub fn llama_cpp_server(model: &Path) -> Program {
    let script = "tests/support/llama_cpp_server.py";
    python_of("TOKENWAY_TEST_WORKER_PYTHON", ".venv-python-worker", script).arg(model)
}

/// Returns a real vLLM that serves OpenAI's API and its own gRPC API on these ports of 127.0.0.1. Its processes are a
/// process group.
pub fn vllm_server(http: u16, grpc: u16) -> Program {
    let mut program = Program::new(&project_path("scripts/vllm.sh"));
    program.0.process_group(0).stderr(Stdio::null());
    let [http, grpc] = [http, grpc].map(|port| port.to_string());
    program.args(["serve", "--port", &http, "--grpc-port", &grpc])
}

/// Returns the program that runs the example Python worker (`examples/python_worker`).
pub fn python_worker() -> Program {
    python_module("tokenway_worker")
}

/// Returns the path and arguments with which an engine starts the Python worker. `runners` is a folder to add to the
/// worker's module path.
pub fn python_worker_command(runners: &str) -> (PathBuf, Vec<OsString>) {
    let paths = [
        project_path("examples/python_worker"),
        project_path(runners),
    ];
    let paths = std::env::join_paths(paths).expect("the paths contain no colon");
    let mut variable = OsString::from("PYTHONPATH=");
    variable.push(paths);
    let interpreter = find_interpreter("TOKENWAY_TEST_WORKER_PYTHON", ".venv-python-worker");
    let module = ["-B", "-m", "tokenway_worker"].map(OsString::from);
    let command = [variable, interpreter.into()].into_iter().chain(module);
    ("/usr/bin/env".into(), command.collect())
}

/// Returns the Python worker's own tests.
pub fn python_worker_tests() -> Program {
    let mut program = python_module("pytest").arg("-q");
    program
        .0
        .current_dir(project_path("examples/python_worker"));
    program
}

fn python_module(module: &str) -> Program {
    let interpreter = find_interpreter("TOKENWAY_TEST_WORKER_PYTHON", ".venv-python-worker");
    let mut program = Program::new(&interpreter).without_proxy();
    program
        .0
        .env("PYTHONPATH", project_path("examples/python_worker"));
    program.0.env("PYTHONDONTWRITEBYTECODE", "1");
    program.args(["-m", module])
}

fn python_of(variable: &str, venv: &str, script: &str) -> Program {
    let interpreter = find_interpreter(variable, venv);
    let mut program = Program::new(&interpreter).without_proxy();
    // The test scripts import the client from the examples.
    program.0.env("PYTHONPATH", project_path("examples"));
    program.0.env("PYTHONDONTWRITEBYTECODE", "1");
    program.arg(project_path(script))
}

fn find_interpreter(variable: &str, venv: &str) -> PathBuf {
    let interpreter = std::env::var_os(variable)
        .map_or_else(|| project_path(venv).join("bin/python"), PathBuf::from);
    assert!(
        interpreter.exists(),
        "{} does not exist: `make test` creates it, or set {variable} to another interpreter",
        interpreter.display()
    );
    interpreter
}

/// Returns a Node script. `script` is its path in the repository.
pub fn node(script: &str) -> Program {
    let modules = project_path("tests/clients/node_modules");
    assert!(
        modules.exists(),
        "{} does not exist: `scripts/node.sh` creates it",
        modules.display()
    );
    let program = Program::new(Path::new("node")).without_proxy();
    program.arg(project_path(script))
}

/// Returns curl, which ignores the machine's configuration file.
pub fn curl() -> Program {
    let program = Program::new(Path::new("curl")).without_proxy();
    program.args(["--disable", "--silent", "--show-error"])
}

/// Returns a program of this machine; `None` if it is not installed.
pub fn system(name: &str) -> Option<Program> {
    let folders = std::env::var_os("PATH")?;
    let mut paths = std::env::split_paths(&folders).map(|folder| folder.join(name));
    let path = paths.find(|path| path.is_file())?;
    Some(Program::new(&path))
}

/// Returns headless Chromium. It prints the DOM of the page at `url` after the page's scripts have run.
///
/// `profile` is an empty folder. Every host name resolves to 127.0.0.1.
pub fn chromium(url: &str, profile: &Path) -> Program {
    let binary = std::env::var_os("TOKENWAY_TEST_CHROMIUM").unwrap_or_else(|| "chromium".into());
    let mut folder = OsString::from("--user-data-dir=");
    folder.push(profile);
    Program::new(Path::new(&binary)).arg(folder).args([
        "--headless=new",
        // Chromium's sandbox does not work for root and in containers, where the tests may run.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * 127.0.0.1",
        // Virtual time advances only while no request is pending, so the page's scripts may wait for the network.
        "--virtual-time-budget=10000",
        "--dump-dom",
        url,
    ])
}

/// Starts `tokenway serve` on free ports. Returns the process and the URLs of its HTTP and gRPC APIs.
pub async fn start_server(arguments: &[&str]) -> (RunningProgram, [String; 2]) {
    start_serving(tokenway(), arguments).await
}

/// Like [`start_server`], with the environment of `program`.
pub async fn start_serving(program: Program, arguments: &[&str]) -> (RunningProgram, [String; 2]) {
    start_command(program, "serve", arguments).await
}

/// Starts `tokenway gateway` on free ports. Returns the process and the URLs of its APIs once an engine is ready.
pub async fn start_gateway(arguments: &[&str]) -> (RunningProgram, [String; 2]) {
    start_command(tokenway(), "gateway", arguments).await
}

async fn start_command(
    program: Program,
    command: &str,
    arguments: &[&str],
) -> (RunningProgram, [String; 2]) {
    let free = "127.0.0.1:0";
    let mut program = program.args([command, "--http-listen", free, "--grpc-listen", free]);
    program.0.stderr(Stdio::piped());
    let mut running = program.args(arguments).start();
    let mut url = async || {
        let line = running.read_line().await;
        line.split_whitespace()
            .nth(1)
            .expect("an address")
            .to_owned()
    };
    let urls = [url().await, url().await];
    // Lines about workers come before the line `ready`.
    while !running.read_line().await.starts_with("ready ") {}
    (running, urls)
}

/// Returns the arguments after `command` in an example's header. They are split as a shell splits them: quotes, and a
/// backslash at the end of a line.
pub fn header_arguments(source: &str, command: &str) -> Vec<String> {
    let text = std::fs::read_to_string(project_path(source)).expect("the example can be read");
    let text = text.replace("\\\n//!", "");
    let line = text.lines().find_map(|line| line.split_once(command));
    let (_, arguments) = line.unwrap_or_else(|| panic!("'{command}' is not in {source}'s header"));
    split_words(arguments)
}

/// Returns the contents of a file that docs/configuration.md asks its reader to write.
pub fn documented_file(name: &str) -> String {
    let text = std::fs::read_to_string(project_path("docs/configuration.md"))
        .expect("docs/configuration.md exists");
    let begin = format!("cat >{name} <<'END'\n");
    let file = text
        .split_once(&begin)
        .and_then(|(_, rest)| rest.split_once("END\n"));
    let (file, _) = file.unwrap_or_else(|| panic!("docs/configuration.md has no {name}"));
    file.to_owned()
}

impl Program {
    fn new(binary: &Path) -> Self {
        let mut command = Command::new(binary);
        command.stdin(Stdio::null()).kill_on_drop(true);
        Self(command)
    }

    /// Makes the program send requests to this machine directly, not through a configured proxy.
    fn without_proxy(self) -> Self {
        self.env("NO_PROXY", "127.0.0.1")
            .env("no_proxy", "127.0.0.1")
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    pub fn args(self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Redirects standard error to a new file at `path`.
    pub fn log_to(mut self, path: &Path) -> Self {
        let file = std::fs::File::create(path).expect("the file can be created");
        self.0.stderr(file);
        self
    }

    /// Redirects standard error to an open file or pipe.
    pub fn log_to_file(mut self, file: impl Into<Stdio>) -> Self {
        self.0.stderr(file);
        self
    }

    /// Redirects standard error to a pipe. Returns the reading end.
    pub fn log_to_pipe(mut self) -> (Self, PipeReader) {
        let (reader, writer) = pipe().expect("a pipe");
        self.0.stderr(writer);
        (self, reader)
    }

    /// Starts the program with this standard output. The test keeps no copy of the pipe's writing end.
    pub fn start_with_output(mut self, stdout: impl Into<Stdio>) -> RunningProgram {
        let child = self
            .0
            .stdout(stdout)
            .spawn()
            .expect("the program can be started");
        // A copy of the writing end in the test process would keep the pipe open.
        drop(self);
        RunningProgram::new(child)
    }

    /// Runs the program until it exits.
    pub async fn run(mut self) -> Outcome {
        let output = self.0.output().await.expect("the program can be started");
        let text = |bytes| String::from_utf8(bytes).expect("the output is UTF-8");
        Outcome {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// Starts the program. The test can read its standard output line by line.
    pub fn start(self) -> RunningProgram {
        self.start_with_output(Stdio::piped())
    }
}

impl Outcome {
    /// Asserts exit code 0. Returns the standard output.
    pub fn expect_success(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Asserts exit code 1. Returns the standard error.
    pub fn expect_failure(self) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        self.stderr
    }
}

fn project_path(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn split_words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quote = None;
    for character in line.trim().chars() {
        match quote {
            Some(open) if open == character => quote = None,
            None if matches!(character, '"' | '\'') => quote = Some(character),
            None if character == ' ' => words.push(String::new()),
            Some(_) | None => words.last_mut().expect("never empty").push(character),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Starts an engine process on which every sequence stops before token 2. Returns the process and its address.
pub async fn engine_process() -> (RunningProgram, String) {
    let free = "127.0.0.1:0";
    let engine = tokenway().args(["engine", "--grpc-listen", free]);
    let engine = engine.args(["--test-runner-silent-at", "2"]);
    let mut running = engine.env("TEST_RUNNER_FREQUENCY_MS", "0").start();
    let line = running.read_line().await;
    let address = line.split_whitespace().nth(1).expect("an address");
    assert!(running.read_line().await.starts_with("ready "));
    (running, address.to_owned())
}
