//! An OpenAI-compatible engine that answers each completion as a script says. It is a raw HTTP/1.1 server, so that it
//! can end a response at any byte.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The models that the engine lists, unless a test sets others.
const MODELS: &str =
    r#"{"object":"list","data":[{"id":"m","object":"model","created":7,"owned_by":"test"}]}"#;

/// One step of a response.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends the head of a streamed response.
    Head,
    /// Sends these bytes as one chunk.
    Chunk(String),
    /// Sends these bytes as one chunk.
    Bytes(&'static [u8]),
    /// Sends a whole response with this status, these headers and this JSON body.
    Answer(u16, &'static str, Value),
    /// Ends the body. The connection stays open.
    End,
    /// Closes the connection.
    Fin,
    /// Resets the connection.
    Rst,
    /// Waits until the gateway closes the connection.
    WaitForClose,
}

/// Returns the step that sends this object as one event.
pub fn event(data: &Value) -> Step {
    Step::Chunk(format!("data: {data}\n\n"))
}

/// Returns a completion delta of choice 0.
pub fn delta(text: &str, finish_reason: Option<&str>) -> Value {
    json!({
        "id": "cmpl-engine", "object": "text_completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "text": text, "logprobs": null, "finish_reason": finish_reason}],
    })
}

/// Returns the step that sends a chat delta of choice 0.
pub fn chat_event(delta: &Value, finish_reason: Option<&str>) -> Step {
    event(&json!({
        "id": "chatcmpl-engine", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }))
}

/// Returns the steps of a whole response with these events and this usage.
pub fn whole_with_usage(events: Vec<Step>, usage: &Value) -> Vec<Step> {
    let mut steps = vec![Step::Head];
    steps.extend(events);
    steps.push(event(&json!({"choices": [], "model": "m", "usage": usage})));
    steps.extend([Step::Chunk("data: [DONE]\n\n".to_owned()), Step::End]);
    steps
}

/// Returns the steps of a whole response with these deltas, the last of which ends with `length`.
pub fn whole(texts: &[&str]) -> Vec<Step> {
    let mut events = Vec::new();
    for (at, text) in texts.iter().enumerate() {
        let is_last = at + 1 == texts.len();
        events.push(event(&delta(text, is_last.then_some("length"))));
    }
    let usage = json!({"prompt_tokens": 3, "completion_tokens": texts.len(), "total_tokens": 9});
    whole_with_usage(events, &usage)
}

/// The words that [`story`] tells.
pub const STORY: [&str; 8] = [
    "Once",
    " upon",
    " a",
    " time",
    " a",
    " f\u{f6}x",
    " sat",
    " here.",
];

/// Returns the steps of an honest engine that knows only one text: after the prompt `hi`, and the part of the text that
/// follows it in the request, it sends the rest word by word. `max_tokens` limits the words.
pub fn story(received: &Received) -> Vec<Step> {
    let rest = rest_of_story(received);
    let mut steps = vec![Step::Head];
    for (at, word) in rest.words.iter().enumerate() {
        let is_last = at + 1 == rest.words.len();
        let reason = if rest.is_cut_short { "length" } else { "stop" };
        let reason = is_last.then_some(reason);
        steps.push(event(&match rest.is_chat {
            false => delta(word, reason),
            true => chat_delta(word, reason),
        }));
    }
    let words = rest.words.len();
    let usage = json!({"prompt_tokens": 3 + rest.known, "completion_tokens": words});
    steps.push(event(&json!({"choices": [], "model": "m", "usage": usage})));
    steps.extend([Step::Chunk("data: [DONE]\n\n".to_owned()), Step::End]);
    steps
}

/// Returns the steps of [`story`] up to this number of words, and then `end`.
pub fn story_until(received: &Received, words: usize, end: &[Step]) -> Vec<Step> {
    let mut steps = story(received);
    steps.truncate(1 + words);
    steps.extend_from_slice(end);
    steps
}

struct Rest {
    words: Vec<&'static str>,
    /// Number of words that the request contains.
    known: usize,
    is_chat: bool,
    is_cut_short: bool,
}

fn rest_of_story(received: &Received) -> Rest {
    let messages = received.body["messages"].as_array();
    let known_text = match messages.map(|messages| &messages[..]) {
        None => {
            let prompt = received.body["prompt"].as_str().expect("a text");
            prompt.strip_prefix("hi").expect("the prompt is 'hi'")
        }
        Some([_]) => "",
        Some([_, assistant]) => assistant["content"].as_str().expect("a text"),
        Some(others) => panic!("expected one or two messages: {others:?}"),
    };
    let mut known = 0;
    let mut length = 0;
    while length < known_text.len() {
        length += STORY[known].len();
        known += 1;
    }
    assert_eq!(
        STORY[..known].concat(),
        known_text,
        "the client's text is whole"
    );
    let limit = received.body["max_tokens"].as_u64().unwrap_or(u64::MAX);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let rest = &STORY[known..];
    Rest {
        words: rest[..limit.min(rest.len())].to_vec(),
        known,
        is_chat: messages.is_some(),
        is_cut_short: limit < rest.len(),
    }
}

/// Returns a chat delta of choice 0.
pub fn chat_delta(text: &str, finish_reason: Option<&str>) -> Value {
    json!({
        "id": "chat-engine", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}],
    })
}

