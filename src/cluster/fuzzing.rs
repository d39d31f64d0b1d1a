//! Fuzz targets of addresses in settings, of the responses of engines and of the ladder, and the source of event streams
//! for the targets of the HTTP API.

use prost::Message;

use super::address::EngineAddress;
use super::conflicts::find_conflicts;
use super::events::{CheckedEvents, UpstreamChecks};
pub(crate) use super::ladder::fuzzing::seams;
pub(crate) use super::openai::fuzzing::responses as openai_responses;
use super::spec::{ClusterSpec, EngineSpec};
pub(crate) use super::vllm::fuzzing::responses as vllm_responses;
use crate::error::Error;
use crate::listen::Address;
use crate::proto::v1;
use tonic::{Code, Status};

/// Addresses of engines, separated by commas, and on further lines addresses to listen on. An address that is accepted
/// prints as it was written, can be connected to, and equals itself.
pub(crate) fn addresses(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut lines = text.split('\n');
    let engines = lines.next().unwrap_or_default().split(',');
    let engines: ClusterSpec = engines.filter_map(|text| text.parse().ok()).collect();
    let engines = engines.engines;
    for EngineSpec {
        address: engine, ..
    } in &engines
    {
        let _ = engine.endpoint();
        assert_eq!(engine.to_string().parse().as_ref(), Ok(engine));
        let twice = [
            EngineSpec::at(engine.clone()),
            EngineSpec::at(engine.clone()),
        ];
        assert_eq!(
            find_conflicts(&twice, &[]).len(),
            1,
            "{engine} equals itself"
        );
    }
    for listen in lines.filter_map(|line| line.parse::<Address>().ok()) {
        let printed = listen.to_string();
        assert_eq!(printed.parse(), Ok(listen.clone()));
        let _ = find_conflicts(&engines, &[("grpc-listen", printed.clone())]);
        if let Address::Unix(_) = &listen
            && let Ok(engine) = printed.parse::<EngineAddress>()
        {
            let listeners = [("grpc-listen", printed.clone())];
            let own = find_conflicts(&[EngineSpec::at(engine)], &listeners);
            assert_eq!(own.len(), 1, "{printed} is the gateway itself");
        }
    }
}

/// A stream of the length-delimited messages in `events`. The first invalid one becomes a status whose details are the
/// rest of the data.
pub(crate) fn checked_events(mut events: &[u8], request: &v1::CompletionRequest) -> CheckedEvents {
    let mut items = Vec::new();
    while !events.is_empty() {
        let rest = events;
        match v1::CompletionEvent::decode_length_delimited(&mut events) {
            Ok(event) => items.push(Ok(event)),
            Err(_) => {
                let details = rest.to_vec().into();
                let status = Status::with_details(Code::InvalidArgument, "invalid", details);
                assert!(!Error::from(&status).message.is_empty());
                items.push(Err(status));
                break;
            }
        }
    }
    CheckedEvents::checked(
        Box::pin(tokio_stream::iter(items)),
        UpstreamChecks::new(request),
    )
}
