//! Fuzz targets of the HTTP API: headers and bodies of clients, and event streams of remote engines.

use std::cell::LazyCell;
use std::time::Duration;

use axum::http::header::{ACCEPT, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderValue, Uri};
use axum::response::IntoResponse;
use bytes::BytesMut;
use prost::Message;
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::accept::{StreamFormat, negotiate};
use super::completion_stream::{CompletionStream, MergedEvent, MergedStreams, finish_reason};
use super::dialect::{
    ChoiceTokens, Dialect, ParsedBody, RecordWriter, ResponseFacts, ResponseOptions, StreamEnd,
    StreamRequest,
};
use super::echoed_prompts::EchoedPrompts;
use super::error_response::ErrorResponse;
use super::fields::Fields;
use super::host::{AllowedHost, AllowedOrigin, Authority, Host, Origin};
use super::openai::{Chat, Completions, StreamOptions};
use super::origin::OriginPolicy;
use super::tokenize::body::{DetokenizeBody, TokenizeBody};
use super::unknown::UnknownFieldPolicy;
use super::{MAX_HEADERS, json as one_line};
use crate::cluster::fuzzing::checked_events;
use crate::delivery::DeliverySummary;
use crate::error::{Error, ErrorKind};
use crate::grpc::first_used_parameter;
use crate::proto::v1;
use crate::proto::v1::completion_request::Input;
use crate::proto::v1::tokenize_request::Input as TokenizeInput;
use crate::request::{MAX_CHOICES, Parameter, RequestId};

/// `Accept` headers, one per line. The default format must not decide whether a client accepts any format, and neither
/// letter case nor splitting a list into several headers may change the result.
pub(crate) fn accept(data: &[u8]) {
    let formats = [StreamFormat::Ndjson, StreamFormat::Sse];
    let results = |data: &[u8], separator| {
        let headers = headers(data, separator);
        formats.map(|default| {
            negotiate(&headers, default)
                .inspect_err(|error| assert_eq!(error.kind, ErrorKind::NotAcceptable))
                .ok()
        })
    };
    let negotiated = results(data, Some(b'\n'));
    assert_eq!(negotiated[0].is_some(), negotiated[1].is_some());
    assert_eq!(results(&data.to_ascii_uppercase(), Some(b'\n')), negotiated);
    // A quoted string may contain commas, and text that is no ASCII makes the whole header invalid.
    if data.is_ascii() && !data.contains(&b'"') && headers(data, Some(b'\n')).len() < MAX_HEADERS {
        let lines = data.split(|byte| *byte == b'\n');
        let valid: Vec<_> = lines
            .filter(|line| HeaderValue::from_bytes(line).is_ok())
            .collect();
        assert_eq!(results(&valid.join(&b','), None), negotiated);
    }
}

fn headers(data: &[u8], separator: Option<u8>) -> HeaderMap {
    let values = data.split(|byte| Some(*byte) == separator);
    let values = values.filter_map(|value| HeaderValue::from_bytes(value).ok());
    let mut headers = HeaderMap::new();
    for value in values.take(MAX_HEADERS) {
        headers.append(ACCEPT, value);
    }
    headers
}

