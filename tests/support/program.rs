//! Other programs: the examples, and clients in Python and Node. They end with the test that runs them.

use std::ffi::{OsStr, OsString};
use std::io::{PipeReader, pipe};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

/// A program to be run.
pub struct Program(Command);

/// What a program did until its end.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A program that runs until it is interrupted, or the test ends.
pub struct Running {
    child: Child,
    /// What it prints, while that is read.
    lines: Option<Lines<BufReader<ChildStdout>>>,
    /// What it logs, where that is read.
    log: Option<Lines<BufReader<ChildStderr>>>,
}

/// An example of this crate, as `cargo run --example NAME` would run it.
pub fn example(name: &str) -> Program {
    let binaries = Path::new(env!("CARGO_BIN_EXE_tokenway"))
        .parent()
        .expect("a binary lies in a folder");
    let binary = binaries.join("examples").join(name);
    assert!(
        binary.is_file(),
        "{} is missing: `cargo build --examples` makes it, and so does testing everything",
        binary.display()
    );
    Program::new(&binary)
}

/// `tokenway` itself. No setting of the machine's environment reaches it.
pub fn tokenway() -> Program {
    let mut program = Program::new(Path::new(env!("CARGO_BIN_EXE_tokenway")));
    program.0.env_clear();
    program
}

/// A Python script, by its path within the project, with what the examples and tests need installed.
pub fn python(script: &str) -> Program {
    python_of("TOKENWAY_TEST_PYTHON", ".venv", script)
}

/// A Python script that uses lm-eval, which has a virtual environment of its own: it is large.
pub fn lm_eval(script: &str) -> Program {
    python_of("TOKENWAY_TEST_LM_EVAL_PYTHON", ".venv-lm-eval", script)
}

/// The Python worker of the examples, with these arguments.
pub fn python_worker() -> Program {
    python_module("tokenway_worker")
}

/// What starts the Python worker for an engine that runs in the test: it finds its runner in this folder, too.
pub fn python_worker_command(runners: &str) -> (PathBuf, Vec<OsString>) {
    let paths = [project("examples/python_worker"), project(runners)];
    let paths = std::env::join_paths(paths).expect("they hold no colon");
    let mut variable = OsString::from("PYTHONPATH=");
    variable.push(paths);
    let interpreter = interpreter("TOKENWAY_TEST_WORKER_PYTHON", ".venv-python-worker");
    let module = ["-B", "-m", "tokenway_worker"].map(OsString::from);
    let command = [variable, interpreter.into()].into_iter().chain(module);
    ("/usr/bin/env".into(), command.collect())
}

/// The Python worker's own tests.
pub fn python_worker_tests() -> Program {
    let mut program = python_module("pytest").arg("-q");
    program.0.current_dir(project("examples/python_worker"));
    program
}

fn python_module(module: &str) -> Program {
    let interpreter = interpreter("TOKENWAY_TEST_WORKER_PYTHON", ".venv-python-worker");
    let mut program = Program::new(&interpreter).without_proxy();
    program
        .0
        .env("PYTHONPATH", project("examples/python_worker"));
    program.0.env("PYTHONDONTWRITEBYTECODE", "1");
    program.args(["-m", module])
}

fn python_of(variable: &str, venv: &str, script: &str) -> Program {
    let interpreter = interpreter(variable, venv);
    let mut program = Program::new(&interpreter).without_proxy();
    // The tests' scripts use the example's client.
    program.0.env("PYTHONPATH", project("examples"));
    program.0.env("PYTHONDONTWRITEBYTECODE", "1");
    program.arg(project(script))
}

fn interpreter(variable: &str, venv: &str) -> PathBuf {
    let interpreter =
        std::env::var_os(variable).map_or_else(|| project(venv).join("bin/python"), PathBuf::from);
    assert!(
        interpreter.exists(),
        "there is no {}: `make test` makes it, or {variable} names another",
        interpreter.display()
    );
    interpreter
}

