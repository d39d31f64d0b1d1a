//! `survive --upstreams`: runs streams through a gateway in front of scripted engines that fail most requests. Every
//! stream is compared, byte by byte, with the story that it asked for.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::Context;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, timeout};

use super::{DRAIN_TIMEOUT, Options};
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::serve::openai::{MODEL, Script};
use crate::serve::story::{Story, StoryFaults};
use crate::serve::{self, Role, RouteOptions};
use crate::server::ServerProcess;
use crate::stream::{
    ChatMessage, CompletionRequest, Connection, Event, Format, RequestInput, Stream, StreamOptions,
    StreamOutcome, Timings,
};
use crate::{CommandResult, Verdict};

/// Time after which the gateway gives up a silent engine.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of times that the gateway sends a request that receives no token.
const TRIES: u32 = 10;
/// Number of engines, and number of those that report token ids. All of them may fall silent after a token. Only the
/// first may do so before: the gateway does not ask such an engine again for the same request.
const ENGINES: u64 = 3;
const WITH_IDS: usize = 2;
/// Model of the engines that report token ids, and model of the engine that reports none.
const IDS_MODEL: &str = "story-ids";
const NO_IDS_MODEL: &str = "story-no-ids";
const FORMATS: [Format; 4] = [Format::Grpc, Format::Ndjson, Format::Grpc, Format::Sse];
const LISTED_FAULTS: usize = 10;

/// Kind of request, which decides how the gateway can continue it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Chat,
    /// Token ids at engines that report ids.
    Ids,
    /// Token ids at an engine that reports none, and whose text differs each time: the completion cannot be continued.
    NoRung,
}

const KINDS: [Kind; 8] = [
    Kind::Text,
    Kind::Chat,
    Kind::Ids,
    Kind::Text,
    Kind::Chat,
    Kind::NoRung,
    Kind::Text,
    Kind::Chat,
];

/// Counts of all streams.
#[derive(Default)]
struct Counts {
    whole: u64,
    tokens: u64,
    /// Streams that could not be continued, and that ended with exactly one error.
    failed_rightly: u64,
    /// Streams that could not be continued, and that were refused while the engine's breaker was open.
    refused: u64,
    faults: Vec<String>,
    missed: StoryFaults,
    resumptions: u64,
    /// Streams by the method of their last resumption.
    methods: BTreeMap<String, u64>,
}

/// The request of one stream.
struct Turn {
    format: Format,
    kind: Kind,
    story: u32,
    tokens: u32,
}

/// The gateway and its engines. The processes end when this is dropped.
struct Gateway {
    process: ServerProcess,
    _engines: Vec<ServerProcess>,
}

pub(super) async fn run(options: &Options, out: &mut dyn Write) -> CommandResult {
    let seed = options.seed.unwrap_or_else(rand::random);
    let gateway = Gateway::start(options, seed).await?;
    let urls = [gateway.process.http_url()?, gateway.process.grpc_url()?];
    let counts = std::rc::Rc::new(RefCell::new(Counts::default()));
    let end = Instant::now() + Duration::from_secs(options.seconds.into());
    let tasks = LocalSet::new();
    let mut streams = JoinSet::new();
    for number in 0..options.streams {
        let (urls, counts, tokens) = (urls.clone(), counts.clone(), options.tokens);
        let stream = async move {
            let mut number = u32::from(number);
            while Instant::now() < end {
                let turn = Turn::new(number, tokens);
                if let Err(fault) = turn.run(&urls, &counts).await {
                    let Turn { kind, format, .. } = turn;
                    let fault = format!("{kind:?} over {format:?}: {fault}");
                    counts.borrow_mut().faults.push(fault);
                }
                number += 4;
            }
        };
        streams.spawn_local_on(stream, &tasks);
    }
    let limit = Duration::from_secs(options.seconds.into()) + DRAIN_TIMEOUT;
    let ended = timeout(limit, tasks.run_until(streams.join_all())).await;
    if ended.is_err() {
        let fault = "some streams did not end after the last fault";
        counts.borrow_mut().faults.push(fault.to_owned());
    }
    let counts = counts.borrow();
    counts.write(seed, out)?;
    let has_passed = counts.faults.is_empty() && counts.whole > 0 && counts.failed_rightly > 0;
    Ok(Verdict::from_report(has_passed))
}

impl Gateway {
    async fn start(options: &Options, seed: u64) -> anyhow::Result<Self> {
        let slots = usize::from(options.streams) * 2;
        let mut engines = Vec::new();
        for number in 0..ENGINES {
            let mut engine = serve::Options::new(Role::OpenAi, options.interval_ms, slots, slots);
            engine.script = Script {
                seed: Some(seed.wrapping_add(number)),
                is_silent: number == 0,
                stamps: false,
                tokens_per_chunk: 1,
            };
            engines.push(ServerProcess::start(&engine).await?);
        }
        let urls = engines
            .iter()
            .map(|engine| Ok(format!("openai+{}/v1", engine.http_url()?)));
        let urls: Vec<_> = urls.collect::<anyhow::Result<_>>()?;
        let route = |model: &str, engines: &[String], tries: u32| RouteOptions {
            model: model.to_owned(),
            engines: engines.to_vec(),
            tries,
        };
        let mut gateway = serve::Options::new(Role::Gateway, Duration::ZERO, 0, 0);
        gateway.peer_timeout = SILENCE_TIMEOUT;
        gateway.routes = vec![
            route(MODEL, &urls, TRIES),
            route(IDS_MODEL, &urls[..WITH_IDS], TRIES),
            route(NO_IDS_MODEL, &urls[WITH_IDS..], 2),
        ];
        gateway.engines = urls;
        gateway.vllm_engines = WITH_IDS;
        let process = ServerProcess::start(&gateway)
            .await
            .context("the gateway does not start")?;
        Ok(Self {
            process,
            _engines: engines,
        })
    }
}