/// A completion request that the engine received.
#[derive(Clone, Debug)]
pub struct Received {
    pub path: String,
    /// The request line and the headers.
    pub head: String,
    pub body: Value,
    /// Number of the connection, from 0.
    pub connection: usize,
    /// Time when the request had arrived.
    pub at: Instant,
}

impl Received {
    /// Returns the value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.find_map(|(known, value)| (known == name).then_some(value))
    }
}

/// An engine that runs until the test ends.
pub struct OpenAiEngine {
    address: String,
    received: Arc<Mutex<Vec<Received>>>,
    requests: watch::Receiver<usize>,
    closed: watch::Receiver<usize>,
}

/// A script: returns the steps of the response to each completion request.
type Script = Arc<dyn Fn(&Received) -> Vec<Step> + Send + Sync>;

struct Engine {
    models: String,
    props_status: u16,
    script: Script,
    received: Arc<Mutex<Vec<Received>>>,
    /// Number of completion requests so far.
    requests: watch::Sender<usize>,
    /// Number of responses during which the gateway closed the connection.
    closed: watch::Sender<usize>,
}

impl OpenAiEngine {
    /// Starts an engine that answers every completion with these steps.
    pub async fn answering(steps: Vec<Step>) -> Self {
        Self::start(move |_| steps.clone()).await
    }

    pub async fn start(script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static) -> Self {
        Self::with_models(MODELS, script).await
    }

    /// Starts an engine that lists these models.
    pub async fn with_models(
        models: &str,
        script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        Self::with_props(models, 404, script).await
    }

    /// Starts an engine that lists these models, and answers `/props`, which belongs to llama.cpp's own API, with this
    /// status.
    pub async fn with_props(
        models: &str,
        props_status: u16,
        script: impl Fn(&Received) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port is free");
        let address = listener.local_addr().expect("it is bound").to_string();
        let received = Arc::new(Mutex::new(Vec::new()));
        let (request_sender, requests) = watch::channel(0);
        let (closed_sender, closed) = watch::channel(0);
        let engine = Arc::new(Engine {
            models: models.to_owned(),
            props_status,
            script: Arc::new(script),
            received: Arc::clone(&received),
            requests: request_sender,
            closed: closed_sender,
        });
        tokio::spawn(async move {
            let mut connections = 0;
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&engine).serve(socket, connections));
                connections += 1;
            }
        });
        Self {
            address,
            received,
            requests,
            closed,
        }
    }

    /// Returns the address for `--engine`.
    pub fn url(&self) -> String {
        format!("openai+http://{}/v1", self.address)
    }

    /// Returns the completion requests so far.
    pub fn received(&self) -> Vec<Received> {
        self.received.lock().expect("no panic").clone()
    }

    /// Waits until the engine has received this many completion requests.
    pub async fn wait_for_requests(&self, count: usize) {
        wait_for_count(&self.requests, count).await;
    }

    /// Waits until the gateway has closed this many connections during a response.
    pub async fn wait_for_closed(&self, count: usize) {
        wait_for_count(&self.closed, count).await;
    }
}