/// A script for Node, by its path within the project, with what it needs installed beside it.
pub fn node(script: &str) -> Program {
    let modules = project("tests/clients/node_modules");
    assert!(
        modules.exists(),
        "there is no {}: `scripts/node.sh` makes it",
        modules.display()
    );
    let program = Program::new(Path::new("node")).without_proxy();
    program.arg(project(script))
}

/// curl, with no settings of the machine's own.
pub fn curl() -> Program {
    let program = Program::new(Path::new("curl")).without_proxy();
    program.args(["--disable", "--silent", "--show-error"])
}

/// Chromium without a window, which prints the page at this URL as it is once its scripts have run. `profile` is an
/// empty folder. Every name that is not this machine's leads to this machine.
pub fn chromium(url: &str, profile: &Path) -> Program {
    let binary = std::env::var_os("TOKENWAY_TEST_CHROMIUM").unwrap_or_else(|| "chromium".into());
    let mut folder = OsString::from("--user-data-dir=");
    folder.push(profile);
    Program::new(Path::new(&binary)).arg(folder).args([
        "--headless=new",
        // The tests may run as root, and in containers.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * 127.0.0.1",
        // Scripts wait for the network for as long as that takes.
        "--virtual-time-budget=10000",
        "--dump-dom",
        url,
    ])
}

/// `tokenway serve` on free ports: the process, and the URLs of its HTTP and its gRPC door.
pub async fn serving(arguments: &[&str]) -> (Running, [String; 2]) {
    let free = "127.0.0.1:0";
    let mut program = tokenway().args(["serve", "--http-listen", free, "--grpc-listen", free]);
    program.0.stderr(Stdio::piped());
    let mut running = program.args(arguments).start();
    let mut door = async || {
        let line = running.line().await;
        line.split_whitespace()
            .nth(1)
            .expect("an address")
            .to_owned()
    };
    let doors = [door().await, door().await];
    // What it tells of workers comes before.
    while !running.line().await.starts_with("ready ") {}
    (running, doors)
}

/// The arguments that the header of an example gives it: what stands behind `command`, with quotes and
/// a backslash at a line's end as a shell reads them.
pub fn header_arguments(source: &str, command: &str) -> Vec<String> {
    let text = std::fs::read_to_string(project(source)).expect("an example can be read");
    let text = text.replace("\\\n//!", "");
    let line = text.lines().find_map(|line| line.split_once(command));
    let (_, arguments) = line.unwrap_or_else(|| panic!("'{command}' is not in {source}'s header"));
    words(arguments)
}

/// The contents of a file that docs/configuration.md tells its reader to write.
pub fn documented_file(name: &str) -> String {
    let text = std::fs::read_to_string(project("docs/configuration.md"))
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

    /// A proxy of the machine's is not to see what stays on the machine.
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

    /// Writes its standard error to a file.
    pub fn log_to(mut self, path: &Path) -> Self {
        let file = std::fs::File::create(path).expect("the file can be made");
        self.0.stderr(file);
        self
    }

    /// Writes its standard error to this file or pipe.
    pub fn log_to_file(mut self, file: impl Into<Stdio>) -> Self {
        self.0.stderr(file);
        self
    }

    /// Writes its standard error to a pipe, whose reading end is left.
    pub fn log_to_pipe(mut self) -> (Self, PipeReader) {
        let (reader, writer) = pipe().expect("a pipe");
        self.0.stderr(writer);
        (self, reader)
    }

    /// Starts it with a standard output that the test keeps no end of.
    pub fn start_with_output(mut self, stdout: impl Into<Stdio>) -> Running {
        let mut child = self
            .0
            .stdout(stdout)
            .spawn()
            .expect("the program can be run");
        // The test's copies of what it writes to would keep a pipe open.
        drop(self);
        let stderr = child.stderr.take();
        Running {
            child,
            lines: None,
            log: stderr.map(|stderr| BufReader::new(stderr).lines()),
        }
    }

    /// Runs it to its end.
    pub async fn run(mut self) -> Outcome {
        let output = self.0.output().await.expect("the program can be run");
        let text = |bytes| String::from_utf8(bytes).expect("a program prints UTF-8");
        Outcome {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }

    /// Starts it; what it prints is read line by line.
    pub fn start(self) -> Running {
        let mut running = self.start_with_output(Stdio::piped());
        let stdout = running.child.stdout.take().expect("it is piped");
        running.lines = Some(BufReader::new(stdout).lines());
        running
    }
}

impl Outcome {
    /// What it printed, where it ended well.
    pub fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// What it said of its failure, where it failed in an orderly way.
    pub fn failure(self) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.stdout, self.stderr);
        self.stderr
    }
}