impl Turn {
    /// Creates the request with this number. Every fourth number has the same format, and another kind.
    fn new(number: u32, tokens: u32) -> Self {
        let at = usize::try_from(number).unwrap_or(0);
        Self {
            format: FORMATS[at % 4],
            kind: KINDS[at / 4 % 8],
            story: number % 97,
            tokens,
        }
    }

    /// Runs the stream to its end, and checks it. `urls` are those of the HTTP API and of the gRPC API.
    async fn run(&self, urls: &[ServerUrl; 2], counts: &RefCell<Counts>) -> Result<(), Fault> {
        let is_grpc = self.format == Format::Grpc;
        let line = format!("Story {}", self.story);
        let messages = [ChatMessage {
            role: "user",
            content: &line,
        }];
        let (text, ids) = (format!("{line}\n"), [self.story]);
        let (input, story) = match self.kind {
            Kind::Text => (RequestInput::Text { prompt: &text }, Story::of_line(&line)),
            Kind::Chat => (
                RequestInput::Chat {
                    messages: &messages,
                },
                Story::of_line(&line),
            ),
            Kind::Ids | Kind::NoRung => (
                RequestInput::TokenIds { prompt: &ids },
                Story::of_number(self.story),
            ),
        };
        let completion = CompletionRequest {
            model: Some(self.kind.model()),
            input,
            stream_options: (!is_grpc).then_some(StreamOptions::IncludeTimings(true)),
            ..CompletionRequest::of_tokens(self.tokens)
        };
        let url = &urls[usize::from(is_grpc)];
        let mut connection = Connection::open(url, self.format.protocol()).await?;
        let mut stream = match Stream::open(&mut connection, self.format, &completion).await {
            // The engine breaks off all of these streams, which may open its breaker.
            Err(Fault::Refused(_)) if self.kind == Kind::NoRung => {
                counts.borrow_mut().refused += 1;
                return Ok(());
            }
            opened => opened?,
        };
        let (mut received, mut indices) = (String::new(), 0..);
        let outcome = stream.read_to_end(|event, _| {
            let Event::Token(token) = event else {
                return Ok(());
            };
            received.push_str(&token.text);
            match (indices.next(), token.index) {
                (due, Some(index)) if due != Some(index) => Err(Fault::unexpected(
                    format!("index {due:?}"),
                    index.to_string(),
                )),
                _ => Ok(()),
            }
        });
        let outcome = outcome.await?;
        let counts = &mut counts.borrow_mut();
        counts.tokens += u64::from(stream.token_count());
        if self.kind == Kind::NoRung
            && matches!(
                outcome,
                StreamOutcome::Failed {
                    is_clean: false,
                    ..
                }
            )
        {
            counts.failed_rightly += 1;
            return Ok(());
        }
        outcome.complete(stream.token_count())?;
        counts.record_whole(&received, &story.text(self.tokens), stream.timings())
    }
}

impl Kind {
    fn model(self) -> &'static str {
        match self {
            Self::Text | Self::Chat => MODEL,
            Self::Ids => IDS_MODEL,
            Self::NoRung => NO_IDS_MODEL,
        }
    }
}

impl Counts {
    /// Counts a stream that ended as if it were whole.
    fn record_whole(
        &mut self,
        text: &str,
        expected: &str,
        timings: Option<&Timings>,
    ) -> Result<(), Fault> {
        let missed = StoryFaults::find(text, expected);
        self.missed.add(missed);
        let timings = timings.ok_or_else(|| Fault::unexpected("timings", "none"))?;
        self.resumptions += u64::from(timings.resumptions);
        let method = timings.resumption_method.clone();
        *self
            .methods
            .entry(method.unwrap_or("none".to_owned()))
            .or_default() += 1;
        if text != expected {
            return Err(Fault::unexpected("the whole story", format!("{missed:?}")));
        }
        self.whole += 1;
        Ok(())
    }

    fn write(&self, seed: u64, out: &mut dyn Write) -> io::Result<()> {
        let StoryFaults {
            lost,
            repeated,
            wrong,
        } = self.missed;
        let methods = self
            .methods
            .iter()
            .map(|(method, count)| format!("{method} {count}"));
        writeln!(
            out,
            "seed {seed}: {} whole streams and {} that could not be continued ({} more refused), {} tokens; lost {lost}, repeated \
             {repeated}, wrong {wrong}; {} faults; {} resumptions (streams by their last method: {})",
            self.whole,
            self.failed_rightly,
            self.refused,
            self.tokens,
            self.faults.len(),
            self.resumptions,
            methods.collect::<Vec<_>>().join(", ")
        )?;
        for fault in self.faults.iter().take(LISTED_FAULTS) {
            writeln!(out, "FAULT {fault}")?;
        }
        Ok(())
    }
}