/// A `Host`, an `Origin`, an entry of `--allowed-hosts` and one of `--cors-origins`, one per line. What parses must be
/// the same after printing and parsing, and a host that no setting names is allowed only if it cannot be an attacker's.
pub(crate) fn host(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut lines = text.split('\n');
    let mut line = || lines.next().unwrap_or_default();
    let (host, origin, allowed_host, allowed_origin) = (line(), line(), line(), line());
    let authority = Authority::parse(host);
    if let Some(authority) = &authority {
        assert_eq!(
            Authority::parse(&printed(authority)).as_ref(),
            Some(authority)
        );
        assert!(authority.is_same(authority, "http"));
        if let Ok(entry) = host.parse::<AllowedHost>() {
            assert!(entry.allows(authority), "{host} must allow itself");
        }
    }
    let parsed_origin = Origin::parse(origin);
    if let Some(parsed) = &parsed_origin {
        assert_eq!(Origin::parse(&parsed.to_string()).as_ref(), Some(parsed));
        let entry: AllowedOrigin = origin.parse().expect("every origin is a valid entry");
        assert!(entry.allows(Some(parsed)), "{origin} must allow itself");
    }
    let mut headers = HeaderMap::new();
    for (name, value) in [(HOST, host), (ORIGIN, origin)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    let uri = Uri::from_static("/v1/models");
    let default = OriginPolicy::default();
    match default.check(&uri, &headers) {
        Ok(()) if headers.contains_key(HOST) && !host.is_empty() => {
            let is_safe = authority.is_some_and(|authority| match authority.host {
                Host::Address(_) => true,
                Host::Name(name) => name == "localhost" || name.ends_with(".localhost"),
            });
            assert!(is_safe, "{host} is allowed by default");
        }
        Ok(()) => {}
        Err(error) => check_rejection(error),
    }
    let configured = OriginPolicy {
        allowed_hosts: allowed_host.parse().into_iter().collect(),
        cors_origins: allowed_origin.parse().into_iter().collect(),
    };
    if let Err(error) = configured.check(&uri, &headers) {
        check_rejection(error);
    }
}

fn printed(authority: &Authority) -> String {
    let port = authority.port.map(|port| format!(":{port}"));
    format!("{}{}", authority.host, port.unwrap_or_default())
}

/// The body of `POST /v1/completions`.
pub(crate) fn completions_body(body: &[u8]) {
    check_body::<Completions>(body);
}

/// The body of `POST /v1/chat/completions`.
pub(crate) fn chat_body(body: &[u8]) {
    check_body::<Chat>(body);
}

/// Every message of a body has a valid number of choices and survives its encoding. A body without unknown fields is
/// read the same whether those are ignored or rejected.
fn check_body<D: Dialect>(body: &[u8]) {
    let strict = parse(body, UnknownFieldPolicy::Refuse, D::parse);
    let lenient = parse(body, UnknownFieldPolicy::Ignore, D::parse);
    match (&strict, &lenient) {
        (Ok(strict), Ok(lenient)) => assert_eq!(strict.messages, lenient.messages),
        (Ok(_), Err(error)) => panic!("{error} only if unknown fields are ignored"),
        (Err(_), _) => {}
    }
    for parsed in [strict, lenient] {
        match parsed {
            Ok(parsed) => check_parsed(parsed),
            Err(error) => check_rejection(error),
        }
    }
}

fn check_parsed<O>(parsed: ParsedBody<O>) {
    let prompts = u32::try_from(parsed.messages.len()).expect("prompts are limited");
    assert!((1..=MAX_CHOICES).contains(&prompts), "{prompts} prompts");
    assert!(prompts * parsed.candidates <= MAX_CHOICES);
    for message in parsed.messages {
        let encoded = message.encode_to_vec();
        let decoded = v1::CompletionRequest::decode(&*encoded);
        assert_eq!(decoded.as_ref(), Ok(&message));
        let parameters = [&Parameter::ALL[..], &Parameter::PASSED_ON].concat();
        match first_used_parameter(&message, &parameters) {
            Ok(_) => assert!((1..=parsed.candidates).contains(&parsed.response.choices)),
            Err(error) => check_rejection(parsed.names.with_client_field_name(error)),
        }
    }
}

fn parse<T>(
    body: &[u8],
    unknown: UnknownFieldPolicy,
    read: impl FnOnce(&mut Fields) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut fields = Fields::parse(body, unknown)?;
    let parsed = read(&mut fields)?;
    let response = fields.into_ignored().add_header(().into_response());
    if unknown == UnknownFieldPolicy::Refuse {
        assert!(response.headers().is_empty(), "nothing is ignored");
    }
    Ok(parsed)
}

/// Reads bodies of `POST /tokenize` and `POST /detokenize`. A body that was read, written as JSON and read again must
/// equal the first.
pub(crate) fn tokenize_body(body: &[u8]) {
    let read = |body: &[u8]| parse(body, UnknownFieldPolicy::Refuse, TokenizeBody::parse);
    match read(body) {
        Ok(request) => assert_eq!(
            read(&one_line::to_vec(&tokenize_json(&request))),
            Ok(request)
        ),
        Err(error) => check_rejection(error),
    }
    let read = |body: &[u8]| parse(body, UnknownFieldPolicy::Refuse, DetokenizeBody::parse);
    match read(body) {
        Ok(request) => {
            let body = json!({"model": request.model, "tokens": request.token_ids});
            assert_eq!(read(&one_line::to_vec(&body)), Ok(request));
        }
        Err(error) => check_rejection(error),
    }
}

fn tokenize_json(request: &v1::TokenizeRequest) -> Value {
    let mut body = json!({"model": request.model});
    body["add_special_tokens"] = request.add_special_tokens.into();
    match request.input.as_ref().expect("a parsed body has an input") {
        TokenizeInput::Text(text) => body["prompt"] = json!(text),
        TokenizeInput::Chat(chat) => {
            let call = |call: &v1::ToolCall| {
                let function = json!({"name": call.name, "arguments": call.arguments});
                json!({"id": call.id, "type": "function", "function": function})
            };
            let text = |text: &str| {
                Some(text)
                    .filter(|text| !text.is_empty())
                    .map(str::to_owned)
            };
            let message = |message: &v1::ChatMessage| {
                let v1::ChatMessage {
                    role,
                    content,
                    name,
                    tool_calls,
                    tool_call_id,
                    reasoning_content,
                    refusal,
                } = message;
                json!({
                    "role": role, "content": content, "name": name,
                    "tool_calls": tool_calls.iter().map(call).collect::<Vec<_>>(),
                    "tool_call_id": text(tool_call_id),
                    "reasoning_content": reasoning_content,
                    "refusal": refusal,
                })
            };
            body["messages"] = chat.messages.iter().map(message).collect();
        }
    }
    body
}

/// A rejected request is the client's fault, and its response can be written.
fn check_rejection(error: Error) {
    let status = error.kind.mapping().http;
    assert!(status.is_client_error(), "{status}: {error}");
    assert!(!error.message.is_empty());
    assert_eq!(ErrorResponse::from(error).into_response().status(), status);
}

/// A JSON string of a response is one line for every reader, and its value is the text.
pub(crate) fn json_text(text: &str) {
    let line = one_line::to_vec(&text);
    let line = String::from_utf8(line).expect("JSON is UTF-8");
    assert!(!line.contains(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']));
    assert_eq!(
        serde_json::from_str::<String>(&line).ok().as_deref(),
        Some(text)
    );
}

thread_local! {
    /// Timers need a runtime.
    static RUNTIME: LazyCell<Runtime> = const {
        LazyCell::new(|| {
            let runtime = Builder::new_current_thread().enable_time().build();
            runtime.expect("a runtime without I/O can be built")
        })
    };
}

/// The events of a remote engine: two bytes of options, then length-delimited messages. Whatever the engine sends, the
/// response consists of lines with valid JSON and ends.
pub(crate) fn completion_events(data: &[u8]) {
    let Some(([request, stream], events)) = data.split_first_chunk() else {
        return;
    };
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            write_events::<Completions>(*request, *stream, events).await;
            write_events::<Chat>(*request, *stream, events).await;
        });
    });
}

