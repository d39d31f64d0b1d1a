//! A gateway in front of real vLLM servers, over OpenAI's HTTP API and over vLLM's own gRPC API. `make test-engines`
//! installs vLLM and runs these tests; they take some minutes.

#![expect(
    clippy::print_stdout,
    reason = "`make test-engines` shows how the streams went on"
)]

mod support;

use std::net::TcpListener;
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::http::{completion, get, post};
use support::program::{llama_cpp_server, python, vllm_server};
use support::running_program::RunningProgram;
use support::{Setup, TestServer, grpc, model_path, route_with_fallbacks};
use tokenway::cluster::RoutePolicy;
use tokenway::proto::v1;
use tokio::sync::Notify;
use tokio::time::sleep;

const MODEL: &str = "SmolLM2-135M-Instruct";

/// Number of tokens of each greedy text.
const TOKENS: u32 = 24;

/// Number of streams on each API.
const STREAMS: usize = 20;

/// Longest time for a server to start.
const START_TIMEOUT: Duration = Duration::from_secs(300);

const PROMPTS: [&str; 4] = [
    "The capital of France is",
    "Once upon a time, in a village near the sea,",
    "A recipe for apple pie: first",
    "In Z\u{fc}rich there is a",
];

/// A running vLLM.
struct Vllm {
    program: RunningProgram,
    http: String,
    grpc: String,
}

impl Vllm {
    /// Starts vLLM with both APIs, and waits until it serves.
    async fn start() -> Self {
        let [http, grpc] = [free_port(), free_port()];
        let program = vllm_server(http, grpc).start();
        let address = format!("127.0.0.1:{http}");
        let ready = async {
            loop {
                let connected = tokio::net::TcpStream::connect(&address).await;
                if connected.is_ok() && get("/health").send_to(&address).await.status == 200 {
                    return;
                }
                // vLLM has no signal for its readiness.
                sleep(Duration::from_millis(200)).await;
            }
        };
        let ready = tokio::time::timeout(START_TIMEOUT, ready).await;
        ready.expect("vLLM starts within five minutes");
        Self {
            program,
            http: format!("openai+http://{address}/v1"),
            grpc: format!("vllm+grpc://127.0.0.1:{grpc}"),
        }
    }

    fn address(&self) -> &str {
        let url = self.http.strip_prefix("openai+http://");
        let url = url.and_then(|url| url.strip_suffix("/v1"));
        url.expect("the URL of vLLM")
    }
}