async fn wait_for_count(counter: &watch::Receiver<usize>, count: usize) {
    let mut counter = counter.clone();
    let waiting = counter.wait_for(|now| *now >= count);
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    waited
        .expect("the count is reached")
        .expect("the engine runs");
}

impl Engine {
    async fn serve(self: Arc<Self>, mut socket: TcpStream, connection: usize) {
        socket.set_nodelay(true).expect("it is a socket");
        let mut buffer = Vec::new();
        while let Some((head, body)) = read_request(&mut socket, &mut buffer).await {
            let path = head.split(' ').nth(1).expect("a request line");
            if path.ends_with("/models") {
                write_answer(&mut socket, 200, "", &self.models).await;
                continue;
            }
            if path == "/props" {
                write_answer(&mut socket, self.props_status, "", "{}").await;
                continue;
            }
            let received = Received {
                path: path.to_owned(),
                head,
                body: serde_json::from_slice(&body).expect("the body is JSON"),
                connection,
                at: Instant::now(),
            };
            let steps = (self.script)(&received);
            self.received.lock().expect("no panic").push(received);
            self.requests.send_modify(|requests| *requests += 1);
            for step in steps {
                match step {
                    Step::Head => write(&mut socket, HEAD.as_bytes()).await,
                    Step::Chunk(text) => write_chunk(&mut socket, text.as_bytes()).await,
                    Step::Bytes(bytes) => write_chunk(&mut socket, bytes).await,
                    Step::Answer(status, headers, body) => {
                        write_answer(&mut socket, status, headers, &body.to_string()).await;
                    }
                    Step::End => write(&mut socket, b"0\r\n\r\n").await,
                    Step::Fin => return,
                    Step::Rst => {
                        let linger = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
                        linger.expect("it is a socket");
                        return;
                    }
                    Step::WaitForClose => {
                        let mut rest = Vec::new();
                        // A reset is an end, too.
                        let _ = socket.read_to_end(&mut rest).await;
                        assert!(
                            rest.is_empty(),
                            "the gateway sends nothing during a response"
                        );
                        self.closed.send_modify(|closed| *closed += 1);
                        return;
                    }
                }
            }
        }
    }
}

const HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

async fn write(socket: &mut TcpStream, bytes: &[u8]) {
    // The gateway may have closed the connection.
    let _ = socket.write_all(bytes).await;
}

async fn write_chunk(socket: &mut TcpStream, data: &[u8]) {
    let head = format!("{:x}\r\n", data.len());
    write(socket, &[head.as_bytes(), data, b"\r\n"].concat()).await;
}

async fn write_answer(socket: &mut TcpStream, status: u16, headers: &str, body: &str) {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} Scripted\r\ncontent-length: {length}\r\n{headers}\r\n");
    write(socket, (head + body).as_bytes()).await;
}

/// Reads a request. Returns its head and its body, or `None` if the connection has ended.
async fn read_request(socket: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    let head_end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if socket.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer[..head_end].to_vec()).expect("a head is ASCII");
    let lines = head.lines().map(str::to_ascii_lowercase);
    let mut lengths = lines.filter_map(|line| {
        let length = line.strip_prefix("content-length: ")?;
        Some(length.parse::<usize>().expect("a length"))
    });
    let end = head_end + lengths.next().unwrap_or(0);
    while buffer.len() < end {
        if socket.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    let body = buffer[head_end..end].to_vec();
    buffer.drain(..end);
    Some((head, body))
}