async fn write_events<D>(request: u8, stream: u8, events: &[u8])
where
    D: Dialect<StreamOptions = StreamOptions>,
{
    let (prompts, choices) = (
        1 + usize::from(request & 1),
        1 + u32::from(request >> 1 & 3),
    );
    let message = v1::CompletionRequest {
        input: Some(Input::Prompt(String::new())),
        n: Some(choices),
        ..v1::CompletionRequest::default()
    };
    let mut merged = MergedStreams::new(choices);
    for _ in 0..prompts {
        merged.push(checked_events(events, &message));
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    let started = CompletionStream::wait_for_start(merged, deadline, CancellationToken::new());
    let Ok(mut events) = started.await else {
        return;
    };
    let mut writer = writer::<D>(request, choices, stream);
    let mut echo = EchoedPrompts::new(prompts, usize::try_from(choices).expect("at most 4"));
    let mut out = BytesMut::new();
    writer.write_start(&mut out, events.first_started());
    loop {
        match events.next().await {
            Ok(MergedEvent::Started(started)) => writer.write_start(&mut out, &started),
            Ok(MergedEvent::Prompt(prompt, part)) => {
                let _ = echo.add(prompt, part);
            }
            Ok(MergedEvent::Tokens(tokens)) => {
                if let Some(prompt) = echo.start_choice(tokens.choice) {
                    writer.write_prompt(&mut out, tokens.choice, &prompt);
                }
                let choice = ChoiceTokens {
                    index: tokens.choice,
                    tokens: &tokens.tokens,
                    finish_reason: finish_reason(&tokens),
                };
                writer.write_tokens(&mut out, &choice);
            }
            Ok(MergedEvent::Chat(delta)) => writer.write_chat_delta(&mut out, &delta),
            Ok(MergedEvent::Ended(usage, timings)) => {
                let delivery = DeliverySummary::default();
                let end = StreamEnd {
                    usage,
                    timings,
                    delivery,
                };
                writer.write_end(&mut out, &end);
                break;
            }
            Err(error) => {
                writer.write_error(&mut out, &error, 0);
                break;
            }
        }
    }
    let written = std::str::from_utf8(&out).expect("lines are UTF-8");
    for line in written.split('\n').filter(|line| !line.is_empty()) {
        let json = line.strip_prefix("data: ").unwrap_or(line);
        let is_json = serde_json::from_str::<Value>(json).is_ok();
        assert!(is_json || line == "data: [DONE]", "{line}");
    }
}

fn writer<D>(request: u8, choices: u32, stream: u8) -> D::Writer
where
    D: Dialect<StreamOptions = StreamOptions>,
{
    let bit = |at: u8| stream >> at & 1 == 1;
    let options = StreamOptions {
        include_usage: bit(0),
        continuous_usage_stats: bit(1),
        include_stamps: bit(2),
        include_timings: bit(3),
        return_token_ids: bit(4),
    };
    let response = ResponseOptions {
        choices,
        logprobs: (request & 0x80 != 0).then_some(1),
    };
    let stream = StreamRequest {
        format: if bit(6) {
            StreamFormat::Sse
        } else {
            StreamFormat::Ndjson
        },
        options,
        response,
    };
    let facts = ResponseFacts {
        request_id: RequestId::random(),
        created: 1,
        model: "model".to_owned(),
    };
    D::writer(stream, facts)
}
