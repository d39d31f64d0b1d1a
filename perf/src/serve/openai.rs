//! A scripted engine with OpenAI's API, which streams [stories](super::story). It writes to raw sockets, so that it is
//! fast, and so that it can break a response at any byte.

use std::borrow::Cow;
use std::future::poll_fn;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokenway::runner::monotonic_ns;
use tokenway::worker::token_channel::TokenReceiver;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::story::Story;
use crate::device::{Device, READ_BATCH};
use crate::stream::reset_on_close;
use crate::timestamps::TEXT_STAMP;

/// Name of the engine's only model.
pub(crate) const MODEL: &str = "story";
/// Start of the first line of a prompt whose completion is not paced.
pub(crate) const FULL_SPEED: &str = "At full speed";
/// Start of such a line for which the engine also counts the prompt's tokens, as every real engine does.
pub(crate) const TOKENIZED: &str = "At full speed, after the tokenizer";
/// Share of the requests that fail. One percent each fail in one of the early ways, before the response.
/// More faults than successes would open the breakers of a gateway.
const FAULTY_PERCENT: usize = 75;
const EARLY: [End; 4] = [End::Busy, End::Failed, End::Rst, End::Silence];
const LATE: [End; 5] = [
    End::Fin,
    End::Rst,
    End::InsideEvent,
    End::ErrorEvent,
    End::Silence,
];
const MOST_HEADERS: usize = 64;
/// Number of tokens that are ready at the same time at full speed.
const FULL_SPEED_BATCH: u32 = 256;

/// Behaviour of a scripted engine.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Script {
    /// Seed of the faults. `None` for an engine without faults.
    pub(crate) seed: Option<u64>,
    /// True if the engine never answers some of the requests.
    pub(crate) is_silent: bool,
    /// True if the tokens are those of the test runner, each followed by its emission time.
    pub(crate) stamps: bool,
    /// Number of tokens that share a chunk if they are ready at the same time.
    pub(crate) tokens_per_chunk: u32,
}

struct Engine {
    script: Script,
    device: Device,
    random: Mutex<StdRng>,
    /// Number of requests so far whose text differs from that of all others.
    salts: AtomicU64,
}

/// The end of a response.
#[derive(Clone, Copy, Debug)]
enum End {
    Complete,
    /// Status 429.
    Busy,
    /// Status 500.
    Failed,
    Fin,
    Rst,
    InsideEvent,
    ErrorEvent,
    Silence,
}

/// Parts of a request that the engine reads.
#[derive(Deserialize)]
struct RequestBody<'a> {
    #[serde(borrow, default)]
    prompt: Option<Prompt<'a>>,
    #[serde(default)]
    messages: Vec<Message>,
    max_tokens: u32,
    #[serde(default)]
    return_token_ids: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt<'a> {
    Text(#[serde(borrow)] Cow<'a, str>),
    Ids(Vec<u32>),
}

#[derive(Default, Deserialize)]
struct Message {
    content: String,
}

impl RequestBody<'_> {
    /// Returns the number of tokens of a prompt that the engine tokenizes, or 1.
    fn count_prompt_tokens(&self) -> usize {
        match &self.prompt {
            Some(Prompt::Text(text)) if text.starts_with(TOKENIZED) => {
                bpe_openai::cl100k_base().count(&**text)
            }
            Some(Prompt::Text(_) | Prompt::Ids(_)) | None => 1,
        }
    }
}

pub(super) async fn serve(listener: TcpListener, script: Script, device: Device) -> io::Result<()> {
    let random = StdRng::seed_from_u64(script.seed.unwrap_or_default());
    let engine = Arc::new(Engine {
        script,
        device,
        random: random.into(),
        salts: AtomicU64::default(),
    });
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        // A client that disconnects ends its own task only.
        tokio::spawn(Arc::clone(&engine).answer_requests(socket));
    }
}