impl Drop for Vllm {
    fn drop(&mut self) {
        self.program.signal_group(Signal::KILL);
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").port()
}

/// Returns a policy for a slow machine: a long prompt takes its time.
fn patient() -> RoutePolicy {
    RoutePolicy {
        first_token_timeout: Duration::from_secs(120),
        stall_timeout: Duration::from_secs(30),
        max_concurrency: Some(8),
        ..RoutePolicy::default()
    }
}

/// Starts a gateway whose engines share the requests.
async fn gateway(urls: &[String]) -> TestServer {
    let mut route = route_with_fallbacks(0, patient());
    route.model = MODEL.to_owned();
    for number in 1..urls.len() {
        let mut target = route.targets[0].clone();
        target.engine = number.to_string().into();
        route.targets.push(target);
    }
    let mut setup = Setup::route(urls, route);
    // Two servers and forty streams share few cores.
    setup.parts.request_timeout = Duration::from_secs(600);
    let gateway = setup.start().await;
    gateway.ready().await.expect("an engine is up");
    gateway
}

fn greedy(prompt: &str) -> Value {
    json!({
        "model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": true,
        "stream_options": {"include_timings": true},
    })
}

/// Returns the text that vLLM itself gives.
async fn direct_text(vllm: &Vllm, prompt: &str) -> String {
    let mut body = greedy(prompt);
    body["stream"] = json!(false);
    body.as_object_mut()
        .expect("an object")
        .remove("stream_options");
    let mut response = completion(&body).send_to(vllm.address()).await;
    let body = response.read_rest().await.json();
    body["choices"][0]["text"]
        .as_str()
        .expect("a text")
        .to_owned()
}

/// Reads a greedy text over HTTP. Returns it, its number of lines with text and the methods of its resumptions.
async fn over_http(gateway: &TestServer, prompt: &str, progress: &Notify) -> (String, Vec<String>) {
    let mut response = completion(&greedy(prompt)).send(gateway).await;
    let (mut text, mut methods) = (String::new(), Vec::new());
    while let Some(line) = response.read_json_line().await {
        assert!(line.get("error").is_none(), "{line}");
        text += line["choices"][0]["text"].as_str().unwrap_or_default();
        if let Some(method) = line["timings"]["resumption_method"].as_str() {
            methods.push(method.to_owned());
        }
        progress.notify_one();
    }
    (text, methods)
}

async fn over_grpc(gateway: &TestServer, prompt: &str) -> grpc::Completion {
    let request = v1::CompletionRequest {
        model: MODEL.to_owned(),
        temperature: Some(0.0),
        ..grpc::request(prompt, TOKENS)
    };
    let seen = grpc::collect(gateway.stream(request).await).await;
    assert!(seen.error.is_none(), "{:?}", seen.error);
    seen
}

#[tokio::test]
#[ignore = "needs vLLM: make test-engines"]
async fn both_apis_of_vllm_give_its_own_texts_and_ids() {
    let vllm = Vllm::start().await;
    for url in [&vllm.http, &vllm.grpc] {
        let gateway = gateway(std::slice::from_ref(url)).await;
        for prompt in PROMPTS {
            let expected = direct_text(&vllm, prompt).await;
            let (text, _) = over_http(&gateway, prompt, &Notify::new()).await;
            assert_eq!(text, expected, "{url}: {prompt}");
            let seen = over_grpc(&gateway, prompt).await;
            assert_eq!(seen.texts(0).concat(), expected, "{url}: {prompt}");
            assert!(
                !seen.started.as_ref().expect("it starts").text_only,
                "{url}"
            );
            assert_eq!(seen.usage().completion_tokens, TOKENS, "{url}");
            assert_eq!(
                seen.token_count(0),
                24,
                "{url}: one token is one message part"
            );
        }
        println!("{url}: {} texts equal vLLM's own", PROMPTS.len());
    }
}

#[tokio::test]
#[ignore = "needs vLLM: make test-engines"]
async fn chats_and_clients_of_others_reach_vllm() {
    let vllm = Vllm::start().await;
    let gateway = gateway(std::slice::from_ref(&vllm.http)).await;
    let chat = json!({
        "model": MODEL, "max_tokens": TOKENS, "temperature": 0,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    });
    let chat = post("/v1/chat/completions", chat.to_string());
    let mut direct = chat.clone().send_to(vllm.address()).await;
    let expected = direct.read_rest().await.json();
    let (_, body) = chat.fetch(&gateway).await;
    let content = |answer: &Value| answer["choices"][0]["message"]["content"].clone();
    assert_eq!(content(&body.json()), content(&expected));
    let url = format!("{}/v1", gateway.http_url());
    let script = python("tests/clients/real_engine.py").args([&url, MODEL]);
    println!("{}", script.run().await.expect_success());
}

/// Kills the first of two servers under twenty greedy streams on each API. Every text must stay the same.
async fn kill_one(first: &Vllm, urls: &[String], expected: &[String]) {
    let gateway = gateway(urls).await;
    let progress = Notify::new();
    let numbers = || 0..STREAMS;
    let http = numbers().map(|at| over_http(&gateway, PROMPTS[at % PROMPTS.len()], &progress));
    let grpc = numbers().map(|at| over_grpc(&gateway, PROMPTS[at % PROMPTS.len()]));
    let kill = async {
        for _ in 0..40 {
            progress.notified().await;
        }
        first.program.signal_group(Signal::KILL);
    };
    let (http, grpc, ()) = tokio::join!(join_all(http), join_all(grpc), kill);
    let methods: Vec<_> = http.iter().flat_map(|(_, methods)| methods).collect();
    println!("{urls:?}: resumed over HTTP by {methods:?}");
    assert!(!methods.is_empty(), "the killed server had no stream");
    for at in numbers() {
        let expected = &expected[at % PROMPTS.len()];
        assert_eq!(&http[at].0, expected, "HTTP, stream {at}");
        assert_eq!(&grpc[at].texts(0).concat(), expected, "gRPC, stream {at}");
    }
}

#[tokio::test]
#[ignore = "needs vLLM: make test-engines"]
async fn greedy_texts_stay_the_same_when_one_of_two_vllms_is_killed() {
    for over_grpc in [false, true] {
        let (first, second) = (Vllm::start().await, Vllm::start().await);
        let mut expected = Vec::new();
        for prompt in PROMPTS {
            expected.push(direct_text(&second, prompt).await);
        }
        let urls = match over_grpc {
            false => [first.http.clone(), second.http.clone()],
            true => [first.grpc.clone(), second.grpc.clone()],
        };
        kill_one(&first, &urls, &expected).await;
    }
}

#[tokio::test]
#[ignore = "needs vLLM: make test-engines"]
async fn llama_cpp_continues_the_streams_of_a_vllm_that_is_killed() {
    let vllm = Vllm::start().await;
    let mut llama = llama_cpp_server(&model_path()).start();
    let llama_url = llama.read_line().await;
    let address = llama_url.strip_prefix("http://").expect("a URL");
    let models = get("/v1/models").send_to(address).await.read_rest().await;
    let models = models.json();
    let mut route = route_with_fallbacks(1, patient());
    route.model = MODEL.to_owned();
    route.fallback[0].model = models["data"][0]["id"].as_str().map(str::to_owned);
    let urls = [vllm.http.clone(), format!("openai+{llama_url}")];
    let gateway = Setup::route(&urls, route).start().await;
    gateway.ready().await.expect("an engine is up");
    let progress = Notify::new();
    let streams = (0..8).map(|at| over_http(&gateway, PROMPTS[at % PROMPTS.len()], &progress));
    let kill = async {
        for _ in 0..16 {
            progress.notified().await;
        }
        vllm.program.signal_group(Signal::KILL);
    };
    let (seen, ()) = tokio::join!(join_all(streams), kill);
    let methods: Vec<_> = seen.iter().flat_map(|(_, methods)| methods).collect();
    println!(
        "llama.cpp continued {} of 8 streams by {methods:?}",
        methods.len()
    );
    assert!(
        methods.iter().all(|method| *method == "text"),
        "{methods:?}"
    );
    assert!(!methods.is_empty());
    assert!(seen.iter().all(|(text, _)| !text.is_empty()));
}