impl Running {
    /// The next line that it prints.
    pub async fn line(&mut self) -> String {
        let lines = self.lines.as_mut().expect("its output is read");
        let line = lines.next_line().await;
        line.expect("it prints UTF-8").expect("it prints a line")
    }

    /// Closes the reading end of its standard output.
    pub fn close_output(&mut self) {
        self.lines = None;
    }

    /// Closes the reading end of its standard error.
    pub fn close_log(&mut self) {
        self.log = None;
    }

    /// Waits until it logs a line with this in it.
    pub async fn logs(&mut self, what: &str) {
        let log = self.log.as_mut().expect("its log is read");
        loop {
            let line = log.next_line().await.expect("it logs UTF-8");
            if line.expect("it runs").contains(what) {
                return;
            }
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.id(), signal).expect("it runs");
    }

    /// Stops it where it is, as a debugger would; it has stopped when this returns.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let stopped = waitpid(Some(self.id()), WaitOptions::UNTRACED).expect("it is a child");
        assert!(stopped.is_some_and(|(_, status)| status.stopped()));
    }

    /// The processes that it has started and that still run.
    pub fn children(&self) -> Vec<Pid> {
        let tasks = format!("/proc/{}/task", self.id().as_raw_nonzero());
        let tasks = std::fs::read_dir(tasks).expect("it runs");
        let mut children = Vec::new();
        for task in tasks {
            let path = task.expect("a thread").path().join("children");
            // A thread may just have ended.
            let listed = std::fs::read_to_string(path).unwrap_or_default();
            let ids = listed.split_whitespace().filter_map(|id| id.parse().ok());
            children.extend(ids.filter_map(Pid::from_raw));
        }
        children.sort_by_key(|id| id.as_raw_nonzero());
        children
    }

    /// Sends a signal to a process that it has started. It may just have ended.
    pub fn signal_child(&self, child: Pid, signal: Signal) {
        let _ = kill_process(child, signal);
    }

    fn id(&self) -> Pid {
        let id = self.child.id().expect("it runs");
        let id = i32::try_from(id).ok().and_then(Pid::from_raw);
        id.expect("a process has an id")
    }

    /// Waits for its end; its exit code is left.
    pub async fn end(self) -> Option<i32> {
        self.status().await.code()
    }

    /// Waits for its end, which a signal may have brought.
    pub async fn status(mut self) -> ExitStatus {
        self.child.wait().await.expect("it ends")
    }

    /// Sends what Ctrl-C sends, and waits for its end; its exit code is left.
    pub async fn interrupt(self) -> Option<i32> {
        self.signal(Signal::INT);
        self.end().await
    }
}

/// Waits until there is no such process any more.
pub async fn gone(process: Pid) {
    // One that has ended already cannot be opened.
    if let Ok(handle) = pidfd_open(process, PidfdFlags::empty()) {
        let ended = tokio::task::spawn_blocking(move || {
            poll(&mut [PollFd::new(&handle, PollFlags::IN)], None)
        });
        let ended = ended.await.expect("it does not panic");
        assert_eq!(ended, Ok(1));
    }
}

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn words(line: &str) -> Vec<String> {
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