impl Engine {
    async fn answer_requests(self: Arc<Self>, mut socket: TcpStream) -> io::Result<()> {
        let mut buffer = Vec::new();
        while let Some((path, body)) = read_request(&mut socket, &mut buffer).await? {
            let end = body.end;
            let is_kept = match &*path {
                "/v1/completions" | "/v1/chat/completions" => {
                    match serde_json::from_slice(&buffer[body]) {
                        Ok(body) => self.complete(&mut socket, &body).await?,
                        Err(_) => write_answer(&mut socket, "400 Bad Request", "").await?,
                    }
                }
                "/v1/models" => {
                    let models = format!(r#"{{"data":[{{"id":"{MODEL}","object":"model"}}]}}"#);
                    write_answer(&mut socket, "200 OK", &models).await?
                }
                "/health" => write_answer(&mut socket, "200 OK", "{}").await?,
                _ => write_answer(&mut socket, "404 Not Found", "{}").await?,
            };
            if !is_kept {
                break;
            }
            buffer.drain(..end);
        }
        Ok(())
    }

    /// Answers a completion. Returns true if the connection is kept.
    async fn complete(&self, socket: &mut TcpStream, body: &RequestBody<'_>) -> io::Result<bool> {
        let (tokens, end) = self.draw_end(body);
        let prompt_tokens = body.count_prompt_tokens();
        let mut telling = self.telling(body);
        let mut out = Vec::new();
        if tokens > 0 {
            socket.write_all(HEAD).await?;
            self.write_tokens(socket, &mut telling, tokens).await?;
        }
        match end {
            End::Complete => {
                let mut event = Vec::new();
                telling.push_event(&mut event, "", "\"length\"");
                push_chunk(&mut out, &event);
                let usage =
                    format!(r#"{{"prompt_tokens":{prompt_tokens},"completion_tokens":{tokens}}}"#);
                let usage =
                    format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\ndata: [DONE]\n\n");
                push_chunk(&mut out, usage.as_bytes());
                out.extend_from_slice(LAST_CHUNK);
            }
            End::Busy => return write_answer(socket, "429 Busy\r\nretry-after: 1", "").await,
            End::Failed => return write_answer(socket, "500 Failed", "").await,
            End::Fin => {}
            End::Rst => reset_on_close(&SockRef::from(&*socket)),
            End::InsideEvent => push_chunk(&mut out, b"data: {\"choices\":[{"),
            End::ErrorEvent => {
                push_chunk(&mut out, b"data: {\"error\":{\"message\":\"no\"}}\n\n");
                out.extend_from_slice(LAST_CHUNK);
            }
            // The client closes the connection.
            End::Silence => while socket.read_buf(&mut Vec::with_capacity(64)).await? > 0 {},
        }
        socket.write_all(&out).await?;
        Ok(matches!(end, End::Complete))
    }

    /// Draws the number of tokens after which a response ends, and its end. With 0 tokens, it has no head. A completion
    /// that no gateway can continue always breaks off.
    fn draw_end(&self, body: &RequestBody<'_>) -> (u32, End) {
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        let is_final = matches!(body.prompt, Some(Prompt::Ids(_))) && !body.return_token_ids;
        let percent = if is_final {
            EARLY.len()
        } else {
            random.random_range(0..100)
        };
        if self.script.seed.is_none() || percent >= FAULTY_PERCENT {
            return (body.max_tokens, End::Complete);
        }
        let (tokens, end) = match EARLY.get(percent) {
            Some(end) => (0, *end),
            None => {
                // The first token may only repeat white space. A try counts as failed until a new token arrives.
                let least = body.max_tokens.min(2);
                let tokens = random.random_range(least..=least.max(body.max_tokens / 3));
                (tokens, LATE[random.random_range(..LATE.len())])
            }
        };
        let is_allowed = self.script.is_silent || tokens > 0 || !matches!(end, End::Silence);
        (tokens, if is_allowed { end } else { End::Fin })
    }

    /// Finds the part of the story that the request has. A prompt that differs from the story gets a text that no
    /// client expects.
    fn telling(&self, body: &RequestBody<'_>) -> Telling {
        let salt = || self.salts.fetch_add(1, Ordering::Relaxed);
        let (line, part) = match (&body.prompt, &body.messages[..]) {
            (Some(Prompt::Text(text)), _) => text.split_once('\n').unwrap_or((text, "")),
            (None, [user, answer]) => (&*user.content, &*answer.content),
            (None, [user, ..]) => (&*user.content, ""),
            (Some(Prompt::Ids(_)) | None, _) => ("", ""),
        };
        let (story, position) = match &body.prompt {
            Some(Prompt::Ids(ids)) => {
                let (number, ids) = ids.split_first().unwrap_or((&0, &[]));
                let story = Story::of_number(*number);
                let story = story.salted((!body.return_token_ids).then(salt));
                (story, Story::position_of_ids(ids))
            }
            _ if self.script.stamps => (Story::of_line(line), Some((0, 0))),
            _ => (Story::of_line(line), Story::of_line(line).position(part)),
        };
        let (story, position) = match position {
            Some(position) => (story, position),
            None => (story.salted(Some(salt())), (0, 0)),
        };
        let is_paced = !line.starts_with(FULL_SPEED);
        Telling {
            story,
            position,
            is_chat: body.prompt.is_none(),
            has_ids: body.return_token_ids,
            has_stamps: self.script.stamps,
            tokens: is_paced.then(|| self.device.open_sequence(body.max_tokens, false)),
        }
    }

    async fn write_tokens(
        &self,
        socket: &mut TcpStream,
        telling: &mut Telling,
        count: u32,
    ) -> io::Result<()> {
        let (mut out, mut events) = (Vec::new(), Vec::new());
        let mut left = count;
        while left > 0 {
            let ready = telling.wait().await?.min(left);
            left -= ready;
            out.clear();
            for number in 1..=ready {
                telling.push_token(&mut events);
                if number.is_multiple_of(self.script.tokens_per_chunk) || number == ready {
                    push_chunk(&mut out, &events);
                    events.clear();
                }
            }
            socket.write_all(&out).await?;
        }
        Ok(())
    }
}

/// The tokens of one response.
struct Telling {
    story: Story,
    /// Index of the next token, and the number of its bytes that the request has already.
    position: (u32, usize),
    is_chat: bool,
    has_ids: bool,
    has_stamps: bool,
    /// Tokens of the device, which set the pace. `None` at full speed.
    tokens: Option<TokenReceiver>,
}

impl Telling {
    /// Waits until tokens are due. Returns their number.
    async fn wait(&mut self) -> io::Result<u32> {
        let Some(tokens) = &mut self.tokens else {
            return Ok(FULL_SPEED_BATCH);
        };
        let mut outputs = Vec::new();
        loop {
            if poll_fn(|cx| tokens.poll_recv_many(cx, &mut outputs, READ_BATCH)).await == 0 {
                return Err(io::Error::other("the device has no slot for the request"));
            }
            let count: usize = outputs
                .drain(..)
                .map(|it| it.completion_tokens().len())
                .sum();
            if count > 0 {
                return u32::try_from(count).map_err(io::Error::other);
            }
        }
    }

    fn push_token(&mut self, out: &mut Vec<u8>) {
        let (index, offset) = self.position;
        let text = match self.has_stamps {
            true => format!("token_{index}{TEXT_STAMP}{}", monotonic_ns()),
            false => self.story.token(index).split_off(offset),
        };
        self.push_event(out, &text, "null");
        self.position = (index.wrapping_add(1), 0);
    }

    /// Appends an event. The finish reason is JSON.
    fn push_event(&self, out: &mut Vec<u8>, text: &str, finish_reason: &str) {
        let (before, after) = match self.is_chat {
            true => ("\"delta\":{\"content\":", "}"),
            false => ("\"text\":", ""),
        };
        out.extend_from_slice(EVENT_PREFIX);
        out.extend_from_slice(before.as_bytes());
        // Writing to a vector does not fail.
        let _ = serde_json::to_writer(&mut *out, text);
        if self.has_ids && !text.is_empty() {
            let id = Story::token_id(self.position.0);
            let _ = write!(out, "{after},\"token_ids\":[{id}]");
        } else {
            out.extend_from_slice(after.as_bytes());
        }
        let _ = write!(out, ",\"finish_reason\":{finish_reason}}}]}}\n\n");
    }
}

const HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";
const EVENT_PREFIX: &[u8] = b"data: {\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\
    \"object\":\"text_completion\",\"created\":1795551613,\"model\":\"story\",\
    \"choices\":[{\"index\":0,\"logprobs\":null,";

fn push_chunk(out: &mut Vec<u8>, data: &[u8]) {
    let _ = write!(out, "{:x}\r\n", data.len());
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

/// Writes a whole response. Returns true, because the connection is kept.
async fn write_answer(socket: &mut TcpStream, status: &str, body: &str) -> io::Result<bool> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    socket.write_all((head + body).as_bytes()).await?;
    Ok(true)
}

/// Reads a request to the end of its body. Returns its path, and the range of its body in the buffer. `None` if the
/// connection has ended.
async fn read_request(
    socket: &mut TcpStream,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<(String, Range<usize>)>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut head = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(start) = head.parse(buffer).map_err(io::Error::other)? {
            let length = head
                .headers
                .iter()
                .find(|it| it.name.eq_ignore_ascii_case("content-length"));
            let length = length.and_then(|it| str::from_utf8(it.value).ok()?.parse().ok());
            let end = start + length.unwrap_or(0);
            if buffer.len() >= end {
                return Ok(Some((head.path.unwrap_or_default().to_owned(), start..end)));
            }
            buffer.reserve(end - buffer.len());
        }
        if socket.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}
